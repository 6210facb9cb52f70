"""What is written is the format byte by byte, the same in any order, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from making import (
    WIDTHS,
    Raw,
    Tensors,
    descriptors,
    lines_of,
    packed,
    read_file,
    read_model,
    staging,
    tree,
)
from suture.checkpoints import atomic, writer
from suture.checkpoints.atomic import alone, appearing
from suture.checkpoints.writer import Writer, index_of, plan_shards
from suture.errors import OutputError
from suture.tensors.spec import TensorSpec


def specs_of(tensors: Tensors) -> dict[str, TensorSpec]:
    return {name: TensorSpec(raw.dtype, raw.shape) for name, raw in tensors.items()}


def bytes_of(raw: Raw) -> np.ndarray:
    return np.frombuffer(raw.data, np.uint8)


def filled(out: Path, tensors: Tensors, order: list[str] | None = None, **how: Any) -> Writer:
    """A writer that was given every tensor and has not published."""
    made = Writer(out, specs_of(tensors), key=how.pop("key", "k"), **how)
    for name in order or tensors:
        made.write(name, 0, bytes_of(tensors[name]))
    return made


TENSORS: Tensors = {
    "b": packed([1.0, -2.0]),
    "a": packed([[3], [4]], "I64"),
    "flag": Raw("BOOL", (3,), b"\1\0\1"),
    "é": packed([0.5], "BF16"),
    "empty": Raw("F32", (0, 3), b""),
    "scalar": packed(7.0, "F64"),
}
GOLDEN = (
    b"\x80\x01\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"pt"},'
    b'"a":{"dtype":"I64","shape":[2,1],"data_offsets":[0,16]},'
    b'"scalar":{"dtype":"F64","shape":[],"data_offsets":[16,24]},'
    b'"b":{"dtype":"F32","shape":[2],"data_offsets":[24,32]},'
    b'"empty":{"dtype":"F32","shape":[0,3],"data_offsets":[32,32]},'
    b'"\xc3\xa9":{"dtype":"BF16","shape":[1],"data_offsets":[32,34]},'
    b'"flag":{"dtype":"BOOL","shape":[3],"data_offsets":[34,37]}}'
    b"     "
    b"\x03\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0"
    b"\0\0\0\0\0\0\x1c\x40"
    b"\0\0\x80\x3f\0\0\0\xc0"
    b"\0\x3f"
    b"\1\0\1"
)


@pytest.mark.parametrize(
    "order", [list(TENSORS), sorted(TENSORS), sorted(TENSORS, reverse=True)], ids=str
)
def test_the_bytes_of_a_checkpoint(tmp_path: Path, order: list[str]) -> None:
    """The file is known to the last byte, whatever the order of names and of writing."""
    filled(tmp_path / "out", {n: TENSORS[n] for n in order}, order[::-1]).publish()

    assert (tmp_path / "out" / "model.safetensors").read_bytes() == GOLDEN
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_written_loads_elsewhere(tmp_path: Path) -> None:
    """The safetensors library reads it for numpy and for torch, alignment checks included."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    filled(tmp_path / "out", TENSORS).publish()
    path = tmp_path / "out" / "model.safetensors"
    found = load_file(path)

    assert found.keys() == TENSORS.keys()
    assert found["é"].dtype == torch.bfloat16
    assert found["é"].item() == 0.5
    assert found["a"].tolist() == [[3], [4]]
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("b").tolist() == [1.0, -2.0]


DTYPE = st.sampled_from(sorted(WIDTHS))
SHAPE = st.lists(st.integers(0, 5), max_size=3).map(tuple)
SPECS = st.dictionaries(st.text(min_size=1, max_size=4).filter(lambda n: n != "__metadata__" and n.isprintable()),
                        st.builds(TensorSpec, DTYPE, SHAPE), min_size=1, max_size=8)  # fmt: skip


@given(specs=SPECS, limit=st.integers(1, 300))
def test_every_plan_of_shards_keeps_its_promises(specs: dict[str, TensorSpec], limit: int) -> None:
    """Each tensor once, aligned to its width, without holes, in shards no larger than asked."""
    shards = plan_shards(specs, limit)

    assert sorted(n for s in shards for n in s.offsets) == sorted(specs)
    for shard in shards:
        assert sum(specs[n].nbytes for n in shard.offsets) <= limit or len(shard.offsets) == 1
        reached = len(shard.header)
        assert reached % 8 == 0
        for name, start in sorted(
            shard.offsets.items(), key=lambda item: (item[1], specs[item[0]].nbytes)
        ):
            assert start == reached
            assert start % WIDTHS[specs[name].dtype] == 0
            reached += specs[name].nbytes
        assert reached == shard.size
    assert plan_shards(dict(reversed(specs.items())), limit) == shards


@pytest.mark.parametrize(("limit", "shards"), [(10**9, 1), (1200, 1), (1199, 2), (400, 3), (1, 4)])
def test_shards_are_cut_by_size(tmp_path: Path, limit: int, shards: int) -> None:
    """A limit on the bytes of tensors; one that is larger than the limit stands alone."""
    tensors = {
        name: packed(np.arange(n)) for name, n in (("a", 25), ("b", 75), ("c", 100), ("d", 100))
    }
    made = filled(tmp_path / "out", tensors, shard_size=limit)
    made.publish()
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))

    assert len(files) == shards
    assert read_model(tmp_path / "out") == tensors
    if shards == 1:
        assert files == ["model.safetensors"]
        return
    assert files == [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 1200}
    assert list(index["weight_map"]) == sorted(tensors)
    for name, file in index["weight_map"].items():
        assert name in read_file(tmp_path / "out" / file)


def test_a_single_file_has_no_index() -> None:
    """The index belongs to shards."""
    specs = specs_of(TENSORS)

    assert index_of(plan_shards(specs), specs) is None


def test_slices_are_put_in_their_places_from_many_threads(tmp_path: Path) -> None:
    """Any slice of any tensor, in any order, from any thread: the same file."""
    values = np.arange(10_000, dtype=np.float32)
    made = Writer(tmp_path / "out", {"w": TensorSpec("F32", (10_000,))}, key="k")
    starts = np.random.default_rng(0).permutation(100) * 100

    def work(mine: np.ndarray) -> None:
        for start in mine:
            made.write("w", int(start), values[start : start + 100].view(np.uint8))

    threads = [threading.Thread(target=work, args=(starts[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.publish()

    assert np.array_equal(read_model(tmp_path / "out")["w"].values, values)


# ------------------------------------------------------------------------ appearing, and not


def test_nothing_appears_before_it_is_published(tmp_path: Path) -> None:
    """Until then there is a hidden folder; afterwards there is the output alone."""
    made = filled(tmp_path / "out", TENSORS)

    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == [".out.suture"]
    made.publish()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    """The user made the folder first: fine."""
    (tmp_path / "out").mkdir()
    filled(tmp_path / "out", TENSORS).publish()

    assert read_model(tmp_path / "out") == TENSORS


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_appears_meanwhile_is_left_alone(tmp_path: Path, kind: str) -> None:
    """Somebody else took the name during the merge: theirs stays, ours stays staged."""
    made = filled(tmp_path / "out", TENSORS)
    if kind == "file":
        (tmp_path / "out").write_text("mine")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
    before = tree(tmp_path / "out")

    with pytest.raises(OutputError, match="appeared while its run was going on"):
        made.publish()
    made.close()
    assert tree(tmp_path / "out") == before
    assert staging(tmp_path / "out").exists()


@pytest.mark.parametrize("swap", [True, False], ids=["swapped", "moved"])
def test_an_old_output_is_replaced_as_a_whole(
    tmp_path: Path, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of the old output survives, whether the system can swap folders or not."""
    if not swap:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    old = {"w": packed(np.ones(100)), "v": packed(np.ones(100))}
    filled(tmp_path / "out", old, shard_size=400).publish()
    (tmp_path / "out" / "tokenizer.json").write_text("old")
    filled(tmp_path / "out", TENSORS, overwrite=True).publish()

    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert read_model(tmp_path / "out") == TENSORS
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_files_beside_the_weights_are_written(tmp_path: Path) -> None:
    """Text as UTF-8, bytes as they are."""
    made = filled(tmp_path / "out", TENSORS)
    made.add_file("a.json", "é")
    made.add_file("b.bin", b"\xff")
    made.publish()

    assert (tmp_path / "out" / "a.json").read_bytes() == "é".encode()
    assert (tmp_path / "out" / "b.bin").read_bytes() == b"\xff"


def test_nothing_stays_open(tmp_path: Path) -> None:
    """Publishing, closing, discarding and failing to begin leave no descriptor behind."""
    before = descriptors(tmp_path)
    filled(tmp_path / "one", TENSORS, shard_size=8).publish()
    filled(tmp_path / "two", TENSORS).close()
    filled(tmp_path / "three", TENSORS).discard()
    held = filled(tmp_path / "four", TENSORS)
    while_held = descriptors(tmp_path)
    with pytest.raises(OutputError):
        filled(tmp_path / "four", TENSORS)
    assert descriptors(tmp_path) == while_held
    held.close()
    held.close()  # twice does no harm

    assert descriptors(tmp_path) == before
    assert not staging(tmp_path / "three").exists()


def test_too_many_shards_to_open_leave_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the system refuses one more file, those that were opened are closed again."""
    real, opened = os.open, []

    def few(path: Any, *more: Any, **how: Any) -> int:
        if str(path).endswith(".safetensors"):
            opened.append(path)
            if len(opened) > 3:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *more, **how)

    before = descriptors(tmp_path)
    monkeypatch.setattr(os, "open", few)
    with pytest.raises(OutputError, match="Too many open files"):
        filled(tmp_path / "out", TENSORS, shard_size=1)
    monkeypatch.undo()

    assert descriptors(tmp_path) == before


# ----------------------------------------------------------------------------------- resuming


def test_an_interrupted_run_is_taken_up(tmp_path: Path) -> None:
    """The same key finds its shards and the journal; what was written is still there."""
    first = filled(tmp_path / "out", TENSORS)
    first.record(["a", 1])
    first.close()
    again = Writer(tmp_path / "out", specs_of(TENSORS), key="k")
    raw = np.zeros(8, np.uint8)
    again.read_back("b", 0, raw)

    assert again.resumed
    assert again.journal() == [["a", 1]]
    assert raw.tobytes() == TENSORS["b"].data
    again.publish()
    assert read_model(tmp_path / "out") == TENSORS


@pytest.mark.parametrize(
    "change",
    ["key", "no resume", "size", "header", "missing shard", "no key", "shard size", "dtype"],
)
def test_what_does_not_fit_is_started_anew(tmp_path: Path, change: str) -> None:
    """Another key, or shards that are not those of this merge: no byte of them is used."""
    filled(tmp_path / "out", TENSORS).close()
    shard = staging(tmp_path / "out") / "model" / "model.safetensors"
    specs, how = specs_of(TENSORS), {"key": "k"}
    match change:
        case "key":
            how["key"] = "other"
        case "no resume":
            how["resume"] = False
        case "size":
            os.truncate(shard, shard.stat().st_size - 1)
        case "header":  # as after a power cut: the size is there, the content is not
            shard.write_bytes(bytes(shard.stat().st_size))
        case "missing shard":
            shard.unlink()
        case "no key":
            (staging(tmp_path / "out") / "key").unlink()
        case "shard size":
            how["shard_size"] = 8
        case "dtype":  # the same sizes under another header
            specs["é"] = TensorSpec("F16", (1,))
    again = Writer(tmp_path / "out", specs, **how)
    raw = np.ones(8, np.uint8)
    again.read_back("b", 0, raw)

    assert not again.resumed
    assert again.journal() == []
    assert not raw.any()
    again.discard()


def test_a_journal_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    """Lines that were cut, changed or are no lines of ours are left out; all others count."""
    first = filled(tmp_path / "out", TENSORS)
    for number in range(4):
        first.record(["line", number, ["0" * 32] * 3])
    first.close()
    path = staging(tmp_path / "out") / "journal"
    lines = path.read_bytes().split(b"\n")
    whole = [line for line in lines if line]
    assert len(whole) == 4
    damaged = [
        whole[0],
        whole[1][:-3],
        whole[2].replace(b"line", b"lime"),
        b"[1]",
        b"\xff\0",
        b"[" * 9999,
    ]
    path.write_bytes(b"\n".join(damaged) + b"\n" + whole[3] + b"\n" + whole[2][:20])
    again = Writer(tmp_path / "out", specs_of(TENSORS), key="k")

    assert [line[1] for line in again.journal()] == [0, 3]
    again.record(["line", 5])  # a line after the torn one stands on its own
    assert [line[1] for line in again.journal()] == [0, 3, 5]
    again.discard()


@given(data=st.data())
def test_any_damage_to_a_journal_only_loses_lines(
    tmp_path_factory: Any, data: st.DataObject
) -> None:
    """Whatever bytes change, what is read back is some of the lines that were written."""
    out = tmp_path_factory.getbasetemp() / "journals"
    first = Writer(out, specs_of(TENSORS), key="k", resume=False)
    lines = [["a", i, [f"{i:032x}"], 3, 0] for i in range(5)]
    for line in lines:
        first.record(line)
    first.close()
    path = staging(out) / "journal"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(1, 60))] = data.draw(st.binary(max_size=3))
        if not content:
            break
    path.write_bytes(content)
    again = Writer(out, specs_of(TENSORS), key="k")

    assert all(line in lines for line in again.journal())
    again.discard()


def test_strangers_in_a_staged_folder_are_not_published(tmp_path: Path) -> None:
    """A process killed right after the swap leaves the old output staged: its files must not return."""
    made = filled(tmp_path / "out", TENSORS)
    made.close()
    model = staging(tmp_path / "out") / "model"
    (model / "old-tokenizer.json").write_text("old")
    (model / "old").mkdir()
    (model / "old" / "x").write_text("old")
    again = filled(tmp_path / "out", TENSORS)

    assert again.resumed
    again.publish()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]


# ------------------------------------------------------------------------- locks and strangers


def test_two_writers_of_one_output(tmp_path: Path) -> None:
    """The second is refused with the reason, and the first goes on undisturbed."""
    first = filled(tmp_path / "out", TENSORS)

    with pytest.raises(OutputError, match="out: another process is writing it just now"):
        filled(tmp_path / "out", TENSORS)
    first.publish()
    assert read_model(tmp_path / "out") == TENSORS


def test_no_writer_begins_while_another_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the last staged file is gone the lock holds: nobody's new files are swept away."""
    first = filled(tmp_path / "out", TENSORS)
    real, tried = writer._remove, []

    def watched(paths: Any) -> None:
        real(paths)
        try:
            filled(tmp_path / "out", TENSORS, overwrite=True).close()
        except OutputError as error:
            tried.append(str(error))

    monkeypatch.setattr(writer, "_remove", watched)
    first.publish()

    assert len(tried) == 1
    assert "another process" in tried[0]
    assert not staging(tmp_path / "out").exists()


def test_a_lock_that_was_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that opened the lock of one that was just finishing takes a new one."""
    first = filled(tmp_path / "out", TENSORS)
    real, times = atomic.locked, []

    def late(descriptor: int) -> bool:
        times.append(descriptor)
        if len(times) == 1:
            first.discard()  # between our opening of the lock and our locking of it
        return real(descriptor)

    monkeypatch.setattr(atomic, "locked", late)
    second = filled(tmp_path / "out", TENSORS)

    assert len(times) == 2
    assert os.path.samestat(
        (staging(tmp_path / "out") / "lock").stat(), os.fstat(second._lock_file)
    )
    second.publish()
    assert read_model(tmp_path / "out") == TENSORS


@pytest.mark.parametrize("kind", ["other files", "a model of somebody", "link", "file"])
def test_a_staging_folder_of_somebody_else_is_left_alone(tmp_path: Path, kind: str) -> None:
    """A folder that happens to have the hidden name is not emptied."""
    place = staging(tmp_path / "out")
    if kind == "file":
        place.write_text("mine")
    elif kind == "link":
        (tmp_path / "far").mkdir()
        place.symlink_to(tmp_path / "far")
    else:
        (place / "model").mkdir(parents=True)
        (place / "model" / "model.safetensors").write_bytes(b"mine")
        if kind == "other files":
            (place / "lock").write_text("")
            (place / "thesis.tex").write_text("mine")
    before = tree(tmp_path)

    with pytest.raises(OutputError) as caught:
        filled(tmp_path / "out", TENSORS)
    lines_of(str(caught.value), ".out.suture")
    assert tree(tmp_path) == before


def test_a_place_that_cannot_be_written_is_named() -> None:
    """The kernel's own folders take no files, not even from the superuser."""
    with pytest.raises(OutputError, match=r"/proc/\.out\.suture: cannot write there"):
        filled(Path("/proc/out"), TENSORS)


# ------------------------------------------------------------------------------ a failing disk


def failing(error: int) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(error, os.strerror(error))

    return fail


@pytest.mark.parametrize("call", ["_pwrite", "write", "fsync"])
def test_a_full_disk_is_named_and_nothing_appears(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a tensor, in the journal or in the last sync: the file and the reason, nothing published."""
    made = filled(tmp_path / "out", TENSORS)
    where = writer if call == "_pwrite" else os
    monkeypatch.setattr(where, call, failing(errno.ENOSPC))

    with pytest.raises(OutputError, match="out.*No space left on device"):
        match call:
            case "_pwrite":
                made.write("b", 0, bytes_of(TENSORS["b"]))
            case "write":
                made.record([])
            case "fsync":
                made.publish()
    monkeypatch.undo()
    made.close()
    assert not (tmp_path / "out").exists()


def test_a_fault_of_the_early_sync_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of a failed write-back once; the sync at the end would hear nothing of it."""
    monkeypatch.setattr(writer, "_FLUSH", 4)
    monkeypatch.setattr(os, "fdatasync", failing(errno.EIO))
    made = filled(tmp_path / "out", TENSORS)

    with pytest.raises(OutputError, match="Input/output error"):
        made.publish()
    made.close()
    assert not (tmp_path / "out").exists()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may write less than it was given; the rest follows."""
    real = writer._pwrite
    monkeypatch.setattr(writer, "_pwrite", lambda d, raw, offset: real(d, raw[:3], offset))
    filled(tmp_path / "out", TENSORS).publish()

    assert (tmp_path / "out" / "model.safetensors").read_bytes() == GOLDEN


@pytest.mark.parametrize("swap", [True, False], ids=["one step", "two steps"])
def test_a_folder_of_any_name_replaces_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    """Even one called ``old``, as what it replaces is put aside; unasked nothing is replaced."""
    if not swap:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    fresh, out = tmp_path / "work" / "old", tmp_path / "old"
    for folder, text in ((fresh, "new"), (out, "older")):
        folder.mkdir(parents=True)
        (folder / "file").write_text(text)

    with pytest.raises(OutputError, match="appeared while its run was going on"):
        atomic.publish(fresh, out, overwrite=False)
    atomic.publish(fresh, out, overwrite=True)

    assert (out / "file").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old", "work"]


def test_a_lock_of_a_folder_that_was_removed_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One who opened the file before its folder was removed locks the file that is there now."""
    folder, lock = tmp_path / "work", atomic.locked
    removed = []

    def late(descriptor: int) -> bool:
        if not removed:  # another process ends its run between opening and locking
            removed.append(folder)
            shutil.rmtree(folder)
        return lock(descriptor)

    monkeypatch.setattr(atomic, "locked", late)
    with alone(folder, tmp_path / "out", "writing"):
        assert (folder / "lock").is_file()
        with (
            pytest.raises(OutputError, match="another process is writing it"),
            alone(folder, tmp_path / "out", "writing"),
        ):
            pass


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_file_appears_whole_and_synced_or_not_at_all(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its bytes are on the disk, what stood there before does, and nothing else is left."""
    path = tmp_path / "some" / "file"
    with appearing(path) as file:
        file.write(b"one")
    if call == "fsync":
        monkeypatch.setattr(os, "fsync", failing(errno.EIO))

    with pytest.raises(OutputError if call == "fsync" else KeyError), appearing(path) as file:
        file.write(b"other")
        if call == "write":
            raise KeyError

    assert path.read_bytes() == b"one"
    assert list(path.parent.iterdir()) == [path]
