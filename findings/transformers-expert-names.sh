#!/usr/bin/env bash
# transformers 5.23.0: of a mixture of experts, `state_dict()` and the files of `save_pretrained` have other
# names and other shapes.
#
# Guess, written before the run: both have the same names, so that what is computed for one can be looked
# up in the other.
# Seen: for Mixtral no name of an expert or of the router is in both. In memory the experts of a layer are
# one tensor (`mlp.experts.gate_up_proj`), in the file three for each expert (`block_sparse_moe.experts.0.w1`);
# a layer of eight experts has 24 tensors there and 2 in memory. Loading folds them again.
# Whom it concerns: who merges state dicts and files, or keeps masks and statistics by name.
# What Suture does: modules are read under the names that their tensors have in files, so that masks,
# patches and recipes fit both (docs/api.md, Models).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 "$place/venv/bin/python" - "$place" <<'PY'
import sys

from safetensors import safe_open
from transformers import MixtralConfig, MixtralForCausalLM

model = MixtralForCausalLM(MixtralConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=8,
))
model.save_pretrained(f"{sys.argv[1]}/model")
with safe_open(f"{sys.argv[1]}/model/model.safetensors", "pt") as file:
    written = set(file.keys())
held = set(model.state_dict())
print("only in memory", sorted(held - written))
print("only in the file", len(written - held), "tensors, such as", sorted(written - held)[0])
assert sorted(held - written) == [
    "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.mlp.gate.weight",
]
assert len(written - held) == 8 * 3 + 1
PY
