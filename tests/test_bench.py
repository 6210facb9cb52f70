"""The benchmark of task arithmetic: its arithmetic, cells, resume, wrong recipes, the command."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import tiny_model
from suture.analysis import masks
from suture.analysis.arithmetic import entangled, movement, sharing
from suture.analysis.vector_space import LinearSpace, PlainSpace, Side, accuracy, alone, space_of
from suture.checkpoints.checkpoint import open_checkpoint
from suture.cli import app
from suture.edits.mask import Mask
from suture.errors import OutputError, Problems, RecipeError, SutureError
from suture.runs.ledger import Ledger, digest
from suture.runs.progress import Progress
from suture.schema.tuning import TuneSettings
from suture.training import strategies
from suture.training.calibrate import Calibration, sensitivity
from suture.training.data import tokenise
from suture.training.labelled import LabelledText
from suture.training.models import Classifier, Head, device_of, load_encoder, load_tokenizer
from suture.training.tangent import LinearizedBody
from suture.verbs.bench import VERB as bench
from suture.verbs.bench import measures
from suture.verbs.bench.learn import Base, Learnt, learn, load_vectors, save_vectors
from suture.verbs.bench.maths import (
    best_amount,
    claim,
    largest_kept,
    matched,
    normalised,
    spread,
    within_one_interval,
)
from suture.verbs.bench.plan import make_plan as plan_bench
from suture.verbs.bench.recipe import MEASURES, Bench, Grids, Line, read_bench
from suture.verbs.bench.tasks import TASKS, divide, package_folders
from suture.verbs.report.collect import gather

STRATEGIES: dict[str, dict[str, Any]] = {
    "full": {"parameters": {"embeddings": False}},
    "linearized": {"parameters": {"embeddings": False}},
    "lora": {"parameters": {"rank": 2, "alpha": 4.0}},
    "linearized-lora": {"parameters": {"rank": 2, "alpha": 4.0}},
    "lota": {"parameters": {"density": 0.2}},
    "talos": {"parameters": {"density": 0.2, "rows": 8}},
    "random": {"strategy": "masked", "parameters": {"mask": "random", "density": 0.2}},
}
"""Every strategy with parameters that suit a tiny model."""


# ------------------------------------------------------------------------------------- arithmetic


def test_the_amount_with_the_best_normalised_accuracy_is_chosen() -> None:
    """By hand: ratios to the single models count, not accuracies; the smallest of equal ones wins."""
    single = [0.5, 1.0]
    scores = {0.5: [0.5, 0.8], 1.0: [0.25, 1.0], 0.8: [0.5, 0.8]}

    # ratios: 0.5 -> (1 + .8)/2 = .9; 1.0 -> (.5 + 1)/2 = .75, although its mean accuracy is nearly as high
    assert best_amount(scores, single) == 0.5
    assert normalised([0.25, 1.0], single) == pytest.approx(0.75)
    with pytest.raises(RecipeError, match="no ratio"):
        normalised([0.5], [0.0])


def test_the_largest_amount_that_keeps_the_control_is_chosen() -> None:
    """Every amount is judged by itself, up to the limit; the base is what is left."""
    control = {0.5: 0.60, 1.0: 0.56, 1.5: 0.57, 2.0: 0.40}

    assert largest_kept(control, 0.6, keep=0.95) == 1.5  # 0.57 is exactly 95 %
    assert largest_kept(control, 0.6, keep=0.95, most=1.0) == 0.5
    assert largest_kept(control, 0.6, keep=0.99, most=0.4) == 0.0


def test_a_t_interval_is_that_of_the_textbook() -> None:
    """Three seeds: t = 4.303 with two degrees of freedom; one seed has no interval."""
    found = spread([1.0, 2.0, 3.0])

    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 / math.sqrt(3))
    assert found.low == pytest.approx(2 - found.half)
    assert (spread([0.4]).low, spread([0.4]).half) == (None, 0.0)
    with pytest.raises(RecipeError, match="no values"):
        spread([])


@pytest.mark.parametrize(
    ("seeds", "quantile"),
    [(2, 12.706), (10, 2.262), (11, 2.228), (12, 2.201), (16, 2.131), (31, 2.042), (121, 1.980)],
)
def test_t_intervals_of_many_seeds_are_no_narrower_than_they_must_be(
    seeds: int, quantile: float
) -> None:
    """Of any number of seeds, with the quantiles of a printed table of Student's t."""
    values = [float(i) for i in range(seeds)]
    found = spread(values)
    error = statistics.stdev(values) / math.sqrt(seeds)
    assert found.half / error == pytest.approx(quantile, abs=1e-3)


def test_checkpoints_are_matched_where_single_models_are_equally_good() -> None:
    """The one that ends lower stays at its end; the later of two equally near ones is taken."""
    assert matched([0.5, 0.6], [0.5, 0.62, 0.9]) == (1, 1)
    assert matched([0.5, 0.75, 0.9], [0.4, 0.7]) == (1, 1)
    assert matched([0.5, 0.5, 0.9], [0.5]) == (1, 0)
    assert within_one_interval(0.62, 0.60, 200)
    assert not within_one_interval(0.72, 0.60, 200)


def test_claims_are_judged_by_paired_differences() -> None:
    """Clear, clearly the opposite, and not decided; one seed decides nothing."""
    assert claim("x", [0.9, 0.91, 0.92], [0.5, 0.51, 0.52]).verdict == "holds"
    assert "opposite" in claim("x", [0.5, 0.51, 0.52], [0.9, 0.91, 0.92]).verdict
    assert "holds 0" in claim("x", [0.5, 0.9, 0.4], [0.6, 0.5, 0.5]).verdict
    assert "one seed" in claim("x", [0.9], [0.1]).verdict
    # the same noise in both is no noise in the difference
    assert claim("x", [0.1, 0.5, 0.9], [0.0, 0.4, 0.8]).difference.half == pytest.approx(
        0, abs=1e-9
    )


def test_chances_of_entries_have_the_sums_of_the_mask() -> None:
    """Rows and columns keep their expected numbers of entries; full and empty lines, too."""
    dice = np.random.default_rng(0)
    mask = dice.random((60, 40)) < np.outer(dice.random(60) ** 2, dice.random(40))
    mask[3], mask[5] = False, True

    chance = masks.chances(mask)

    assert np.abs(chance.sum(1) - mask.sum(1)).max() < 0.5
    assert np.abs(chance.sum(0) - mask.sum(0)).max() < 0.5
    assert not chance[3].any()
    assert (chance[5] > 0.98).all()


def test_overlap_of_masks_beside_chance() -> None:
    """Random masks overlap as chance says; masks of the same rows as the null of rows says."""
    dice = np.random.default_rng(1)
    shape, rows = (200, 100), dice.random((200, 1))
    plain = [Mask.of({"a.weight": dice.random(shape) < 0.2}) for _ in range(2)]
    lines = [Mask.of({"a.weight": dice.random(shape) < rows**3}) for _ in range(2)]

    found, ruled = masks.overlaps(plain), masks.overlaps(lines)

    assert found["iou"] == pytest.approx(0.2 / 1.8, abs=0.01)
    assert found["random"] == pytest.approx(found["lines"], abs=0.01)
    assert ruled["iou"] == pytest.approx(ruled["lines"], abs=0.02)
    assert ruled["iou"] > 2 * ruled["random"]
    assert masks.overlaps([plain[0], plain[0]])["iou"] == 1.0


# ----------------------------------------------------------------------------- vectors and spaces


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tiny_model.folder(tmp_path_factory.mktemp("bench") / "base")
    checkpoint = open_checkpoint(folder)
    return Base(load_encoder(folder, dtype=torch.float32).model, checkpoint, "tiny")


@pytest.fixture(scope="module")
def sides(base: Base) -> list[Side]:
    """Two tasks with heads of their own: colours or sky, and the number of words."""
    tokenizer = load_tokenizer(base.checkpoint.folder)
    rows = tiny_model.rows(48)
    other = [
        LabelledText(row.text, "long" if len(row.text.split()) > 4 else "short") for row in rows
    ]
    found = []
    for seed, (name, task) in enumerate((("kind", rows), ("length", other))):
        labels = tuple(sorted({row.label for row in task}))
        data = {
            part: tokenise(task[i::3], tokenizer, labels=labels, max_length=16)
            for i, part in enumerate(("train", "validation", "test"))
        }
        data["probe"] = data["test"]
        dice = torch.Generator().manual_seed(seed)
        head = Head(labels, torch.randn(2, 16, generator=dice), torch.zeros(2))
        found.append(Side(name, head, data, name))
    return found


def line_of(name: str) -> Line:
    raw = STRATEGIES[name]
    return Line(
        name, strategies.STRATEGIES.find(raw.get("strategy", name)), raw["parameters"], (5e-3,)
    )


def learnt(base: Base, side: Side, name: str) -> Learnt:
    training = TuneSettings(epochs=4, batch=8, weight_decay=0.0)
    return learn(base, line_of(name), 2e-2, side, training, 0, (0.5, 1.0))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_vector_put_back_is_the_model_that_was_trained(
    base: Base, sides: list[Side], name: str
) -> None:
    """At every checkpoint the space gives the accuracy that was measured while training."""
    before = {n: p.detach().clone() for n, p in base.encoder.named_parameters()}
    found = learnt(base, sides[0], name)

    assert found.steps == (4, 8)
    for vector, score in zip(found.vectors, found.validation, strict=True):
        space = space_of(name == "linearized", base.encoder, [vector], sides)
        assert accuracy(space, (1.0,), 0, "validation") == pytest.approx(score)
    assert any((v != found.vectors[0].get(n, 0)).any() for n, v in found.vectors[1].items())
    assert all(torch.equal(p, before[n]) for n, p in base.encoder.named_parameters())
    if found.mask is not None:
        for n, delta in found.vectors[-1].items():
            assert not (delta.numpy()[~found.mask[n]]).any(), n


def test_there_is_a_vector_for_every_checkpoint_of_a_short_training(
    base: Base, sides: list[Side]
) -> None:
    """Checkpoints that fall on the same step are the same vector; none is missing."""
    training = TuneSettings(epochs=1, steps=2, batch=8)
    found = learn(base, line_of("full"), 1e-2, sides[0], training, 0, (0.25, 0.5, 1.0))

    assert found.steps == (1, 1, 2)
    assert len(found.vectors) == len(found.validation) == 3
    assert all(torch.equal(v, found.vectors[1][n]) for n, v in found.vectors[0].items())


def test_vectors_come_back_from_disk_as_they_were(
    base: Base, sides: list[Side], tmp_path: Path
) -> None:
    """Dense and sparse ones, every checkpoint by itself."""
    for name in ("full", "talos"):
        vectors = learnt(base, sides[0], name).vectors
        save_vectors(vectors, tmp_path / "v.safetensors")
        for number, vector in enumerate(vectors):
            again = load_vectors(tmp_path / "v.safetensors", number)
            assert again.keys() == vector.keys()
            assert all(torch.equal(again[n], v) for n, v in vector.items())


def test_vectors_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    """A file where the folder should be: an error with the place, and nothing half."""
    (tmp_path / "vectors").write_text("")
    with pytest.raises(OutputError, match=r"vectors.v\.safetensors"):
        save_vectors([{"a": torch.ones(3)}], tmp_path / "vectors" / "v.safetensors")


def test_points_do_not_depend_on_the_way_to_them(base: Base, sides: list[Side]) -> None:
    """After any points, the base says the same again, bit by bit, and so does a fresh space."""
    vectors = [learnt(base, side, "full").vectors[-1] for side in sides]
    space = PlainSpace(base.encoder, vectors, sides)
    space.predict((0.3, -2.0), 0, "test")
    space.predict((0.0, 0.0), 0, "test")

    for n, p in space.encoder.named_parameters():
        assert torch.equal(p, base.encoder.get_parameter(n))
    fresh = PlainSpace(base.encoder, vectors, sides).predict((1.0, 0.5), 1, "test")
    assert np.array_equal(space.predict((1.0, 0.5), 1, "test"), fresh)
    assert alone(3, 1, -0.5) == (0.0, -0.5, 0.0)


def test_the_linearized_space_is_the_linearized_model(base: Base, sides: list[Side]) -> None:
    """Sums of vectors, added up from products, are the product with the sum."""
    vectors = [learnt(base, side, "linearized").vectors[-1] for side in sides]
    third = {n: 0.5 * t for n, t in vectors[0].items()}
    space = LinearSpace(base.encoder, [*vectors, third], sides)
    for amounts in ((0.7, -1.0, 0.0), (1.0, 1.0, 1.0)):
        total = {
            f"backbone.{n}": sum(a * v[n] for a, v in zip(amounts, [*vectors, third], strict=True))
            for n in vectors[0]
        }
        body = LinearizedBody(base.encoder, total)
        model = Classifier(base.encoder, sides[1].head).with_body(body)
        batch = next(sides[1].data["test"].batches(64))
        expected = np.empty(len(batch.rows), np.int64)
        expected[list(batch.rows)] = model(batch.input_ids, batch.attention_mask).argmax(1)
        assert np.array_equal(space.predict(amounts, 1, "test"), expected)


class Known:
    """A space whose answers are written down: accuracy falls with what other vectors do."""

    def __init__(self, sides: list[Side], count: int, control: Any = None) -> None:
        self.sides, self.count, self.control = sides, count, control

    def predict(self, amounts: tuple[float, ...], task: int, part: str) -> Any:
        right = np.asarray(self.sides[task].data[part].labels)
        others = sum(abs(a) for i, a in enumerate(amounts) if i != task)
        share = min(1.0, 0.5 + 0.5 * (amounts[task] if task < self.count else 0) - 0.25 * others)
        wrong = len(right) - round(max(0.0, share) * len(right))
        return np.where(np.arange(len(right)) < wrong, 1 - right, right)


def test_measures_by_hand(sides: list[Side]) -> None:
    """Addition takes the best amount; negation keeps the control; drift is off the diagonal."""
    space = Known([*sides, sides[0]], 2)

    found = measures.addition(space, (0.5, 1.0))
    assert found["alpha"] == 1.0  # 0.5 + 0.25 a
    assert found["absolute"] == pytest.approx(0.75, abs=0.04)
    assert found["normalised"] == pytest.approx(0.75, abs=0.04)
    assert found["single_mean"] == 1.0
    removed = measures.negation(space, Grids(negation=(0.2, 0.4, 1.0, 2.0), keep=0.75))
    # the control falls by a quarter of the amount from a half: 0.4 is as far as 0.75 of it goes
    assert [t["alpha"] for t in removed["limits"]["2"]] == [0.4, 0.4]
    assert [t["alpha"] for t in removed["limits"]["1"]] == [0.4, 0.4]
    assert removed["limits"]["2"][0]["target"] < removed["base"][0]
    mixed = entangled(space, (0.0, 1.0), ["kind", "length"])
    assert mixed["transfer"][0][0] > 0 > mixed["transfer"][0][1]
    assert mixed["drift"][1][0] == pytest.approx(0.25, abs=0.04)
    assert mixed["xi"] == pytest.approx(0.5, abs=0.07)  # a quarter in each of both tasks


def test_small_vectors_move_features_to_first_order(base: Base, sides: list[Side]) -> None:
    """The bend goes with the square of the amount; a linearized space has none at all."""
    few = [replace(s, data={**s.data, "few": s.data["test"]}) for s in sides]
    vectors = [learnt(base, side, "full").vectors[-1] for side in sides]
    bends = []
    for amount in (0.02, 0.01):
        small = [{n: amount * t for n, t in v.items()} for v in vectors]
        found = movement(PlainSpace(base.encoder, small, few), base.encoder)
        assert found["elsewhere"] == pytest.approx(found["elsewhere_first"], rel=0.1)
        bends.append(found["bend"])
    assert bends[0] / bends[1] == pytest.approx(4, rel=0.3)
    found = movement(LinearSpace(base.encoder, vectors, few), base.encoder)
    assert (found["bend"], found["moved"]) == (0, found["first"])


def test_what_is_least_sensitive_is_set_to_0_and_nothing_else(
    base: Base, sides: list[Side]
) -> None:
    """The base is as it was afterwards; all three choices are measured on every task."""
    before = {n: p.detach().clone() for n, p in base.encoder.named_parameters()}
    found = sharing(base.encoder, sides, 0, (0.5,), Calibration(rows=8, seed=0))

    assert found["rows"].keys() == {"least", "random", "most"}
    assert all(len(shares["0.5"]) == 2 for shares in found["rows"].values())
    assert all(torch.equal(p, before[n]) for n, p in base.encoder.named_parameters())


def test_sensitivity_is_measured_where_the_model_lies(
    base: Base, sides: list[Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows go to the device of the encoder, wherever that is."""
    asked: list[str] = []

    def measured(*args: Any, device: str = "elsewhere", **more: Any) -> Any:
        asked.append(device)
        return sensitivity(*args, device=device, **more)

    monkeypatch.setattr("suture.analysis.arithmetic.sensitivity", measured)
    sharing(base.encoder, sides, 0, (0.5,), Calibration(rows=8, seed=0))

    assert asked == [str(device_of(base.encoder))]


# ------------------------------------------------------------------------------------- whole runs


def write_task(path: Path, number: int) -> None:
    rows = tiny_model.rows(96)
    texts = [(f"{row.text} {tiny_model.WORDS[8 + number]}", row.label) for row in rows]
    lines = [json.dumps({"text": text, "label": label}) for text, label in texts]
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A base, three tasks in files and a recipe."""
    tiny_model.folder(tmp_path / "base")
    for number, name in enumerate(("one", "two", "rest")):
        write_task(tmp_path / f"{name}.jsonl", number)
    recipe = {
        "base": "base",
        "tasks": [{"name": "one", "file": "one.jsonl"}, {"name": "two", "file": "two.jsonl"}],
        "control": {"name": "rest", "file": "rest.jsonl"},
        "rows": {"train": 24, "validation": 12, "test": 12, "control": 12, "max_length": 16},
        "training": {"batch": 8, "epochs": 2, "checkpoints": [0.5, 1.0], "choose_lr_on": ["one"]},
        "strategies": {
            "full": {"parameters": {"embeddings": False}, "lr": [1e-3, 1e-2]},
            "talos": {"parameters": {"density": 0.2, "rows": 8, "rounds": 2}, "lr": 1e-2},
            "linearized": {"lr": 1e-2, "negation": False},
        },
        "seeds": [0, 1],
        "addition": {"alphas": [0.5, 1]},
        "negation": {"alphas": [0.5, 1.0, 2.0]},
        "disentanglement": {"amounts": [1.0], "rows": 6},
        "sensitivity": {"shares": [0.2]},
    }
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return tmp_path


def test_a_run_gives_tables_claims_and_curves(shop: Path) -> None:
    """Everything that was asked for is in the results; numbers agree with their cells."""
    told: list[str] = []
    found = bench(shop / "bench.yaml", shop / "out", progress=Progress(say=told.append))

    assert found["complete"]
    assert found["lines"].keys() == {"full", "talos", "linearized"}
    assert found["lines"]["full"]["lr"] in (1e-3, 1e-2)
    assert set(found["lines"]["full"]["choice"]) == {"0.001", "0.01"}
    cells = [json.loads(p.read_text()) for p in (shop / "out/cells").glob("addition-talos-*")]
    ends = [c for c in cells if c["inputs"][1] == 1]
    absolute = [c["value"]["absolute"] for c in ends]
    assert found["lines"]["talos"]["absolute"]["mean"] == pytest.approx(np.mean(absolute))
    assert found["lines"]["talos"]["masks"]["query_key"]["mean"] <= 1
    assert found["lines"]["talos"]["masks"]["ceiling"] > 0
    assert "negation" not in found["lines"]["linearized"]
    texts = [c["text"] for c in found["claims"]]
    assert any("matched single-task accuracy" in text for text in texts)
    assert all(c["difference"]["low"] <= c["difference"]["mean"] for c in found["claims"])
    page = (shop / "out/results.md").read_text()
    for heading in ("Addition", "matched", "Negation", "Masks", "Claims", "insensitive"):
        assert heading in page
    assert any("cells to go, about" in text for text in told)
    assert len(gather(shop / "out").curves) == 2
    assert not list((shop / "out/vectors").glob("*"))


def test_a_second_run_makes_no_cell_again(shop: Path) -> None:
    """Nothing is made twice; what a changed recipe needs is, and comes out as before."""
    first = bench(shop / "bench.yaml", shop / "out")
    told: list[str] = []
    again = bench(shop / "bench.yaml", shop / "out", progress=Progress(say=told.append))
    assert told == []
    assert again == first

    def look(text: str) -> None:
        told.append(text)
        assert json.loads((shop / "out/results.json").read_text())["lines"].keys() == {
            "full", "talos", "linearized"
        }  # fmt: skip

    for cell in (shop / "out/cells").glob("addition-talos-seed1-*"):
        cell.unlink()  # its vectors are gone, too: they are trained again
    third = bench(
        shop / "bench.yaml", shop / "out", progress=Progress(say=look)
    )  # the tables never shrink
    made = {text.partition(":")[0].rsplit("-lr", 1)[0] for text in told}
    assert made == {"addition-talos-seed1", "train-talos-one-seed1", "train-talos-two-seed1"} or (
        made == {"addition-talos-seed1", "addition-talos-seed1-checkpoint1",
                 "train-talos-one-seed1", "train-talos-two-seed1"}
    )  # fmt: skip
    assert {**third, "cells": 0} == {**first, "cells": 0}


def test_a_killed_run_loses_one_cell_at_most(shop: Path) -> None:
    """After kill -9, and with half a cell on disk, the run ends with the same results."""
    recipe = yaml.safe_load((shop / "bench.yaml").read_text()) | {"seeds": [0]}
    (shop / "bench.yaml").write_text(yaml.safe_dump(recipe))
    expected = bench(shop / "bench.yaml", shop / "whole")
    code = ("import sys\nfrom pathlib import Path\nfrom suture.verbs.bench import VERB as bench\n"
            "import torch\ntorch.set_num_threads(1)\n"
            "bench(Path(sys.argv[1]), Path(sys.argv[2]))")  # fmt: skip
    place = shop / "killed"
    child = subprocess.Popen([sys.executable, "-c", code, shop / "bench.yaml", place])
    deadline = time.monotonic() + 100
    while len(list(place.glob("cells/*.json"))) < 6 and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in place.glob("cells/*.json")}
    assert len(kept) >= 6
    torn = next(place.glob("cells/base-seed0*"))
    torn.write_text(torn.read_text()[:40])

    found = bench(shop / "bench.yaml", place)

    now = {p.name: p.stat().st_mtime_ns for p in place.glob("cells/*.json")}
    assert {n for n, t in kept.items() if now[n] != t} == {torn.name}
    assert {**found, "cells": 0} == {**expected, "cells": 0}


def test_a_folder_is_worked_on_by_one_process(shop: Path) -> None:
    """A second process would delete vectors that the first one needs; it is refused."""
    out = shop / "out"
    refused: list[str] = []

    def tell(text: str) -> None:
        if not refused:
            with pytest.raises(OutputError, match="another process") as caught:
                bench(shop / "bench.yaml", out)
            refused.append(str(caught.value))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(shop / "bench.yaml", out, progress=Progress(say=tell))
    assert refused
    assert list(out.glob("cells/*.json"))


def test_the_clock_goes_by_cells_of_the_same_kind(tmp_path: Path) -> None:
    """Known kinds count by their own time, others by what does the same elsewhere."""
    ledger = Ledger(tmp_path, lambda _: None)
    ledger.pending.update({("train", "a"): 2, ("train", "b"): 1, ("masks", "a"): 1})
    for number, seconds in enumerate((4.0, 6.0)):
        key = digest(number)
        text = json.dumps({"key": key, "seconds": seconds, "value": number})
        ledger.path("x", key).write_text(text)
        assert ledger.cell(("train", "a"), "x", number, lambda: None) == number
    # train/a is done; train/b takes the mean of train cells, masks/a that of all
    assert ledger.pending["train", "a"] == 0
    assert ledger.eta() == pytest.approx(5.0 + 5.0)


# --------------------------------------------------------------------------- tasks and their rows


def test_rows_are_divided_evenly_and_leak_nothing() -> None:
    """Each text is on one side, labels are as even as can be, other rows move nothing."""
    rows = [LabelledText(f"text {i}", "abc"[0 if i % 10 else 1 + i % 20 // 10]) for i in range(400)]
    parts = divide(rows, train=60, validation=20, test=20, seed=0)

    texts = [{row.text for row in side} for side in parts]
    assert [len(t) for t in texts] == [60, 20, 20]
    assert len(set.union(*texts)) == 100
    counts = [sum(row.label == word for row in parts.train) for word in "abc"]
    assert min(counts) > 8  # of a tenth of the rows, a fifth of the sample or more
    more = divide([*rows, *(LabelledText(f"new {i}", "a") for i in range(50))],
                  train=600, validation=200, test=200, seed=0)  # fmt: skip
    assert not {r.text for r in more.train} & texts[2]
    with pytest.raises(RecipeError, match="1 labels"):
        divide(
            [LabelledText(str(i), "same") for i in range(99)], train=9, validation=9, test=9, seed=0
        )


def test_tasks_of_packages_are_there_or_named() -> None:
    """Every task that a recipe may name says what it needs; missing packages come with the remedy."""
    assert {"topics", "bias", "languages", "order", "harm"} <= set(TASKS)
    assert all(task.needs and task.about for task in TASKS.values())
    from suture.verbs.bench import tasks as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.PACKAGES, "no-such-thing", "no_such_thing")
        with pytest.raises(SutureError, match=r"no-such-thing: .*requirements/bench.txt"):
            package_folders(["no-such-thing"])


# ---------------------------------------------------------------------------------- wrong recipes


def bench_of(source: Path | dict[str, Any], folder: Path | None = None) -> Bench:
    """A recipe that is read, or all that is wrong with it."""
    problems = Problems()
    found = read_bench(source, problems, folder)
    problems.raise_if_any()
    assert found is not None
    return found


def test_all_that_is_wrong_with_a_recipe_is_told_at_once(shop: Path) -> None:
    """Unknown words with the nearest known ones, values out of range, things that do not fit."""
    raw = yaml.safe_load((shop / "bench.yaml").read_text())
    raw |= {
        "base": "elsewhere", "tasks": ["topicks", {"name": "one"}], "control": None,
        "heads": "probe", "head": "proof", "reference": "ful", "seeds": [0.5],
        "measure": ["adition", "negation"], "rows": {"train": 1},
        "training": {"lr": 1e-3, "checkpoints": [0.5], "choose_lr_on": ["three"]},
        "addition": {"alphas": [1.0, 0.5]}, "negation": {"keep": 2},
        "strategies": {
            "full": {"lr": "fast"}, "talus": {"lr": 1e-3},
            "talos": {"lr": 0.0, "parameters": {"density": 3, "rouns": 4}},
        },
    }  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        bench_of(raw, shop)
    problems = caught.value.problems  # type: ignore[attr-defined]
    for part in (
        "base: no folder", "did you mean 'topics'", "a name and a file", "'heads'", "head: 'proof'",
        "reference: 'ful'", "seeds[0]: a whole number", "did you mean 'addition'", "rows.train",
        "training.lr", "the last is 1", "addition.alphas", "negation.keep",
        "strategies.full.lr", "no strategy 'talus'", "strategies.talos.lr", "'rouns'", "density",
    ):  # fmt: skip
        assert any(part in text for text in problems), (part, problems)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": ["bias"]}, "two or more"),
        ({"tasks": "bias"}, "tasks: a list"),
        ({"training": {"choose_lr_on": ["three"]}}, "choose_lr_on: some of the tasks"),
        ({"control": None}, "control: negation needs"),
        ({"strategies": {}}, "strategies: a mapping from names to strategies"),
        ({"strategies": {"full": 3}}, "strategies.full"),
        ({"measure": []}, "measure: a list"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 2, 1]}, "stands twice"),
        ({"strategies": {"a/b": {"strategy": "full", "lr": 1e-3}}}, "a name is made of"),
        ({"tasks": ["bias", {"name": "../x", "file": "one.jsonl"}]}, "a name of letters"),
        ({"training": {"steps": "many"}}, "training.steps"),
        ({"training": {"schedule": "wavy"}}, "schedule"),
        ({"control": "bias", "tasks": ["bias", "topics"]}, "control: bias is one of the tasks"),
        ({"tasks": ["bias", "bias"]}, "stands twice"),
        ({"tasks": [{"name": "a", "file": "none.jsonl"}, "bias"]}, "no file"),
    ],
)
def test_wrong_recipes_are_refused(shop: Path, change: dict[str, Any], words: str) -> None:
    """Each by a message that names the place."""
    raw = {**yaml.safe_load((shop / "bench.yaml").read_text()), **change}
    with pytest.raises(RecipeError, match=words):
        bench_of(raw, shop)


def test_what_only_files_tell_is_checked_before_anything_is_trained(shop: Path) -> None:
    """A task of one label, a base that is no model, an output that holds something else."""
    (shop / "one.jsonl").write_text('{"text": "red sun", "label": "a"}\n' * 3)
    (shop / "out").mkdir()
    (shop / "out" / "thesis.txt").write_text("mine")
    (shop / "base" / "config.json").unlink()
    with pytest.raises(SutureError) as caught:
        plan_bench(shop / "bench.yaml", shop / "out")
    text = str(caught.value)
    assert "tasks: one" in text
    assert "no config.json" in text
    assert "was not written by `suture bench`" in text
    assert (shop / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["[1, 2]", "base: [", "\x00"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    """Lists, broken YAML and bytes; and a file that is not there."""
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError):
        bench_of(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match=r"none\.yaml"):
        bench_of(tmp_path / "none.yaml")


def test_the_recipes_of_the_repository_are_recipes() -> None:
    """Both examples are read; the large one has every strategy, six tasks and three seeds."""
    examples = Path(__file__).parents[1] / "examples"
    large = bench_of(examples / "bench.yaml")
    assert {line.strategy.name for line in large.lines} == {
        "full", "linearized", "lora", "linearized-lora", "lota", "talos", "masked"
    }  # fmt: skip
    assert (len(large.tasks), len(large.seeds)) == (6, 3)
    assert large.measure == MEASURES
    assert bench_of(examples / "bench-quick.yaml").seeds == (0,)
    assert json.dumps(large.resolved())


# ------------------------------------------------------------------------------------ the command


def test_the_command_checks_runs_and_prints(shop: Path) -> None:
    """--dry-run writes nothing; the run prints its tables; errors have exit code 2."""
    runner = CliRunner()
    recipe, out = str(shop / "bench.yaml"), str(shop / "out")
    raw = yaml.safe_load((shop / "bench.yaml").read_text())
    raw |= {"seeds": [0], "measure": ["addition"]}
    raw["strategies"] = {"full": {"lr": 1e-3}}
    (shop / "bench.yaml").write_text(yaml.safe_dump(raw))

    dry = runner.invoke(app, ["bench", recipe, "-o", out, "--dry-run"])
    assert (dry.exit_code, "nothing was written" in dry.output) == (0, True)
    assert not (shop / "out").exists()
    done = runner.invoke(app, ["bench", recipe, "-o", out, "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert "| full |" in done.output
    as_json = runner.invoke(app, ["bench", recipe, "-o", out, "--json"])
    assert json.loads(as_json.stdout)["complete"]
    (shop / "bench.yaml").write_text("tasks: [bias]")
    wrong = runner.invoke(app, ["bench", recipe, "-o", out])
    assert wrong.exit_code == 2
    assert "tasks" in wrong.output


def test_probe_heads_are_fitted_on_training_rows(shop: Path) -> None:
    """The other kind of frozen head; no control and no negation are needed."""
    raw = yaml.safe_load((shop / "bench.yaml").read_text())
    raw |= {"head": "probe", "control": None, "measure": ["disentanglement"], "seeds": [0]}
    raw["strategies"] = {"full": {"lr": 1e-3}, "random": {
        "strategy": "masked", "parameters": {"mask": "random"}, "lr": 1e-2}}  # fmt: skip
    raw["base"] = str(shop / "base")
    for task in raw["tasks"]:
        task["file"] = str(shop / task["file"])
    found = bench(raw, shop / "out")
    assert found["lines"]["random"]["xi"]["mean"] >= 0
    assert "absolute" not in found["lines"]["random"]
    assert found["lines"]["random"]["matched"]["own_xi"]["mean"] >= 0
    assert bench_of(raw).model_copy(update={"seeds": (4,)}).resolved()["seeds"] == [4]
