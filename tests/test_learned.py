"""Learned masks: the gradient is that of the objective, the penalties push where they should."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import suture
import tiny_model
from suture.edits.stats import Stats
from suture.errors import NonFiniteError, Problems, RecipeError
from suture.schema.read import parse
from suture.schema.tuning import LEARN_PRESETS, LearnSettings
from suture.training.data import Dataset, tokenise
from suture.training.mask_learning import _Trainer, gradient, learn, penalty
from suture.training.measure import OBJECTIVES, measure
from suture.training.models import Classifier, Head, load_encoder, save_model
from suture.verbs.localize.recipe import Regions

LABELS = ("colour", "sky")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base, a model tuned from it, a head, rows: all tiny."""
    folder = tmp_path_factory.mktemp("task")
    base = tiny_model.folder(folder / "base")
    loaded = load_encoder(base, dtype=torch.float32)
    draw = torch.Generator().manual_seed(1)
    head = Head(LABELS, torch.randn(2, loaded.model.dim, generator=draw), torch.zeros(2))
    data = tokenise(tiny_model.rows(24), loaded.tokenizer, labels=LABELS, max_length=16)
    model = Classifier(loaded.model, head).eval()
    optimizer = torch.optim.Adam(loaded.model.parameters(), lr=3e-3)
    for batch in data.batches(24):
        for _ in range(15):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.input_ids, batch.attention_mask), batch.labels).backward()
            optimizer.step()
    save_model(loaded.model, loaded.tokenizer, folder / "tuned")
    tau = suture.open(folder / "tuned") - suture.open(base)

    class Task:
        vector = tau.select(exclude=["embedding", "pooler"])
        rows = data
        place = folder

        @staticmethod
        def model(which: str = "base") -> Classifier:
            return Classifier(load_encoder(folder / which, dtype=torch.float32).model, head).eval()

    return Task


def objective_value(task: Any, logits: dict[str, torch.Tensor], reg: str, strength: float) -> float:
    """J(S) by its definition, in float64, with a fresh model."""
    model = task.model().double()
    parameters = dict(model.encoder.backbone.named_parameters())
    with torch.no_grad():
        for name, s in logits.items():
            delta = torch.from_numpy(task.vector[name]).double()
            parameters[name].add_(s.double().sigmoid() * delta)
        batch = next(iter(task.rows.batches(len(task.rows))))
        loss = F.cross_entropy(model(batch.input_ids, batch.attention_mask), batch.labels)
        return float(loss + sum(penalty(s.double(), reg, strength) for s in logits.values()))


@pytest.mark.parametrize("reg", ["l1", "polarize", "none"])
def test_the_gradient_is_that_of_the_objective(reg: str, task: Any) -> None:
    """dJ/dS agrees with central differences of J, for each penalty, in random directions."""
    draw = torch.Generator().manual_seed(3)
    model, strength = task.model().double(), 1e-3
    from suture.training.models import parameters_of

    parameters = parameters_of(model, task.vector.names)
    settings = LearnSettings(reg=reg, strength=strength, step="raw", batch=len(task.rows))
    trainer = _Trainer(task.vector, parameters, settings, "cpu")
    for values in (trainer.base, trainer.tau, trainer.use):
        for name in values:
            values[name] = values[name].double()
    trainer.logits = {
        n: 2 * torch.randn(t.shape, generator=draw, dtype=torch.float64)
        for n, t in trainer.tau.items()
    }
    trainer.place()
    trainer.gather(model, task.rows, OBJECTIVES["classification"])
    slopes = {n: gradient(trainer.use[n], s, reg, strength) for n, s in trainer.logits.items()}

    for _ in range(4):
        way = {
            n: torch.randn(s.shape, generator=draw, dtype=torch.float64)
            for n, s in trainer.logits.items()
        }
        step = 1e-5
        ahead, back = (
            objective_value(
                task,
                {n: s + sign * step * way[n] for n, s in trainer.logits.items()},
                reg,
                strength,
            )
            for sign in (1, -1)
        )
        expected = (ahead - back) / (2 * step)
        found = sum(float((slopes[n] * way[n]).sum()) for n in way)
        assert abs(found - expected) < 1e-5 * max(1e-3, abs(expected)), (found, expected)


@pytest.mark.parametrize("step", ["rms", "adam", "raw"])
def test_penalties_push_where_they_should(step: str, task: Any) -> None:
    """Without a loss, ``l1`` lowers every logit and ``polarize`` moves every one away from 0."""
    for reg in ("l1", "polarize"):
        lr = 1e7 if step == "raw" else 0.1
        settings = LearnSettings(reg=reg, strength=1.0, step=step, lr=lr)
        trainer = _Trainer(task.vector, {}, settings, "cpu")
        trainer.open({n: torch.from_numpy(task.vector[n]) > 0 for n in task.vector.names})
        before = {n: s.clone() for n, s in trainer.logits.items()}

        trainer.step()

        for name, s in trainer.logits.items():
            if reg == "l1":
                assert (s < before[name]).all()
            else:
                assert (s.abs() > before[name].abs()).all()
                assert torch.equal(s.sign(), before[name].sign())


def test_learning_lowers_the_loss_and_leaves_the_model_alone(task: Any) -> None:
    """The trained masks fit better than those they started from; the model is as before, bit for bit."""
    model = task.model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    seen: list[Any] = []

    found = learn(
        task.vector, model, task.rows, LearnSettings(epochs=8, reg="none"), progress=seen.append
    )

    assert found.facts["losses"][-1] < found.facts["losses"][0]
    assert [e.epoch for e in seen] == list(range(1, 9))
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    again = learn(task.vector, task.model(), task.rows, LearnSettings(epochs=8, reg="none"))
    assert all(np.array_equal(again.tensors[k], v) for k, v in found.tensors.items())


def test_learned_logits_become_masks(task: Any, tmp_path: Path) -> None:
    """To an exact density, or to what is above 0; through a file, too."""
    found = learn(task.vector, task.model(), task.rows, LearnSettings(epochs=3))
    found.save(tmp_path / "logits.safetensors")

    some = suture.localize(
        task.vector, "learned", density=0.02, stats=tmp_path / "logits.safetensors"
    )
    open_ = suture.localize(task.vector, "learned", positive=True, stats=found)

    assert some.count == round(0.02 * some.size)
    assert open_.count == sum(int((v > 0).sum()) for v in found.tensors.values())
    least = min(float(v[some[k[6:]]].min()) for k, v in found.tensors.items() if some[k[6:]].any())
    assert all((v[~some[k[6:]]] <= least).all() for k, v in found.tensors.items())


def test_one_step_ranks_by_the_saving(task: Any) -> None:
    """``first_order`` is minus delta times the gradient at the tuned model."""
    stats = measure(task.model("tuned"), task.rows, ["grad"], names=task.vector.names)

    mask = suture.localize(task.vector, "first_order", density=0.05, stats=stats)

    saving = np.concatenate(
        [(-task.vector[n] * stats.whole("grad", n)).ravel() for n in sorted(task.vector)]
    )
    marks = np.concatenate([mask[n].ravel() for n in sorted(task.vector)])
    assert marks.sum() == round(0.05 * marks.size)
    assert saving[marks].min() >= saving[~marks].max()


def settings_from(learning: dict[str, Any], problems: Problems) -> LearnSettings | None:
    """What a recipe says about learning."""
    what = {"base": "base", "models": {"a": "a"}, "rule": "learned", "learn": learning}
    found = parse(Regions, what, Path(), problems, whole=False)
    return None if found is None else found.learn


def test_the_released_schedule() -> None:
    """The preset has the numbers of the published code, and single ones can be changed."""
    problems = Problems()
    found = settings_from({"preset": "released", "epochs": 2}, problems)

    assert found is not None
    assert (found.lr, found.logit, found.reg, found.strength, found.start) == (
        1e7,
        5.0,
        "polarize",
        10.0,
        1e-5,
    )
    assert (found.epochs, LEARN_PRESETS["released"].epochs, found.step) == (2, 10, "raw")
    assert not problems


def test_a_raw_step_is_the_released_one(task: Any) -> None:
    """S moves by minus lr times the summed use times the slope, and by the unscaled polariser."""
    settings = LearnSettings(step="raw", reg="polarize", strength=10.0, lr=1e3, logit=1.0)
    trainer = _Trainer(task.vector, {}, settings, "cpu")
    trainer.open({n: torch.from_numpy(task.vector[n]) > 0 for n in task.vector.names})
    draw = torch.Generator().manual_seed(0)
    for use in trainer.use.values():
        use.normal_(generator=draw)
    before = {n: s.clone() for n, s in trainer.logits.items()}

    trainer.step()

    for n, s in trainer.logits.items():
        slope = before[n].sigmoid() * (1 - before[n].sigmoid())
        expected = before[n] - 1e3 * trainer.use[n] * slope + 10.0 * before[n].sign() * slope
        torch.testing.assert_close(s, expected, rtol=1e-5, atol=1e-4)


def test_wrong_settings_are_told_at_once() -> None:
    """Unknown words and impossible numbers, each with its place."""
    problems = Problems()
    settings_from({"reg": "l2", "epochs": 0, "start": 2.0, "lr": float("nan"), "rate": 1}, problems)

    with pytest.raises(RecipeError) as caught:
        problems.raise_if_any()
    for part in (
        "learn.reg: 'l2'",
        "learn.epochs",
        "learn.start",
        "learn.lr",
        "unknown key 'rate'",
    ):
        assert part in str(caught.value)


def test_what_cannot_be_learned_from_is_refused(task: Any) -> None:
    """No rows, rows without labels, a loss that is NaN; the model is put back all the same."""
    bare = Dataset(task.rows.ids, tuple(-1 for _ in task.rows.labels), 0)
    with pytest.raises(RecipeError, match="no rows"):
        learn(task.vector, task.model(), Dataset((), (), 0))
    with pytest.raises(RecipeError, match="have no label"):
        learn(task.vector, task.model(), bare)
    model = task.model()
    with torch.no_grad():
        model.linear.bias[0] = float("nan")
    before = {n: p.clone() for n, p in model.encoder.named_parameters()}
    with pytest.raises(NonFiniteError, match="loss of a row is nan while masks are learned"):
        learn(task.vector, model, task.rows)
    assert all(torch.equal(p, before[n]) for n, p in model.encoder.named_parameters())


def test_logits_are_statistics(task: Any, tmp_path: Path) -> None:
    """Their file says what they were made from."""
    found = learn(
        task.vector, task.model(), task.rows, LearnSettings(epochs=1), facts={"model": "abc"}
    )
    found.save(tmp_path / "l.safetensors")
    facts = Stats.load(tmp_path / "l.safetensors").facts

    assert facts["model"] == "abc"
    assert facts["settings"]["reg"] == "l1"
    shutil.rmtree(tmp_path)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("step", ["rms", "adam", "raw"])
def test_training_goes_on_where_it_was_killed(step: str, task: Any, tmp_path: Path) -> None:
    """Killed after any epoch, the same call gives the same bytes; of other data it starts anew."""
    settings = LearnSettings(epochs=4, step=step, lr={"rms": 10.0, "adam": 0.3, "raw": 1e3}[step])
    whole = learn(task.vector, task.model(), task.rows, settings)
    keep = tmp_path / "state.safetensors"
    for after in (1, 3):
        seen: list[int] = []

        def kill(now: Any, after: int = after, seen: list[int] = seen) -> None:
            seen.append(now.epoch)
            if now.epoch == after:
                raise Killed

        with pytest.raises(Killed):
            learn(task.vector, task.model(), task.rows, settings, progress=kill, keep=keep)
        assert seen == ([1] if after == 1 else [2, 3])

    again = learn(task.vector, task.model(), task.rows, settings, keep=keep)

    assert again.facts == whole.facts
    assert all(np.array_equal(again.tensors[k], v) for k, v in whole.tensors.items())
    seen = []
    less = Dataset(task.rows.ids[:-1], task.rows.labels[:-1], task.rows.pad)
    learn(
        task.vector,
        task.model(),
        less,
        settings,
        keep=keep,
        progress=lambda e: seen.append(e.epoch),
    )
    assert seen == [1, 2, 3, 4]
