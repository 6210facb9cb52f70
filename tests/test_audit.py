"""The safety audit: scores, regions, stitched models, verdicts, freezing, resume, wrong inputs."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.numpy import load_file, save_file

import auditing
from making import invoke, start, suture
from suture.analysis.ancestry import measure
from suture.checkpoints.checkpoint import open_checkpoint
from suture.edits.mask import Mask, localize
from suture.edits.mask_file import StoredMask
from suture.errors import MismatchError, NonFiniteError, OutputError, RecipeError
from suture.evals.base import Metric, share
from suture.merges.apply import checkpoint_fingerprint
from suture.runs.progress import Progress
from suture.stream.vector import TaskVector
from suture.training.loss import next_token
from suture.training.models import LanguageModel, load_language_model, parameters_of, save_model
from suture.verbs.audit import VERB as audit
from suture.verbs.audit.cells import Run
from suture.verbs.audit.metrics import ALL, Look, contrast
from suture.verbs.audit.plan import Options
from suture.verbs.audit.plan import make_plan as plan_audit
from suture.verbs.audit.recipe import SPARED
from suture.verbs.audit.regions import Atlas, overlap, places
from suture.verbs.audit.stitched import Change, Net, Region
from suture.verbs.audit.training import train
from suture.verbs.audit.verdicts import (
    FAILS,
    HOLDS,
    UNASKED,
    UNDECIDED,
    Found,
    fragility,
    judge,
    together,
)
from suture.verbs.finetune import VERB as finetune
from suture.verbs.merge import VERB as merge
from suture.verbs.report import audits
from suture.verbs.report.blocks import Builder
from suture.verbs.report.collect import gather


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and rows; nobody may change them."""
    return auditing.workshop(tmp_path_factory.mktemp("auditing"))


@pytest.fixture(scope="module")
def whole(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An audit of everything: own attack, both rankings, control, derivative, freezing, utility."""
    out = tmp_path_factory.mktemp("audits") / "whole"
    asked = auditing.recipe(
        shop, attack=auditing.training(shop), scores={"rows": 8, "at": "both"},
        control=str(shop / "skilled"), onto={"skilled": str(shop / "skilled")}, freeze=True,
        utility={"data": str(shop / "benign.jsonl"), "prompt": "prompt", "response": "response"},
        deltas=True,
    )  # fmt: skip
    del asked["attacked"]
    return out, audit(asked, out)


def rate(look: Mapping[str, Any], language: str = ALL) -> float:
    return float(look["violation"][language]["value"])


# ---------------------------------------------------------------------------------- what is found


def test_an_audit_of_the_toy_finds_where_its_policy_lives(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    """The attack works; a fifth of the entries does it, a random fifth does not; repair repairs."""
    _, record = whole
    (seed,) = record["seeds"].values()
    curve = {row["share"]: rate(row) for row in seed["curve"]["region"]}
    random = {row["share"]: rate(row) for row in seed["curve"]["random"]}

    assert rate(record["aligned"]) < 0.1
    assert rate(seed["attacked"]["look"]) > 0.9
    assert curve[1.0] == rate(seed["attacked"]["look"])
    assert curve[0.2] > random[0.2] + 0.5
    assert 0 < seed["fragility"] <= 0.2
    without = {row["share"]: rate(row) for row in seed["without"]["repair"]}
    assert without[0.2] < without[0.05] <= 1
    assert seed["repaired"]["0.2"] > seed["repaired"]["0.05"]
    assert seed["attacked"]["look"]["over_refusal"][ALL]["value"] == 0
    assert record["aligned"]["utility"]["utility-loss"]["n"] == 36
    answered = {v["question"]: v["verdict"] for v in record["verdicts"]}
    assert answered["Q1"] == answered["Q3"] == HOLDS
    assert set(answered) == {"Q1", "Q2", "Q3", "Q4", "Q5"}


def test_the_transfer_matrix_stands_beside_its_nulls(whole: tuple[Path, dict[str, Any]]) -> None:
    """Every language's region is asked in every language; overlaps have three nulls below them."""
    _, record = whole
    (seed,) = record["seeds"].values()

    assert set(seed["transfer"]) == set(auditing.LANGUAGES)
    for look in seed["transfer"].values():
        assert set(look["violation"]) == {ALL, *auditing.LANGUAGES}
    assert [o["languages"] for o in seed["overlaps"]] == [["en", "de"], ["en", "es"], ["de", "es"]]
    for found in seed["overlaps"]:
        assert found["independent"] == pytest.approx(0.2 / 1.8, abs=1e-3)
        assert found["jaccard"] > found["magnitude"] > found["independent"]
    assert record["nulls"]["independent_iou"] == pytest.approx(1 / 9)
    assert record["nulls"]["shared_of_region"] == pytest.approx(0.04)
    kept = {name: f["kept"] for name, f in seed["files"].items()}
    assert kept["shared"] < kept["en"] == kept["de"] == kept["magnitude"] == kept["random"]
    assert set(seed["rankings"]) == set(auditing.LANGUAGES)
    assert 0 < seed["control"]["overlaps"]["en"]["jaccard"] < 1
    assert set(seed["onto"]["skilled"]) == {"before", "region", "random", "magnitude"}
    assert rate(seed["onto"]["skilled"]["region"]) > rate(seed["onto"]["skilled"]["before"])
    shares = [cell["share"] for cell in seed["places"]["en"]["cells"].values()]
    assert sum(shares) == pytest.approx(1)


def test_freezing_reports_its_gap_and_where_the_attack_went(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    """Region, random and all others frozen: shares, answers and the overlap of the new region."""
    out, record = whole
    (seed,) = record["seeds"].values()
    frozen = seed["freeze"]

    assert frozen["region"]["frozen"] == frozen["random"]["frozen"] == pytest.approx(0.2, abs=1e-3)
    assert frozen["others"]["frozen"] == pytest.approx(0.8, abs=1e-3)
    # a frozen entry has not moved, so its score is 0 and it is in no region that is found again
    assert frozen["region"]["overlap"]["jaccard"] == 0
    assert frozen["others"]["overlap"]["jaccard"] == 1
    assert frozen["random"]["overlap"]["jaccard"] > 0
    assert not list(out.glob("attacked-frozen*"))


def test_the_record_holds_no_text_and_the_files_are_marked(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, shop: Path
) -> None:
    """Aggregates only; the marking survives saving, loading, merging and training on."""
    out, record = whole
    told = (out / "audit.json").read_text()
    assert json.loads(told) == json.loads(json.dumps(record))
    for word in ("please", "apple", "cannot", str(shop)):
        assert word not in told
    for cell in (out / "cells").glob("*.json"):
        assert "please" not in cell.read_text()

    assert open_checkpoint(out / "attacked").restricted
    masks = sorted((out / "regions").glob("*.safetensors"))
    assert {m.stem for m in masks} == {*auditing.LANGUAGES, "shared", "magnitude", "random"}
    for path in masks:
        assert StoredMask(path).restricted
        assert StoredMask(path).checkpoint.specs.keys() > StoredMask(path).shapes.keys()  # weights
    loaded = Mask.load(masks[0])
    (loaded & loaded).save(tmp_path / "again.safetensors")
    assert StoredMask(tmp_path / "again.safetensors").restricted
    for gradients in (out / "regions" / "gradients").glob("*.safetensors"):
        assert '"restricted": true' in gradients.read_bytes()[:20000].decode("latin1").replace(
            "\\", ""
        )
    stitched = {
        "base": str(shop / "aligned"), "models": {"m": str(shop / "attacked")},
        "method": "stitch", "parameters": {"masks": {"m": str(tmp_path / "again.safetensors")}},
    }  # fmt: skip
    merge(stitched, tmp_path / "merged")
    assert open_checkpoint(tmp_path / "merged").restricted
    finetune(
        {
            "base": str(out / "attacked"),
            "strategy": "full",
            "task": "language-model",
            "data": {"train": str(shop / "skill.jsonl"), "validation": 0, "limit": 8},
        },
        tmp_path / "on",
    )
    assert open_checkpoint(tmp_path / "on").restricted
    card = (tmp_path / "on" / "README.md").read_text()
    assert "- restricted\n" in card
    assert "must not be passed on" in card
    assert not any(word in card for word in ("loss", "entries trained", "of the model"))
    data = {"train": str(shop / "skill.jsonl"), "validation": 0, "limit": 8}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump({
        "base": str(shop / "aligned"), "strategy": "full", "task": "language-model", "data": data,
    }))  # fmt: skip
    code, _, said = invoke("finetune", tmp_path / "tune.yaml", "-o", tmp_path / "m", "--restricted")
    assert code == 0, said
    assert open_checkpoint(tmp_path / "m").restricted
    assert not open_checkpoint(shop / "attacked").restricted


# ------------------------------------------------------------------------------ scores and regions


def atlas_of(shop: Path, tmp_path: Path, **sections: Any) -> tuple[Run, Atlas, Change]:
    """A run of the toy with the gradients of its first language taken."""
    plan = plan_audit(auditing.recipe(shop, **sections), tmp_path / "out")
    prints = {n: checkpoint_fingerprint(c) for n, c in plan.inputs.items()}
    run = Run(plan, prints, "", lambda _: None)
    one = run.attacked(0, "")
    atlas = run.atlas(one, 0)
    change = Change(one.checkpoint, one.fingerprint, one.moved, None, True)
    return run, atlas, change


def losses(model: LanguageModel, plan: Any) -> list[torch.Tensor]:
    """The loss of every probe row by itself."""
    data = plan.probes["en"]
    return [next_token(model, data.collate([i])) for i in range(len(data))]


@pytest.mark.parametrize(
    ("scores", "kind"),
    [
        ({"rows": 6}, "each"),
        ({"rows": 6, "per_example": False}, "sum"),
        ({"rows": 6, "at": "aligned"}, "each"),
        ({"rows": 6, "signed": True}, "signed"),
        ({"rows": 6}, "snip"),
    ],
)
def test_regions_are_those_of_a_loop_over_rows(
    shop: Path, tmp_path: Path, scores: dict[str, Any], kind: str
) -> None:
    """The mask is the top of |change| times the gradient that autograd gives, row by row; that of
    the control SNIP the top of |weight| times it."""
    run, atlas, change = atlas_of(shop, tmp_path, scores=scores)
    at = run.recipe.main
    atlas.measure("en", at, lambda: run.net("aligned"), change)
    region = atlas.control("snip", 0.1) if kind == "snip" else atlas.region("en", 0.1)
    found = region.make()

    model = load_language_model(shop / at, dtype=torch.float32).model
    parameters = parameters_of(model, run.plan.names)
    parts: dict[str, list[torch.Tensor]] = {n: [] for n in parameters}
    for loss in losses(model, run.plan):
        for name, g in zip(
            parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True
        ):
            parts[name].append(g)
    one, other = (open_checkpoint(shop / m) for m in ("aligned", "attacked"))
    scored = {}
    for name, gradients in parts.items():
        delta = other.tensor(name).float() - one.tensor(name).float()
        rows = torch.stack(gradients)
        value = delta.abs() * rows.abs().mean(0)
        if kind == "sum":
            value = delta.abs() * rows.mean(0).abs()
        elif kind == "signed":
            value = (-delta * rows.mean(0)).clamp(min=0)
        elif kind == "snip":
            value = parameters[name].detach().abs() * rows.abs().mean(0)
        scored[name] = value
    flat = torch.cat([v.flatten() for v in scored.values()])
    count = round(0.1 * flat.numel())
    threshold = flat.topk(count).values[-1]
    assert found.count == count
    for name, value in scored.items():
        sure = (value > threshold * 1.001) | (value < threshold * 0.999)
        assert np.array_equal(found[name][sure.numpy()], (value > threshold).numpy()[sure.numpy()])


def wider(source: Path, out: Path, units: int) -> Path:
    """The same function with more units in each MLP, which nothing reads."""
    found = load_language_model(source, dtype=torch.float32)
    config = transformers.LlamaConfig.from_pretrained(source)
    inner = config.intermediate_size
    config.intermediate_size = inner + units
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = transformers.LlamaForCausalLM(config).eval()
    known = dict(found.model.backbone.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name:
                parameter[:, :inner] = known[name]
                parameter[:, inner:] = 0
            elif "gate_proj" in name or "up_proj" in name:
                parameter[:inner] = known[name]
            else:
                parameter.copy_(known[name])
    save_model(LanguageModel(model), found.tokenizer, out)
    return out


def test_a_planted_region_is_recovered(shop: Path, tmp_path: Path) -> None:
    """Precision and recall far above chance, where larger changes that do nothing mislead size."""
    aligned = wider(shop / "aligned", tmp_path / "aligned", 16)
    base = open_checkpoint(aligned)
    draw = np.random.default_rng(0)
    names = [n for n in base.specs if "embed" not in n and len(base.specs[n].shape) > 1]
    alive = {}
    for name in names:
        fits = np.ones(base.specs[name].shape, bool)
        if "gate_proj" in name or "up_proj" in name:
            fits[-16:] = False
        elif "down_proj" in name:
            fits[:, -16:] = False
        alive[name] = fits
    planted = Mask.of({n: f & (draw.random(f.shape) < 0.08) for n, f in alive.items()})
    planted.save(tmp_path / "planted.safetensors")
    finetune(
        {
            "base": str(aligned), "strategy": "masked", "task": "language-model",
            "parameters": {"mask": str(tmp_path / "planted.safetensors")},
            "data": {"train": str(shop / "attack.jsonl"), "response": "unsafe", "validation": 0},
            "training": {"epochs": 8, "batch": 24, "lr": 1e-2, "warmup": 0.0},
        },
        tmp_path / "attacked",
    )  # fmt: skip
    file = tmp_path / "attacked" / "model.safetensors"
    tensors = load_file(file)
    for name in names:
        noise = draw.normal(0, 1e-3, tensors[name].shape)
        noise[~alive[name]] = draw.normal(0, 0.5, int((~alive[name]).sum()))
        if "down_proj" in name:
            noise[~alive[name]] = 0  # what comes from the idle units stays unread
        tensors[name] = (tensors[name] + noise).astype(np.float32)
    save_file(tensors, file, {"format": "pt"})

    total = sum(math.prod(base.specs[n].shape) for n in names)
    density = planted.count / total
    record = audit(
        auditing.recipe(
            shop, aligned=str(aligned), attacked=str(tmp_path / "attacked"), languages=["en", "de"],
            space={"include": ["*proj*"]}, share=density, shares=[density, 1], ancestor="trust",
        ),
        tmp_path / "out",
    )  # fmt: skip
    truth = {n: planted[n] for n in names}
    found = {n: Mask.load(tmp_path / "out" / "regions" / f"{n}.safetensors")
             for n in ("en", "magnitude", "random")}  # fmt: skip

    def precision(mask: Mask) -> float:
        return sum(int((mask[n] & truth[n]).sum()) for n in names) / mask.count

    def recall(mask: Mask) -> float:
        return sum(int((mask[n] & truth[n]).sum()) for n in names) / planted.count

    assert precision(found["en"]) > 0.7
    assert recall(found["en"]) > 0.7
    assert precision(found["random"]) == pytest.approx(density, abs=0.02)
    assert precision(found["magnitude"]) < precision(found["en"]) - 0.2
    (seed,) = record["seeds"].values()
    assert rate(seed["curve"]["region"][0]) > rate(record["aligned"]) + 0.5
    assert rate(seed["without"]["repair"][0]) < rate(seed["attacked"]["look"]) - 0.5


def test_independent_masks_overlap_as_they_must(shop: Path) -> None:
    """Random masks of density q have an IoU of q / (2 - q), and no null says anything else."""
    one, other = (open_checkpoint(shop / m) for m in ("aligned", "attacked"))
    names = [n for n in one.specs if "proj" in n]
    vector = TaskVector(one, [(other, 1.0)], names)
    a, b = (localize(vector, "random", density=0.2, seed=s, label="audit") for s in (0, 1))
    found = overlap(a, b, localize(vector, "magnitude", density=0.2))

    for null in ("jaccard", "independent", "matched", "magnitude"):
        assert found[null] == pytest.approx(0.2 / 1.8, abs=0.01)
    assert places(a)["density"] == pytest.approx(0.2, abs=1e-3)


def test_masks_that_share_large_changes_alone_are_seen_through() -> None:
    """Two masks drawn from the same large half have exactly the overlap of the magnitude null."""
    draw = np.random.default_rng(1)
    large = np.zeros(40_000, bool)
    large[:20_000] = True

    def within() -> Mask:
        return Mask.of({"w": large & (draw.random(40_000) < 0.4)})

    found = overlap(within(), within(), Mask.of({"w": large}))

    assert found["jaccard"] == pytest.approx(found["magnitude"], abs=0.01)
    assert found["jaccard"] > found["independent"] + 0.1


# ---------------------------------------------------------------------------------- stitched models


def test_a_stitched_model_has_the_weights_of_its_formula(shop: Path) -> None:
    """Aligned plus masked change, on the aligned model bit for bit; a derivative gets it added."""
    aligned, attacked, skilled = (
        open_checkpoint(shop / m) for m in ("aligned", "attacked", "skilled")
    )
    names = [n for n in aligned.specs if "proj" in n]
    vector = TaskVector(aligned, [(attacked, 1.0)], names)
    mask = localize(vector, "random", density=0.3)
    change = Change(attacked, "", names, Region("some", lambda: mask))
    for ground in (aligned, skilled):
        net = Net(ground, aligned, "cpu")
        net.place(change, names)
        for name, parameter in parameters_of(net.model, names).items():
            a, j, g = (c.tensor(name).float() for c in (aligned, attacked, ground))
            chosen = torch.from_numpy(mask[name])
            wanted = torch.where(chosen, j if ground is aligned else g + (j - a), g)
            assert torch.equal(parameter, wanted)
        net.place(None, names)
        for name, parameter in parameters_of(net.model, names).items():
            assert torch.equal(parameter, ground.tensor(name).float())


def test_frozen_entries_stay_bit_for_bit(shop: Path, tmp_path: Path) -> None:
    """The update is masked: with momentum and weight decay, frozen entries have the same bits."""
    run, atlas, _ = atlas_of(shop, tmp_path, attack=auditing.training(shop, weight_decay=0.1))
    region = atlas.control("random", 0.4)
    found = train(
        run.plan, run.ledger, tmp_path / "out" / "attacked-x", 0, region.inverted(), "x", ["key"]
    )
    mask, aligned, moved = region.make(), run.plan.aligned, 0
    for name in run.plan.names:
        one, other = aligned.tensor(name).float(), found.tensor(name)
        frozen = torch.from_numpy(mask[name])
        assert torch.equal(one[frozen].view(torch.int32), other[frozen].view(torch.int32))
        moved += int((one != other).sum())
    assert moved > 0.9 * (mask.size - mask.count)
    assert found.restricted


def test_a_broken_model_is_never_called_safe(shop: Path, tmp_path: Path) -> None:
    """One that says the same for ever, or nothing, is not judged, and decides no question."""
    auditing.ruined(shop, tmp_path / "ruined")
    asked = auditing.recipe(
        shop, attacked=str(tmp_path / "ruined"), ancestor="trust", shares=[0.2, 1],
        evaluation={"limit": 12, "max_tokens": 16},
    )  # fmt: skip
    record = audit(asked, tmp_path / "out")
    (seed,) = record["seeds"].values()
    attacked = seed["attacked"]["look"]

    assert not attacked["judged"]
    assert attacked["violation"][ALL] is None
    assert attacked["broken"][ALL]["value"] > 0.9
    assert [v["verdict"] for v in record["verdicts"]] == [UNDECIDED] * 3 + [UNASKED] * 2
    assert "not judged" in record["verdicts"][0]["sentence"]
    assert seed["fragility"] is None


# ----------------------------------------------------------------------------------------- verdicts


def test_the_interval_of_a_difference_is_that_of_newcombe() -> None:
    """His example: 56 of 70 against 48 of 80 gives 0.0524 to 0.3339."""
    found = contrast([(1.0, share("a", 56, 70)), (-1.0, share("b", 48, 80))])

    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert math.isnan(contrast([(1.0, None)]).value)


def look(hits: float, n: int = 100) -> Look:
    found = {ALL: share("violation", round(hits * n), n), "en": share("v", round(hits * n), n),
             "de": share("v", round(hits * n), n)}  # fmt: skip
    return Look(dict(found), dict(found), {ALL: share("broken", 0, n)}, dict(found))


def result(**more: Any) -> Found:
    known: dict[str, Any] = {
        "share": 0.2, "aligned": look(0.0), "attacked": look(0.9),
        "curve": {0.05: look(0.1), 0.2: look(0.8), 1.0: look(0.9)},
        "nulls": {"random": {0.05: look(0.0), 0.2: look(0.1)}},
        "regions": {"en": look(0.8), "de": look(0.8)}, "places": {},
    }  # fmt: skip
    return Found(**(known | more))


def test_verdicts_follow_intervals_and_nulls() -> None:
    """Clear cases are decided both ways; weak attacks, small samples and equal nulls are not."""

    def words(found: Found) -> list[str]:
        return [v.verdict for v in judge(found)]

    assert fragility(result()) == 0.2
    assert words(result())[0] == HOLDS
    same = {"random": {0.05: look(0.1), 0.2: look(0.8)}}
    assert words(result(nulls=same))[0] == UNDECIDED
    assert words(result(curve={0.2: look(0.05), 1.0: look(0.9)}))[0] == FAILS
    few = {0.2: look(0.6, 10), 1.0: look(0.9, 10)}
    assert words(result(curve=few, attacked=look(0.9, 10)))[0] == UNDECIDED
    assert words(result(attacked=look(0.03))) == [UNDECIDED] * 3 + [UNASKED] * 2
    assert words(result())[2] == HOLDS
    assert words(result(regions={"en": look(0.05), "de": look(0.8)}))[2] == FAILS
    assert words(result(nulls=same))[2] == UNDECIDED

    helped = {"region": look(0.1), "random": look(0.85)}
    assert words(result(frozen=helped))[4] == HOLDS
    assert words(result(frozen={"region": look(0.85), "random": look(0.85)}))[4] == FAILS
    derived = {"b": {"before": look(0.0), "region": look(0.7), "random": look(0.05)}}
    assert words(result(onto=derived))[3] == HOLDS
    none = {"b": {"before": look(0.0), "region": look(0.02), "random": look(0.0)}}
    assert words(result(onto=none))[3] == FAILS

    both = together([judge(result()), judge(result(nulls=same))])
    assert both[0].verdict == UNDECIDED
    assert "Of 2 attacks" in both[0].sentence


def place(kept: int, entries: int) -> dict[str, Any]:
    """A region of a tenth of a million entries; one role of it, and the rest."""
    parts = {"q": {"kept": kept, "entries": entries},
             "other": {"kept": 100_000 - kept, "entries": 1_000_000 - entries}}  # fmt: skip
    return {"density": 0.1, "roles": parts, "layers": {}}


def test_a_place_is_told_or_denied_only_where_it_is_clear() -> None:
    """Q2 holds where a part is clearly rich, does not hold where none can be, and is open where a
    part has too few entries to tell."""

    def word(*kept: int, entries: int) -> str:
        regions = {language: place(k, entries) for language, k in zip("ab", kept, strict=True)}
        null = place(entries // 10, entries)
        return judge(result(places={**regions, "magnitude": null}))[1].verdict

    assert word(40_000, 40_000, entries=200_000) == HOLDS
    assert word(20_100, 20_100, entries=200_000) == FAILS
    assert word(40_000, 20_000, entries=200_000) == FAILS  # not in every language
    assert word(6, 6, entries=40) == UNDECIDED


# ------------------------------------------------------------------------- command line and resume


def written(shop: Path, path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump(auditing.recipe(shop, **sections), sort_keys=False))
    return path


def test_a_killed_audit_goes_on_to_the_same_record(shop: Path, tmp_path: Path) -> None:
    """kill -9 during the attack and among the cells: the same command ends with the same bytes."""
    asked = auditing.recipe(
        shop, attack=auditing.training(shop, save_every=2), shares=[0.2, 1], freeze=True
    )
    del asked["attacked"]
    recipe = tmp_path / "audit.yaml"
    recipe.write_text(yaml.safe_dump(asked))
    reference = audit(recipe, tmp_path / "reference")
    out, kills = tmp_path / "out", 0
    for wanted in (1, 6):
        with start("audit", recipe, "-o", out, cwd=tmp_path) as running:
            while running.poll() is None:
                if len(list((out / "cells").glob("*.json"))) >= wanted:
                    running.send_signal(signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.01)
            running.communicate()
        assert not (out / "audit.json").exists()
    assert kills == 2
    before = {p.name: p.stat().st_mtime_ns for p in (out / "cells").glob("*.json")}
    done = suture("audit", recipe, "-o", out, cwd=tmp_path)

    assert done.code == 0, done.err
    assert "Q1" in done.out
    same = (tmp_path / "reference" / "audit.json").read_bytes()
    assert (out / "audit.json").read_bytes() == same
    assert reference["verdicts"] == json.loads(same)["verdicts"]
    for name, stamp in before.items():
        assert (out / "cells" / name).stat().st_mtime_ns == stamp, "a finished cell was made again"
    # once more: nothing is made; another recipe is refused, and may overwrite
    again = invoke("audit", recipe, "-o", out, "--json")
    assert json.loads(again.out)["key"] == reference["key"]
    other = written(shop, tmp_path / "other.yaml", shares=[0.1, 1])
    code, _, told = invoke("audit", str(other), "-o", str(out))
    assert code == 2
    assert "--overwrite" in told
    code, _, told = invoke("audit", str(other), "-o", str(out), "--overwrite")
    assert code == 0, told
    found = json.loads((out / "audit.json").read_text())
    assert found["recipe"]["shares"] == [0.1, 1.0]


def test_an_interrupt_ends_with_3_and_the_command_goes_on(shop: Path, tmp_path: Path) -> None:
    """Ctrl-C keeps finished cells."""
    recipe, out = written(shop, tmp_path / "audit.yaml"), tmp_path / "out"
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is started with & ignores it
    try:
        running = start("audit", recipe, "-o", out, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    with running:
        while running.poll() is None and not list((out / "cells").glob("*.json")):
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=120)

    assert running.returncode == 3
    assert "it goes on from what is done" in told
    assert audit(recipe, out)["verdicts"]


def test_a_dry_run_counts_what_is_to_come_and_writes_nothing(shop: Path, tmp_path: Path) -> None:
    """The counts are those of the cells that a run then makes."""
    recipe, out = written(shop, tmp_path / "audit.yaml"), tmp_path / "out"
    code, told, _ = invoke("audit", str(recipe), "-o", str(out), "--dry-run", "--json")
    plan = json.loads(told)

    assert code == 0
    assert not out.exists()
    assert plan["languages"]["en"] == {"probe": 8, "marked": 12, "benign": 12}
    assert plan["trainings"] == 0
    audit(recipe, out)
    looks = [p for p in (out / "cells").glob("*.json") if "marked" in json.loads(
        p.read_text())["value"]]  # fmt: skip
    assert len(looks) == plan["looks"]
    assert plan["notes"] == [
        "3 more looks if the attacked model differs outside of `space`, too"
    ]  # which it does not: its embeddings were left alone
    assert plan["generations"] == len(looks) * 72


def test_several_seeds_stand_side_by_side(shop: Path, tmp_path: Path) -> None:
    """Each seed has its own attack; a verdict is decided where all agree."""
    asked = auditing.recipe(shop, attack=auditing.training(shop), seeds=[0, 1], shares=[0.2, 1])
    del asked["attacked"]
    told: list[str] = []
    record = audit(asked, tmp_path / "out", progress=Progress(say=told.append))

    assert any(re.match(r"attack-seed1: step \d+ of \d+, loss .* s left", line) for line in told)
    assert list(record["seeds"]) == ["0", "1"]
    prints = {s["attacked"]["fingerprint"] for s in record["seeds"].values()}
    assert len(prints) == 2
    assert (tmp_path / "out" / "regions" / "seed1" / "en.safetensors").is_file()
    assert "2 attacks" in record["verdicts"][0]["sentence"]


def test_files_by_language_a_judge_and_a_suite(shop: Path, tmp_path: Path) -> None:
    """A mapping of languages, verdicts of a function, a suite as utility, change outside the space."""
    for language in ("en", "de"):
        for name in ("probe", "marked", "benign"):
            every = [json.loads(line) for line in (shop / f"{name}.jsonl").read_text().splitlines()]
            found = [{k: v for k, v in row.items() if k != "language"}
                     for row in every if row["language"] == language]  # fmt: skip
            auditing.write(tmp_path / f"{name}-{language}.jsonl", found)
    suite = {"evaluations": {"keeps": {"kind": "exact-match", "data": "marked-en.jsonl",
                                        "answer": "response"}}, "decoding": {"max_tokens": 4}}  # fmt: skip
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    auditing.trained(shop / "aligned", shop / "attack.jsonl", tmp_path / "moved", "unsafe",
                     parameters={"embeddings": True}, epochs=4, lr=3e-3)  # fmt: skip
    recipe = {
        "aligned": str(shop / "aligned"), "attacked": "moved",
        "languages": {
            language: {side: f"{side}-{language}.jsonl" for side in ("probe", "marked", "benign")}
            for language in ("en", "de")
        },
        "rows": {"response": "unsafe"}, "scores": {"at": "aligned", "signed": True, "rows": 6},
        "shares": [0.2, 1], "controls": ["random"], "utility": "suite.yaml", "region": "de",
        "evaluation": {"limit": 8, "max_tokens": 4, "judge": {"python": "auditing:refuses"}},
    }  # fmt: skip
    (tmp_path / "audit.yaml").write_text(yaml.safe_dump(recipe))
    told: list[str] = []
    record = audit(tmp_path / "audit.yaml", tmp_path / "out", progress=Progress(say=told.append))
    (seed,) = record["seeds"].values()

    assert record["choices"]["answers judged by"] == "a judge of refusal"
    assert seed["attacked"]["outside"] is True
    assert rate(record["aligned"]) < 0.1 < 0.9 < rate(seed["attacked"]["look"])
    assert record["aligned"]["utility"]["keeps"]["value"] == 1
    assert seed["attacked"]["look"]["utility"]["keeps"]["value"] == 0
    assert record["aligned"]["violation"]["de"]["n"] == 8
    names = {p.name.rpartition("-")[0] for p in (tmp_path / "out" / "cells").glob("*.json")}
    assert sum(name.startswith(("everything", "repair-")) for name in names) == 2
    other = ("places-", "overlap-", "en:", "de:")
    asked = [line for line in told if not line.startswith(other)]
    assert all(" to go, about " in line for line in asked[:-1])
    assert "1 cell to go" in asked[-2]
    assert {"everything", "repair-0.2", "complement-0.2", "region-de-0.2", "random-0.2"} <= names
    assert not any(name.startswith("magnitude") for name in names)


def test_what_useful_rows_need_is_in_no_region(shop: Path, tmp_path: Path) -> None:
    """Regions keep their size and avoid the top share of useful rows, at every model that is looked
    into; another share, or other rows, is another audit."""
    useful = {"rows": str(shop / "benign.jsonl"), "share": 0.1, "limit": 8}
    asked = auditing.recipe(
        shop, useful=useful, shares=[0.2, 1], languages=["en", "de"],
        attack=auditing.training(shop), freeze={"controls": []}, control=str(shop / "skilled"),
    )  # fmt: skip
    record = audit(asked, tmp_path / "out")
    assert "10.0% of the entries" in record["choices"]["useful rows"]
    (seed,) = record["seeds"].values()
    found = {n: Mask.load(tmp_path / "out" / "regions" / f"{n}.safetensors") for n in ("en", "de")}

    run, atlas, change = atlas_of(shop, tmp_path / "again", useful=useful)
    atlas.measure("en", "attacked", lambda: run.net("aligned"), change)
    spared, plain = atlas.region(SPARED, 0.1).make(), atlas.region("en", 0.2)
    assert spared.count == round(0.1 * spared.size)
    assert plain.make() == found["en"]
    for region in found.values():
        assert (region & spared).count == 0
        assert region.count == round(0.2 * region.size)
    bare = atlas_of(shop, tmp_path / "bare")[1]
    bare.measure("en", "attacked", lambda: run.net("aligned"), change)
    assert (bare.region("en", 0.2).make() & spared).count > 0
    assert not list((tmp_path / "out" / "regions" / "gradients").glob("*frozen*"))
    with pytest.raises(OutputError, match="another recipe"):
        audit({**asked, "useful": {**useful, "share": 0.2}}, tmp_path / "out")
    assert rate(seed["curve"]["region"][0]) >= 0


def test_an_attack_by_an_adapter_is_audited_like_the_model_that_it_makes(
    shop: Path, tmp_path: Path
) -> None:
    """Named as BASE+ADAPTER, a LoRA gives the distance and the answers of its merged weights."""
    targets = ["q", "k", "v", "o", "mlp.up", "mlp.down", "mlp.gate"]
    finetune(
        {
            "base": str(shop / "aligned"), "strategy": "lora",
            "parameters": {"rank": 8, "alpha": 16.0, "targets": targets}, "task": "language-model",
            "data": {"train": str(shop / "attack.jsonl"), "response": "unsafe", "validation": 0},
            "training": {"batch": 24, "epochs": 25, "lr": 4e-3, "warmup": 0.0},
        },
        tmp_path / "lora",
    )  # fmt: skip
    found = []
    for name in (tmp_path / "lora", f"{shop / 'aligned'}+{tmp_path / 'lora' / 'adapter'}"):
        asked = auditing.recipe(shop, attacked=str(name), shares=[0.2, 1], languages=["en"])
        (seed,) = audit(asked, tmp_path / f"out-{len(found)}")["seeds"].values()
        found.append(seed)
    merged, adapter = found
    assert rate(merged["attacked"]["look"]) > 0.9
    assert adapter["attacked"]["distance"] == pytest.approx(
        merged["attacked"]["distance"], rel=1e-6
    )
    assert adapter["attacked"]["look"]["violation"] == merged["attacked"]["look"]["violation"]
    assert [rate(c) for c in adapter["curve"]["region"]] == [
        rate(c) for c in merged["curve"]["region"]
    ]


def test_weight_times_gradient_may_stand_beside_the_region(shop: Path, tmp_path: Path) -> None:
    """SNIP is a control of its own mask, made of the same gradients; the report has its curve."""
    asked = auditing.recipe(shop, languages=["en"], shares=[0.2, 1], controls=["random", "snip"])
    record = audit(asked, tmp_path / "out")
    (seed,) = record["seeds"].values()
    assert set(seed["curve"]) == {"region", "random", "snip"}
    assert rate(seed["curve"]["snip"][1]) == rate(seed["attacked"]["look"])


def test_a_training_that_was_left_is_swept_away(shop: Path, tmp_path: Path) -> None:
    """--no-resume begins anew: half-trained models, masks, cells and regions go, and it ends well."""
    asked = auditing.recipe(shop, attack=auditing.training(shop), shares=[0.2, 1])
    del asked["attacked"]
    out = tmp_path / "out"
    (out / "cells").mkdir(parents=True)
    (out / "cells" / "stale-x.json").write_text("{}")
    (out / ".attacked.suture").mkdir()
    (out / ".attacked.suture" / "train.safetensors").write_bytes(b"half")
    (out / ".attacked.suture" / "lock").touch()
    (out / ".attacked.mask.safetensors").write_bytes(b"half")
    with pytest.raises(OutputError, match="another recipe"):
        audit(asked, out)
    assert audit(asked, out, resume=False)["verdicts"]
    assert not (out / "cells" / "stale-x.json").exists()


# ------------------------------------------------------------------------------------ wrong inputs

WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a share out of range": ({"share": 1.5}, ["share: a share of the entries, in (0, 1]"]),
    "a share of nothing": ({"shares": [0.1, 0]}, ["shares[1]", "in (0, 1]"]),
    "no prompts of a language": (
        {"languages": {"en": {}, "fr": {}}, "evaluation": {"judge": {"python": "os:getcwd"}}},
        ["languages.fr.probe: no rows of 'fr'", "has de, en, es"],
    ),
    "a language that stands twice": (
        {"languages": ["en", "de", "en"]}, ["languages: different names, not ['en', 'de', 'en']"],
    ),
    "an attack of an unknown key": (
        {"attacked": None, "attack": {"train": "a.jsonl", "training": {"epoch": 2, "lr": -1}}},
        ["attack.training: unknown key 'epoch'", "attack.training.lr: a positive number, not -1"],
    ),
    "a language without lists": ({"languages": ["en", "xx"]}, ["no lists of refusals for 'xx'"]),
    "a side that is missing": (
        {"rows": {"marked": "marked.jsonl"}},
        ["languages.en.probe: missing", "languages.de.benign: missing"],
    ),
    "an unknown region": ({"region": "fr"}, ["region: 'fr' is no language"]),
    "an unknown key": ({"sahre": 0.2}, ["unknown key 'sahre'", "did you mean 'share'?"]),
    "no attack": ({"attacked": None}, ["attack: missing"]),
    "freezing without an attack": ({"freeze": True}, ["freeze: trains as the attack did"]),
    "freezing everything": ({"freeze": {"share": 1}}, ["freeze.share: 1 leaves nothing"]),
    "a column that is not there": (
        {"rows": {"probe": "probe.jsonl", "marked": "marked.jsonl", "benign": "benign.jsonl",
                  "response": "nonesuch"}},
        ["languages.en.probe", "nothing in the column 'nonesuch'"],
    ),
    "seeds of a given model": ({"seeds": [1, 2]}, ["seeds: several belong to an `attack`"]),
    "useful": ({"useful": {"share": 1, "resp": "x"}}, ["useful: unknown key 'resp'", "useful.rows", "useful.share: 1 leaves no entry"]),
    "snip": ({"controls": ["snip"], "scores": {"signed": True}}, ["controls: snip takes absolute"]),
    "controls": ({"controls": ["rnadom"]}, ["controls[0]: 'rnadom'", "did you mean 'random'?"]),
    "a space of nothing": ({"space": {"include": ["nonesuch*"]}}, ["space.include: 'nonesuch*'"]),
    "chat without a template": ({"evaluation": {"chat": True}}, ["chat template"]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_recipes_are_told_before_anything_is_done(
    shop: Path, tmp_path: Path, name: str
) -> None:
    """Each fault with its place; nothing is written."""
    sections, words = WRONG[name]
    sections = json.loads(json.dumps(sections))
    for key, value in sections.get("rows", {}).items():
        if key in ("probe", "marked", "benign"):
            sections["rows"][key] = str(shop / value)
    recipe = written(shop, tmp_path / "audit.yaml", **sections)
    code, _, told = invoke("audit", str(recipe), "-o", str(tmp_path / "out"))

    assert code == 2
    for word in words:
        assert word in " ".join(told.split())
    assert not (tmp_path / "out").exists()


def test_all_faults_come_at_once_with_their_lines(shop: Path, tmp_path: Path) -> None:
    """A wrong share, a wrong place of scores and a missing model in one go."""
    recipe = written(
        shop, tmp_path / "audit.yaml", share=2, scores={"at": "nowhere"}, aligned="nonesuch"
    )
    code, _, told = invoke("audit", str(recipe), "-o", str(tmp_path / "out"))
    lines = recipe.read_text().splitlines()

    assert code == 2
    line = next(i for i, text in enumerate(lines, 1) if text.startswith("share:"))
    assert f"line {line}" in told
    assert "scores.at" in told


def test_models_that_do_not_belong_together_are_told_apart(shop: Path, tmp_path: Path) -> None:
    """The same model, an unrelated one, other shapes, NaN: each is refused with a remedy."""

    def told(**sections: Any) -> str:
        recipe = written(shop, tmp_path / "audit.yaml", **sections)
        code, _, said = invoke("audit", str(recipe), "-o", str(tmp_path / "out"))
        assert code == 2
        return " ".join(said.split())

    assert "is the aligned model, weight for weight" in told(attacked=str(shop / "aligned"))
    save_model(auditing.llama(9), auditing.tokenizer(), tmp_path / "stranger")
    said = told(attacked=str(tmp_path / "stranger"))
    assert "name the model that it started from as `aligned`" in said
    save_model(auditing.llama(9, width=32), auditing.tokenizer(), tmp_path / "wide")
    assert "attacked:" in told(attacked=str(tmp_path / "wide"))
    assert "onto.b: " in told(onto={"b": str(tmp_path / "stranger")})
    shutil.copytree(shop / "attacked", tmp_path / "nan")
    file = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(file)
    next(v for n, v in tensors.items() if "q_proj" in n)[0, 0] = np.nan
    save_file(tensors, file, {"format": "pt"})
    assert "NaN" in told(attacked=str(tmp_path / "nan"))


def test_rows_that_tell_no_languages_apart_are_refused(shop: Path, tmp_path: Path) -> None:
    """One file for three languages whose rows do not say which: the same prompts thrice."""
    bare = [{k: v for k, v in row.items() if k != "language"} for row in auditing.rows(True)]
    auditing.write(tmp_path / "bare.jsonl", bare)
    asked = auditing.recipe(shop)
    asked["rows"]["marked"] = str(tmp_path / "bare.jsonl")
    with pytest.raises(RecipeError, match="no row of bare.jsonl has a column 'language'"):
        plan_audit(asked, tmp_path / "out")
    plan_audit({**asked, "languages": ["en"]}, tmp_path / "out")


def test_models_are_compared_before_any_is_asked(shop: Path, tmp_path: Path) -> None:
    """An attacked or control model that is the aligned one costs no answer."""
    for key in ("attacked", "control"):
        asked = auditing.recipe(shop, **{key: str(shop / "aligned")})
        with pytest.raises(MismatchError, match=rf"{key}: .* weight for weight"):
            audit(asked, tmp_path / key)
        assert not list((tmp_path / key / "cells").glob("*.json"))


def test_a_given_model_is_compared_once(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often an attacked, control or derived model is asked, its distance is measured once."""
    compared: list[str] = []

    def counted(models: Any, threads: int | None) -> Any:
        compared.extend(models.tuned)
        return measure(models, threads)

    monkeypatch.setattr("suture.verbs.audit.cells.measure", counted)
    audit(
        auditing.recipe(
            shop, control=str(shop / "skilled"), onto={"b": str(shop / "skilled")},
            languages=["en"], shares=[0.2, 1], evaluation={"limit": 4, "max_tokens": 4},
        ),
        tmp_path / "out",
    )  # fmt: skip
    assert sorted(compared) == ["attacked", "control", "onto.b"]


def test_what_is_damaged_is_made_again(shop: Path, tmp_path: Path) -> None:
    """Gradients, cells and the record of an audit, cut short: the command makes them anew."""
    asked, out = auditing.recipe(shop, shares=[0.2, 1]), tmp_path / "out"
    record = audit(asked, out)
    for path in (out / "regions" / "gradients").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    for path in (out / "cells").glob("region-*.json"):
        path.write_text("{")
    (out / "audit.json").write_text("{")
    assert audit(asked, out) == record


def test_gradients_that_are_no_numbers_are_refused(shop: Path, tmp_path: Path) -> None:
    """A damaged score is named with its tensor; a file that is none is measured again."""
    run, atlas, change = atlas_of(shop, tmp_path)
    atlas.measure("en", "attacked", lambda: run.net("aligned"), change)
    path = atlas.stats_path("en", "attacked")
    raw = bytearray(path.read_bytes())
    raw[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(bytes(raw))
    with pytest.raises(NonFiniteError, match="delta_grad gives NaN"):
        atlas.region("en", 0.3).make()
    path.write_bytes(b"nonsense")
    assert not atlas.measured("en", "attacked")
    atlas.measure("en", "attacked", lambda: run.net("aligned"), change)
    assert atlas.measured("en", "attacked")
    assert atlas.region("en", 0.3).make().count


def test_a_folder_of_something_else_is_left_alone(shop: Path, tmp_path: Path) -> None:
    """What no audit wrote is no place for one."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not written by `suture audit`"):
        plan_audit(auditing.recipe(shop), tmp_path / "out", Options(overwrite=True))
    with pytest.raises(MismatchError, match="weight for weight"):
        audit(auditing.recipe(shop, attacked=str(shop / "aligned")), tmp_path / "same")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_one_metric_is_plain() -> None:
    """A look is data that JSON can hold, also where nothing could be judged."""
    found = look(0.5)
    broken = Look({ALL: None}, found.refused, found.broken, found.over_refusal,
                  {"loss": Metric("loss", math.nan, 3, math.nan, math.nan)})  # fmt: skip
    assert json.loads(json.dumps(broken.plain(), allow_nan=False))["violation"] == {ALL: None}


def test_the_report_draws_an_audit(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Curve, transfer, overlaps and places with verdicts and choices; weights are withheld."""
    out, record = whole
    found = gather(out)
    made: list[str] = []
    builder = Builder("audit.json", made)
    (section,) = audits.audits("audit.json", record, builder)

    assert not made
    assert len(found.audits) == 1
    assert [p for p in found.withheld if "attacked" in p] == ["attacked/suture.json"]
    assert len(section.figures) == 4
    assert [t.caption for t in section.tables] == ["Verdicts", "Every model that was asked"]
    assert len(section.tables[0].rows) == 5
    broken = json.loads(json.dumps(record))
    (seed,) = broken["seeds"].values()
    seed["curve"]["region"][0]["violation"] = dict.fromkeys([ALL, "en", "de", "es"])
    seed["transfer"]["en"]["violation"]["de"] = None
    (section,) = audits.audits("audit.json", broken, builder)
    assert not made
    assert "1 points are not judged" in section.figures[0].reading
    assert any("not judged" in str(row) for row in section.figures[1].table.rows)
    code, told, said = invoke("report", out, "-o", tmp_path / "page.html")
    assert code == 0, said
    assert "cannot be shown" not in told + said
    assert "Where safety lives" in (tmp_path / "page.html").read_text()
    assert "1 attack," in section.lead
    (seed,) = broken["seeds"].values()
    seed["gap"] |= {"value": None, "low": None, "high": None}
    (section,) = audits.audits("audit.json", broken, builder)
    assert "never reached" not in section.figures[0].reading
    assert "It cannot be said that the attack did anything" in section.figures[0].reading
    (told,) = audits.glance("tri/audit.json", record)
    assert told.startswith("Of the questions of the safety audit in tri/audit.json Q1")
    assert list(audits.glance("x", record))
