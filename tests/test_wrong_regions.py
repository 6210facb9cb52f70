"""What users get wrong about regions, patches and analyses: a clear error, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import making
import tiny_model
from suture import Mask
from suture.training.models import Head, load_encoder, save_head, save_model

ENTRY = {"data": "rows.jsonl", "head": "head.safetensors", "max_length": 16}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data, masks, statistics and a patch; and some of each that are broken."""
    where = tiny_model.workshop(tmp_path_factory.mktemp("made"))
    recipe(
        where, "ok.yaml", {"rule": "snip", "density": 0.1, "tasks": {"one": ENTRY, "two": ENTRY}}
    )
    assert making.invoke("localize", where / "ok.yaml", "-o", where / "masks").code == 0
    for name in ("one", "two"):
        said = making.invoke("patch", "make", where / "base", where / name, "--density", "0.02", "-o",
                             where / f"{name}.patch.safetensors")  # fmt: skip
        assert said.code == 0, said.err
    tensors = {n: t[:1].clone() for n, t in load_file(where / "base" / "model.safetensors").items()}
    for name in ("other-base", "other"):
        shutil.copytree(where / "base", where / name)
        save_file({n: t + (name == "other") for n, t in tensors.items()},
                  where / name / "model.safetensors", {"format": "pt"})  # fmt: skip
    Mask.of({n: np.ones(tuple(t.shape), bool) for n, t in tensors.items()}).save(where / "foreign" / "one.safetensors")  # fmt: skip
    shutil.copy(where / "foreign" / "one.safetensors", where / "foreign" / "two.safetensors")
    (where / "empty.jsonl").write_text("\n")
    (where / "bare.jsonl").write_text('{"text": "red sun"}\n')
    (where / "null.jsonl").write_text('{"text": "red sun", "label": null}\n')
    (where / "blank.jsonl").write_text('{"text": "  ", "label": "sky"}\n')
    (where / "odd.jsonl").write_text('{"text": "red sun", "label": "sea"}\n')
    (where / "broken.jsonl").write_text('{"text": \n')
    weight = torch.full((2, 16), float("nan"))
    save_head(Head(("colour", "sky"), weight, torch.zeros(2)), where / "nan-head.safetensors")
    loaded = load_encoder(where / "one", dtype=torch.float32)
    with torch.no_grad():
        loaded.model.backbone.encoder.layer[0].attention.self.query.weight[0, 0] = float("nan")  # type: ignore[union-attr, index]
    save_model(loaded.model, loaded.tokenizer, where / "nan")
    return where


def recipe(where: Path, name: str, more: Mapping[str, Any]) -> Path:
    what = {"base": "base", "models": {"one": "one", "two": "two"}, **more}
    (where / name).write_text(yaml.safe_dump({k: v for k, v in what.items() if v is not None}))
    return where / name


def with_data(**change: Any) -> dict[str, Any]:
    return {"one": {**ENTRY, **change}, "two": ENTRY}


@dataclass(frozen=True)
class Case:
    """A command, the recipe it follows, and what its error says."""

    command: str
    recipe: Mapping[str, Any]
    says: tuple[str, ...]


STITCH = {"method": "stitch"}
DATA = {
    "no rows": ("empty.jsonl", "holds no rows"), "no column of labels": ("bare.jsonl", "no column 'label'"),
    "a label that is null": ("null.jsonl", "line 1: no column 'label'"),
    "a label the head lacks": ("odd.jsonl", "the head has no label 'sea'"),
    "a text without tokens": ("blank.jsonl", "has no tokens"), "no JSON": ("broken.jsonl", "line 1: not JSON"),
    "no file": ("nowhere.jsonl", "nowhere.jsonl: cannot be read"),
}  # fmt: skip
CASES = {
    "localize at density 0": Case("localize", {"density": 0}, ("in (0, 1], not 0",)),
    "localize at density 2": Case("localize", {"density": 2}, ("in (0, 1], not 2",)),
    "localize without density": Case("localize", {}, ("density: missing",)),
    "analyze at density 0": Case("analyze", {"density": 0}, ("in (0, 1], not 0",)),
    "stitch at density 0": Case("merge", {**STITCH, "parameters": {"density": 0}}, ("(0, 1]", "0")),
    "analyze masks of another model": Case("analyze", {"masks": "foreign"}, ("mask of another model",)),
    "stitch masks of another model": Case(
        "merge", {**STITCH, "parameters": {"masks": "foreign"}}, ("a mask of another", "foreign/one")),
    "stitch a mask that is another's": Case(
        "merge", {**STITCH, "models": {"one": "two"}, "parameters": {"masks": {"one": "masks/one.safetensors"}}},
        ("not the model that the masks",)),
    "a model as a mask": Case(
        "merge", {**STITCH, "models": {"one": "one"},
                  "parameters": {"masks": {"one": "one/model.safetensors"}}}, ("not a mask",)),
    "a mask of no model": Case("merge", {**STITCH, "parameters": {"masks": {"one": "masks/one.safetensors"}}},
                               ("two",)),
    "statistics of another model": Case(
        "localize", {"rule": "snip", "density": 0.1, "models": {"two": "two"},
                     "stats": {"two": "masks/stats/one.safetensors"}}, ("measured on another model than two",)),
    "statistics of another kind": Case(
        "localize", {"rule": "fisher", "density": 0.1,
                     "stats": {m: f"masks/stats/{m}.safetensors" for m in ("one", "two")}},
        ("holds no 'fisher' statistics",)),
    "models of another shape": Case("localize", {"density": 0.1, "base": "other-base"}, ("one against other-base",)),
    "an expert with NaN": Case("localize", {"density": 0.1, "models": {"one": "nan"}}, ("NaN",)),
    "a patch of another base": Case("localize", {"density": 0.1, "base": "two",
                                                 "models": {"one": "one.patch.safetensors"}}, ("a patch fits its own base only",)),
    **{
        f"{command} {rule} with {kind}": Case(
            command, {**how, "tasks": with_data(data=file)}, (says,))
        for kind, (file, says) in DATA.items()
        for command, rule, how in (
            ("localize", "snip", {"rule": "snip", "density": 0.1}),
            ("localize", "learned", {"rule": "learned", "density": 0.1, "learn": {"epochs": 1}}),
            ("analyze", "diagnostics", {"analyses": ["diagnostics"]}),
        )
    },
    **{
        f"{command} {rule} with a loss that is NaN": Case(
            command, {**how, "tasks": with_data(head="nan-head.safetensors")}, (says, "one"))
        for command, rule, how, says in (
            ("localize", "snip", {"rule": "snip", "density": 0.1}, "loss of a row is nan"),
            ("localize", "fisher", {"rule": "fisher", "density": 0.1}, "loss of a row is nan"),
            ("localize", "wanda", {"rule": "wanda", "density": 0.1}, "loss of a row is nan"),
            ("localize", "learned", {"rule": "learned", "density": 0.1}, "nan while masks are learned"),
            ("analyze", "diagnostics", {"analyses": ["diagnostics"]}, "mean loss is nan"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_recipe_writes_nothing(name: str, made: Path) -> None:
    """Exit code 2, a sentence that names the fault, and a folder that is as it was."""
    case = CASES[name]
    where = recipe(made, "wrong.yaml", case.recipe)
    before = making.tree(made)

    said = making.invoke(case.command, where, "-o", made / "out")

    assert said.code == 2, said.out
    making.lines_of(said.err, "error: ", *case.says)
    assert making.tree(made) == before


COMMANDS: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "a patch at density 0": (
        lambda w: ["patch", "make", w / "base", w / "one", "--density", "0", "-o", w / "x.patch.safetensors"],
        "in (0, 1]; got 0"),
    "a patch by a mask of another model": (
        lambda w: ["patch", "make", w / "base", w / "one", "--mask", w / "foreign/one.safetensors", "-o",
                   w / "x.patch.safetensors"], "mask"),
    "a patch by a mask and a density": (
        lambda w: ["patch", "make", w / "base", w / "one", "--mask", w / "masks/one.safetensors", "--density",
                   "0.1", "-o", w / "x.patch.safetensors"], "not both"),
    "a patch by no mask": (
        lambda w: ["patch", "make", w / "base", w / "one", "--mask", w / "one/model.safetensors", "-o",
                   w / "x.patch.safetensors"], "not a mask"),
    "a patch of the same model": (
        lambda w: ["patch", "make", w / "base", w / "base", "-o", w / "x.patch.safetensors"], "no entry differs"),
    "a patch on another base": (
        lambda w: ["patch", "apply", w / "two", w / "one.patch.safetensors", "-o", w / "out"], "was made on"),
    "patches that overlap": (
        lambda w: ["patch", "apply", w / "base", w / "one.patch.safetensors", w / "one.patch.safetensors", "-o",
                   w / "out"], "overlap"),
    "a patch taken off where it is not": (
        lambda w: ["patch", "revert", w / "base", w / "one.patch.safetensors", "-o", w / "out"], "patch"),
    "a mask as a patch": (
        lambda w: ["patch", "apply", w / "base", w / "masks/one.safetensors", "-o", w / "out"], "not a patch"),
    "a report of nothing": (
        lambda w: ["report", w / "base", "-o", w / "page.html"], "nothing to show"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_writes_nothing(name: str, made: Path) -> None:
    """The same for commands without a recipe."""
    command, says = COMMANDS[name]
    before = making.tree(made)

    said = making.invoke(*command(made))

    assert said.code == 2, said.out
    making.lines_of(said.err, "error: ", says)
    assert making.tree(made) == before


def test_a_damaged_patch_is_never_put_on(made: Path, tmp_path: Path) -> None:
    """One byte flipped in every region of the file (length, header, metadata, each tensor's parts):
    apply, revert and show refuse it, and a model is only read."""
    whole = (made / "one.patch.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    places = {0, 3, 7, 8, 8 + size // 3, 8 + size // 2, 8 + size - 1}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            places |= {8 + size + start, 8 + size + (start + end) // 2, 8 + size + end - 1}
    assert len(places) > 30
    path = tmp_path / "p.patch.safetensors"
    before = making.tree(made)
    for number, place in enumerate(sorted(p for p in places if p < len(whole))):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        command: list[object] = ["apply", made / "base", path, "-o", tmp_path / "out"]
        if number % 5 == 1:
            command = ["revert", made / "base", path, "-o", tmp_path / "out"]
        if number % 5 == 2:
            command = ["show", path]
        said = making.invoke("patch", *command)
        assert said.code == 2, f"byte {place} of {len(whole)}: {said.out}"
        making.lines_of(said.err, "error: ", "p.patch.safetensors")
        assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]
    assert making.tree(made) == before


@pytest.mark.parametrize("kind", ["masks/one.safetensors", "masks/stats/one.safetensors"])
def test_a_damaged_header_is_an_error_and_no_crash(kind: str, made: Path, tmp_path: Path) -> None:
    """A flipped byte in the header of a mask or of statistics: they are refused, or still say the
    same things about their tensors; no traceback either way."""
    whole = (made / kind).read_bytes()
    size = int.from_bytes(whole[:8], "little")
    before = making.tree(made)
    refused = 0
    for place in [*range(8), *range(8, 8 + size, max(1, size // 40))]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x04
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(damaged)
        if "stats" in kind:
            what: dict[str, Any] = {"rule": "snip", "density": 0.1, "stats": {"one": str(path)}}
            command = "localize"
        else:
            what = {**STITCH, "parameters": {"masks": {"one": str(path)}}}
            command = "merge"
        where = tmp_path / "r.yaml"
        where.write_text(
            yaml.safe_dump(
                {"base": str(made / "base"), "models": {"one": str(made / "one")}, **what}
            )
        )
        said = making.invoke(command, where, "-o", tmp_path / "out")
        assert said.code in (0, 2)
        if said.code == 2:
            refused += 1
            assert not (tmp_path / "out").exists()
        else:
            shutil.rmtree(tmp_path / "out")
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert refused > 20
    assert making.tree(made) == before
