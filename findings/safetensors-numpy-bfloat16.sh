#!/usr/bin/env bash
# safetensors 0.8.0 with numpy 2.4.6: whether a file of bfloat16 can be read as numpy arrays depends on
# whether another package was imported before; 8-bit floats of the same package cannot be read either way.
#
# Guess, written before the run: `safetensors.numpy.load_file` refuses what numpy lacks, the same always.
# Seen: without `ml_dtypes` a TypeError ("data type 'bfloat16' not understood"); after `import ml_dtypes`
# the same call on the same file works. For float8_e4m3fn there is an AttributeError both times.
# Whom it concerns: who edits checkpoints without torch: a test that imports jax or ml_dtypes passes, and
# the script without it fails.
# What Suture does: it reads bytes and widens bfloat16 and 8-bit floats itself; it needs neither package.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -qq --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.5.4
cat > "$place/write.py" <<'PY'
import json, struct, sys

for dtype, size, name in (("BF16", 4, "bf16"), ("F8_E4M3", 2, "f8")):
    header = json.dumps({"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}}).encode()
    with open(f"{sys.argv[1]}/{name}.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + bytes(size))
PY
cat > "$place/read.py" <<'PY'
import importlib, sys

if sys.argv[2:]:
    importlib.import_module(sys.argv[2])
from safetensors.numpy import load_file

for name in ("bf16", "f8"):
    try:
        print(name, load_file(f"{sys.argv[1]}/{name}.safetensors")["a"].dtype)
    except Exception as error:
        print(name, type(error).__name__)
PY
"$place/venv/bin/python" "$place/write.py" "$place"
without=$("$place/venv/bin/python" "$place/read.py" "$place")
with=$("$place/venv/bin/python" "$place/read.py" "$place" ml_dtypes)
printf 'without ml_dtypes:\n%s\nwith it:\n%s\n' "$without" "$with"
[ "$without" = $'bf16 TypeError\nf8 AttributeError' ]
[ "$with" = $'bf16 bfloat16\nf8 AttributeError' ]
