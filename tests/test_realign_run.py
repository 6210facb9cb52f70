"""From a recipe to a realigned folder: every method, resume after a kill, wrong input, the command."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

import adapting
import refusing
import suture
from making import invoke
from suture.edits.mask import Mask, localize
from suture.edits.stats import Stats
from suture.errors import (
    CheckpointError,
    MismatchError,
    NonFiniteError,
    OutputError,
    Problems,
    RecipeError,
    SutureError,
)
from suture.merges.apply import checkpoint_fingerprint
from suture.runs.progress import Progress
from suture.training.models import load_language_model
from suture.verbs.merge import VERB as merge
from suture.verbs.realign import VERB as realign
from suture.verbs.realign import somf
from suture.verbs.realign.base import RealignJob
from suture.verbs.realign.fusing import FUSES
from suture.verbs.realign.methods import REALIGNERS
from suture.verbs.realign.pairs import answers_of, margins
from suture.verbs.realign.plan import make_plan as plan_realign
from suture.verbs.realign.recipe import Realign
from suture.verbs.realign.recipe import read_realign as parse
from suture.verbs.realign.result import curve_of, lines

EXAMPLES: dict[str, dict[str, Any]] = {
    "somf": {},
    "resta": {"gamma": 0.5, "density": 0.7},
    "safelora": {"threshold": 1.0, "normalise": True},
    "safemerge": {"threshold": 1.0},
    "dare": {"density": 0.7},
    "random": {"density": 0.5},
    "magnitude": {"density": 0.5},
    "protect": {"density": 0.3},
    "line-search": {"points": 9, "retain": 0.5},
}
"""Parameters with which each method runs on the tiny family."""
TRAINING = {"epochs": 2, "batch": 8, "accumulate": 1, "lr": 0.1, "save_every": 3}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family; nobody may change it."""
    return refusing.family(tmp_path_factory.mktemp("refusing"))


def recipe(shop: Path, method: str = "somf", **sections: Any) -> dict[str, Any]:
    return {
        "method": method,
        "base": str(shop / "start"),
        "aligned": str(shop / "aligned"),
        "models": {"tuned": str(shop / "tuned")},
        "parameters": EXAMPLES[method],
        "data": {"train": str(shop / "pairs.jsonl"), "validation": 0.3},
        "training": TRAINING,
        **({"safety": str(shop / "other")} if method == "safemerge" else {}),
        **sections,
    }


def dataless(shop: Path, method: str, **parameters: Any) -> dict[str, Any]:
    found = recipe(shop, method, parameters=parameters)
    return {k: v for k, v in found.items() if k not in ("data", "training")}


def read_realign(what: dict[str, Any], folder: Path | None = None) -> Realign:
    """Read a recipe that must be right."""
    problems = Problems()
    found = parse(what, problems, folder)
    problems.raise_if_any()
    assert found is not None
    return found


def tensors(where: Path) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = load_file(where / "model.safetensors")
    return found


def test_every_method_has_an_example() -> None:
    """The table and the tests agree; each line says what it is and what its parameters mean."""
    assert set(EXAMPLES) == set(REALIGNERS)
    for line in REALIGNERS.values():
        assert line.paper
        assert line.equation
        assert all(p.doc for p in line.parameters.values())


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_every_method_goes_from_a_recipe_to_a_folder(name: str, shop: Path, tmp_path: Path) -> None:
    """The folder loads, differs from both models, says what was done, and the same recipe gives
    the same bytes."""
    what = recipe(shop, name, utility={"rows": str(shop / "utility.jsonl")})
    told: list[str] = []
    report = realign(what, tmp_path / "out", progress=Progress(say=told.append))
    looks = [
        line.partition(":")[0] for line in told if ": margin " in line and ", utility " in line
    ]
    assert [name for name in looks if not name.startswith("c =")] == list(report.scores)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    load_language_model(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "suture.json").read_text())
    assert record["kind"] == "realign"
    assert record["recipe"]["method"] == name
    assert record["output"]["fingerprint"] == report.fingerprint
    assert set(report.scores) == {"aligned", "tuned", "realigned"}
    assert set(report.scores["realigned"]) == {"margin", "preferred", "utility"}
    new = tensors(tmp_path / "out")
    for other in ("aligned", "tuned"):
        assert any(not np.array_equal(v, new[n]) for n, v in tensors(shop / other).items())
    again = realign(what, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    assert again.scores == report.scores
    # and from the record alone, wherever the rows are
    card = (tmp_path / "out" / "README.md").read_text()
    assert REALIGNERS[name].title in card


def test_the_given_models_are_asked_once_for_all_methods(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second method has the very numbers of a run that asked; what may change a bit asks anew:
    batch, rows, fuse, weights under the same path; so does a damaged cache, and one without room."""
    asked: list[str] = []
    ask = RealignJob.scores

    def counted(job: RealignJob, pairs: Any, utility: Any) -> Any:
        asked.append(job.device)
        return ask(job, pairs, utility)

    def asks(method: str, cache: str = "cache", **sections: Any) -> tuple[int, Any]:
        asked.clear()
        monkeypatch.setenv("SUTURE_CACHE", str(tmp_path / cache))
        what = recipe(shop, method, utility={"rows": str(shop / "utility.jsonl")}, **sections)
        report = realign(what, tmp_path / "out", overwrite=True)
        return len(asked), report.scores

    monkeypatch.setattr(RealignJob, "scores", counted)
    assert asks("magnitude")[0] == 3
    known, scores = asks("random")
    assert (known, asks("random", "other")) == (1, (3, scores))
    assert asks("random", training={**TRAINING, "batch": 5})[0] == 3
    assert asks("random", data={"train": str(shop / "pairs.jsonl"), "validation": 0.5})[0] == 3
    assert asks("random", fuse={"how": "single", "coefficient": 0.5})[0] == 2

    models = {"tuned": str(tmp_path / "copy")}
    shutil.copytree(shop / "tuned", tmp_path / "copy")
    assert asks("random", models=models) == (1, scores)
    file = tmp_path / "copy" / "model.safetensors"
    found = tensors(tmp_path / "copy")
    save_file({n: v + (0.1 if n.endswith("q_proj.weight") else 0) for n, v in found.items()}, file)
    assert asks("random", models=models)[0] == 2

    for path in (tmp_path / "cache" / "scores").iterdir():
        path.write_text(path.read_text().replace('"n": ', '"n": 1'))
    assert asks("random") == (3, scores)
    (tmp_path / "file").write_text("")
    assert asks("random", "file/below") == (3, scores)


@pytest.mark.parametrize("name", ["somf", "random", "protect"])
def test_the_record_tells_where_the_tuned_change_may_stay(
    name: str, shop: Path, tmp_path: Path
) -> None:
    """The profile's mean over entries is the mask's own; every loss is in the curve."""
    report = realign(recipe(shop, name), tmp_path / "out")
    results = json.loads((tmp_path / "out" / "suture.json").read_text())["results"]
    profile = results["profile"]

    assert {p["layer"] for p in profile} == {None, 0, 1}
    entries = sum(p["entries"] for p in profile)
    assert entries == report.changed
    mean = sum(p["mean"] * p["entries"] for p in profile) / entries
    if name == "somf":
        assert mean == pytest.approx(results["mean"])
        assert [step for step, _ in results["curve"]] == list(range(1, report.steps + 1))
    else:
        mask = Mask.load(tmp_path / "out" / "mask.safetensors")
        marked = sum(mask[n].sum() for n in mask.shapes if n in tensors(tmp_path / "out"))
        own = marked / entries
        if name == "random":
            assert mean == pytest.approx(own)
        assert 0 < mean < 1
        assert results["curve"] == []


def test_pairs_the_wrong_way_round_are_told(shop: Path, tmp_path: Path) -> None:
    """Where the tuned model lost no margin there is no retention, and it is said why."""
    data = {"train": str(shop / "pairs.jsonl"), "validation": 0.3, "chosen": "rejected",
            "rejected": "chosen"}  # fmt: skip
    what = dataless(shop, "magnitude", density=0.5)
    told: list[str] = []
    report = realign({**what, "data": data}, tmp_path / "out", progress=Progress(say=told.append))
    assert report.retention["safety"] is None
    (note,) = report.notes
    assert "nothing to bring back; are the columns of `chosen` and `rejected` exchanged?" in note
    assert note in told
    what["data"] = recipe(shop)["data"]
    utility = {"rows": str(shop / "utility.jsonl")}
    assert not realign({**what, "utility": utility}, tmp_path / "right").notes
    utility = {"rows": str(shop / "safe.jsonl")}  # what the aligned model was taught
    worse = realign({**what, "utility": utility}, tmp_path / "worse")
    assert worse.retention["utility"] is None
    assert "is no better than the aligned one on the utility rows" in worse.notes[0]


def test_no_zero_has_a_sign(shop: Path, tmp_path: Path) -> None:
    """What a hair of rounding took away is 0.0 % in the table and in the card."""
    report = realign(dataless(shop, "magnitude"), tmp_path / "out")
    report = replace(report, retention={"safety": -4e-9, "utility": 1.0, "harmonic": 0.0})
    assert f"{'retention, safety':<22}0.0%" in list(lines(report, tmp_path))


def test_a_long_curve_of_losses_is_a_short_one() -> None:
    """At most so many points, each the mean of the steps since the one before; none is lost."""
    losses = [float(i) for i in range(450)]
    curve = curve_of(losses)

    assert len(curve) == 150
    assert curve[0] == (3.0, 1.0)
    assert curve[-1] == (450.0, 448.0)
    assert curve_of([0.5]) == ((1.0, 0.5),)
    assert curve_of([]) == ()


def test_somf_brings_refusals_back(shop: Path, tmp_path: Path) -> None:
    """More of the margin than a random mask of the same density, and most of the utility; the
    policy is refused more often on prompts that were held out."""
    utility = {"rows": str(shop / "utility.jsonl")}
    training = {**TRAINING, "epochs": 10, "lr": 0.05}
    learned = realign(recipe(shop, training=training, utility=utility), tmp_path / "somf")
    control = realign(recipe(shop, "random", utility=utility), tmp_path / "random")
    assert learned.losses[1] < learned.losses[0]
    safety, kept = learned.retention["safety"], learned.retention["utility"]
    assert safety is not None
    assert kept is not None
    assert control.retention["safety"] is not None
    assert safety > max(0.9, control.retention["safety"] + 0.3)
    assert kept > 0.8
    scores = learned.scores
    assert scores["realigned"]["preferred"].value > scores["tuned"]["preferred"].value


def test_the_mask_and_its_logits_serve_elsewhere(shop: Path, tmp_path: Path) -> None:
    """The mask is where logits are above 0, and ``localize`` ranks the logits."""
    realign(recipe(shop), tmp_path / "out")
    mask, logits = (tmp_path / "out" / f"{n}.safetensors" for n in ("mask", "logits"))
    held, stats = Mask.load(mask), Stats.load(logits)
    tau = suture.open(shop / "tuned") - suture.open(shop / "aligned")
    found = localize(tau, "learned", stats=stats, positive=True)
    assert {n: held[n].sum() for n in held.shapes} == {n: found[n].sum() for n in held.shapes}
    assert 0 < held.density < 1
    top = localize(tau, "learned", stats=stats, density=0.1)
    assert top.count == round(0.1 * top.size)


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_coarse_masks(granularity: str, shop: Path, tmp_path: Path) -> None:
    """One logit an output or a tensor: few numbers are learned, the mask still has every entry."""
    parameters = {"granularity": granularity, "rescale": "none"}
    report = realign(recipe(shop, parameters=parameters), tmp_path / "out")
    assert report.facts["logits"] < report.facts["masked"] / 10
    mask = Mask.load(tmp_path / "out" / "mask.safetensors")
    assert mask.size == report.facts["masked"]


@pytest.mark.parametrize("how", [f for f in FUSES if f != "single"])
def test_several_models_are_fused(how: str, shop: Path, tmp_path: Path) -> None:
    """By every way to fuse; an order of models is not part of the result."""
    models = {"tuned": str(shop / "tuned"), "other": {"path": str(shop / "other"), "weight": 0.5}}
    what = recipe(shop, models=models, fuse={"how": how, "coefficient": 0.5})
    report = realign(what, tmp_path / "out")
    assert report.losses[1] < report.losses[0]
    turned = {k: models[k] for k in reversed(models)}
    other = realign({**what, "models": turned}, tmp_path / "turned")
    assert (other.losses, other.fingerprint) == (report.losses, report.fingerprint)


def test_the_numbers_are_those_of_the_file(shop: Path, tmp_path: Path) -> None:
    """What is reported is what the written model gives, its rounding included."""
    what = recipe(shop, "magnitude", output={"dtype": "bfloat16"})
    report = realign(what, tmp_path / "out")
    plan = plan_realign(what, tmp_path / "other")
    assert plan.rows is not None
    model = load_language_model(tmp_path / "out", dtype=torch.float32).model
    answers = answers_of(model, plan.rows.reported, plan.recipe.training.batch)
    written = margins(answers, plan.rows.reported)[0].value
    exact = realign(recipe(shop, "magnitude"), tmp_path / "exact")
    assert exact.scores["realigned"]["margin"].value != pytest.approx(written, abs=1e-4)
    assert report.scores["realigned"]["margin"].value == pytest.approx(written, abs=1e-4)


def test_exports(shop: Path, tmp_path: Path) -> None:
    """Soft, hard and averaged come from the same logits; each is the same in every run."""
    made = {}
    for export in ("soft", "hard", "averaged"):
        where = tmp_path / export
        realign(recipe(shop, parameters={"export": export}), where)
        made[export] = tensors(where)
    logits = [load_file(tmp_path / e / "logits.safetensors") for e in made]
    assert all(np.array_equal(v, other[n]) for other in logits[1:] for n, v in logits[0].items())
    safe, tuned = tensors(shop / "aligned"), tensors(shop / "tuned")
    for name, value in logits[0].items():
        key = name.removeprefix("logit/")
        delta = tuned[key] - safe[key]
        soft = 1 / (1 + np.exp(-value.astype(np.float64)))
        hard = (value > 0).astype(np.float64)
        for export, mask in (("soft", soft), ("hard", hard)):
            wanted = safe[key] + mask / max(mask.mean(), 1e-3) * delta
            np.testing.assert_allclose(made[export][key], wanted, atol=2e-6)
    key = next(n for n in safe if "q_proj" in n)
    assert not np.array_equal(made["averaged"][key], made["soft"][key])


# -- baselines, against their equations ------------------------------------------------------------


def test_resta(shop: Path, tmp_path: Path) -> None:
    """``tuned + gamma (aligned - base)``, also where the tuned model did not move; with DARE the
    kept share of what is added is divided by the density."""
    base, safe, tuned = (tensors(shop / n) for n in ("start", "aligned", "tuned"))
    realign(dataless(shop, "resta", gamma=0.3), tmp_path / "out")
    for name, value in tensors(tmp_path / "out").items():
        np.testing.assert_allclose(value, tuned[name] + 0.3 * (safe[name] - base[name]), atol=1e-6)
    realign(dataless(shop, "resta", gamma=0.3, density=0.5), tmp_path / "thin")
    kept = total = 0
    for name, value in tensors(tmp_path / "thin").items():
        v = 0.3 * (safe[name] - base[name])
        here = np.abs(value - tuned[name]) > 1e-7
        np.testing.assert_allclose((value - tuned[name])[here], 2 * v[here], atol=1e-6)
        kept, total = kept + int(here.sum()), total + int((np.abs(v) > 1e-7).sum())
    assert kept / total == pytest.approx(0.5, abs=0.03)


def projected(shop: Path, name: str) -> tuple[np.ndarray[Any, Any], float]:
    """``C delta`` and its cosine with ``delta``, with C formed."""
    base, safe, tuned = (tensors(shop / n)[name].astype(np.float64) for n in
                         ("start", "aligned", "tuned"))  # fmt: skip
    v, delta = safe - base, tuned - safe
    c = v @ v.T / np.linalg.norm(v)
    found = c @ delta
    return found, float((found * delta).sum() / np.linalg.norm(found) / np.linalg.norm(delta))


def test_safelora(shop: Path, tmp_path: Path) -> None:
    """By number, the matrices of lowest cosine get ``C delta``; embeddings and norms are left."""
    safe, tuned = tensors(shop / "aligned"), tensors(shop / "tuned")
    realign(dataless(shop, "safelora", select="number", number=3), tmp_path / "out")
    new = tensors(tmp_path / "out")
    matrices = [n for n, v in safe.items() if v.ndim == 2 and "embed" not in n]
    low = sorted(matrices, key=lambda n: projected(shop, n)[1])[:3]
    for name, value in new.items():
        wanted = safe[name] + projected(shop, name)[0] if name in low else tuned[name]
        np.testing.assert_allclose(value, wanted, atol=2e-6)
    realign(dataless(shop, "safelora", threshold=-1.0), tmp_path / "none")
    assert all(np.allclose(v, tuned[n], atol=1e-6) for n, v in tensors(tmp_path / "none").items())


def test_safelora_normalised(shop: Path, tmp_path: Path) -> None:
    """C over its largest eigenvalue: no direction grows."""
    safe, tuned = tensors(shop / "aligned"), tensors(shop / "tuned")
    realign(dataless(shop, "safelora", threshold=1.0, normalise=True), tmp_path / "out")
    base, name = tensors(shop / "start"), next(n for n in safe if "up_proj" in n)
    v = (safe[name] - base[name]).astype(np.float64)
    delta = tuned[name] - safe[name]
    wanted = v @ v.T / np.linalg.norm(v, 2) ** 2 @ delta
    found = tensors(tmp_path / "out")[name] - safe[name]
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert np.linalg.norm(found) <= np.linalg.norm(delta)


def test_safemerge(shop: Path, tmp_path: Path) -> None:
    """Below the threshold 0.8 of the change and 0.2 of the safety model's; else the tuned model."""
    safe, tuned, extra = (tensors(shop / n) for n in ("aligned", "tuned", "other"))
    name = next(n for n in safe if "q_proj" in n)
    cosine = projected(shop, name)[1]
    for threshold, mixed in ((cosine + 1e-4, True), (cosine - 1e-4, False)):
        out = tmp_path / str(mixed)
        realign(dataless(shop, "safemerge", threshold=threshold), out)
        delta = tuned[name] - safe[name]
        wanted = 0.8 * delta + 0.2 * (extra[name] - safe[name]) if mixed else delta
        np.testing.assert_allclose(tensors(out)[name] - safe[name], wanted, atol=2e-6)


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_fixed_masks(method: str, shop: Path, tmp_path: Path) -> None:
    """Exactly so many entries stay, divided by their share where that is asked for."""
    safe, tuned = tensors(shop / "aligned"), tensors(shop / "tuned")
    realign(dataless(shop, method, density=0.25, rescale="mean"), tmp_path / "out")
    mask = Mask.load(tmp_path / "out" / "mask.safetensors")
    assert mask.count == round(0.25 * mask.size)
    for name, value in tensors(tmp_path / "out").items():
        kept = mask[name].astype(np.float64)
        wanted = safe[name] + kept / max(kept.mean(), 1e-3) * (tuned[name] - safe[name])
        np.testing.assert_allclose(value, wanted, atol=2e-6)


def test_protect(shop: Path, tmp_path: Path) -> None:
    """Entries that the alignment moved most have their aligned values, bit for bit, the others
    those of the tuned model; a mask of the user's does as well."""
    base, safe, tuned = (tensors(shop / n) for n in ("start", "aligned", "tuned"))
    realign(dataless(shop, "protect", density=0.2), tmp_path / "out")
    mask = Mask.load(tmp_path / "out" / "mask.safetensors")
    assert mask.count == round(0.2 * mask.size)
    low = min(np.abs(safe[n] - base[n])[mask[n]].min() for n in safe if mask[n].any())
    high = max(np.abs(safe[n] - base[n])[~mask[n]].max() for n in safe if not mask[n].all())
    assert low >= high
    for name, value in tensors(tmp_path / "out").items():
        assert np.array_equal(value[mask[name]], safe[name][mask[name]])
        np.testing.assert_allclose(value[~mask[name]], tuned[name][~mask[name]], atol=1e-6)
    given = dataless(shop, "protect", mask=str(tmp_path / "out" / "mask.safetensors"))
    given.pop("base")
    realign(given, tmp_path / "again")
    assert all(np.array_equal(v, tensors(tmp_path / "again")[n])
               for n, v in tensors(tmp_path / "out").items())  # fmt: skip


def test_a_mask_of_other_models_is_refused_before_anything(shop: Path, tmp_path: Path) -> None:
    """Other tensors are told by the plan; another model of the same shape by its fingerprint."""
    path = str(tmp_path / "mask.safetensors")
    what = dataless(shop, "protect", mask=path)
    Mask.of({"odd": np.ones(3, np.bool_)}).save(Path(path))
    with pytest.raises(MismatchError, match="masks odd: of another model"):
        plan_realign(what, tmp_path / "out")
    Mask.of({"model.norm.weight": np.ones(24, np.bool_)}, {"base": "1", "model": "2"}).save(
        Path(path)
    )
    with pytest.raises(MismatchError, match="fingerprints 1 and 2, and this recipe names neither"):
        realign(what, tmp_path / "out")


def test_masks_know_their_models_wherever_they_are_used(shop: Path, tmp_path: Path) -> None:
    """A merge takes the mask of a realignment for its own models, and for no others."""
    realign(recipe(shop, "magnitude"), tmp_path / "out")
    prints = {n: checkpoint_fingerprint(suture.open(shop / n)) for n in ("aligned", "tuned")}
    mask = Mask.load(tmp_path / "out" / "mask.safetensors")
    about = mask.about
    assert {"base": about["base"], "model": about["model"]} == {
        "base": prints["aligned"], "model": prints["tuned"],
    }  # fmt: skip
    stitched = {
        "base": str(shop / "aligned"), "models": {"a": str(shop / "tuned")}, "method": "stitch",
        "parameters": {"masks": {"a": str(tmp_path / "out" / "mask.safetensors")}},
        "space": {"exclude": []},
    }  # fmt: skip
    merge(stitched, tmp_path / "stitched")
    new, tuned = tensors(tmp_path / "stitched"), tensors(shop / "tuned")
    for name in mask.shapes:
        np.testing.assert_allclose(new[name][mask[name]], tuned[name][mask[name]], atol=1e-6)
    with pytest.raises(MismatchError, match="is not the model that the masks"):
        merge({**stitched, "models": {"a": str(shop / "other")}}, tmp_path / "wrong")
    two = {"tuned": str(shop / "tuned"), "other": str(shop / "other")}
    realign(recipe(shop, "magnitude", models=two), tmp_path / "two")
    assert Mask.load(tmp_path / "two" / "mask-tuned.safetensors").about["model"] == prints["tuned"]
    realign(recipe(shop, "random", models=two), tmp_path / "shared")
    assert "model" not in Mask.load(tmp_path / "shared" / "mask.safetensors").about


def test_line_search(shop: Path, tmp_path: Path) -> None:
    """The chosen coefficient passes the gate, and none that passes loses less utility."""
    what = recipe(shop, "line-search", parameters={"retain": 0.6, "points": 6},
                  utility={"rows": str(shop / "utility.jsonl")})  # fmt: skip
    report = realign(what, tmp_path / "out")
    line, chosen = report.facts["line"], report.facts["coefficient"]
    assert [point["c"] for point in line] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    passing = [point for point in line if point["margin"] >= report.facts["gate"]]
    assert chosen == min(passing, key=lambda point: point["utility"])["c"]
    safe, tuned = tensors(shop / "aligned"), tensors(shop / "tuned")
    for name, value in tensors(tmp_path / "out").items():
        wanted = tuned[name] + chosen * (safe[name] - tuned[name])
        np.testing.assert_allclose(value, wanted, atol=2e-6)
    assert [note for note in report.notes if "chosen by those that are reported" in note]


@pytest.mark.usefixtures("other_precision")
def test_the_reference_has_the_precision_of_training(shop: Path, tmp_path: Path) -> None:
    """With masks that are open the model is its reference: the first loss is that of a coin, in
    mixed precision too, where numbers of float32 would differ from those of training."""
    what = recipe(
        shop, parameters={"start": 50.0, "rescale": "none", "granularity": "tensor"},
        training={**TRAINING, "precision": "bf16", "steps": 1},
    )  # fmt: skip
    report = realign(what, tmp_path / "out")
    assert report.losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_line_search_chooses_by_rows_that_it_does_not_report(shop: Path, tmp_path: Path) -> None:
    """`utility.validation` holds rows out: the line is of those, the scores are of the others; a
    method that chooses nothing says that it does not look at them."""
    rows = (shop / "utility.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("held", rows[:4]), ("told", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    utility = {"rows": str(tmp_path / "told.jsonl"), "validation": str(tmp_path / "held.jsonl")}
    looks = {}
    for name, given in {"both": utility, "held": {"rows": utility["validation"]},
                        "told": {"rows": utility["rows"]}}.items():  # fmt: skip
        what = recipe(shop, "line-search", parameters={"points": 3}, utility=given)
        looks[name] = realign(what, tmp_path / name)
    line = {n: [p["utility"] for p in r.facts["line"]] for n, r in looks.items()}
    assert line["both"] == line["held"] != line["told"]
    for model in ("aligned", "tuned"):
        one, other = (looks[n].scores[model]["utility"].value for n in ("both", "told"))
        assert one == other
    assert not [note for note in looks["both"].notes if "utility.validation" in note]
    share = plan_realign(
        recipe(shop, "random", utility={"rows": str(shop / "utility.jsonl"), "validation": 0.5}),
        tmp_path / "share",
    )
    assert share.utility is not None
    assert share.choosing is not None
    assert len(share.utility) + len(share.choosing) == len(rows)
    assert "utility.validation: random chooses nothing by these rows" in share.notes


# -- adapters --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of the same rank on one base, and one of another."""
    where = tmp_path_factory.mktemp("adapters")
    for name, seed, rank in (("safe", 1, 4), ("tuned", 2, 4), ("wide", 3, 6)):
        adapting.adapter(shop / "start", where / name, seed, r=rank)
    return where


def on_adapters(shop: Path, lora: Path, space: str, **parameters: Any) -> dict[str, Any]:
    found = recipe(
        shop,
        aligned=f"{shop / 'start'}+{lora / 'safe'}",
        models={"tuned": str(lora / "tuned")},
        parameters={"space": space, **parameters},
        training={**TRAINING, "steps": 2, "lr": 1e-4},
        ancestor="trust",
    )
    return {**found, "base": str(shop / "start")}


@pytest.mark.parametrize("space", ["delta_w", "factors"])
def test_open_and_closed_masks_of_adapters(
    space: str, shop: Path, lora: Path, tmp_path: Path
) -> None:
    """Logits of +20 give base plus tuned adapter, logits of -20 without rescaling base plus safe
    adapter: in both spaces, as PEFT merges them."""
    ends = {"tuned": 20.0, "safe": -6.0}
    for name, start in ends.items():
        what = on_adapters(shop, lora, space, start=start, rescale="none")
        report = realign(what, tmp_path / name)
        wanted = adapting.merged_by_peft(shop / "start", lora / name)
        for key, value in tensors(tmp_path / name).items():
            np.testing.assert_allclose(value, wanted[key].numpy(), atol=2e-2 if start < 0 else 1e-5)
    factors = sum(v.size for v in load_file(lora / "safe" / "adapter_model.safetensors").values())
    assert (report.facts["masked"] == factors) == (space == "factors")


def test_a_mask_of_factors_is_no_mask_of_products(shop: Path, lora: Path, tmp_path: Path) -> None:
    """Half of both factors' changes is a quarter of their product, and cross terms: the spaces
    give different models from the same logits."""
    made = []
    for space in ("delta_w", "factors"):
        realign(on_adapters(shop, lora, space, rescale="none"), tmp_path / space)
        made.append(tensors(tmp_path / space))
    name = next(n for n in made[0] if "q_proj" in n)
    assert np.abs(made[0][name] - made[1][name]).max() > 1e-4


def test_the_aligned_model_has_its_adapter_everywhere(
    shop: Path, lora: Path, tmp_path: Path
) -> None:
    """Also in tensors that no tuned model changed: its scores are those of the merged folder."""
    extra = adapting.adapter(shop / "start", tmp_path / "extra", 5, r=2, target_modules=["q_proj"])
    both = f"{shop / 'start'}+{lora / 'safe'}"
    what = {**on_adapters(shop, lora, "delta_w"), "models": {"x": f"{both}+{extra}"}}
    found = realign(what, tmp_path / "out").scores["aligned"]["margin"].value
    shutil.copytree(shop / "start", tmp_path / "merged")
    merged = {
        k: v.numpy() for k, v in adapting.merged_by_peft(shop / "start", lora / "safe").items()
    }
    save_file(merged, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    plain = {**what, "aligned": str(tmp_path / "merged")}
    expected = realign(plain, tmp_path / "plain").scores["aligned"]["margin"].value
    assert found == pytest.approx(expected, rel=1e-4)


def test_masks_of_factors_are_learned_on_the_model_that_is_written(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What adapters save beside factors has no logits and is written as it is in the aligned
    model; it is so while masks are learned, too, although the tuned model was looked at before."""
    lora = tmp_path / "lora"
    for name, seed in (("safe", 1), ("tuned", 2)):
        adapting.adapter(shop / "start", lora / name, seed, modules_to_save=["input_layernorm"])
    seen: dict[str, torch.Tensor] = {}

    kept = somf.references

    def looked(job: Any, *args: Any) -> Any:
        seen.update({n: p.detach().clone() for n, p in job.parameters().items() if "norm" in n})
        return kept(job, *args)

    monkeypatch.setattr(somf, "references", looked)
    realign(on_adapters(shop, lora, "factors"), tmp_path / "out")
    written = tensors(tmp_path / "out")
    assert len(seen) == 2
    for name, value in seen.items():
        np.testing.assert_array_equal(value.numpy(), written[name])


def test_factors_must_fit(shop: Path, lora: Path, tmp_path: Path) -> None:
    """Ranks that differ, and models without adapters, are refused with what to do; products may
    be compared whatever the ranks."""
    what = on_adapters(shop, lora, "factors")
    wide = {**what, "models": {"tuned": str(lora / "wide")}}
    with pytest.raises(MismatchError, match=r"rank 6, not 4.*delta_w"):
        plan_realign(wide, tmp_path / "out")
    with pytest.raises(MismatchError, match="has no adapter.*delta_w"):
        plan_realign({**what, "aligned": str(shop / "aligned")}, tmp_path / "out")
    whole = {**what, "models": {"tuned": str(shop / "tuned")}}
    with pytest.raises(MismatchError, match="only one of them has factors"):
        plan_realign(whole, tmp_path / "out")
    plan_realign({**wide, "parameters": {"space": "delta_w"}}, tmp_path / "out")


# -- interruptions ---------------------------------------------------------------------------------

CHILD = """
import json, os, signal, sys
from pathlib import Path
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
torch.set_num_threads(1)
from suture.runs.progress import Progress
from suture.verbs.realign import VERB as realign
recipe, out, stop = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
def tell(phase, at):
    if at.step == stop:
        os.kill(os.getpid(), signal.SIGKILL)
report = realign(recipe, out, progress=Progress(step=tell))
print(report.fingerprint, report.losses)
"""


def child(what: dict[str, Any], out: Path, stop: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(what), str(out), json.dumps(stop)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("how", "kills"), [("average", 1), ("dare", 2)])
def test_a_killed_run_ends_as_one_that_was_not(
    how: str, kills: int, shop: Path, tmp_path: Path
) -> None:
    """``kill -9`` at random steps, early stop included; then the same command: the same losses,
    masks, logits and weights, byte for byte."""
    what = recipe(
        shop,
        models={"tuned": str(shop / "tuned"), "other": str(shop / "other")},
        fuse=how,
        training={**TRAINING, "epochs": 3, "patience": 3, "validate_every": 2},
    )
    expected = realign(what, tmp_path / "whole")
    for stop in sorted(random.Random(how).sample(range(1, expected.steps), kills)):
        done = child(what, tmp_path / "out", stop)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "out").exists()
    done = child(what, tmp_path / "out", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{expected.fingerprint} {expected.losses}"
    for file in ("model", "mask", "logits"):
        pair = [(tmp_path / n / f"{file}.safetensors").read_bytes() for n in ("whole", "out")]
        assert pair[0] == pair[1], file
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_the_best_masks_are_kept(shop: Path, tmp_path: Path) -> None:
    """Training stops when held-out pairs say so, and goes back to where they were best."""
    training = {**TRAINING, "epochs": 20, "lr": 10.0, "schedule": "constant", "patience": 2,
                "validate_every": 1}  # fmt: skip
    report = realign(recipe(shop, training=training), tmp_path / "out")
    assert report.best is not None
    assert report.best <= report.steps - 2
    assert report.steps < 100


def test_what_goes_wrong_keeps_the_last_good_state(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is no number, or masks that close: the message says so and where the last
    checkpoint is, nothing appears at the output, and the run can go on from it to the same end."""
    what = recipe(shop)
    expected = realign(what, tmp_path / "whole")
    real, calls = somf.dpo, 0

    def broken(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(*args) * (float("nan") if calls == 8 else 1.0)

    monkeypatch.setattr(somf, "dpo", broken)
    with pytest.raises(NonFiniteError, match=r"loss is nan at step \d.*the checkpoint of step \d"):
        realign(what, tmp_path / "out")
    monkeypatch.setattr(somf, "dpo", real)
    steps: list[int] = []

    def closing(phase: str, at: Any) -> None:
        steps.append(at.step)
        if at.step == 8:
            monkeypatch.setattr(somf, "COLLAPSED", 0.9)

    with pytest.raises(SutureError, match=r"collapsed: its mean fell to 0.*is kept in"):
        realign(what, tmp_path / "out", progress=Progress(step=closing))
    assert steps[0] > 1
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(somf, "COLLAPSED", 1e-3)
    found = realign(what, tmp_path / "out")
    assert (found.fingerprint, found.losses) == (expected.fingerprint, expected.losses)


def test_a_mask_that_has_collapsed(shop: Path, tmp_path: Path) -> None:
    """Logits far below 0 leave the aligned model alone: that is said, not written."""
    with pytest.raises(SutureError, match="only the aligned model would be left"):
        realign(recipe(shop, parameters={"start": -9.0}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_recipe_does_not_take_over(shop: Path, tmp_path: Path) -> None:
    """Masks of another recipe are kept until --no-resume says otherwise."""

    def stop(phase: str, at: Any) -> None:
        if at.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        realign(recipe(shop), tmp_path / "out", progress=Progress(step=stop))
    other = recipe(shop, training={**TRAINING, "lr": 0.01})
    with pytest.raises(OutputError, match="another recipe"):
        realign(other, tmp_path / "out")
    key = tmp_path / ".out.suture" / "key"
    whole = key.read_bytes()
    key.write_bytes(b"\xff")
    with pytest.raises(OutputError, match="another recipe"):
        realign(recipe(shop), tmp_path / "out")
    key.write_bytes(whole)
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        realign(
            recipe(shop),
            tmp_path / "out",
            progress=Progress(step=stop, say=told.append),
        )
    assert "going on from the last checkpoint of a run that was interrupted" in told
    (key.parent / "reference.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="remove it to start anew"):
        realign(recipe(shop), tmp_path / "out")
    realign(other, tmp_path / "out", resume=False)


# -- wrong input -----------------------------------------------------------------------------------


def test_pairs_that_teach_nothing(shop: Path, tmp_path: Path) -> None:
    """No rows; two equal answers in every row; a column that is missing, told once and not of
    every row; an empty answer; nothing but answers that are too long."""
    rows = refusing.pairs()
    same = [{**r, "rejected": r["chosen"]} for r in rows]
    cases = {
        "holds no rows": [],
        "in all .* pairs 'chosen' and 'rejected' are identical": same,
        r"^2 problems:\s+- data.train: no row has a column 'chosen'; known: prompt, safe\n": [
            {"prompt": r["prompt"], "safe": r["chosen"]} for r in rows
        ],
        r"^data.train: no row has a column 'chosen'; known": [{**r, "chosen": None} for r in rows],
        r"jsonl, line 1: the column 'rejected' is empty": [{**rows[0], "rejected": " "}, *rows[1:]],
        "leaves no (validation|training) pairs": rows[:1],
    }
    for text, found in cases.items():
        path = refusing.write_pairs(tmp_path / "pairs.jsonl", found)
        with pytest.raises(RecipeError, match=text):
            plan_realign(recipe(shop, data={"train": path}), tmp_path / "out")
    mixed = refusing.write_pairs(tmp_path / "pairs.jsonl", rows + same[:3])
    plan = plan_realign(recipe(shop, data={"train": mixed}), tmp_path / "out")
    assert plan.rows is not None
    assert "two equal answers; left out" in " ".join(plan.rows.notes)
    none = {"train": mixed, "max_length": 4, "too_long": "drop"}
    with pytest.raises(RecipeError, match=r"data.train: none of \d+ pairs is left: \d+ have more"):
        plan_realign(recipe(shop, data=none), tmp_path / "out")
    with pytest.raises(RecipeError, match="a line search chooses by pairs that are held out"):
        plan_realign(recipe(shop, "line-search", data={"train": mixed, "validation": 0}),
                     tmp_path / "out")  # fmt: skip
    short = {"train": mixed, "max_length": 4, "too_long": "cut"}
    with pytest.raises(RecipeError, match="has no tokens"):
        plan_realign(recipe(shop, data=short), tmp_path / "out")


def test_prompts_are_on_one_side_only(shop: Path, tmp_path: Path) -> None:
    """Several pairs of a prompt are never divided between training and validation."""
    rows = [{**r, "rejected": r["rejected"] + extra} for r in refusing.pairs()
            for extra in ("", " now")]  # fmt: skip
    path = refusing.write_pairs(tmp_path / "pairs.jsonl", rows)
    plan = plan_realign(recipe(shop, data={"train": path, "validation": 0.4}), tmp_path / "out")
    assert plan.rows is not None
    sides = [{ids[:5] for ids in side.rows.ids} for side in (plan.rows.train, plan.rows.validation)]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_prompts_on_two_sides_are_told(shop: Path, tmp_path: Path) -> None:
    """Validation or test rows that were trained on are no held-out rows, and that is said."""
    rows = refusing.pairs()
    sources = {"train": rows[:30], "validation": rows[28:36], "test": rows[35:]}
    data = {
        side: refusing.write_pairs(tmp_path / f"{side}.jsonl", r) for side, r in sources.items()
    }
    plan = plan_realign(recipe(shop, data=data), tmp_path / "out")
    assert plan.rows is not None
    assert plan.rows.notes == (
        "2 of 8 validation prompts are train prompts, too: not held out",
        "1 of 13 test prompts are validation prompts, too: not held out",
    )


def test_an_aligned_model_that_is_no_ancestor(shop: Path, tmp_path: Path) -> None:
    """A model nearer to the base than to the aligned one, the aligned model itself, and another
    model altogether are told by distances; `ancestor: trust` overrides."""
    shutil.copytree(shop / "start", tmp_path / "cousin")
    moved = {n: v + np.float32(1e-3) for n, v in tensors(shop / "start").items()}
    save_file(moved, tmp_path / "cousin" / "model.safetensors", {"format": "pt"})
    cousin = recipe(shop, "magnitude", models={"x": str(tmp_path / "cousin")})
    with pytest.raises(MismatchError, match=r"models.x: .*lies nearer to the base .*trust"):
        realign(cousin, tmp_path / "out")
    realign({**cousin, "ancestor": "trust"}, tmp_path / "out")
    itself = recipe(shop, models={"x": str(shop / "aligned")})
    with pytest.raises(MismatchError, match="is the aligned model itself"):
        realign(itself, tmp_path / "other")
    refusing.save_model(refusing.llama(seed=9), refusing.tokenizer(), tmp_path / "stranger")
    stranger = recipe(shop, models={"x": str(tmp_path / "stranger")})
    del stranger["base"]
    with pytest.raises(MismatchError, match=r"differs from .* by \d+%"):
        realign(stranger, tmp_path / "other")


def test_all_faults_of_a_recipe_at_once(shop: Path, tmp_path: Path) -> None:
    """With the key, what was expected, and a suggestion."""
    with pytest.raises(RecipeError) as caught:
        read_realign(
            {
                "method": "somv", "aligned": 3, "models": {"a": 1}, "fuse": "tis", "spase": {},
                "data": {"train": "nowhere.jsonl", "chosn": "x"}, "training": {"lr": "fast"},
                "ancestor": "chek", "space": {"include": 3},
            },
            shop,
        )  # fmt: skip
    text = str(caught.value)
    for part in ("did you mean 'somf'", "aligned: a path", "models.a: a path", "mean 'ties'",
                 "'spase'; did you mean 'space'", "no file", "did you mean 'chosen'",
                 "training.lr: a number", "did you mean 'check'", "space.include"):  # fmt: skip
        assert part in text, (part, text)
    needs = recipe(shop, "safemerge")
    for key in ("base", "safety"):
        needs.pop(key)
    with pytest.raises(RecipeError, match=r"base: missing(.|\n)*safety: missing"):
        read_realign(needs)
    for what, text in (
        (recipe(shop, parameters={"temperature": 0}), r"Concrete distribution, above 0; got 0"),
        (recipe(shop, "line-search", parameters={"retain": 2}), r"in \[0, 1\]; got 2"),
        (recipe(shop, training={"epochs": 0}), "training.epochs: at least 1, not 0"),
        (recipe(shop, training={"lr": 1e30}), r"training.lr: less than \d+, not 1e\+30"),
        (recipe(shop, models={"../a": "x"}), "'../a' cannot be the name of a model"),
        (recipe(shop, output={"dtype": "int7"}), "output.dtype: no dtype 'int7'"),
        (recipe(shop, fuse={"how": "single", "density": 0.5}), "fuse.density: single keeps all"),
        (recipe(shop, models={"a": {"path": "x", "weight": float("inf")}}), "weight: a number"),
        (recipe(shop, parameters={"granularity": "tensor"}), "is 1 whatever was learned"),
        (recipe(shop, models={"a": "x", "b": "y"}, fuse="single"), "single takes one model"),
        ({**dataless(shop, "magnitude"), "method": "somf"}, "data: missing"),
    ):
        with pytest.raises(RecipeError, match=text):
            read_realign(what)


def test_the_example_can_be_read(shop: Path, tmp_path: Path) -> None:
    """``examples/realign.yaml`` and the recipe of the docs, with rows beside them."""
    root = Path(__file__).parents[1]
    page = (root / "docs" / "realign.md").read_text()
    for name in ("pairs", "utility", "reported", "math-held-out"):
        (tmp_path / f"{name}.jsonl").write_text("{}")
    for text in ((root / "examples" / "realign.yaml").read_text(),
                 page.split("```yaml\n")[1].split("```")[0]):  # fmt: skip
        found = read_realign(yaml.safe_load(text), tmp_path)
        assert found.method == "somf"
        assert found.fusing.how == "ties"
        again = read_realign(found.resolved(), tmp_path)
        assert again.resolved() == found.resolved()


def test_models_that_do_not_fit(shop: Path, tmp_path: Path) -> None:
    """Shapes, a missing folder, an output that is an input: all before anything is read."""
    refusing.save_model(refusing.llama(width=16), refusing.tokenizer(), tmp_path / "small")
    what = recipe(shop, models={"x": str(tmp_path / "small"), "y": str(tmp_path / "none")})
    with pytest.raises(SutureError, match=r"models.y: (.|\n)*is \[") as caught:
        plan_realign(what, shop / "aligned")
    assert "aligned" in str(caught.value)
    refusing.save_model(refusing.llama(layers=3), refusing.tokenizer(), tmp_path / "deep")
    with pytest.raises(SutureError, match=r"has model.layers.2.* besides") as caught:
        plan_realign(recipe(shop, models={"x": str(tmp_path / "deep")}), tmp_path / "out")
    assert "policy" not in str(caught.value)  # a key that this recipe does not have


def test_numbers_that_are_none(shop: Path, tmp_path: Path) -> None:
    """NaN in a model is an error of its own."""
    shutil.copytree(shop / "tuned", tmp_path / "nan")
    broken = tensors(shop / "tuned")
    broken["model.norm.weight"][0] = np.nan
    save_file(broken, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        realign(recipe(shop, models={"x": str(tmp_path / "nan")}), tmp_path / "out")


def test_what_must_not_be_passed_on_is_marked(shop: Path, tmp_path: Path) -> None:
    """A restricted input makes a restricted output; its card has no scores and not the input's name."""
    shutil.copytree(shop / "tuned", tmp_path / "secret")
    record = tmp_path / "secret" / "suture.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "restricted": True}))
    what = recipe(shop, method="magnitude", parameters={"density": 0.5})
    report = realign({**what, "models": {"x": str(tmp_path / "secret")}}, tmp_path / "out")
    realign(what, tmp_path / "open")
    assert report.restricted
    found = json.loads((tmp_path / "out" / "suture.json").read_text())
    assert found["restricted"] is True
    assert found["results"]["scores"]["realigned"]["margin"]
    card, free = ((tmp_path / n / "README.md").read_text() for n in ("out", "open"))
    assert "must not be passed on, nor what is made with it" in card
    assert "tags:\n- realignment\n- suture\n- restricted" in card
    assert found["output"]["fingerprint"] in card
    for word in ("margin", "preferred", "utility", "retention", "secret"):
        assert word not in card, word
        assert word in free or word == "secret"
    assert Mask.load(tmp_path / "out" / "mask.safetensors").about["restricted"] is True
    again = {**what, "models": {"x": str(tmp_path / "out")}, "ancestor": "trust"}
    assert realign(again, tmp_path / "next").restricted


# -- the command -----------------------------------------------------------------------------------


def test_the_command(shop: Path, tmp_path: Path) -> None:
    """Says what memory it needs, writes a folder, prints a table or one JSON object; errors end
    with 2 and without a traceback."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(shop)))
    code, out, err = invoke("realign", str(path), "-o", str(tmp_path / "out"), "--dry-run")
    assert code == 0, err
    assert "nothing was written" in out
    assert "in all" in out
    code, out, err = invoke("realign", str(path), "-o", str(tmp_path / "out"))
    assert code == 0, err
    assert "needs about" in err
    assert "retention, safety" in out
    code, out, err = invoke("realign", str(path), "-o", str(tmp_path / "two"), "--json")
    assert code == 0, err
    assert json.loads(out)["method"] == "somf"
    code, out, err = invoke("realign", str(path), "-o", str(tmp_path / "out"))
    assert code == 2
    assert "exists" in err
    assert "Traceback" not in err


def test_the_table_of_methods() -> None:
    """Every method with its parameters; one in full, with what it needs."""
    code, out, _ = invoke("realigners")
    assert code == 0
    assert all(name in out for name in REALIGNERS)
    code, out, _ = invoke("realigners", "safemerge")
    assert code == 0
    assert "needs aligned, models, base, safety" in out
    assert invoke("realigners", "safemrge")[0] == 2
