"""Analyses of masks and of classifiers that users bring: what they hold, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import suture
import tiny_model
from making import invoke, lines_of, quick_disk
from suture.analysis import vector_space as space
from suture.analysis.arithmetic import apart, entangled, movement, sharing
from suture.analysis.masks import pairwise
from suture.analysis.vector_space import LinearSpace, PlainSpace, Side, vector_from
from suture.edits.mask import Mask, localize
from suture.errors import SutureError
from suture.evals.walk import Walk, classes
from suture.training.calibrate import Calibration
from suture.training.data import tokenise
from suture.training.models import (
    Classifier,
    Encoder,
    Head,
    load_encoder,
    load_head,
    parameters_of,
    save_head,
    save_model,
)
from suture.verbs.analyze import VERB as analysis
from suture.verbs.analyze.plan import make_plan as plan_analysis

NAMES = ("one", "two")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_disk(monkeypatch)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder; a dense model and one with few entries moved; heads, rows."""
    folder = tmp_path_factory.mktemp("shop")
    tiny_model.folder(folder / "base")
    for number, name in enumerate(NAMES):
        loaded = load_encoder(folder / "base", dtype=torch.float32)
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for n, p in loaded.model.backbone.named_parameters():
                if "embeddings" not in n:
                    step = 0.3 * torch.randn(p.shape, generator=draw)
                    p.add_(step if number == 0 else step * (step > 0.45))
        save_model(loaded.model, loaded.tokenizer, folder / name)
        head = Head(("colour", "sky"), torch.randn(2, 16, generator=draw), torch.zeros(2))
        save_head(head, folder / f"{name}-head.safetensors")
    rows = [{"text": r.text, "label": r.label} for r in tiny_model.rows(24)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipe(shop: Path, *analyses: str, **more: Any) -> dict[str, Any]:
    """A recipe over the shop; paths are absolute."""
    return {
        "base": str(shop / "base"), "models": {n: str(shop / n) for n in NAMES},
        "analyses": list(analyses), "space": {"exclude": []},
        "tasks": {n: {"data": str(shop / "rows.jsonl"), "max_length": 16,
                      "head": str(shop / f"{n}-head.safetensors")} for n in NAMES},
        **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def world(shop: Path) -> tuple[Encoder, PlainSpace, list[Side]]:
    """The same models as a benchmark holds them: an encoder, vectors, sides."""
    loaded = load_encoder(shop / "base", dtype=torch.float32)
    sides = []
    for name in NAMES:
        head = load_head(shop / f"{name}-head.safetensors")
        rows = tiny_model.rows(24)
        whole, part = (
            tokenise(r, loaded.tokenizer, labels=head.labels, max_length=16)
            for r in (rows, rows[:16])
        )
        data = {"probe": whole, "validation": whole, "few": part}
        sides.append(Side(name, head, data, name))
    vectors = []
    for name in NAMES:
        tau = suture.open(shop / name) - suture.open(shop / "base")
        vectors.append(vector_from({n: tau[n] for n in tau.names}))
    return loaded.model, PlainSpace(loaded.model, vectors, sides), sides


def test_maps_are_those_of_the_plain_definition(shop: Path, tmp_path: Path) -> None:
    """Each point of the grid equals a slow twin that writes each of its models anew."""
    found = analysis(
        recipe(shop, "disentanglement", disentanglement={"amounts": [-1, 0, 1, 0.5]}),
        tmp_path / "o",
    ).to_dict()["disentanglement"]

    assert found["amounts"] == [-1, 0, 0.5, 1]
    (made,) = found["maps"]
    taus = [suture.open(shop / n) - suture.open(shop / "base") for n in NAMES]
    loaded = load_encoder(shop / "base", dtype=torch.float32)
    heads = [load_head(shop / f"{n}-head.safetensors") for n in NAMES]
    data = tokenise(tiny_model.rows(24), loaded.tokenizer, labels=heads[0].labels, max_length=16)
    walk = Walk(loaded.model, [{n: t[n] for n in t.names} for t in taus])

    def said(point: tuple[float, float], task: int) -> Any:
        body: Any = walk.move(point)
        return classes(Classifier(body, heads[task]), data.batches(64))

    for i, a in enumerate(found["amounts"]):
        for j, b in enumerate(found["amounts"]):
            both = [said((a, b), t) for t in (0, 1)]
            error = np.mean(both[0] != said((a, 0), 0)) + np.mean(both[1] != said((0, b), 1))
            assert made["error"][i][j] == pytest.approx(error)
    assert np.max(made["error"]) > 0
    assert found["xi"] == made["at_one"] == made["error"][3][3]


def test_analyses_are_what_the_benchmark_computes(
    shop: Path, tmp_path: Path, world: tuple[Encoder, PlainSpace, list[Side]]
) -> None:
    """The same numbers from files as from the vectors, sides and encoder of a benchmark."""
    encoder, space, sides = world
    made = analysis(
        recipe(
            shop, "disentanglement", "function-localization", "sensitivity",
            disentanglement={"range": [0, 1], "points": 3}, sensitivity={"shares": [0.3], "rows": 8},
        ),
        tmp_path / "o",
    ).to_dict()  # fmt: skip
    mixed = entangled(space, (0.0, 0.5, 1.0), NAMES)
    local, map_ = made["function_localization"], made["disentanglement"]

    assert map_["xi"] == pytest.approx(mixed["xi"])
    assert np.round(map_["maps"][0]["error"], 4).tolist() == mixed["maps"]["one, two"]
    for word in ("transfer", "drift"):
        assert local[word] == mixed[word]
    for word, value in movement(space, encoder).items():
        assert local[word] == value
    for number, name in enumerate(NAMES):
        alone = sharing(encoder, sides, number, (0.3,), Calibration(rows=8, seed=0))
        assert made["sensitivity"]["tasks"][name] == alone["rows"]
        assert made["sensitivity"]["base"] == alone["base"]


def test_features_can_be_compared_instead_of_classes(shop: Path, tmp_path: Path) -> None:
    """By cosine: 0 on the point of no vectors, the same for twins, more for a longer way."""
    found = analysis(
        recipe(shop, "disentanglement",
               disentanglement={"amounts": [0, 0.1, 1], "metric": "features"}),
        tmp_path / "o",
    ).to_dict()["disentanglement"]  # fmt: skip
    error = np.array(found["maps"][0]["error"])

    assert found["metric"] == found["maps"][0]["metric"] == "features"
    assert error[0, 0] == pytest.approx(0, abs=1e-6)
    assert 0 < error[1, 1] < error[2, 2]
    assert apart(np.eye(2), np.eye(2)[::-1]) == pytest.approx(1)


def test_sparse_vectors_are_written_entry_by_entry(
    world: tuple[Encoder, PlainSpace, list[Side]],
) -> None:
    """Only what moves is written, the values are those of whole tensors, the base comes back."""
    encoder, space, sides = world
    sparse = PlainSpace(encoder, [space.vectors[1]], sides)
    before = {n: p.detach().clone() for n, p in sparse.encoder.named_parameters()}
    sparse.predict((1.5,), 0, "probe")
    held = dict(sparse.encoder.named_parameters())

    assert sum(m.at is not None for m in sparse.moved.values()) > 5
    for name, tensor in space.vectors[1].items():
        start = before[f"backbone.{name}"]
        torch.testing.assert_close(held[f"backbone.{name}"].detach(), start + 1.5 * tensor)
        assert torch.equal(held[f"backbone.{name}"][tensor == 0], start[tensor == 0])
    sparse.predict((0.0,), 1, "probe")
    assert all(torch.equal(p, before[n]) for n, p in sparse.encoder.named_parameters())


def test_masks_stand_beside_four_baselines_and_have_a_structure(shop: Path, tmp_path: Path) -> None:
    """Pairs as ``pairwise`` has them, the same task as ceiling; shares add up to 1."""
    made = {}
    for where, density in (("masks", 0.2), ("again", 0.25)):
        (tmp_path / where).mkdir()
        for name in NAMES:
            tau = suture.open(shop / name) - suture.open(shop / "base")
            made[where, name] = localize(tau, density=density if name == "one" else 0.01)
            made[where, name].save(tmp_path / where / f"{name}.safetensors")
    found = analysis(
        recipe(shop, "masks", "structure", masks=str(tmp_path / "masks"),
               same_task=str(tmp_path / "again"), tasks=None, space=None),
        tmp_path / "o",
    ).to_dict()  # fmt: skip

    (pair,) = found["masks"]["pairs"]
    (slow,) = pairwise([made["masks", n] for n in NAMES])
    assert pair == {**slow, "pair": list(NAMES)}
    assert pair["iou"] == made["masks", "one"].jaccard(made["masks", "two"])
    assert found["masks"]["same_task"]["two"] == 1
    assert found["masks"]["same_task"]["one"] == pytest.approx(0.8, abs=0.01)
    for name in NAMES:
        one = found["structure"]["models"][name]
        assert sum(one["cells"].values()) == pytest.approx(1, abs=1e-3)
        assert one["cells"].keys() <= one["densities"].keys()


def test_baselines_of_masks_are_those_of_plain_loops() -> None:
    """Chance by tensor: the product of densities, entry by entry."""
    dice = np.random.default_rng(0)
    entries = [{n: dice.random((6, 8)) < p for n, p in (("a", 0.3), ("b", 0.7))} for _ in range(2)]
    (found,) = pairwise([Mask.of(e) for e in entries])

    shared = sum(e.mean() * f.mean() for n in "ab" for e, f in [(entries[0][n], entries[1][n])]
                 for _ in range(48))  # fmt: skip
    kept = sum(float(e.sum()) for mask in entries for e in mask.values())
    both = sum(int((entries[0][n] & entries[1][n]).sum()) for n in "ab")
    assert found["tensors"] == pytest.approx(shared / (kept - shared))
    assert found["iou"] == pytest.approx(both / (kept - both))


def test_the_command_tells_and_the_report_shows(shop: Path, tmp_path: Path) -> None:
    """A line each; the page has maps, gains, sharing, masks and their places; repeatable."""
    what = recipe(shop, "disentanglement", "function-localization", "sensitivity", "masks",
                  "structure", density=0.1, disentanglement={"range": [0, 1], "points": 2},
                  sensitivity={"shares": [0.2]})  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(what))

    said = invoke("analyze", tmp_path / "r.yaml", "-o", tmp_path / "out")

    assert said.code == 0, said.err
    lines_of(
        said.out, "disentanglement error: ", "vectors change their own task", "masks share",
        "in queries and keys", "without the least sensitive 20%",
    )  # fmt: skip
    lines_of(said.err, "disentanglement\n", "function-localization\n", "sensitivity ")
    raw = json.loads((tmp_path / "out/analysis.json").read_text())
    again = analysis(raw["request"], tmp_path / "again", folder=tmp_path / "out").to_dict()
    for key in ("disentanglement", "function_localization", "sensitivity", "masks", "structure"):
        assert json.loads(json.dumps(again[key])) == raw[key]
    shown = invoke("report", tmp_path / "out", "-o", tmp_path / "page.html")
    assert shown.code == 0, shown.err
    page = (tmp_path / "page.html").read_text()
    lines_of(
        page, "Do tasks disturb each other?", "Every vector on every task",
        "Do tasks share their insensitive weights?", "What the masks of different tasks share",
        "Where each mask lies",
    )  # fmt: skip
    assert "cannot be shown" not in page


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tasks": None}, "give rows of 'one'"),
        ({"models": {"one": "one"}}, "takes two models or more"),
        ({"disentanglement": {"points": 1}}, "from 2 to 101 different amounts"),
        ({"disentanglement": {"amounts": [1, 1]}}, "from 2 to 101 different amounts"),
        ({"disentanglement": {"range": [2, 1]}}, "two numbers that go up"),
        ({"disentanglement": {"points": 1000}}, "at most 101"),
        ({"disentanglement": {"amounts": [0, 1], "points": 3}}, "not both"),
        ({"disentanglement": {"metric": "clases"}}, "did you mean 'classes'"),
        ({"disentanglement": {"amounts": [0, "x"]}}, "a list of numbers"),
        ({"sensitivity": {"shares": [0.1]}}, "was not asked for"),
        ({"analyses": ["sensitivity"], "sensitivity": {"shares": [2]}}, "in (0, 1)"),
        ({"analyses": ["sensitivity"], "sensitivity": {"share": [0.2]}}, "'shares'"),
        ({"analyses": ["masks"]}, "give a density, or a folder"),
        ({"same_task": "x"}, "belongs to the analysis masks"),
        ({"analyses": ["disentangle"]}, "did you mean 'disentanglement'"),
        ({"rows": 0}, "rows: a whole number from 1"),
        ({"device": "abacus"}, "device: 'abacus' is none"),
    ],
)
def test_what_cannot_be_asked_is_refused(shop: Path, change: dict[str, Any], says: str) -> None:
    """Before any tensor is read, with the key and the remedy."""
    with pytest.raises(SutureError) as caught:
        plan_analysis({**recipe(shop, "disentanglement"), **change}, folder=shop)
    assert says in str(caught.value)


def test_texts_without_classes_and_mixed_forms_are_refused(shop: Path, tmp_path: Path) -> None:
    """A language model's rows have no classes; linearized and plain models do not add up."""
    what = recipe(shop, "function-localization")
    what["tasks"]["two"] = {"data": str(shop / "rows.jsonl"), "kind": "causal"}
    with pytest.raises(SutureError, match="tasks.two is causal"):
        plan_analysis(what)
    loaded = load_encoder(shop / "two", dtype=torch.float32)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "lines")
    (tmp_path / "lines/suture.json").write_text('{"form": "linearized"}')
    what = recipe(shop, "disentanglement")
    what["models"]["two"] = str(tmp_path / "lines")
    with pytest.raises(SutureError, match="linearized and plain models do not add up"):
        plan_analysis(what)


def test_linearized_models_move_along_lines(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features at twice the amount move twice as far: nothing bends, first order is all there is."""
    what: Any = recipe(shop, "function-localization")
    for name in NAMES:
        loaded = load_encoder(shop / name, dtype=torch.float32)
        save_model(loaded.model, loaded.tokenizer, tmp_path / name)
        (tmp_path / name / "suture.json").write_text('{"form": "linearized"}')
        what["models"][name] = str(tmp_path / name)

    found = analysis(what, tmp_path / "o").to_dict()["function_localization"]

    assert found["linearized"]
    assert found["bend"] == 0
    assert found["moved"] == found["first"]


def test_masks_restrict_no_task_vector_that_is_run(shop: Path, tmp_path: Path) -> None:
    """What a whole model does on its rows is the same beside masks that cover one tensor of it."""
    base = suture.open(shop / "base")
    (tmp_path / "masks").mkdir()
    for name in NAMES:
        tau = suture.open(shop / name) - base
        part = tau.select(next(n for n in tau.names if "query.weight" in n))
        localize(part, density=0.5).save(tmp_path / "masks" / f"{name}.safetensors")

    alone = analysis(recipe(shop, "function-localization"), tmp_path / "a").to_dict()
    beside = analysis(
        recipe(shop, "function-localization", "masks", masks=str(tmp_path / "masks")),
        tmp_path / "b",
    ).to_dict()

    assert beside["tensors"] == 1 < alone["tensors"]
    assert beside["function_localization"] == alone["function_localization"]


def test_masks_made_anew_are_over_the_tensors_of_the_first(shop: Path, tmp_path: Path) -> None:
    """Else they cannot be compared, which is told before anything is computed."""
    base = suture.open(shop / "base")
    for name in NAMES:
        tau = suture.open(shop / name) - base
        for folder, names in (("whole", tau.names), ("part", tau.names[:3])):
            (tmp_path / folder).mkdir(exist_ok=True)
            found = localize(tau.select(*names), density=0.5)
            found.save(tmp_path / folder / f"{name}.safetensors")
    for first in ({"density": 0.1}, {"masks": str(tmp_path / "whole")}):
        what = recipe(shop, "masks", **first)
        plan_analysis({**what, "same_task": str(tmp_path / "whole")})
        with pytest.raises(SutureError, match="same_task: one: is not over the tensors"):
            plan_analysis({**what, "same_task": str(tmp_path / "part")})


def test_no_average_is_told_of_amounts_that_were_not_measured(shop: Path, tmp_path: Path) -> None:
    """At (0, 0) alone the error is 0 by its making: the largest of the grid is told instead."""
    what = recipe(shop, "disentanglement", disentanglement={"amounts": [0, 3]})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(what))
    said = invoke("analyze", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert said.code == 0, said.err
    (made,) = json.loads((tmp_path / "out/analysis.json").read_text())["disentanglement"]["maps"]
    lines_of(said.out, f"disentanglement error: at most {np.max(made['error']):.3f}; no amount is")
    assert "on average" not in said.out


def test_a_vector_that_moves_nothing_has_no_share_elsewhere(shop: Path, tmp_path: Path) -> None:
    """A model that is the base is named, where a division by 0 would be written."""
    what = recipe(shop, "function-localization")
    what["models"]["two"] = str(shop / "base")
    with pytest.raises(SutureError, match="two: its task vector moves no features of its own task"):
        analysis(what, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_base_that_knows_nothing_has_no_accuracy_to_keep(shop: Path, tmp_path: Path) -> None:
    """A share of 0 right answers is no number, and not a billion."""
    rows = [{"text": r.text, "label": "sky"} for r in tiny_model.rows(24)]
    (tmp_path / "sky.jsonl").write_text("\n".join(map(json.dumps, rows)))
    head = Head(("colour", "sky"), torch.zeros(2, 16), torch.tensor([1.0, 0.0]))
    save_head(head, tmp_path / "head.safetensors")
    what = recipe(shop, "sensitivity")
    what["tasks"]["two"] = {"data": str(tmp_path / "sky.jsonl"), "max_length": 16,
                            "head": str(tmp_path / "head.safetensors")}  # fmt: skip
    with pytest.raises(SutureError, match="the base gets no row of 'two' right"):
        analysis(what, tmp_path / "o")


def test_a_line_looks_up_its_parameters_once(
    world: tuple[Encoder, PlainSpace, list[Side]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tensors move: a look-up goes through the whole network."""
    encoder, plain, sides = world
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return parameters_of(*args)

    monkeypatch.setattr(space, "parameters_of", counted)
    LinearSpace(encoder, plain.vectors, sides)
    assert len(calls) == 1
