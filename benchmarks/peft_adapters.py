"""Merging LoRA adapters: what PEFT's add_weighted_adapter makes, against the exact sum of products.

Usage: peft_adapters.py [--hidden N] [--rank R] [--rounds N]

The first table gives each way's distance from ``sum w_i s_i B_i A_i`` (float64), relative to its
norm, for adapters of equal rank, of different ranks, and with rsLoRA; that of ``ties`` from TIES of
the deltas. The second gives the time to read a base with an adapter on it, beside the time to read
the base alone: by the clock on all cores, and as processor time. The third holds the product of the
factors against torch's matrix product of the same shape, on one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from models import llama_config, write_model
from peft import LoraConfig
from safetensors.torch import load_file

import suture
from suture.checkpoints.open import open_model
from suture.kernels import compiled
from suture.merges.apply import checkpoint_fingerprint
from suture.stream.sweep import BLOCK, RAW, Sources, Visitor, sweep, tasks_of

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETS = {
    "two of rank 4, weights 1 and 1": ([{}, {}], [1.0, 1.0]),
    "one with itself, weights 1 and 0.2": ([{}, None], [1.0, 0.2]),
    "ranks 4 and 8": ([{}, {"r": 8}], [1.0, 1.0]),
    "two with rsLoRA": ([{"use_rslora": True}, {"use_rslora": True}], [1.0, 1.0]),
    "three, one negative": ([{}, {}, {}], [0.7, 0.5, -0.3]),
}
WAYS = ("linear", "cat", "svd", "ties")
DENSITY = 0.5


def make(base: Path, where: Path, seed: int, options: dict[str, object]) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(model, LoraConfig(**(settings | options)))  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    model.save_pretrained(where)
    return where


def exact(adapters: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """The sum of the adapters' products, in float64 from their files."""
    found: dict[str, torch.Tensor] = {}
    for folder, weight in zip(adapters, weights, strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        root = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
        factors = load_file(folder / "adapter_model.safetensors")
        for key, a in factors.items():
            if "lora_A" in key:
                name = key.removeprefix("base_model.model.").replace(".lora_A", "")
                delta = factors[key.replace("lora_A", "lora_B")].double() @ a.double()
                found[name] = found.get(name, 0) + weight * config["lora_alpha"] / root * delta
    return found


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    missing = sum(float((found[n] - d).square().sum()) for n, d in expected.items())
    return (missing / sum(float(d.square().sum()) for d in expected.values())) ** 0.5


def by_peft(base: Path, adapters: list[Path], weights: list[float], way: str) -> object:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    start = {n: t.double() for n, t in model.state_dict().items()}
    names = [f"a{n}" for n in range(len(adapters))]
    model = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    more = {"density": DENSITY} if way == "ties" else {}
    try:
        model.add_weighted_adapter(names, weights, "all", combination_type=way, **more)
        model.set_adapter("all")
        merged = model.merge_and_unload(adapter_names=["all"]).state_dict()
    except (ValueError, RuntimeError) as error:
        return f"refused: {str(error)[:48]}"
    return {n: t.double() - start[n] for n, t in merged.items()}


def by_suture(
    base: Path, adapters: list[Path], weights: list[float], out: Path,
    method: str = "task_arithmetic", **parameters: object,
) -> dict[str, torch.Tensor]:  # fmt: skip
    models = {f"m{n}": {"path": str(a), "weight": w}
              for n, (a, w) in enumerate(zip(adapters, weights, strict=True))}  # fmt: skip
    recipe = {"base": str(base), "models": models, "method": method,
              "parameters": parameters, "output": {"dtype": "float32"}}  # fmt: skip
    suture.run_recipe(recipe, out)
    found, start = suture.open(out), suture.open(base)
    return {
        n: torch.from_numpy(found[n]).double() - torch.from_numpy(start[n]).double() for n in found
    }


def by_extraction(base: Path, adapters: list[Path], weights: list[float], out: Path) -> object:
    start = suture.open(base)
    models = [open_model(a, base=start) for a in adapters]
    suture.extract_lora(start, models, out, weights=weights)
    return exact([out], [1.0]) if not json.loads((out / "adapter_config.json").read_text())[
        "rank_pattern"] else _patterned(out)  # fmt: skip


def _patterned(folder: Path) -> dict[str, torch.Tensor]:
    factors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").replace(".lora_A", ""):
            factors[key.replace("lora_A", "lora_B")].double() @ a.double()
        for key, a in factors.items() if "lora_A" in key
    }  # fmt: skip


class _Reading(Visitor[None]):
    """Looks at nothing: the time is that of reading."""


def seconds(model: suture.Checkpoint, rounds: int) -> tuple[float, float]:
    """What reading all of a model takes: by the clock, and of processor time."""
    clock, used = [], []
    for _ in range(rounds):
        begun, before = time.perf_counter(), time.process_time()
        tasks = tasks_of(list(model), model.specs)
        sweep(Sources((model,), how=RAW), tasks, _Reading())
        clock.append(time.perf_counter() - begun)
        used.append(time.process_time() - before)
    return min(clock), min(used)


def products(hidden: int, rank: int, rounds: int) -> None:
    """Processor time an entry of ``W + 2 B @ A``: ours, and torch's on one thread."""
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    wide = hidden * 11 // 4
    print(f"\nadding a product of rank {rank}, ns of processor time an entry")
    for rows, columns in ((hidden, hidden), (wide, hidden), (hidden, wide)):
        number = min(rows, BLOCK // columns)
        left, right, block = (
            draw.standard_normal(shape, np.float32)
            for shape in ((number, rank), (rank, columns), (number, columns))
        )
        a, b, c = (torch.from_numpy(x) for x in (left, right, block))
        flat, count = block.reshape(-1), block.size
        ours, theirs = [], []
        for _ in range(20 * rounds):
            begun = time.thread_time()
            compiled.add_low_rank(flat, 0, count, left, right, 2.0)
            between = time.thread_time()
            torch.addmm(c, a, b, alpha=2.0, out=c)
            theirs.append(time.thread_time() - between)
            ours.append(between - begun)
        one, other = (min(times) / count * 1e9 for times in (ours, theirs))
        print(f"{rows} x {columns}, {number} rows at once: {one:.2f}, torch {other:.2f} "
              f"({other / one:.0%} of its speed)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as place:
        where = Path(place)
        errors(where)
        reading(where, args.hidden, args.rank, args.rounds)


def errors(where: Path) -> None:
    write_model(where / "small", llama_config(128, 2, 256, 512), 0)
    base = where / "small"
    ways = ("suture merge", "suture extract-lora", *WAYS)
    print("relative error of the merged delta\n\n| adapters | " + " | ".join(ways) + " |")
    print("|---" * (len(ways) + 1) + "|")
    for number, (title, (options, weights)) in enumerate(SETS.items()):
        folders: list[Path] = []
        for seed, own in enumerate(options):
            folders.append(folders[0] if own is None
                           else make(base, where / f"{number}-{seed}", seed + 1, own))  # fmt: skip
        expected = exact(folders, weights)
        found = [by_suture(base, folders, weights, where / f"merged-{number}"),
                 by_extraction(base, folders, weights, where / f"adapter-{number}")]  # fmt: skip
        found += [by_peft(base, folders, weights, way) for way in WAYS]
        # TIES of the adapters is held against TIES of their deltas, with PEFT's conventions.
        ties = by_suture(base, folders, weights, where / f"ties-{number}", "ties", density=DENSITY,
                         scope="tensor", aggregate="mean")  # fmt: skip
        if not isinstance(found[-1], str):
            found[-1] = f"{distance(found[-1], {n: ties[n] for n in expected}):.2g}"  # type: ignore[arg-type]
        cells = [f if isinstance(f, str) else f"{distance(f, expected):.2g}" for f in found]  # type: ignore[arg-type]
        print(f"| {title} | " + " | ".join(cells) + " |")


def reading(where: Path, hidden: int, rank: int, rounds: int) -> None:
    config = llama_config(hidden, 8, hidden * 11 // 4, 8192)
    write_model(where / "large", config, 0)
    folder = make(where / "large", where / "large-adapter", 1, {"r": rank, "lora_alpha": 2 * rank})
    base = suture.open(where / "large")
    model = suture.open(f"{where / 'large'}+{folder}")
    (plain, own), (adapted, used) = seconds(base, rounds), seconds(model, rounds)
    size = sum(s.numel for s in base.specs.values())
    print(f"\nreading {size / 1e6:.0f} M parameters, bfloat16, rank {rank} on every linear module: "
          f"{plain:.3f} s ({base.nbytes / plain / 1e9:.1f} GB/s), with the adapter {adapted:.3f} s "
          f"({model.nbytes / adapted / 1e9:.1f} GB/s of float32); processor time {own:.3f} s and "
          f"{used:.3f} s, {used / size * 1e9:.2f} ns an entry")  # fmt: skip
    products(hidden, rank, rounds)
    begun = time.perf_counter()
    checkpoint_fingerprint(base)
    one = time.perf_counter() - begun
    begun = time.perf_counter()
    checkpoint_fingerprint(model)
    print(f"fingerprint of the base {one:.3f} s, with the adapter "
          f"{time.perf_counter() - begun:.3f} s")  # fmt: skip
    begun = time.perf_counter()
    merged = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(where / "large", dtype=torch.bfloat16),
        folder,
    ).merge_and_unload()
    merged.save_pretrained(where / "copy")
    print(f"PEFT's merge into a copy on disk: {time.perf_counter() - begun:.3f} s, "
          f"{np.sum([p.stat().st_size for p in (where / 'copy').iterdir()]) / 1e6:.0f} MB; "
          f"adapter {sum(p.stat().st_size for p in folder.iterdir()) / 1e6:.1f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
