"""The laws of merge methods: whoever adds a line to ``METHODS`` gets these tests for nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest

from suture.merges.base import Context, Example, Merge, Method, Scale, Seed, Weight
from suture.merges.table import METHODS
from suture.schema.parameters import Number
from suture.schema.values import PerModel, Scalar, each
from suture.stream.sweep import WEIGHT, Block
from suture.testing import check_method
from suture.testing.laws import LAWS, Case, cases, hold
from suture.testing.toys import Lab, cells, read, write


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Families of models, made once for all laws of a worker."""
    return Lab(tmp_path_factory.mktemp("laws"))


def every_case() -> Iterator[Any]:
    for line in METHODS.own.values():
        for law, case in cases(line, None):  # type: ignore[arg-type]
            words = "-".join(str(v) for v in case.parameters.values())
            yield pytest.param(law, case, id=f"{line.name}-{words}-{law}".replace(" ", "_"))


@pytest.mark.parametrize(("law", "case"), list(every_case()))
def test_a_method_keeps_the_laws(law: str, case: Case, lab: Lab) -> None:
    """Every method of the table, with every set of parameters of its example."""
    hold(law, replace(case, lab=lab))


def test_every_parameter_of_an_example_is_one_of_its_method() -> None:
    """A misspelt word in an example would make a law weaker."""
    for line in METHODS.own.values():
        one = line.example
        for given in (one.neutral, *one.lively, *one.together, one.drawing, one.apart or {}):
            assert given.keys() <= line.parameters.keys(), line.name
        assert one.lively, line.name


# -- laws are broken, and say so -------------------------------------------------------------------

Factor = Annotated[float, Number("factor")]


def plain(scale: Scale = Scalar(1.0), weight: Weight = each(1.0)) -> Merge[None]:
    """The sum of the deltas."""

    def combine(block: Block, state: None) -> None:
        factor = np.float32(scale.at(block.name))
        weights = weight.row(block)
        rows = block.rows[:, : block.count]
        block.out[: block.count] = factor * np.sum(weights[:, None] * rows, axis=0)

    return Merge(combine)


def wrong(change: Callable[[Block], None], **line: Any) -> Method:
    """The sum of deltas, with a fault."""

    def faulty(scale: Scale = Scalar(1.0), weight: Weight = each(1.0)) -> Merge[None]:
        """The sum of the deltas, and a fault."""
        inner = plain(scale, weight)

        def combine(block: Block, state: None) -> None:
            inner.combine(block, state)
            change(block)

        return Merge(combine)

    return Method(faulty, "Faulty", "", **line)


def at_least(block: Block, number: float) -> None:
    block.out[: block.count] += np.float32(number)


def by_start(block: Block) -> None:
    if block.start:
        block.out[: block.count] *= np.float32(2)


def first_only(block: Block) -> None:
    block.out[: block.count] = block.rows[0, : block.count]


def largest(block: Block) -> None:
    out = block.out[: block.count]
    out[np.abs(out) < np.abs(out).max(initial=0)] = 0


def other_sign(block: Block) -> None:
    block.out[: block.count] = np.where(block.out[: block.count] == 0, 1e-30, 0)


def mean_twin(rows: Mapping[str, Mapping[str, Any]], scale: float, weight: float) -> dict[str, Any]:
    names = next(iter(rows.values()))
    return {n: np.mean([one[n] for one in rows.values()], axis=0) for n in names}


def unread(scale: Factor = 1.0) -> Merge[None]:
    """The sum of the deltas; its parameter does nothing."""
    return plain()


def seeded(seed: Seed = 0) -> Merge[None]:
    """The sum of the deltas; it draws nothing."""
    return plain()


def told_nothing() -> Merge[None]:
    return plain()


def average() -> Merge[None]:
    """The mean of the deltas, which is not said."""

    def combine(block: Block, state: None) -> None:
        block.out[: block.count] = block.rows[:, : block.count].mean(axis=0)

    return Merge(combine)


def order(weight: PerModel = each(1.0)) -> Merge[None]:
    """The first model; which that is depends on the order, and a base is not asked for."""

    def combine(block: Block, state: None) -> None:
        block.out[: block.count] = block.rows[0, : block.count]

    return Merge(combine, how=WEIGHT)


def counted() -> Merge[list[int]]:
    """The sum of the deltas and how often it was called, which depends on threads and blocks."""

    def prepare(context: Context) -> list[int]:
        return [0]

    def combine(block: Block, state: list[int]) -> None:
        state[0] += 1
        block.out[: block.count] = block.rows[:, : block.count].sum(axis=0) * (state[0] % 7 + 1)

    return Merge(combine, prepare)


BROKEN: dict[str, tuple[Method, str, str]] = {
    "a constant": (wrong(lambda b: at_least(b, 0.25)), "zero vectors give the base",
                   r"models like the base, f32: \S+ is 0\.\d+, expected .*; 1 of 1 entries; 21 tensors"),
    "not neutral": (wrong(lambda b: at_least(b, 0.25)), "one model alone comes back",
                    r"one model alone, f32: .*expected"),
    "blocks": (wrong(by_start), "tiny blocks change no byte", "blocks of 8: "),
    "calls": (Method(counted, "Counted", ""), "threads blocks and shards change no byte",
              "2 threads, blocks of 4096, shards of 1MB: "),
    "one model": (wrong(first_only), "disjoint changes do not touch each other",
                  "beside another model, b's entries"),
    "an average": (Method(average, "Average", ""), "disjoint changes do not touch each other",
                   "averages=True or mixes=True"),
    "an order": (Method(order, "Order", "", ordered=True, needs_base=False, example=Example()),
                 "a number for one tensor changes that tensor only", r"weight: .*changes \[\]"),
    "signs of zeros": (wrong(other_sign), "negative zeros stay", r"w\[\d\] is .*, expected"),
    "no docstring": (Method(told_nothing, "Nothing", ""), "it says what it does", "no docstring"),
    "no title": (Method(average, "", ""), "it says what it does", "it has no title"),
    "a seed that is not said": (Method(seeded, "Seeded", ""), "it says what it does",
                                "random=False, but it has a seed"),
    "a seed that does nothing": (Method(seeded, "Seeded", "", random=True), "the seed decides",
                                 "another seed draws the same for"),
    "another twin": (replace(wrong(lambda b: None), example=Example(twin=mean_twin)),
                     "it is its twin", r"its twin, f32: .*expected"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_law_is_told(what: str, lab: Lab) -> None:
    """Which law, with which parameters, which entry, what came and what was expected."""
    line, law, text = BROKEN[what]
    for name, case in cases(line, lab):
        if name == law:
            with pytest.raises(AssertionError) as caught:
                hold(law, case)
            said = str(caught.value)
            assert said.startswith(f"{line.name}(")
            assert law in said
            assert re.search(text, said), said


def test_inputs_and_parts_are_watched(lab: Lab, tmp_path: Path) -> None:
    """A method that writes beside its inputs, or whose tensors decide about each other, is told."""
    family = lab.family("bf16", grid=True)

    def touching() -> Merge[Any]:
        """The sum of the deltas; it leaves a file beside an input."""

        def prepare(context: Context) -> Any:
            (Path(context.sources.models[0].path) / "left").write_text("here")
            return None

        return replace(plain(), prepare=prepare)

    def competing() -> Merge[Any]:
        """The sum of the deltas times the number of tensors."""
        inner = plain()

        def combine(block: Block, state: Any) -> None:
            inner.combine(block, None)
            block.out[: block.count] *= np.float32(state)

        return Merge(combine, lambda context: len(context.names))

    own = Lab(tmp_path)
    for make, law, text in (
        (touching, "inputs are left alone", "the files of an input were changed"),
        (competing, "a shard merged alone is the shard of the whole", "half of the tensors: "),
    ):
        line = Method(make, "Faulty", "")
        with pytest.raises(AssertionError, match=text):
            hold(law, next(c for n, c in cases(line, own) if n == law))
    assert family.names


def test_all_broken_laws_are_told_at_once(tmp_path: Path) -> None:
    """A line for each; what is refused is a broken law, too."""
    with pytest.raises(AssertionError) as caught:
        check_method(wrong(lambda b: at_least(b, 0.25)), tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) >= 4
    assert all(line.startswith("faulty(") for line in lines)
    bad = replace(METHODS["ties"], example=Example({"density": 2.0}))
    with (
        pytest.raises(AssertionError, match="one model alone comes back: it is refused: .*density"),
    ):
        hold_all(bad, tmp_path / "other")


def hold_all(line: Method, where: Path) -> None:
    named = replace(line, called="tied")
    check_method(named, where)


def test_what_is_no_method_or_has_a_name_that_is_taken_is_refused() -> None:
    """``check_method`` takes a line; Suture's own names stay Suture's."""
    with pytest.raises(TypeError, match=r"takes a suture.merges.base.Method, not <function"):
        check_method(plain)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="Suture has a merge method of this name"):
        check_method(Method(plain, "Plain", "", called="ties"))


def test_numbers_are_written_as_they_are_read(tmp_path: Path) -> None:
    """The laws' own reader and writer agree with safetensors, in every dtype."""
    import torch
    from safetensors.torch import load_file

    values = np.random.default_rng(0).standard_normal((5, 7))
    made = {d: cells(values, d) for d in ("F64", "F32", "F16", "BF16")} | {
        "I64": cells(np.arange(4), "I64"), "BOOL": cells(np.array([True, False]), "BOOL"),
        "none": cells(np.zeros((0, 3)), "F32"), "scalar": cells(np.array(2.0), "BF16"),
    }  # fmt: skip
    folder = write(tmp_path / "one", made, shards=3)

    assert read(folder) == made
    theirs = {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    assert theirs.keys() == made.keys()
    for name, tensor in theirs.items():
        assert tuple(tensor.shape) == made[name].shape
        assert np.array_equal(tensor.double().numpy(), made[name].numbers)
    bf16 = torch.from_numpy(values).float().to(torch.bfloat16)
    assert torch.equal(theirs["BF16"], bf16)
    assert set(LAWS)
