"""Tensors that are merged as a whole, and rows that blocks cut through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import suture
import toy
from suture.checkpoints.checkpoint import open_checkpoint
from suture.merges.row_blocks import RowBlocks
from suture.merges.table import METHODS
from suture.merges.whole import HELD, WholeTensor
from suture.stream.sweep import DELTA, Block, Sources, Visitor, sweep, tasks_of
from suture.tensors.spec import PIECE


class Copying(Visitor[None]):
    """Collects what a merge makes of blocks."""

    def __init__(self, fill: Any, specs: Any) -> None:
        self.fill = fill
        self.out = {n: np.full(s.numel, np.nan, np.float32) for n, s in specs.items()}

    def see(self, local: None, block: Block) -> None:
        self.fill(block)
        self.out[block.name][block.start : block.stop] = block.out[: block.count]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Two models and their base: a tensor of three pieces, some small ones."""
    where = tmp_path_factory.mktemp("whole")
    shapes = {
        "big": (3000, 1000),
        "long": (1, 5000),
        "vector": (777,),
        "scalar": (),
        "odd": (7, 13),
    }
    draw = torch.Generator().manual_seed(0)
    names = ("base", "ada", "bob")
    places = [
        toy.folder(where / m, {n: torch.randn(s, generator=draw) for n, s in shapes.items()})
        for m in names
    ]
    base, *models = map(open_checkpoint, places)
    return Sources(tuple(models), base, DELTA)


def deltas(sources: Sources, name: str) -> Any:
    assert sources.base is not None
    base = sources.base[name].reshape(-1)
    return np.stack([m[name].reshape(-1) - base for m in sources.models])


@pytest.mark.parametrize(("threads", "block"), [(1, 1 << 16), (4, 1 << 12), (3, 1 << 18)])
def test_a_tensor_is_computed_once(sources: Sources, threads: int, block: int) -> None:
    """Whatever the threads and blocks, each tensor is computed once, from all its rows."""
    calls: list[str] = []

    def compute(name: str, rows: Any) -> Any:
        calls.append(name)
        return rows[0] - rows[1].sum(dtype=np.float64).astype(np.float32)

    whole = WholeTensor(compute)
    specs = sources.reference.specs
    copying = Copying(whole.fill, specs)
    sweep(sources, tasks_of(sorted(specs), specs), copying, threads=threads, block=block)

    assert sorted(calls) == sorted(specs)
    for name in specs:
        one, two = deltas(sources, name)
        assert (copying.out[name] == one - two.sum(dtype=np.float64).astype(np.float32)).all()
    assert not whole._entries  # nothing is held once everything was handed out


def test_what_is_never_asked_for_is_forgotten(sources: Sources) -> None:
    """A run that goes on in the middle of tensors holds a few of them at most."""
    whole = WholeTensor(lambda name, rows: rows[0])
    block = Block(sources, 8)
    for name in sources.reference.specs:
        if sources.spec(name).numel > 8:
            block.load(name, 0, 8)
            whole.fill(block)

    assert len(whole._entries) <= HELD + 1
    block.load("big", 8, 8)
    whole.fill(block)  # forgotten by now, and computed again
    assert (block.out[:8] == deltas(sources, "big")[0][8:16]).all()


def test_an_error_in_one_thread_stops_all(sources: Sources) -> None:
    """Those that wait for the tensor do not wait for ever."""

    def compute(name: str, rows: Any) -> Any:
        raise ZeroDivisionError(name)

    specs = sources.reference.specs
    with pytest.raises(ZeroDivisionError):
        sweep(
            sources, tasks_of(["big"], specs), Copying(WholeTensor(compute).fill, specs), threads=3
        )


@pytest.mark.parametrize("block", [8, 64, 1 << 10, 1 << 17])
def test_rows_are_whole_wherever_blocks_end(sources: Sources, block: int) -> None:
    """Each row is seen whole, its result arrives in every block that holds a part of it."""

    def reverse(part: Block, start: int, number: int) -> None:
        spec = sources.spec(part.name)
        width = spec.shape[-1] if spec.shape else 1
        columns = slice(start, start + number * width)
        rows = part.rows[0, columns].reshape(number, width)
        part.out[columns] = (rows[:, ::-1] + rows.sum(1, dtype=np.float64)[:, None]).reshape(-1)

    specs = sources.reference.specs
    names = [n for n in specs if n != "big" or block > 64]
    copying = Copying(RowBlocks(reverse), specs)
    sweep(sources, tasks_of(names, specs), copying, threads=2, block=block)

    for name in names:
        shape = specs[name].shape
        rows = deltas(sources, name)[0].reshape(-1, shape[-1] if shape else 1)
        expected = rows[:, ::-1] + rows.sum(1, dtype=np.float64)[:, None]
        np.testing.assert_array_equal(copying.out[name], expected.astype(np.float32).reshape(-1))


@pytest.mark.parametrize("method", sorted(n for n, m in METHODS.items() if m.tensorwise))
def test_torch_s_threads_are_left_as_they_were(method: str, family: Any, tmp_path: Path) -> None:
    """A decomposition runs on one thread; the setting of the process comes back, the bytes stay."""
    models = family("f32")
    what = toy.recipe(method, models.paths, models.base_path)
    outs = []
    before = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            outs.append(toy.run(tmp_path / str(number), what, threads=number)[0])
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)

    assert toy.same_bytes(*outs) == []


def test_memory_for_whole_tensors_is_told(family: Any, tmp_path: Path) -> None:
    """The estimate of a tensorwise merge holds its largest matrix several times."""
    from suture.runs.place import MergeOptions
    from suture.verbs.merge.plan import describe, make_plan

    n = PIECE * 16
    base = toy.folder(tmp_path / "base", {"w": torch.zeros(4096, 4096, dtype=torch.bfloat16)})
    found = {}
    for method in ("task_arithmetic", "tsv_merge"):
        plan = make_plan(toy.recipe(method, {"a": base}, base), tmp_path / "o", MergeOptions())
        found[method] = describe(plan)["peak_memory"]

    assert found["tsv_merge"] - found["task_arithmetic"] >= 4 * n * 8


def test_without_torch_whole_matrices_are_refused(
    family: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything is read, with the command that installs it."""
    from suture.merges import spectral

    monkeypatch.setattr(spectral, "find_spec", lambda name: None)
    models = family("f32")
    with pytest.raises(suture.SutureError, match=r"iso_c: needs torch.*suture\[models\]"):
        toy.run(tmp_path / "out", toy.recipe("iso_c", models.paths, models.base_path))
