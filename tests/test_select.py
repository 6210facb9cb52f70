"""Exact top-k out of core: every path of it gives what a stable sort of everything would give."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import toy
from slow import topk
from suture.checkpoints.checkpoint import Checkpoint, open_checkpoint
from suture.errors import NonFiniteError
from suture.stream import sweep
from suture.stream.sweep import Block, Sources
from suture.stream.topk import Selection, exact_count, select
from suture.tensors import spec

Array = np.ndarray[Any, Any]
Deltas = Mapping[str, Array]
selecting = importlib.import_module("suture.stream.topk")

SIZES = {
    "model.layers.0.a.weight": 3000,
    "model.layers.0.b.weight": 1,
    "model.layers.1.a.weight": 9001,
    "model.layers.1.c.weight": 0,
    "model.layers.10.a.weight": 517,
    "model.norm.weight": 64,
    "zz.last": 2048,
}
TOTAL = sum(SIZES.values())


def spread_over_names(values: Array) -> dict[str, Array]:
    """One vector cut into the tensors of SIZES, in the order of sorted names."""
    found = {}
    for name in sorted(SIZES):
        found[name], values = values[: SIZES[name]], values[SIZES[name] :]
    return found


def random_values(seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(TOTAL)


def tied_values(seed: int) -> Array:
    return np.random.default_rng(seed).integers(-3, 4, TOTAL) / 4


def sparse_values(seed: int) -> Array:
    draw = np.random.default_rng(seed)
    return draw.standard_normal(TOTAL) * (draw.random(TOTAL) < 0.02)


def bfloat_values(seed: int) -> Array:
    """What bfloat16 leaves of a small change: a quarter of all entries ties at the threshold."""
    draw = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(TOTAL, generator=draw)).to(torch.bfloat16)
    tuned = (base.float() + 1e-4 * torch.randn(TOTAL, generator=draw)).to(torch.bfloat16)
    return (tuned.float() - base.float()).double().numpy()


def falling_values(seed: int) -> Array:
    return np.linspace(2, 0, TOTAL) * np.where(np.arange(TOTAL) % 3, 1, -1)


def steep_values(seed: int) -> Array:
    """Magnitudes over the whole range of float32, subnormal ones included."""
    draw = np.random.default_rng(seed)
    return draw.standard_normal(TOTAL) * 10.0 ** draw.integers(-44, 37, TOTAL)


def hidden_values(seed: int) -> Array:
    """Large entries where an evenly spaced sample of runs does not look."""
    values = 1e-3 * random_values(seed)
    values[-40:] = 1e3
    return values


DATA: dict[str, Callable[[int], Array]] = {
    "random": random_values,
    "tied": tied_values,
    "sparse": sparse_values,
    "zeros": lambda seed: np.zeros(TOTAL),
    "one": lambda seed: np.where(np.arange(TOTAL) == 5000, 1.0, 0.0),
    "constant": lambda seed: np.full(TOTAL, -0.5),
    "bfloat": bfloat_values,
    "falling": falling_values,
    "steep": steep_values,
    "hidden": hidden_values,
}


def checkpoint(where: Path, tensors: Mapping[str, Array]) -> Checkpoint:
    single = {name: torch.from_numpy(np.asarray(x, np.float32)) for name, x in tensors.items()}
    return open_checkpoint(toy.folder(where, single))


def sources_of(where: Path, models: Sequence[Deltas]) -> Sources:
    """Models that differ from an all-zero base by exactly these deltas."""
    zeros = {name: np.zeros(x.size) for name, x in models[0].items()}
    base = checkpoint(where / "base", zeros)
    tuned = tuple(checkpoint(where / str(i), m) for i, m in enumerate(models))
    return Sources(tuned, base, allow_nonfinite=True)


def marks(selection: Selection, sources: Sources, block: int) -> list[dict[str, Array]]:
    """What is selected, by model and name, read off the segments of every block."""
    found: list[dict[str, Array]] = [{} for _ in sources.models]
    view = Block(sources, block)
    for name in selection.groups:
        size = sources.spec(name).numel
        for masks in found:
            masks[name] = np.zeros(size, bool)
        for start in range(0, size, block):
            view.load(name, start, min(block, size - start))
            reached = 0
            for first, last, keys in selection.segments(view):
                assert first == reached, "segments follow one another"
                reached = last
                size_of = view.rows[:, first:last].view(np.uint32) & 0x7FFFFFFF
                for masks, row, key in zip(found, size_of, keys, strict=True):
                    masks[name][start + first : start + last] = row >= key
            assert reached == view.count, "segments cover the block"
    return found


def check(
    selection: Selection,
    sources: Sources,
    models: Sequence[Deltas],
    densities: Callable[[str], Sequence[float]],
    scope: str,
    block: int = 1 << 12,
    count: Callable[[float, int], int] = exact_count,
) -> None:
    """Hold a selection against the stable sort: entries, counts of kept and of tied ones."""
    names = list(models[0])
    found = marks(selection, sources, block)
    for number, deltas in enumerate(models):
        expected = topk.kept(deltas, names, densities, number, scope, count)
        for name in names:
            assert np.array_equal(found[number][name], expected[name]), (number, name)
        assert selection.kept()[number] == sum(int(m.sum()) for m in expected.values())
        tied = 0
        for (_, shares), members in topk.groups(names, scope, densities).items():
            sizes = np.abs(np.concatenate([deltas[n] for n in members]).astype(np.float32))
            wanted = count(shares[number], sizes.size)
            if wanted:
                tied += int((sizes == np.sort(sizes)[::-1][wanted - 1]).sum())
        assert selection.tied()[number] == tied
    assert selection.total() == sum(x.size for x in models[0].values())


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 1,024 elements, so that small tensors, too, are spread over threads."""
    monkeypatch.setattr(spec, "PIECE", 1 << 10)
    monkeypatch.setattr(sweep, "PIECE", 1 << 10)


@pytest.fixture(params=["alone", "shared"])
def path(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> str:
    """A group in one thread that keeps its keys, or in all threads, which count them."""
    if request.param == "shared":
        monkeypatch.setattr(selecting, "_ALONE", 0)
    return str(request.param)


@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
@pytest.mark.parametrize("kind", list(DATA))
def test_selection_is_that_of_a_stable_sort(
    kind: str, scope: str, path: str, tmp_path: Path
) -> None:
    """Any data, scope and path: exactly the largest entries, ties by position, never a zero."""
    models = [spread_over_names(DATA[kind](seed)) for seed in (1, 2)]
    sources = sources_of(tmp_path, models)
    for shares in ((0.2, 0.9999), (1.0, 0.001)):

        def densities(name: str, shares: tuple[float, float] = shares) -> Sequence[float]:
            return shares

        selection = select(sources, list(SIZES), densities, scope=scope, threads=2, block=1 << 10)

        check(selection, sources, models, densities, scope)


@pytest.mark.parametrize(
    ("block", "threads"),
    [(1 << 5, 2), (1 << 10, 1), (1 << 10, 4), (1 << 12, 2), (1 << 16, 1), (1 << 18, 4)],
)
def test_blocks_and_threads_do_not_matter(
    block: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block sizes from 2**5 to 2**18 and one to four threads: the same entries."""
    monkeypatch.setattr(selecting, "_ALONE", 0)
    models = [spread_over_names(bfloat_values(seed)) for seed in (3, 4)]
    sources = sources_of(tmp_path, models)

    selection = select(sources, list(SIZES), lambda name: (0.2, 0.7), threads=threads, block=block)

    check(selection, sources, models, lambda name: (0.2, 0.7), "global")


def test_more_than_a_piece_is_shared_between_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors larger than a piece of 2**20, with ties across its edge, counted by two threads."""
    monkeypatch.setattr(selecting, "_ALONE", 0)
    draw = np.random.default_rng(5)
    models = [
        {"a": draw.integers(-40, 41, 1_200_000) / 64, "b": draw.integers(-40, 41, 900_001) / 64}
    ]
    sources = sources_of(tmp_path, models)

    selection = select(sources, ["a", "b"], lambda name: (0.6,), threads=2)

    check(selection, sources, models, lambda name: (0.6,), "global", block=1 << 16)


def wrong(kind: str, real: Any) -> Any:
    """A guess as bad as they come, in place of the one that was made."""
    nothing = np.zeros(0, np.uint32)
    threshold = real.low + real.width // 2
    return {
        "below": real._replace(low=0, width=1, guesses=nothing),
        "above": real._replace(low=0x7F7FFFFE, width=2, guesses=nothing),
        "one key": real._replace(low=threshold, width=1, guesses=nothing),
        "no guesses": real._replace(guesses=nothing),
        "wrong guesses": real._replace(guesses=np.array([1, 2, 0x7F000000], np.uint32)),
        "empty": real._replace(low=threshold, width=0, guesses=nothing),
        "half of it": real._replace(width=max(1, real.width // 2)),
        "the other half": real._replace(low=threshold, width=max(1, real.width // 2)),
    }[kind]


WRONG = ["below", "above", "one key", "no guesses", "wrong guesses", "empty", "half of it",
         "the other half"]  # fmt: skip


@pytest.mark.parametrize("data", ["random", "sparse", "bfloat"])
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_guess_costs_a_sweep_and_changes_nothing(
    kind: str, data: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets below, above, empty, half right; guesses missing or wrong: the same result."""
    honest = selecting._guess
    monkeypatch.setattr(selecting, "_guess", lambda *args: wrong(kind, honest(*args)))
    models = [spread_over_names(DATA[data](seed)) for seed in (6, 7)]
    sources = sources_of(tmp_path, models)

    selection = select(sources, list(SIZES), lambda name: (0.3, 0.02), threads=2, block=1 << 8)

    check(selection, sources, models, lambda name: (0.3, 0.02), "global")


@pytest.mark.parametrize("data", ["tied", "steep", "hidden"])
def test_only_one_model_guessed_wrong(
    data: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second sweep for one model does not disturb the other, whose guess was right."""
    honest = selecting._guess
    calls = 0

    def guess(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return wrong("above" if calls % 2 else "wrong guesses", honest(*args))

    monkeypatch.setattr(selecting, "_guess", guess)
    models = [spread_over_names(DATA[data](seed)) for seed in (8, 9, 10)]
    sources = sources_of(tmp_path, models)
    shares = (0.5, 0.01, 1.0)

    selection = select(sources, list(SIZES), lambda name: shares, threads=2, block=1 << 9)

    check(selection, sources, models, lambda name: shares, "global")


@pytest.mark.parametrize("sample", [1, 1 << 11])
@pytest.mark.parametrize("data", ["random", "bfloat", "falling", "hidden"])
def test_a_tiny_sample_is_enough(
    data: str, sample: int, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample decides the speed only: one run of it gives the same entries."""
    monkeypatch.setattr(selecting, "SAMPLE", sample)
    models = [spread_over_names(DATA[data](11))]
    sources = sources_of(tmp_path, models)

    selection = select(sources, list(SIZES), lambda name: (0.1,), threads=2, block=1 << 10)

    check(selection, sources, models, lambda name: (0.1,), "global")


def test_densities_may_differ_by_tensor_and_model(path: str, tmp_path: Path) -> None:
    """Tensors compete only with those that have the same densities."""
    models = [spread_over_names(tied_values(seed)) for seed in (12, 13)]
    sources = sources_of(tmp_path, models)

    def densities(name: str) -> Sequence[float]:
        return (0.5, 0.1) if "layers.1." in name else (0.2, 0.1) if "a." in name else (1.0, 0.03)

    for scope in ("global", "layer", "tensor"):
        selection = select(sources, list(SIZES), densities, scope=scope, threads=2, block=1 << 9)

        check(selection, sources, models, densities, scope)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 100, 1000])
def test_exactly_the_rounded_count_is_kept(n: int, tmp_path: Path) -> None:
    """Of n tied entries the first ``round(density * n)`` are kept, halves to even."""
    models = [{"a": np.full(n, 0.25)}]
    sources = sources_of(tmp_path, models)
    for density in (1e-6, 0.1, 0.25, 0.5, 0.7, 1.0):
        selection = select(sources, ["a"], lambda name, d=density: (d,))

        kept = marks(selection, sources, 1 << 10)[0]["a"]
        assert kept.tolist() == [i < round(density * n) for i in range(n)]
        assert selection.kept() == [round(density * n)]


def test_twenty_percent_of_a_hundred_is_twenty(tmp_path: Path) -> None:
    """K = 20 % of the magnitudes 1 to 100 keeps exactly 81 to 100, where other tools keep 21."""
    values = np.arange(1.0, 101.0) * np.where(np.arange(100) % 2, 1, -1)
    sources = sources_of(tmp_path, [{"a": values}])

    selection = select(sources, ["a"], lambda name: (0.2,))

    assert selection.kept() == [20]
    assert np.abs(values[marks(selection, sources, 64)[0]["a"]]).tolist() == list(range(81, 101))


def test_names_are_taken_in_sorted_order(tmp_path: Path) -> None:
    """Between tied entries the name that sorts first wins, whatever order the caller gives."""
    models = [{name: np.ones(4) for name in ("b", "a", "B", "a.10", "a.9")}]
    sources = sources_of(tmp_path, models)

    selection = select(sources, ["b", "a", "B", "a.10", "a.9"], lambda name: (0.55,))

    kept = marks(selection, sources, 8)[0]
    assert [int(kept[n].sum()) for n in ("B", "a", "a.10", "a.9", "b")] == [4, 4, 3, 0, 0]


@pytest.mark.parametrize("data", ["tied", "bfloat"])
@pytest.mark.parametrize("layout", ["one file", "shards", "backwards"])
def test_file_order_does_not_break_ties(data: str, layout: str, tmp_path: Path) -> None:
    """Shards and the order of tensors in the file change nothing."""
    tensors = {n: torch.from_numpy(x).float() for n, x in spread_over_names(DATA[data](14)).items()}
    zeros = {n: torch.zeros_like(x) for n, x in tensors.items()}
    models = [{n: x.double().numpy() for n, x in tensors.items()}]
    if layout == "backwards":
        place = toy.save_in_order(tmp_path / "m.safetensors", tensors, sorted(tensors)[::-1])
    else:
        place = toy.folder(tmp_path / "m", tensors, shards=3 if layout == "shards" else 1)
    sources = Sources((open_checkpoint(place),), open_checkpoint(toy.folder(tmp_path / "b", zeros)))

    selection = select(sources, list(SIZES)[::-1], lambda name: (0.2,))

    check(selection, sources, models, lambda name: (0.2,), "global")


@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
def test_groups_of_nothing_but_empty_tensors(scope: str, tmp_path: Path) -> None:
    """A layer without a single element keeps nothing and stops nothing."""
    models = [{"model.layers.0.a": np.zeros(0), "model.layers.0.b": np.zeros(0), "c": np.ones(3)}]
    sources = sources_of(tmp_path, models)

    selection = select(sources, list(models[0]), lambda name: (0.5,), scope=scope)

    check(selection, sources, models, lambda name: (0.5,), scope)


def test_other_counts_than_the_rounded_one(tmp_path: Path) -> None:
    """A method may count as another tool does: rounded down, but at least one entry."""
    models = [spread_over_names(random_values(15))]
    sources = sources_of(tmp_path, models)

    def floor(density: float, n: int) -> int:
        return min(n, max(1, int(density * n)))

    selection = select(sources, list(SIZES), lambda name: (0.0015,), scope="tensor", count=floor)

    check(selection, sources, models, lambda name: (0.0015,), "tensor", count=floor)


def test_nan_and_infinity_where_they_are_allowed(path: str, tmp_path: Path) -> None:
    """With non-finite values allowed they rank above all numbers; the count stays exact."""
    values = random_values(16)
    values[[5, 500, 5000]] = math.nan
    values[[7, 700]] = -math.inf
    sources = sources_of(tmp_path, [spread_over_names(values)])

    selection = select(sources, list(SIZES), lambda name: (0.01,), threads=2, block=1 << 10)

    kept = marks(selection, sources, 1 << 10)[0]
    whole = np.concatenate([kept[name] for name in sorted(SIZES)])
    assert whole.sum() == round(0.01 * TOTAL) == selection.kept()[0]
    assert whole[~np.isfinite(values)].all()


def test_nan_is_refused_otherwise(tmp_path: Path) -> None:
    """A NaN has no magnitude to rank by: refused with file, tensor and count."""
    good, bad = np.ones(10), np.ones(10)
    bad[3] = math.nan
    sources = sources_of(tmp_path, [{"a": bad}])
    strict = Sources(sources.models, sources.base)

    with pytest.raises(NonFiniteError, match=r"a holds 1 NaN or infinite values of 10"):
        select(strict, ["a"], lambda name: (0.5,))
    assert good.all()


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-149, -(2.0**-149)])
SHARE = st.floats(0, 1, exclude_min=True) | st.sampled_from([1.0, 0.5, 1e-9])


@given(
    tensors=st.lists(st.lists(FLOATS, max_size=40) | st.lists(FEW, max_size=40), min_size=1,
                     max_size=4),
    share=SHARE,
    scope=st.sampled_from(["global", "layer", "tensor"]),
    block=st.sampled_from([8, 16, 64]),
)  # fmt: skip
@example(tensors=[[], [], []], share=0.5, scope="global", block=8)
@example(tensors=[[1.0] * 17, [1.0] * 17], share=0.5, scope="global", block=8)
def test_selection_for_all_small_vectors(
    tensors: list[list[float]], share: float, scope: str, block: int,
    tmp_path_factory: pytest.TempPathFactory, path: str,
) -> None:  # fmt: skip
    """Whatever the values, shapes, density and scope: the stable sort's entries."""
    models = [{f"model.layers.{i}.w": np.array(x, np.float64) for i, x in enumerate(tensors)}]
    sources = sources_of(tmp_path_factory.mktemp("small"), models)

    selection = select(sources, list(models[0]), lambda name: (share,), scope=scope, threads=1,
                       block=block)  # fmt: skip

    check(selection, sources, models, lambda name: (share,), scope, block=block)
