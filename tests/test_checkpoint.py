"""Files and folders that are hostile, broken or odd are refused by name; all others open lazily."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize

import suture
from making import (
    CONFIG,
    NUMPY,
    WIDTHS,
    Raw,
    Tensors,
    descriptors,
    entry,
    file_of,
    lines_of,
    llama,
    packed,
    read_file,
    safetensors,
    save_model,
)
from suture.checkpoints import checkpoint
from suture.checkpoints.checkpoint import Checkpoint, open_checkpoint
from suture.errors import CheckpointError, SutureError

F32 = entry("F32", [2], 0, 8)
EIGHT = bytes(range(8))


def opened(tmp_path: Path, content: bytes) -> Checkpoint:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    return open_checkpoint(path)


def refused(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, content)
    text = str(caught.value)
    lines_of(text, "x.safetensors")
    assert len(text) < 2000
    return text


# ------------------------------------------------------------------------------------ headers


HOSTILE: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "too few"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "too few"),
    "a length beyond the file": (file_of({"a": F32}, EIGHT, length=10**6), "cut short inside its header"),
    "a length beyond the format": (file_of({"a": F32}, EIGHT, length=2**63), "more than the format allows"),
    "a length of all ones": (file_of({"a": F32}, EIGHT, length=2**64 - 1), "more than the format allows"),
    "a length that is too small": (file_of({"a": F32}, EIGHT, length=20), "not valid JSON"),
    "a length of zero": (file_of(b"", EIGHT), "not valid JSON"),
    "a cut in the header": (file_of({"a": F32}, EIGHT)[:30], "cut short inside its header"),
    "a cut in the data": (file_of({"a": F32}, EIGHT)[:-1], "cut short"),
    "no data at all": (file_of({"a": F32}), "cut short"),
    "bytes behind the last tensor": (file_of({"a": F32}, EIGHT + b"!"), "1 bytes after the last"),
    "a hole at the start": (file_of({"a": entry("F32", [1], 4, 8)}, EIGHT), "belong to nothing"),
    "a hole in the middle": (
        file_of({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 4, 6)}, EIGHT[:6]),
        "2 bytes before 'b'",
    ),
    "an overlap": (
        file_of({"a": entry("U8", [5], 0, 5), "b": entry("U8", [4], 4, 8)}, EIGHT), "overlap"
    ),
    "two tensors in one place": (file_of({"a": F32, "b": F32}, EIGHT), "overlap"),
    "a name that stands twice": (
        file_of(b'{"a":' + json.dumps(F32).encode() + b',"a":' + json.dumps(F32).encode() + b"}", EIGHT),
        "'a' stands twice",
    ),
    "a key that stands twice": (
        file_of(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', EIGHT),
        "'dtype' stands twice",
    ),
    "an unknown dtype": (file_of({"a": entry("F31", [2], 0, 8)}, EIGHT), "unknown dtype 'F31'"),
    "a dtype that is a list": (file_of({"a": entry(["F32"], [2], 0, 8)}, EIGHT), "dtype"),
    "a dtype that is a mapping": (file_of({"a": entry({}, [2], 0, 8)}, EIGHT), "dtype"),
    "a dtype that is null": (file_of({"a": entry(None, [2], 0, 8)}, EIGHT), "dtype"),
    "a negative shape": (file_of({"a": entry("F32", [-2], 0, 8)}, EIGHT), "whole numbers"),
    "two negative sizes": (file_of({"a": entry("F32", [-1, -2], 0, 8)}, EIGHT), "whole numbers"),
    "a fraction in a shape": (file_of({"a": entry("F32", [2.0], 0, 8)}, EIGHT), "whole numbers"),
    "a truth value in a shape": (file_of({"a": entry("F32", [True, 2], 0, 8)}, EIGHT), "whole numbers"),
    "a word in a shape": (file_of({"a": entry("F32", ["2"], 0, 8)}, EIGHT), "whole numbers"),
    "a shape that is a number": (file_of({"a": entry("F32", 2, 0, 8)}, EIGHT), "whole numbers"),
    "a shape that is null": (file_of({"a": entry("F32", None, 0, 8)}, EIGHT), "whole numbers"),
    "a huge size": (file_of({"a": entry("F32", [2**70], 0, 8)}, EIGHT), "absurd shape"),
    "a huge size beside a zero": (file_of({"a": entry("F32", [2**62, 0], 0, 0)}), "absurd shape"),
    "huge sizes beside a zero": (file_of({"a": entry("F32", [2**40, 2**40, 0], 0, 0)}), "absurd shape"),
    "a product beyond 64 bits": (file_of({"a": entry("F32", [2**32, 2**32], 0, 8)}, EIGHT), "absurd shape"),
    "a product that wraps around to the right size": (
        file_of({"a": entry("F32", [2**62 + 2], 0, 8)}, EIGHT), "absurd shape"
    ),
    "more dimensions than numpy has": (file_of({"a": entry("U8", [1] * 65, 0, 1)}, b"x"), "absurd shape"),
    "a hundred thousand dimensions": (file_of({"a": entry("U8", [3] * 10**5, 0, 1)}, b"x"), "absurd shape"),
    "offsets too short": (file_of({"a": entry("F32", [2], 0, 7)}, EIGHT), "needs 8 bytes"),
    "offsets too long": (file_of({"a": entry("F32", [1], 0, 8)}, EIGHT), "needs 4 bytes"),
    "offsets the wrong way round": (file_of({"a": entry("F32", [2], 8, 0)}, EIGHT), "needs 8 bytes"),
    "a negative offset": (file_of({"a": entry("F32", [2], -8, 0)}, EIGHT), "whole numbers"),
    "a fraction as an offset": (file_of({"a": entry("F32", [2], 0.0, 8)}, EIGHT), "whole numbers"),
    "offsets beyond the file": (file_of({"a": entry("F32", [2], 2**40, 2**40 + 8)}, EIGHT), "belong to nothing"),
    "three offsets": (
        file_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, EIGHT), "whole numbers"
    ),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "no dtype, shape and data_offsets"),
    "an entry that is a list": (file_of({"a": [1]}, EIGHT), "no dtype, shape and data_offsets"),
    "an entry that is null": (file_of({"a": None}, EIGHT), "no dtype, shape and data_offsets"),
    "a header that is a list": (file_of(b"[1, 2]", EIGHT), "not a JSON object"),
    "a header that is no JSON": (file_of(b"{'a': 1}", EIGHT), "not valid JSON"),
    "a header that is no text": (file_of(b"\xff\xfe\xfa\x80", EIGHT), "not valid JSON"),
    "a header cut in its JSON": (file_of(b'{"a": {"dtype": "F32"', EIGHT), "not valid JSON"),
    "half a character in a name": (
        file_of(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT), "not valid"
    ),
    "nested lists": (file_of(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "nested too deeply"),
    "nested mappings": (file_of(b'{"a":' * 10**5 + b"1" + b"}" * 10**5), "nested too deeply"),
    "a number of a million digits": (
        file_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,8]}}', EIGHT), ""
    ),
    "metadata that is a number": (file_of({"__metadata__": 1, "a": F32}, EIGHT), "__metadata__"),
    "metadata with a number in it": (file_of({"__metadata__": {"n": 1}, "a": F32}, EIGHT), "__metadata__"),
    "metadata with a mapping in it": (file_of({"__metadata__": {"n": {}}, "a": F32}, EIGHT), "__metadata__"),
    "a pickle under a false name": (b"\x80\x02}q\x00X\x01\x00\x00\x00a" + bytes(100), "not a safetensors file"),
    "a zip file under a false name": (b"PK\x03\x04" + bytes(100), ""),
    "HTML of a failed download": (b"<!DOCTYPE html><html><body>404</body></html>" * 4, "not a safetensors"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_header_is_refused_by_name(tmp_path: Path, what: str) -> None:
    """Each is an error of one page at most with the file's name, and takes no noticeable time."""
    content, reason = HOSTILE[what]
    begun = time.perf_counter()

    assert reason in refused(tmp_path, content)
    assert time.perf_counter() - begun < 5  # a generous bound against a hang, not a measurement


def test_null_metadata_is_no_metadata(tmp_path: Path) -> None:
    """Some writers put null where the mapping should be; the tensors are right all the same."""
    model = opened(tmp_path, file_of({"__metadata__": None, "a": F32}, EIGHT))

    assert list(model) == ["a"]


def test_scalars_and_empty_tensors_are_tensors(tmp_path: Path) -> None:
    """A shape of nothing is one number; a size of zero is no number; both can be read."""
    header = {
        "s": entry("F32", [], 0, 4),
        "e": entry("F32", [0, 3], 4, 4),
        "f": entry("I64", [0], 4, 4),
    }
    model = opened(tmp_path, file_of(header, np.float32(2).tobytes()))

    assert model["s"].shape == ()
    assert model["s"] == 2
    assert model["e"].shape == (0, 3)
    assert model.tensor("e").shape == (0, 3)
    assert model["f"].dtype == np.int64


def test_a_file_without_tensors_opens_and_is_empty(tmp_path: Path) -> None:
    """No tensors are no error of the file; what needs some says so."""
    assert len(opened(tmp_path, file_of({}))) == 0


@pytest.mark.parametrize("dtype", sorted(WIDTHS))
def test_every_dtype_reads_as_torch_reads_it(tmp_path: Path, dtype: str) -> None:
    """``tensor`` has the bytes and the dtype that the safetensors library gives."""
    from safetensors.torch import load_file

    raw = Raw(dtype, (2, 3), bytes(range(6 * WIDTHS[dtype])) if dtype != "BOOL" else b"\0\1" * 3)
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"a": raw}))
    mine, theirs = open_checkpoint(path).tensor("a"), load_file(path)["a"]

    assert mine.dtype == theirs.dtype
    assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL"])
def test_arrays_hold_the_values_of_the_file(tmp_path: Path, dtype: str) -> None:
    """``checkpoint[name]`` is float32 for small floats, and the file's own type for all others."""
    values = (
        np.array([[0, 1, 0], [1, 1, 0]]) if dtype == "BOOL" else np.array([[0, 1, 2], [7, 100, 3]])
    )
    found = opened(tmp_path, safetensors({"a": packed(values, dtype)}))["a"]

    assert np.array_equal(found, values)
    small = dtype in ("F32", "F16", "BF16")
    assert found.dtype == (np.float32 if small else np.dtype(NUMPY[dtype]))


# ---------------------------------------------------------------------------------------- fuzz

SEEDS: list[Tensors] = [
    {"a": packed(np.arange(6).reshape(2, 3)), "b": packed([1, 2], "BF16"), "c": packed([3], "I64")},
    {"x.weight": packed(np.ones((4, 4)), "F16"), "e": Raw("F32", (0, 2), b""), "s": packed(7.0)},
]
TWISTED = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=3)
    | st.integers(-9, 9) | st.sampled_from([2**31, 2**32, 2**60, 2**63, 2**64, -(2**63), 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)  # fmt: skip


def check_opened(path: Path) -> None:
    """What opens lies inside the file, reads to the last byte, and is what safetensors reads."""
    content = path.read_bytes()
    try:
        model = open_checkpoint(path)
    except CheckpointError as error:
        assert path.name in str(error)
        return
    for name, spec in model.specs.items():
        place = model.places[name]
        assert 0 < place.offset <= place.offset + spec.nbytes <= len(content)
        raw = np.empty(spec.nbytes, np.uint8)
        model.read_into(name, 0, raw)
        assert raw.tobytes() == content[place.offset : place.offset + spec.nbytes]
        assert model[name].shape == spec.shape
    model.close()
    head = content[8:9]
    if head == b"{" and b'"__metadata__": null' not in content:
        theirs = dict(deserialize(content))
        assert {n: tuple(t["shape"]) for n, t in theirs.items()} == {
            n: s.shape for n, s in model.specs.items()
        }


@given(data=st.data())
def test_bytes_changed_at_random_never_crash(tmp_path_factory: Any, data: st.DataObject) -> None:
    """A valid file with some bytes changed, cut or put in opens as what it says, or is refused."""
    content = bytearray(safetensors(data.draw(st.sampled_from(SEEDS)), {"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        match data.draw(st.sampled_from(["set", "flip", "cut", "insert", "length"])):
            case "set":
                content[place : place + 1] = bytes([data.draw(st.integers(0, 255))])
            case "flip" if place < len(content):
                content[place] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del content[place : place + data.draw(st.integers(1, 40))]
            case "insert":
                content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
            case "length":
                content[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)

    check_opened(path)


@given(data=st.data())
def test_headers_twisted_at_random_never_crash(tmp_path_factory: Any, data: st.DataObject) -> None:
    """A valid header with entries replaced by any JSON value opens as what it says, or is refused."""
    seed = data.draw(st.sampled_from(SEEDS))
    content = safetensors(seed, {"format": "pt"})
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from([*seed, "__metadata__", "new"]))
    value = data.draw(TWISTED)
    part = data.draw(st.sampled_from(["all", "dtype", "shape", "data_offsets", "size", "offset"]))
    if part == "all" or name not in seed:
        header[name] = value
    elif part in ("size", "offset"):
        key = {"size": "shape", "offset": "data_offsets"}[part]
        header[name][key] = [*header[name][key][:-1], value]
    else:
        header[name][part] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(file_of(header, content[8 + length :]))

    check_opened(path)


@given(where=st.dictionaries(st.text(max_size=6), TWISTED | st.text(max_size=300), max_size=3))
def test_an_index_of_anything_never_crashes(tmp_path_factory: Any, where: dict[str, Any]) -> None:
    """An index with any names and values opens nothing outside of the folder, or is refused."""
    folder = tmp_path_factory.getbasetemp() / "indexed"
    save_model(folder, SEEDS[0])
    for index in ({"weight_map": where}, where):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        try:
            found = open_checkpoint(folder)
        except CheckpointError:
            continue
        assert all(file.parent == folder.resolve() for file in found.files)


# -------------------------------------------------------------------------------- giant files


def sparse(path: Path, size: int, head: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


def test_a_giant_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A header beyond the format's 100 MB is an error, however large the file is."""
    path = sparse(tmp_path / "x.safetensors", 1 << 33, (1 << 32).to_bytes(8, "little"))

    with pytest.raises(CheckpointError, match="more than the format allows"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_giant_json_file_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    """A configuration or an index of gigabytes is an error, not a full memory."""
    folder = save_model(tmp_path / "m", SEEDS[0])
    sparse(folder / name, 1 << 34)

    with pytest.raises(CheckpointError, match=f"{name}.*too large"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["[" * 10**5, "[1]", "{'a': 1}", '{"a": 1, "a": 2}', "\ud800", ""])
def test_a_broken_config_is_refused_by_name(tmp_path: Path, text: str) -> None:
    """A ``config.json`` that is no JSON object is named, not ignored: it says what is tied."""
    folder = save_model(tmp_path / "m", SEEDS[0])
    (folder / "config.json").write_bytes(text.encode(errors="surrogatepass"))

    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


# ------------------------------------------------------------------------------------- the index


def sharded(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    folder = save_model(tmp_path / "m", llama(0), shards=3)
    return folder, json.loads((folder / "model.safetensors.index.json").read_text())


def with_index(folder: Path, index: object) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def complaint(model: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    return str(caught.value)


def test_shards_are_one_model(tmp_path: Path) -> None:
    """The tensors of all shards are there, each in its file."""
    folder, _ = sharded(tmp_path)
    model, plain = open_checkpoint(folder), llama(0)

    assert set(model) == set(plain)
    assert all(np.array_equal(model[name], raw.values) for name, raw in plain.items())


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "a\0b", "./x"],
)
def test_an_index_cannot_name_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    """Only plain names of files in the folder: nothing above it, below it or absolute."""
    folder, index = sharded(tmp_path)
    save_model(tmp_path, SEEDS[0])
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    index["weight_map"]["lm_head.weight"] = name

    lines_of(complaint(with_index(folder, index)), "index.json")


def test_a_shard_with_a_name_too_long_is_missing(tmp_path: Path) -> None:
    """A name that no file can have is the name of a missing shard."""
    folder, index = sharded(tmp_path)
    index["weight_map"]["lm_head.weight"] = "x" * 5000

    text = complaint(with_index(folder, index))
    assert "missing shard" in text or "not a plain file name" in text


def test_missing_shards_are_named_all_at_once(tmp_path: Path) -> None:
    """Each missing shard is named, with what was in it and the remedy."""
    folder, _ = sharded(tmp_path)
    (folder / "model-00001-of-00003.safetensors").unlink()
    (folder / "model-00003-of-00003.safetensors").unlink()

    lines_of(complaint(folder), "2 problems", "model-00001-of-00003.safetensors: missing shard",
             "model-00003-of-00003.safetensors: missing shard", "tensors", "fetch it again")  # fmt: skip


def test_a_cut_shard_is_named(tmp_path: Path) -> None:
    """A shard that was not fetched to its end is named, the others are not."""
    folder, _ = sharded(tmp_path)
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-5])

    text = complaint(folder)
    lines_of(text, str(path), "cut short", "fetch the file again")
    assert "00001" not in text


def test_a_tensor_that_the_index_promises_must_be_there(tmp_path: Path) -> None:
    """The name of the tensor and of the shard are in the message."""
    folder, index = sharded(tmp_path)
    index["weight_map"]["model.ghost.weight"] = "model-00002-of-00003.safetensors"

    lines_of(complaint(with_index(folder, index)), "model-00002-of-00003.safetensors",
             "the index promises model.ghost.weight")  # fmt: skip


def test_a_tensor_that_the_index_does_not_list_is_refused(tmp_path: Path) -> None:
    """A shard with one tensor more belongs to another version of the model."""
    folder, index = sharded(tmp_path)
    shard = index["weight_map"].pop("lm_head.weight")

    lines_of(complaint(with_index(folder, index)), shard, "holds lm_head.weight")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Which one counts would be a guess."""
    folder, _ = sharded(tmp_path)
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(safetensors({**read_file(path), "lm_head.weight": packed([1.0])}))

    lines_of(complaint(folder), path.name, "lm_head.weight")


def test_shards_without_an_index_need_to_be_complete(tmp_path: Path) -> None:
    """A numbered set is a model without its index too, but only when all of it is there."""
    folder, _ = sharded(tmp_path)
    (folder / "model.safetensors.index.json").unlink()

    assert set(open_checkpoint(folder)) == set(llama(0))

    (folder / "model-00002-of-00003.safetensors").unlink()
    lines_of(complaint(folder), "2 .safetensors files", "index")


def test_the_same_tensor_in_two_numbered_files_is_refused(tmp_path: Path) -> None:
    """Without an index too, a name stands in one file only."""
    folder = tmp_path / "m"
    folder.mkdir()
    for i in (1, 2):
        (folder / f"model-{i:05}-of-00002.safetensors").write_bytes(safetensors(SEEDS[0]))

    lines_of(complaint(folder), "model-00002-of-00002.safetensors", "also stand in another shard")


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": None}]
)
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, index: object) -> None:
    """The index is named and what it should hold."""
    folder, _ = sharded(tmp_path)

    lines_of(complaint(with_index(folder, index)), "index.json", "weight_map")


def test_an_index_of_nothing_is_refused(tmp_path: Path) -> None:
    """An empty weight map lists none of the shards that lie beside it."""
    folder, _ = sharded(tmp_path)

    lines_of(complaint(with_index(folder, {"weight_map": {}})), "index.json")


def test_a_whole_file_beside_another_index_is_refused(tmp_path: Path) -> None:
    """An old ``model.safetensors`` beside new shards is two models in one folder."""
    folder, _ = sharded(tmp_path)
    save_model(folder, llama(1))

    lines_of(complaint(folder), "model.safetensors", "not clear which", "remove")


# --------------------------------------------------------------------------------------- links


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """A weight file, an index, a shard or a configuration must lie in the model's own folder."""
    secret = save_model(tmp_path / "secret", llama(0), config={"a": 1})
    for name in ("model.safetensors", "config.json"):
        folder = save_model(tmp_path / f"with-{name}", llama(0), config={})
        (folder / name).unlink()
        (folder / name).symlink_to(secret / name)
        lines_of(complaint(folder), name, "is a link to", "outside")
    folder, _ = sharded(tmp_path)
    (folder / "model-00002-of-00003.safetensors").rename(tmp_path / "away.safetensors")
    (folder / "model-00002-of-00003.safetensors").symlink_to(tmp_path / "away.safetensors")
    lines_of(complaint(folder), "model-00002-of-00003.safetensors", "outside")
    (folder / "model.safetensors.index.json").rename(tmp_path / "away.json")
    (folder / "model.safetensors.index.json").symlink_to("../away.json")
    lines_of(complaint(folder), "index.json", "outside")


def test_a_link_inside_the_folder_works(tmp_path: Path) -> None:
    """Some downloads keep the content in a subfolder."""
    folder = save_model(tmp_path / "m", llama(0))
    (folder / ".data").mkdir()
    (folder / "model.safetensors").rename(folder / ".data" / "1")
    (folder / "model.safetensors").symlink_to(".data/1")

    assert set(open_checkpoint(folder)) == set(llama(0))


def hub_cache(where: Path, model: Path) -> Path:
    """The layout of the Hugging Face cache: snapshots of links to blobs."""
    root = where / "models--org--name"
    snapshot = root / "snapshots" / "0123abcd"
    (root / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, root / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:040x}"))
    return snapshot


def test_the_cache_of_the_hub_works(tmp_path: Path) -> None:
    """Snapshots whose files are links into the blobs beside them are models."""
    folder, _ = sharded(tmp_path)
    snapshot = hub_cache(tmp_path / "hub", folder)

    assert set(open_checkpoint(snapshot)) == set(llama(0))


def test_the_cache_of_the_hub_opens_no_door(tmp_path: Path) -> None:
    """A link from a snapshot to anywhere but the blobs is refused all the same."""
    folder, _ = sharded(tmp_path)
    snapshot = hub_cache(tmp_path / "hub", folder)
    shard = snapshot / "model-00001-of-00003.safetensors"
    shard.unlink()
    shard.symlink_to(folder / shard.name)

    lines_of(complaint(snapshot), shard.name, "outside")


def test_a_folder_that_is_itself_a_link_works(tmp_path: Path) -> None:
    """Where the user put a model is the user's business; only the model's own links are watched."""
    save_model(tmp_path / "far" / "m", llama(0))
    (tmp_path / "near").symlink_to(tmp_path / "far" / "m")

    assert set(open_checkpoint(tmp_path / "near")) == set(llama(0))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "model.safetensors.index.json"]
)
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    """A named pipe in the place of a file is an error, not a command that never ends."""
    folder = save_model(tmp_path / "m", llama(0))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)

    lines_of(complaint(folder), name)


def test_a_folder_in_the_place_of_a_shard_is_named(tmp_path: Path) -> None:
    """Not a file at all: named like every other fault."""
    folder, _ = sharded(tmp_path)
    (folder / "model-00001-of-00003.safetensors").unlink()
    (folder / "model-00001-of-00003.safetensors").mkdir()

    lines_of(complaint(folder), "model-00001-of-00003.safetensors")


# ------------------------------------------------------------------------------ other folders


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "x.ckpt", "x.pkl"]
)
def test_a_folder_of_pickles_is_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    """A pickle runs code when it is read: it is never opened, and the message says what to do."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / name).write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")

    for model in (folder, folder / name):
        lines_of(complaint(model), str(model), "pickle", "run code", "save_pretrained")


def test_a_gguf_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """The quantised format of llama.cpp is named, with the way to convert it."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(64))

    for model in (folder, folder / "model.Q4_K_M.gguf"):
        lines_of(complaint(model), "GGUF", "from_pretrained")


def test_an_adapter_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """A LoRA folder is no whole model, and the message says how to make one of it."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(safetensors(SEEDS[0]))

    lines_of(complaint(folder), "LoRA adapter", "BASE+")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    """Nothing in it: that is what the message says."""
    lines_of(complaint(tmp_path), str(tmp_path), "without a .safetensors file")


def test_a_misspelt_path_gets_a_suggestion(tmp_path: Path) -> None:
    """The nearest name in the same folder, as a path and as two words that look like a hub id."""
    save_model(tmp_path / "models" / "llama-math", llama(0))

    lines_of(complaint(tmp_path / "models" / "lama-math"), "no such file or folder", "'llama-math'")
    with pytest.raises(CheckpointError, match="'llama-math'"):
        open_checkpoint("models/lama-math", tmp_path)


@pytest.mark.parametrize(
    "model", ["", "x" * 5000, "~nobody-of-this-name/x", "a\0b", "/dev/null", "a/b/c", "."]
)
def test_any_text_as_a_path_is_refused_in_peace(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths that no file can have are wrong paths, not crashes."""
    monkeypatch.chdir(tmp_path)

    with pytest.raises(CheckpointError):
        open_checkpoint(model)
    with pytest.raises(CheckpointError):
        open_checkpoint(model, tmp_path)


def test_a_hub_id_without_a_network_says_so() -> None:
    """Offline, and not in the cache: one line with the id, and no traceback of a library."""
    text = complaint("suture-tests/no-such-model@main")

    lines_of(text, "suture-tests/no-such-model@main", "Hub")
    assert "\n" not in text


# ------------------------------------------------------------------------------------ behaviour


def test_opening_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte of a tensor is read before it is asked for."""
    folder, _ = sharded(tmp_path)

    def never(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(Checkpoint, "read_at", never)
    model = open_checkpoint(folder)

    assert len(model) == len(llama(0))
    assert model.nbytes == sum(len(raw.data) for raw in llama(0).values())
    assert model.vocabulary == 24


def test_files_are_closed_again(tmp_path: Path) -> None:
    """``close`` and the end of a checkpoint's life leave no descriptor behind."""
    folder, _ = sharded(tmp_path)
    before = descriptors(tmp_path)
    model = open_checkpoint(folder)
    for name in model:
        model[name]
    assert len(descriptors(tmp_path)) == len(before) + 3
    model.close()
    assert descriptors(tmp_path) == before
    model["lm_head.weight"]  # opened again
    del model
    gc.collect()

    assert descriptors(tmp_path) == before


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    """A download that starts over under a running merge is an error, not zeros."""
    folder = save_model(tmp_path / "m", llama(0))
    model = open_checkpoint(folder)
    os.truncate(folder / "model.safetensors", 2000)

    with pytest.raises(CheckpointError, match=r"model\.safetensors: became shorter"):
        model["lm_head.weight"]


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    """Opened lazily, so it may be gone when it is needed."""
    folder = save_model(tmp_path / "m", llama(0))
    model = open_checkpoint(folder)
    (folder / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"model\.safetensors: No such file"):
        model["lm_head.weight"]


def test_two_checkpoints_are_not_added(tmp_path: Path) -> None:
    """Their sum means nothing; the message says what does."""
    one = open_checkpoint(save_model(tmp_path / "m", llama(0)))

    with pytest.raises(SutureError, match="add their task vectors"):
        one + one


def test_a_checkpoint_opens_from_the_package(tmp_path: Path) -> None:
    """``suture.open`` takes a path or text, and what is there is a mapping of arrays."""
    folder = save_model(tmp_path / "m", llama(0))
    model = suture.open(folder)

    assert model["model.norm.weight"].shape == (16,)
    assert "nothing" not in model
    with pytest.raises(KeyError):
        model["nothing"]


# ------------------------------------------------------------------------------ tied embeddings


TIED = {**CONFIG, "tie_word_embeddings": True}


def test_a_tied_head_is_one_tensor(tmp_path: Path) -> None:
    """A file that holds a tied tensor under both names counts it once."""
    tensors = llama(0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = open_checkpoint(save_model(tmp_path / "m", tensors, config=TIED))

    assert "lm_head.weight" not in model
    assert model.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.untied() == []


@pytest.mark.parametrize("change", ["value", "shape", "dtype"])
def test_a_tied_head_that_differs_is_refused(tmp_path: Path, change: str) -> None:
    """Two different tensors of which the configuration says that they are one: which is right?"""
    tensors = llama(0)
    head = tensors["model.embed_tokens.weight"].values.copy()
    head[-1, -1] += 1
    tensors["lm_head.weight"] = packed(
        head[:-1] if change == "shape" else head, "F16" if change == "dtype" else "F32"
    )
    model = open_checkpoint(save_model(tmp_path / "m", tensors, config=TIED))

    assert model.untied() == ["lm_head.weight"]


@pytest.mark.parametrize(
    "config",
    [{"tie_word_embeddings": "yes"}, {"text_config": 5}, {"text_config": []}, {"architectures": 3},
     {"architectures": {"a": 1}}, {"architectures": "Llama"}, {"quantization_config": None}, {"dtype": 5}],
    ids=str,
)  # fmt: skip
def test_odd_values_in_a_config_do_no_harm(tmp_path: Path, config: dict[str, Any]) -> None:
    """A configuration holds what it likes; only what we use is looked at, and with care."""
    from suture.analysis.profile import inspect_model

    model = open_checkpoint(save_model(tmp_path / "m", llama(0), config=config))

    assert inspect_model(model)["tensors"] == len(llama(0))
    checkpoint.refuse_uncomputable(model)


@pytest.mark.parametrize(
    "make",
    [lambda t: (t | {"model.norm.weight": Raw("F8_E4M3", (16,), bytes(16))}, {}),
     lambda t: (t, {"quantization_config": {"quant_method": "gptq"}})],
    ids=["float8", "gptq"],
)  # fmt: skip
def test_quantised_models_are_refused(
    tmp_path: Path, make: Callable[[Tensors], tuple[Tensors, dict[str, Any]]]
) -> None:
    """Their tensors are not the weights, so arithmetic on them would be nonsense."""
    tensors, config = make(llama(0))
    model = open_checkpoint(save_model(tmp_path / "m", tensors, config=config))

    with pytest.raises(CheckpointError, match="dequantise"):
        checkpoint.refuse_uncomputable(model)


def test_planning_reads_every_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many shards a model has: the index is held against what was read anyway."""
    tensors = {f"model.layers.{i}.w": packed([float(i)]) for i in range(12)}
    folder = save_model(tmp_path / "model", tensors, shards=6)
    read: list[Path] = []
    plain = checkpoint.read_header
    monkeypatch.setattr(checkpoint, "read_header", lambda path: read.append(path) or plain(path))

    opened = open_checkpoint(folder)

    assert len(opened) == 12
    assert sorted(p.name for p in read) == [
        f"model-{i:05}-of-00006.safetensors" for i in range(1, 7)
    ]
