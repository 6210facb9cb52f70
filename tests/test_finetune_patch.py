"""What is trained as a patch, and what is patched as a mask to train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import suture
import tiny_model
from suture.edits.mask import Mask
from suture.edits.patch import Patch
from suture.errors import MismatchError
from suture.merges.apply import checkpoint_fingerprint
from suture.training.strategies import STRATEGIES
from suture.verbs.finetune import VERB as finetune
from test_finetune import EXAMPLES, TRAINING, command, problems_of, recipe, shop, talker

__all__ = ["shop", "talker"]


def print_of(folder: Path) -> str:
    return checkpoint_fingerprint(suture.open(folder))


@pytest.mark.parametrize("name", [n for n in EXAMPLES if n != "linearized"])
def test_a_patch_is_the_tuned_model(name: str, shop: Path, tmp_path: Path) -> None:
    """Applied it gives the bytes of the model that the same recipe writes whole; a sparse one has
    only entries of the mask."""
    what = recipe(shop, name, training={**TRAINING, "epochs": 1})
    whole = finetune(what, tmp_path / "whole")
    part = finetune({**what, "output": {"form": "patch"}}, tmp_path / "patch")
    assert part.fingerprint == whole.fingerprint
    patch = Patch.load(tmp_path / "patch" / "tuned.patch.safetensors")
    assert patch.result == whole.fingerprint
    suture.apply_patches(suture.open(shop / "base"), [patch], tmp_path / "made")
    assert print_of(tmp_path / "made") == whole.fingerprint
    if STRATEGIES[name].sparse:
        mask, support = Mask.load(tmp_path / "whole" / "mask.safetensors"), patch.mask()
        for tensor in support.shapes:
            assert not (support[tensor] & ~mask[tensor]).any(), tensor


def test_the_commands_lead_there_and_back(shop: Path, tmp_path: Path) -> None:
    """finetune, patch apply, patch revert: the tuned bytes, and the base's again; the folder has
    what the patch needs and nothing of the base's."""
    what = recipe(shop, "talos", output={"form": "patch"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(what))
    done = command("finetune", "recipe.yaml", "-o", "tuned", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    held = {p.name for p in (tmp_path / "tuned").iterdir()}
    names = {"tuned.patch.safetensors", "mask.safetensors", "head.safetensors"}
    assert held == names | {"suture.json", "README.md"}
    assert "suture patch apply" in (tmp_path / "tuned" / "README.md").read_text()

    file = "tuned/tuned.patch.safetensors"
    made = command("patch", "apply", str(shop / "base"), file, "-o", "made", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert print_of(tmp_path / "made") == json.loads(done.stdout)["fingerprint"]
    back = command("patch", "revert", "made", file, "-o", "back", cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    assert print_of(tmp_path / "back") == print_of(shop / "base")


def test_both_forms_stand_side_by_side_and_packed_tensors_too(talker: Path, tmp_path: Path) -> None:
    """A language model with packed projections: the patch leads from its base to its folder."""
    what = {
        "base": str(talker / "base"), "strategy": "talos", "parameters": EXAMPLES["talos"],
        "data": {"train": str(talker / "pairs.jsonl"), "validation": 0.3},
        "training": {"lr": 1e-2}, "output": {"form": "both"},
    }  # fmt: skip
    finetune(what, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    patch = Patch.load(tmp_path / "out" / "tuned.patch.safetensors")
    assert patch.base == print_of(talker / "base")
    assert patch.result == print_of(tmp_path / "out")


def test_the_entries_of_a_patch_are_trained(shop: Path, tmp_path: Path) -> None:
    """A patch as the mask: exactly its support is chosen; that of another base is refused."""
    finetune(recipe(shop, "talos", output={"form": "patch"}), tmp_path / "one")
    file = tmp_path / "one" / "tuned.patch.safetensors"
    (tmp_path / "again.yaml").write_text(
        yaml.safe_dump(recipe(shop, "masked", parameters={"mask": str(file)}))
    )
    done = command("finetune", "again.yaml", "-o", "again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    support, mask = Patch.load(file).mask(), Mask.load(tmp_path / "again" / "mask.safetensors")
    assert mask.count == support.count
    for tensor in support.shapes:
        assert (mask[tensor] == support[tensor]).all()

    tiny_model.folder(tmp_path / "other", seed=5)
    other = {
        **recipe(shop, "masked", parameters={"mask": str(file)}), "base": str(tmp_path / "other")
    }  # fmt: skip
    with pytest.raises(MismatchError, match="another base"):
        finetune(other, tmp_path / "x")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"strategy": "linearized", "output": {"form": "patch"}}, "no patch of its base"),
        ({"output": {"form": "both", "dtype": "bfloat16"}}, "dtypes of its base"),
        ({"output": {"form": "ptach"}}, "did you mean 'patch'"),
    ],
)
def test_what_cannot_be_a_patch_is_told(
    more: dict[str, Any], words: str, shop: Path, tmp_path: Path
) -> None:
    """A linearized model, another dtype, a form that is none."""
    assert any(words in text for text in problems_of({**recipe(shop), **more}, tmp_path / "x"))
