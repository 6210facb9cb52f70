"""An interrupted merge goes on where it stopped, to the same bytes; what cannot be trusted is redone.

Pieces are made of 256 elements here instead of a million, so that tiny models have many of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import suture
from making import (
    CONFIG,
    RECIPE,
    descriptors,
    family,
    llama,
    packed,
    quick_disk,
    read_model,
    save_model,
    staging,
    tree,
    weights,
)
from suture.analysis import profile
from suture.checkpoints import writer
from suture.checkpoints.writer import Writer
from suture.errors import MismatchError, NonFiniteError, OutputError, SutureError
from suture.merges import apply
from suture.stream import sweep
from suture.tensors import spec
from suture.verbs.merge import VERB as made
from suture.verbs.merge import estimate, run
from suture.verbs.merge.result import MergeReport

PIECE = 256


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (spec, apply, estimate, profile):  # not `stream`: blocks may be larger there
        monkeypatch.setattr(module, "PIECE", PIECE)
    monkeypatch.setattr(sweep, "TASK_PIECES", 2)
    quick_disk(monkeypatch)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return family(tmp_path / "in", "math", "code", "law", config=CONFIG)


def merge(here: Path, where: str, recipe: Any = RECIPE, **how: Any) -> MergeReport:
    """Merge into ``where``/out beside the inputs; the name of the output is always the same."""
    options = {"threads": 2, "block": 64, **how}
    progress = run.progress_of(options.pop("stage", None))
    return made(recipe, here.parent / where / "out", folder=here, progress=progress, **options)


def same(here: Path, one: str, other: str) -> bool:
    """Whether two outputs are the same to the last byte, records and cards included."""
    return tree(here.parent / one / "out") == tree(here.parent / other / "out")


class Stop(BaseException):
    """What interrupts the merges here: no error that anything could handle."""


def stopping(
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    what: str,
    after: int,
    error: type[BaseException] = Stop,
) -> None:
    """Let a function work ``after`` times, and then raise."""
    real, calls = getattr(where, what), []

    def stop(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise error
        return real(*arguments, **more)

    monkeypatch.setattr(where, what, stop)


def interrupted(here: Path, where: str, after: int, recipe: Any = RECIPE, **how: Any) -> None:
    """A merge that stops after so many writes, and leaves its staging folder."""
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, Writer, "write", after)
        with pytest.raises(Stop):
            merge(here, where, recipe, **how)
    assert not (here.parent / where / "out").exists()
    assert (here.parent / where / ".out.suture" / "journal").exists()


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "parameters": {}},
    "ties": {"method": "ties", "parameters": {"density": 0.3, "scope": "global"}},
    "ties by tensor": {"method": "ties", "parameters": {"density": 0.3, "scope": "tensor"}},
    "dare_ties": {"method": "dare_ties", "parameters": {"density": 0.4, "seed": 7}},
    "dare_linear l1": {"method": "dare_linear", "parameters": {"density": 0.4, "rescale": "l1"}},
    "consensus": {"method": "consensus", "parameters": {}},
    "stitch": {"method": "stitch", "parameters": {"density": 0.1}},
    "slerp": {"method": "slerp", "parameters": {"t": 0.3}, "base": None},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [0, 1, 3, 10, 17, 25])
def test_the_second_run_ends_where_one_run_would_have(here: Path, method: str, after: int) -> None:
    """Weights, record and card are those of an uninterrupted merge: counts and fingerprints too."""
    recipe = {k: v for k, v in {**RECIPE, **METHODS[method]}.items() if v is not None}
    recipe["output"] = {"dtype": "bfloat16", "shard_size": 4000}
    merge(here, "whole", recipe)
    interrupted(here, "part", after, recipe, threads=1)
    report = merge(here, "part", recipe)

    assert same(here, "part", "whole")
    assert (report.resumed > 0) == (after > 1)  # a line of the journal is two pieces here
    assert not staging(here.parent / "part" / "out").exists()


@pytest.mark.parametrize("threads", [1, 4])
def test_it_may_be_interrupted_again_and_again(here: Path, threads: int) -> None:
    """Each run takes over all that was finished before it."""
    merge(here, "whole")
    taken = [0]
    for after in (4, 5, 6, 7):
        interrupted(here, "part", after, threads=threads)
        journal = (staging(here.parent / "part" / "out") / "journal").read_text()
        taken.append(journal.count('"model.') + journal.count('"lm_head.'))
    assert merge(here, "part").resumed == taken[-1]

    assert taken == sorted(taken)
    assert taken[-1] > 4
    assert same(here, "part", "whole")


@pytest.mark.parametrize(
    "where", ["_outcome", "check_fingerprints", "add_files", "publish", "_rename"]
)
def test_a_stop_near_the_end_repeats_nothing(
    here: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When every piece was written, the next run writes none."""
    merge(here, "whole")
    owner = {"_outcome": apply, "publish": Writer, "_rename": Writer}.get(where, run)
    with monkeypatch.context() as patch:
        stopping(patch, owner, where, 0)
        with pytest.raises(Stop):
            merge(here, "part")
    assert not (here.parent / "part" / "out").exists()
    with monkeypatch.context() as patch:
        stopping(patch, Writer, "write", 0)
        report = merge(here, "part")

    assert same(here, "part", "whole")
    assert report.resumed == sum(-(-raw.values.size // PIECE) for raw in llama(0).values())


@pytest.mark.parametrize("after", [5, 10**9])
def test_a_record_has_the_facts_of_a_merge_that_was_finished_before(here: Path, after: int) -> None:
    """Those of a mask that only protects are known without reading a model; they are told again."""
    mask = suture.localize(suture.open(here / "math") - suture.open(here / "base"), density=0.1)
    mask.save(here / "mask.safetensors")
    recipe = {**RECIPE, "method": "task_arithmetic", "parameters": {}, "space": {"exclude": []},
              "protect": {"model": "math", "mask": str(here / "mask.safetensors")}}  # fmt: skip
    merge(here, "whole", recipe)
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, Writer, "write", after)
        stopping(patch, Writer, "publish", 0)
        with pytest.raises(Stop):
            merge(here, "part", recipe)
    report = merge(here, "part", recipe)

    assert report.facts["protect"]["entries"] == mask.count
    assert any("which only math writes" in line for line in report.told)
    assert same(here, "part", "whole")


def test_looking_over_what_is_finished_is_a_stage(here: Path) -> None:
    """A second run reads back all that the first wrote, and says so with the number of bytes."""
    stages: list[tuple[str, int]] = []
    read: list[int] = []

    def stage(name: str, nbytes: int) -> Callable[[str, int], None]:
        stages.append((name, nbytes))
        return lambda tensor, more: read.append(more) if len(stages) == 1 else None

    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, Writer, "publish", 0)
        with pytest.raises(Stop):
            merge(here, "part")
    merge(here, "part", stage=stage)

    whole = suture.open(here.parent / "part" / "out").nbytes
    assert stages[0] == ("verify", whole)
    assert sum(read) == whole


@pytest.mark.parametrize("change", [{"threads": 3}, {"block": 256}, {"block": 8}])
def test_threads_and_blocks_may_change_between_runs(here: Path, change: dict[str, int]) -> None:
    """They change no byte, so they start nothing anew."""
    merge(here, "whole")
    interrupted(here, "part", 12, threads=1)

    assert merge(here, "part", **change).resumed > 0
    assert same(here, "part", "whole")


def test_the_order_of_models_is_no_other_merge(here: Path) -> None:
    """Models named in another order, even between the two runs, give the same weights."""
    recipe = {**RECIPE, "models": dict(reversed(RECIPE["models"].items()))}
    merge(here, "whole")
    interrupted(here, "part", 12)
    merge(here, "part", recipe)

    assert weights(here.parent / "part" / "out") == weights(here.parent / "whole" / "out")


OTHER: dict[str, dict[str, Any]] = {
    "another number": {"parameters": {"density": 0.4}},
    "another weight": {"models": {"math": {"path": "./math", "weight": 2}, "code": "./code"}},
    "another method": {"method": "task_arithmetic", "parameters": {}},
    "one model less": {"models": {"math": "./math"}},
    "another model": {"models": {"math": "./math", "code": "./law"}},
    "another name": {"models": {"maths": "./math", "code": "./code"}},
    "another space": {"space": {"exclude": ["norm"]}},
    "another policy": {"policy": {"extra": "drop"}},
    "another dtype": {"output": {"dtype": "float16"}},
    "other shards": {"output": {"shard_size": 8000}},
    "no resuming": {},
}


@pytest.mark.parametrize("what", OTHER)
def test_another_recipe_starts_anew(here: Path, what: str) -> None:
    """Nothing of one merge gets into another, whatever differs between them."""
    recipe = {**RECIPE, **OTHER[what]}
    merge(here, "whole", recipe)
    interrupted(here, "part", 12)
    report = merge(here, "part", recipe, resume=what != "no resuming")

    assert report.resumed == 0
    assert same(here, "part", "whole")


def test_the_other_way_round_is_another_merge(here: Path) -> None:
    """SLERP from a to b is not SLERP from b to a: the order of its models counts."""
    recipe = {
        "method": "slerp",
        "models": {"math": "./math", "code": "./code"},
        "parameters": {"t": 0.2},
    }
    turned = {**recipe, "models": dict(reversed(recipe["models"].items()))}
    merge(here, "whole", turned)
    interrupted(here, "part", 12, recipe)
    report = merge(here, "part", turned)

    assert report.resumed == 0
    assert same(here, "part", "whole")


def rewrite(path: Path, *, keep_time: bool = False) -> None:
    """Change one weight of a file in place."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x55
    path.write_bytes(content)
    times = (before.st_atime_ns, before.st_mtime_ns if keep_time else before.st_mtime_ns + 1)
    os.utime(path, ns=times)


@pytest.mark.parametrize("who", ["base", "math"])
@pytest.mark.parametrize("how", ["content", "time", "header", "shards"])
def test_changed_inputs_start_anew(here: Path, who: str, how: str) -> None:
    """A model that was written again between the runs is another model."""
    interrupted(here, "part", 12)
    path = here / who / "model.safetensors"
    match how:
        case "content":
            rewrite(path)
        case "time":
            os.utime(path)
        case "header":
            stat = path.stat()
            tensors = read_model(here / who)
            save_model(here / who, dict(reversed(tensors.items())))
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        case "shards":
            tensors = read_model(here / who)
            shutil.rmtree(here / who)
            save_model(here / who, tensors, shards=2, config=CONFIG)
    merge(here, "whole")
    report = merge(here, "part")

    assert report.resumed == 0
    assert same(here, "part", "whole")


def shards_of(here: Path, where: str) -> list[Path]:
    return sorted((staging(here.parent / where / "out") / "model").glob("*.safetensors"))


@pytest.mark.parametrize("damage", ["a bit", "zeros", "the last byte", "everything"])
def test_a_damaged_piece_is_made_again(here: Path, damage: str) -> None:
    """What is on disk must have the digest of the journal: as after a power cut, or a bad disk."""
    merge(here, "whole")
    interrupted(here, "part", 20, threads=1)
    (shard,) = shards_of(here, "part")
    content = bytearray(shard.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    journal = len(Writer(here.parent / "elsewhere", {}, key="").shards)
    assert journal == 1
    written = [i for i in range(length, len(content)) if content[i]]
    match damage:
        case "a bit":
            content[written[len(written) // 2]] ^= 1
        case "zeros":
            content[length : length + 3000] = bytes(3000)
        case "the last byte":
            content[written[-1]] ^= 0x80
        case "everything":
            content[length:] = os.urandom(len(content) - length)
    shard.write_bytes(content)
    report = merge(here, "part")

    assert same(here, "part", "whole")
    assert (report.resumed == 0) == (damage == "everything")


@pytest.mark.parametrize("cut", [1, 5, 30, 200])
def test_a_journal_that_is_cut_short_loses_its_last_line_only(here: Path, cut: int) -> None:
    """The rest of it counts; what the line spoke of is made again."""
    merge(here, "whole")
    interrupted(here, "part", 20, threads=1)
    path = staging(here.parent / "part" / "out") / "journal"
    os.truncate(path, path.stat().st_size - cut)
    report = merge(here, "part")

    assert report.resumed > 5
    assert same(here, "part", "whole")


@pytest.mark.parametrize("name", ["journal", "key", "lock", "model"])
def test_a_staging_folder_with_a_part_missing(here: Path, name: str) -> None:
    """Whatever is gone, the result is right."""
    merge(here, "whole")
    interrupted(here, "part", 20)
    path = staging(here.parent / "part" / "out") / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if name == "lock":  # a folder without a lock is none of ours
        with pytest.raises(OutputError, match="which no run left"):
            merge(here, "part")
        return
    report = merge(here, "part")

    assert report.resumed == 0
    assert same(here, "part", "whole")


@settings(max_examples=20, phases=[Phase.generate])
@given(data=st.data())
def test_any_damage_to_what_is_staged_is_repaired(
    tmp_path_factory: Any, data: st.DataObject
) -> None:
    """Random bytes anywhere in shards, journal and key: the second run ends as the only one would."""
    root = tmp_path_factory.mktemp("damage")
    here = family(root / "in", "math", "code", config=CONFIG, layers=1)
    merge(here, "whole")
    interrupted(here, "part", data.draw(st.integers(1, 14)), threads=1)
    files = [
        *shards_of(here, "part"),
        *(staging(root / "part" / "out") / n for n in ("journal", "key")),
    ]
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from(files))
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        content[place : place + data.draw(st.integers(1, 500))] = data.draw(st.binary(max_size=20))
        path.write_bytes(content)
    merge(here, "part")

    assert same(here, "part", "whole")
    shutil.rmtree(root)


def test_unequal_integers_are_told_by_every_run(here: Path) -> None:
    """Before anything is merged, in a first run as in one that takes over another's pieces."""
    for name in ("base", "math", "code"):
        tensors = {"a.position_ids": packed(np.arange(300), "I64")}
        save_model(here / name, tensors | read_model(here / name), config=CONFIG)
    interrupted(here, "part", 12, threads=1)
    path = here / "code" / "model.safetensors"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1
    path.write_bytes(content)
    os.utime(
        path, ns=(before.st_atime_ns, before.st_mtime_ns)
    )  # the first run's pieces seem to fit

    for place in ("part", "new"):
        with pytest.raises(MismatchError, match=r"code against base: a\.position_ids"):
            merge(here, place, threads=1)
        assert not (here.parent / place / "out").exists()


def test_allowing_nonfinite_values_is_another_merge(here: Path) -> None:
    """A run that was refused for its values leaves nothing that the next could take over."""
    tensors = read_model(here / "math")
    tensors["model.norm.weight"] = packed(np.full(16, np.nan))
    save_model(here / "math", tensors, config=CONFIG)

    with pytest.raises(NonFiniteError):
        merge(here, "part", threads=1)
    assert not staging(here.parent / "part" / "out").exists()
    assert merge(here, "part", allow_nonfinite=True).resumed == 0


# --------------------------------------------------------------------------------------- overwriting


def test_an_old_output_stays_until_the_new_one_is_whole(here: Path) -> None:
    """Interrupted at any point of its replacement, the old folder is as it was; then it is gone."""
    merge(here, "part", {**RECIPE, "output": {"shard_size": 4000}})
    old = here.parent / "part" / "out"
    (old / "tokenizer.json").write_text("old")
    before = tree(old)
    recipe = {**RECIPE, "parameters": {"density": 0.9}}
    for where, what, after in [(Writer, "write", 0), (Writer, "write", 9), (apply, "_outcome", 0),
                               (run, "add_files", 0), (Writer, "publish", 0), (Writer, "_rename", 0)]:  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            stopping(patch, where, what, after)
            with pytest.raises(Stop):
                merge(here, "part", recipe, overwrite=True)
        assert tree(old) == before
    merge(here, "part", recipe, overwrite=True)
    merge(here, "whole", recipe)

    assert same(
        here, "part", "whole"
    )  # among other things: no shard and no tokenizer of the old one
    assert sorted(p.name for p in (here.parent / "part").iterdir()) == ["out"]


def test_a_failed_replacement_leaves_the_old_output(here: Path) -> None:
    """An input that is refused halfway through costs nothing that was there."""
    merge(here, "part")
    before = tree(here.parent / "part")
    tensors = read_model(here / "math")
    tensors["model.norm.weight"] = packed(np.full(16, np.inf))
    save_model(here / "math", tensors, config=CONFIG)

    with pytest.raises(NonFiniteError):
        merge(here, "part", overwrite=True)
    assert tree(here.parent / "part") == before


def test_killed_right_after_the_swap(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new output is in place and the old one staged: neither is taken for the other."""
    merge(here, "part", {**RECIPE, "output": {"dtype": "float16"}})
    out = here.parent / "part" / "out"
    (out / "tokenizer.json").write_text("old")
    recipe = {**RECIPE, "output": {"dtype": "bfloat16"}}  # as many bytes, in another dtype
    with monkeypatch.context() as patch:
        stopping(patch, writer, "sync_folder", 1)  # between the swap and the cleaning
        with pytest.raises(Stop):
            merge(here, "part", recipe, overwrite=True)
    merge(here, "whole", recipe)
    assert same(here, "part", "whole")
    assert (staging(out) / "model" / "tokenizer.json").exists()

    merge(here, "part", recipe, overwrite=True)
    assert same(here, "part", "whole")
    assert not staging(out).exists()


def test_the_second_of_two_at_once_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one merge writes, another to the same place ends with an error and touches nothing."""
    errors: list[str] = []
    real = run.add_files

    def meanwhile(*arguments: Any) -> None:
        with pytest.raises(OutputError) as caught:
            merge(here, "part")
        errors.append(str(caught.value))
        real(*arguments)

    monkeypatch.setattr(run, "add_files", meanwhile)
    merge(here, "part")
    monkeypatch.undo()
    monkeypatch.setattr(spec, "PIECE", PIECE)

    assert len(errors) == 1
    assert "another process is writing it just now" in errors[0]
    assert (here.parent / "part" / "out" / "suture.json").exists()


def test_outputs_beside_each_other_do_not_meet(here: Path) -> None:
    """Interrupted merges to two names in one folder go on separately."""
    for name, density in (("out", 0.5), ("out2", 0.9)):
        with pytest.MonkeyPatch.context() as patch:
            stopping(patch, Writer, "write", 12)
            with pytest.raises(Stop):
                made({**RECIPE, "parameters": {"density": density}}, here.parent / name,
                          folder=here, threads=1, block=64)  # fmt: skip
    for name, density in (("out", 0.5), ("out2", 0.9)):
        report = made({**RECIPE, "parameters": {"density": density}}, here.parent / name,
                           folder=here, threads=1, block=64)  # fmt: skip
        assert report.resumed > 0
    assert weights(here.parent / "out") != weights(here.parent / "out2")


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, MemoryError, OutputError])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_leaves_no_file_open_and_no_lock(
    here: Path, error: type[BaseException], threads: int
) -> None:
    """Whatever ends a merge, in whichever thread: the next one in this process can begin."""
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, Writer, "write", 5, error)
        with pytest.raises(error):
            merge(here, "part", threads=threads)

    assert descriptors(here.parent / "part") == []
    assert merge(here, "part").resumed >= 0


@pytest.mark.parametrize(
    "spoil",
    [lambda here: os.truncate(here / "math" / "model.safetensors", 9000),
     lambda here: (here / "math" / "model.safetensors").unlink()],
    ids=["cut", "gone"],
)  # fmt: skip
def test_an_input_that_fails_during_the_merge(
    here: Path, spoil: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is named, nothing is published, and a merge of the repaired input is right."""
    real, content = run.apply, (here / "math" / "model.safetensors").read_bytes()
    merge(here, "whole")

    def later(*arguments: Any) -> Any:
        spoil(here)
        return real(*arguments)

    monkeypatch.setattr(run, "apply", later)
    with pytest.raises(SutureError, match=r"math.model\.safetensors"):
        merge(here, "part")
    assert not (here.parent / "part" / "out").exists()
    monkeypatch.setattr(run, "apply", real)
    (here / "math" / "model.safetensors").write_bytes(content)
    merge(here, "part")
    assert same(here, "part", "whole")


def test_the_record_tells_nothing_of_the_interruption(here: Path) -> None:
    """``suture.json`` is the merge's, not the run's: no times, no machine, no threads."""
    merge(here, "whole")
    record = json.loads((here.parent / "whole" / "out" / "suture.json").read_text())
    text = json.dumps(record)

    assert "seconds" not in text
    assert "threads" not in text
    assert str(here.parent) not in text
