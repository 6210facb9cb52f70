"""How long planning takes: `suture merge --dry-run` on the headers of very large models.

The models are sparse files: headers of 100,000 tensors and 10**12 parameters in bfloat16, and
holes where the values would be. The run is a process of its own, whose time and memory are whole:
interpreter, imports, headers of three models, every check, the plan.

    python benchmarks/plan.py [--tensors 100000] [--parameters 1e12] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

SHARD = 5 * 10**9
CHILD = """
import json, resource, shutil, sys, time
from collections import namedtuple
usage = namedtuple("usage", "total used free")
shutil.disk_usage = lambda path: usage(1 << 60, 0, 1 << 60)  # as if there were room for the output
begun = time.perf_counter()
sys.argv = ["suture", "merge", sys.argv[1], "-o", sys.argv[2], "--dry-run", "--json"]
from suture.cli import main
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": time.perf_counter() - begun,
                  "processor": used.ru_utime + used.ru_stime, "kB": used.ru_maxrss, "code": code}),
      file=sys.stderr)
"""


def shapes(tensors: int, parameters: float) -> Iterator[tuple[str, tuple[int, int]]]:
    """The names and shapes of a mixture of experts of about this size."""
    layers = 64
    experts = max(1, (tensors - 3) // layers // 3 - 3)
    each = parameters / tensors
    inner = max(1, round(math.sqrt(each / 4)))
    hidden = 4 * inner
    yield "model.embed_tokens.weight", (hidden * 2, hidden)
    yield "model.norm.weight", (1, hidden)
    yield "lm_head.weight", (hidden * 2, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for part in "qkvo":
            yield f"{at}self_attn.{part}_proj.weight", (inner, hidden)
        for expert in range(experts):
            for part in ("gate", "up"):
                yield f"{at}mlp.experts.{expert}.{part}_proj.weight", (inner, hidden)
            yield f"{at}mlp.experts.{expert}.down_proj.weight", (hidden, inner)
        yield f"{at}mlp.gate.weight", (experts, hidden)
        yield f"{at}input_layernorm.weight", (1, hidden)


def write_model(folder: Path, tensors: int, parameters: float) -> tuple[int, int]:
    """Write the headers and the holes; how many tensors and parameters there are."""
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[int, int]]] = [{}]
    room, count, total = SHARD, 0, 0
    for name, shape in shapes(tensors, parameters):
        size = 2 * math.prod(shape)
        if shards[-1] and size > room:
            shards.append({})
            room = SHARD
        shards[-1][name] = shape
        room -= size
        count, total = count + 1, total + math.prod(shape)
    where = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        end, header = 0, {}
        for name, shape in shard.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            where[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 64}))
    return count, total


RECIPES: dict[str, dict[str, Any]] = {
    "ties": {
        "base": "./base", "models": {"math": "./math", "code": "./code"}, "method": "ties"},
    "mergekit, gradients": {
        "merge_method": "ties", "base_model": "./base",
        "models": [
            {"model": f"./{name}", "parameters": {
                "weight": [0.2, 1.0], "density": [{"filter": "mlp", "value": 0.3}, {"value": 0.5}]}}
            for name in ("math", "code")]},
    "passthrough, slices": {
        "merge_method": "passthrough", "slices": [
            {"sources": [{"model": f"./{name}", "layer_range": layers}]}
            for name, layers in (("math", [0, 40]), ("code", [20, 64]))]},
}  # fmt: skip


def measured(place: Path, recipe: Mapping[str, Any]) -> dict[str, float]:
    """Seconds and kilobytes of one dry run, whole process."""
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(place / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stderr.splitlines()[-1])
    if found["code"]:
        raise SystemExit(f"the dry run failed:\n{done.stderr[-2000:]}")
    return found


def main() -> None:
    """Write the models, run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--parameters", type=float, default=1e12)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in ("base", "math", "code"):
            count, total = write_model(place / name, options.tensors, options.parameters)
        print(f"three models of {count:,} tensors and {total / 1e12:.3f} x 10^12 parameters\n")
        print(f"{'recipe':<24}{'seconds':>9}{'processor s':>13}{'MB':>8}")
        for name, recipe in RECIPES.items():
            found = measured(place, recipe)
            row = {"seconds": found["seconds"], "processor_seconds": found["processor"],
                   "megabytes": found["kB"] * 1024 / 1e6}  # fmt: skip
            rows[name] = row
            print(f"{name:<24}{row['seconds']:>9.2f}{row['processor_seconds']:>13.2f}"
                  f"{row['megabytes']:>8.0f}")  # fmt: skip
    if options.json:
        facts = {"machine": platform.platform(), "python": platform.python_version(),
                 "tensors": count, "parameters": total, "rows": rows}  # fmt: skip
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
