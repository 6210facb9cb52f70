"""``protect`` in any recipe: marked entries are one model's alone, all others the method's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import making
import suture
import toy
from suture import METHODS, Mask
from suture.errors import MismatchError, RecipeError
from suture.runs.place import MergeOptions
from suture.verbs.merge import VERB as merge
from suture.verbs.merge.explain import explain
from suture.verbs.merge.plan import make_plan

NAMES = ("ada", "bob", "cyd")


def mask_of(family: Any, where: Path, share: float = 0.3, about: Any = None) -> tuple[Path, Mask]:
    """A mask drawn over what a merge may touch, as a file."""
    draw = np.random.default_rng(3)
    entries = {n: draw.random(tuple(family.base[n].shape)) < share for n in family.names}
    mask = Mask.of({n: np.asarray(e) for n, e in entries.items()}, about)
    mask.save(where)
    return where, mask


def protected(what: dict[str, Any], **protect: Any) -> dict[str, Any]:
    return {**what, "protect": protect}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_be_protected(method: str, family: Any, tmp_path: Path) -> None:
    """Marked entries are the safety expert's; all others are those of the merge without protection."""
    models = family("f32")
    path, mask = mask_of(models, tmp_path / "mask.safetensors")
    names = {1: NAMES[:1], 2: NAMES[:2]}.get(METHODS[method].most or 3, NAMES)
    base = models.base_path if METHODS[method].needs_base else None
    what = toy.recipe(method, models.some(*names), base)

    plain, _ = toy.run(tmp_path / "plain", what)
    out, report = toy.run(tmp_path / "out", protected(what, model="ada", mask=str(path)))

    for name, tensor in plain.items():
        if name not in mask.shapes:
            assert toy.same_bytes({name: out[name]}, {name: tensor}) == []
            continue
        marked = torch.from_numpy(np.array(mask[name]))
        torch.testing.assert_close(
            out[name][marked], models.models["ada"][name][marked], rtol=1e-6, atol=1e-6
        )
        assert torch.equal(out[name][~marked], tensor[~marked])
    assert report.facts["protect"] == {
        "model": "ada", "entries": mask.count, "share": mask.count / mask.size,
    }  # fmt: skip
    assert any("which only ada writes" in line for line in report.told)


@pytest.mark.parametrize("flavour", ["bf16", "mixed"])
def test_task_arithmetic_with_protection(flavour: str, family: Any, tmp_path: Path) -> None:
    """theta_0 + s * where(E, tau_safety, the sum of all tau): the cheap variant of LED-Merging."""
    models = family(flavour)
    path, mask = mask_of(models, tmp_path / "mask.safetensors")
    what = toy.recipe("task_arithmetic", models.some(*NAMES), models.base_path, scale=0.5)

    out, _ = toy.run(tmp_path / "out", protected(what, model="bob", mask=str(path), scale=0.5))

    for name in models.names:
        base = models.base[name].double()
        tau = {m: models.models[m][name].double() - base for m in NAMES}
        marked = torch.from_numpy(np.array(mask[name]))
        wanted = base + 0.5 * torch.where(marked, tau["bob"], sum(tau.values(), torch.zeros(())))
        found, expected = out[name], wanted.to(out[name].dtype)
        if found.dtype in (torch.bfloat16, torch.float16):
            assert (toy.steps_apart(found, expected) <= 1).all()
        else:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_rule_marks_what_localize_marks(family: Any, tmp_path: Path) -> None:
    """A rule in the recipe protects the entries of the mask that the same question gives."""
    models = family("f32")
    base, tuned = suture.open(models.base_path), suture.open(models.paths["cyd"])
    tau = (tuned - base).select(exclude=["embedding", "head"])
    stats = toy.invented_stats(models.paths["cyd"])
    what = toy.recipe("ties", models.some(*NAMES), models.base_path, density=0.4)

    for rule, more in (("magnitude", {}), ("snip", {"stats": str(stats)}), ("random", {"seed": 4})):
        for scope in ("tensor", "global"):
            mask = suture.localize(tau, rule, density=0.2, scope=scope, label="cyd", **more)
            path = tmp_path / f"{rule}-{scope}.safetensors"
            mask.save(path)
            one, _ = toy.run(
                tmp_path / f"a-{rule}-{scope}", protected(what, model="cyd", mask=str(path))
            )
            two, report = toy.run(
                tmp_path / f"b-{rule}-{scope}",
                protected(what, model="cyd", rule=rule, density=0.2, scope=scope, **more),
            )
            assert toy.same_bytes(one, two) == []
            assert report.facts["protect"]["entries"] == mask.count


@pytest.mark.parametrize("rule", ["magnitude", "random"])
def test_controls_have_the_density_of_the_mask(rule: str, family: Any, tmp_path: Path) -> None:
    """Beside a mask a rule marks as many entries of every tensor: the largest changes, or any."""
    models = family("f32")
    path, mask = mask_of(models, tmp_path / "mask.safetensors")
    what = toy.recipe("linear", models.some(*NAMES), models.base_path)
    plain, _ = toy.run(tmp_path / "plain", what)

    out, report = toy.run(tmp_path / "out", protected(what, model="ada", mask=str(path), rule=rule))

    assert report.facts["protect"]["entries"] == mask.count
    for name in models.names:
        count = int(mask[name].sum())
        changed = (out[name] != plain[name]).reshape(-1)
        assert int(changed.sum()) == count
        if rule == "magnitude" and count:
            tau = (models.models["ada"][name] - models.base[name]).reshape(-1).abs()
            least = tau.topk(count).values.min()
            assert bool((tau[changed] >= least).all())


def test_blocks_and_threads_change_no_byte(family: Any, tmp_path: Path) -> None:
    """However the work is cut, the bytes are the same."""
    models = family("mixed")
    path, _ = mask_of(models, tmp_path / "mask.safetensors")
    what = toy.recipe("dare_ties", models.some(*NAMES), models.base_path, density=0.4)
    for number, protect in enumerate(
        (
            {"mask": str(path)},
            {"rule": "magnitude", "density": 0.3},
            {"rule": "random", "mask": str(path)},
        )
    ):
        recipe = protected(what, model="bob", **protect)
        one, _ = toy.run(tmp_path / f"one{number}", recipe, threads=1)
        two, _ = toy.run(tmp_path / f"two{number}", recipe, threads=3, block=8)
        assert toy.same_bytes(one, two) == []


def test_the_record_makes_it_again(family: Any, tmp_path: Path) -> None:
    """``suture.json`` names the mask from where it stands, the card says what was protected."""
    models = family("bf16")
    print_ = suture.merges.apply.checkpoint_fingerprint(suture.open(models.paths["ada"]))
    about = {"model": print_, "rule": "snip"}
    path, mask = mask_of(models, tmp_path / "m" / "mask.safetensors", about=about)
    recipe = protected(toy.recipe("task_arithmetic", models.some(*NAMES), models.base_path),
                       model="ada", mask="m/mask.safetensors")  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))

    said = making.invoke("merge", tmp_path / "r.yaml", "-o", tmp_path / "out")
    merge(tmp_path / "out" / "suture.json", tmp_path / "deep" / "again")

    assert said.code == 0, said.err
    making.lines_of(said.out, f"protected: {mask.count:,} entries", "which only ada writes")
    assert toy.same_bytes(toy.read(tmp_path / "out"), toy.read(tmp_path / "deep" / "again")) == []
    record = json.loads((tmp_path / "out" / "suture.json").read_text())
    assert record["recipe"]["protect"] == {"model": "ada", "mask": "../m/mask.safetensors"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Protected by the mask mask.safetensors" in card
    assert "are written by **ada** alone" in card
    told = explain(tmp_path / "r.yaml")
    assert told["native"]["protect"]["model"] == "ada"
    assert any("only ada writes" in note for note in told["notes"])

    other = {**recipe, "protect": {"model": "bob", "mask": str(path)}}
    with pytest.raises(MismatchError, match="bob: .* is not the model that the masks"):
        toy.run(tmp_path / "no", other)
    assert not (tmp_path / "no").exists()


def test_another_mask_is_another_merge(family: Any, tmp_path: Path) -> None:
    """What an interrupted run left is not taken over when the mask has changed since."""
    models = family("f32")
    keys = []
    for share in (0.3, 0.3, 0.6):
        path, _ = mask_of(models, tmp_path / "mask.safetensors", share)
        recipe = protected(
            toy.recipe("linear", models.some("ada", "bob")), model="ada", mask=str(path)
        )
        plan = make_plan(recipe, tmp_path / "out", MergeOptions())
        keys.append((plan.recipe.resolved(), [b.identity for b in plan.beside]))
    assert keys[0][0] == keys[2][0]
    assert keys[0][1] != keys[2][1]


def test_from_python(family: Any, tmp_path: Path) -> None:
    """``suture.merge(..., protect=...)`` is the same merge."""
    models = family("f32")
    protect = {"model": "ada", "rule": "magnitude", "density": 0.25}
    what = toy.recipe("task_arithmetic", models.some("ada", "bob"), models.base_path)
    wanted, _ = toy.run(tmp_path / "yaml", {**what, "protect": protect})
    opened = {n: suture.open(p) for n, p in models.some("ada", "bob").items()}

    suture.save(
        suture.merge(suture.open(models.base_path), opened, protect=protect), tmp_path / "py"
    )

    assert toy.same_bytes(wanted, toy.read(tmp_path / "py")) == []


@pytest.mark.parametrize(
    ("protect", "match"),
    [
        ("ada", "protect: a mapping with a model and a mask, not 'ada'"),
        ({"rule": "random", "density": 0.1}, "protect.model: missing; the name of the model"),
        (
            {"model": "adda", "rule": "random", "density": 0.1},
            "no model 'adda'; did you mean 'ada'",
        ),
        ({"model": "ada"}, "give a mask, a file of `suture localize`, or a rule"),
        ({"model": "ada", "rule": "randm", "density": 0.1}, "did you mean 'random'"),
        ({"model": "ada", "rule": "random"}, "protect.density: missing"),
        ({"model": "ada", "rule": "random", "density": 0}, r"in \(0, 1\]; got 0"),
        ({"model": "ada", "rule": "random", "density": 1.5}, r"in \(0, 1\]; got 1.5"),
        ({"model": "ada", "rule": "snip", "density": 0.1}, "protect.stats: missing; the rule snip"),
        ({"model": "ada", "rule": "learned", "density": 0.1}, "learned has a sign"),
        ({"model": "ada", "mask": "m", "density": 0.1}, "protect.density: belongs to a rule"),
        ({"model": "ada", "mask": "m", "rule": "snip"}, "beside a mask a control"),
        ({"model": "ada", "mask": "nonesuch.safetensors"}, "nonesuch.safetensors"),
        ({"model": "ada", "masks": "m"}, "unknown key 'masks'; did you mean 'mask'"),
        (
            {"model": "ada", "rule": "random", "density": 0.1, "scope": "tensr"},
            "did you mean 'tensor'",
        ),
        ({"model": "ada", "rule": "random", "density": 0.1, "seed": -1}, "protect.seed"),
    ],
)
def test_wrong_protections(protect: Any, match: str, family: Any, tmp_path: Path) -> None:
    """What a user can get wrong is told before a tensor is read."""
    models = family("f32")
    what = {**toy.recipe("linear", models.some(*NAMES), models.base_path), "protect": protect}

    with pytest.raises(suture.SutureError, match=match):
        toy.run(tmp_path / "out", what)
    assert not (tmp_path / "out").exists()


def test_protections_that_do_not_fit(family: Any, tmp_path: Path) -> None:
    """Slices, no base for a rule, a mask of other tensors, a mask of another base."""
    models = family("f32")
    what = toy.recipe("linear", models.some("ada", "bob"))
    cuts = [{"sources": {"ada": [0, 1], "bob": [0, 1]}}]
    rule = {"model": "ada", "rule": "random", "density": 0.1}
    with pytest.raises(RecipeError, match="slices: protect marks entries of whole models"):
        toy.run(tmp_path / "out", {**what, "slices": cuts, "protect": {**rule}})
    with pytest.raises(RecipeError, match="works on the change to a base; name a base"):
        toy.run(tmp_path / "out", {**what, "protect": rule})
    Mask.of({"other": np.ones(3, bool)}).save(tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match="a mask of another model"):
        toy.run(
            tmp_path / "out",
            {**what, "protect": {"model": "ada", "mask": str(tmp_path / "other.safetensors")}},
        )
    path, _ = mask_of(models, tmp_path / "mask.safetensors", about={"base": "0"})
    based = toy.recipe("linear", models.some("ada", "bob"), models.base_path)
    with pytest.raises(MismatchError, match="base: .* is not the model that the masks"):
        toy.run(tmp_path / "out", {**based, "protect": {"model": "ada", "mask": str(path)}})
    space = {"include": ["mlp.up"]}
    with pytest.raises(MismatchError, match="which the space of this recipe leaves out"):
        toy.run(
            tmp_path / "out",
            {**based, "space": space, "protect": {"model": "ada", "mask": str(path)}},
        )
