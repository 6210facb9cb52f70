"""The file of a patch: codes of positions, its bytes, and what is said of one that is damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from making import Raw, file_of, packed, quick_disk, save_model, tree
from slow import patches as slow
from suture import Patch, make_patch
from suture import open as open_model
from suture.edits.patch_file import Entries, Spool, decode, encode, write_patch
from suture.errors import CheckpointError, OutputError, SutureError
from suture.tensors.spec import PIECE, TensorSpec, pieces_of


@st.composite
def positions(draw: Any) -> tuple[list[int], int]:
    """Some positions in a piece of some size, sparse or dense."""
    size = draw(st.sampled_from([1, 7, 8, 9, 300, 5000, 40_000, PIECE]))
    dense = draw(st.booleans()) and size <= 300
    chosen = draw(st.sets(st.integers(0, size - 1), max_size=size if dense else 40))
    return sorted(chosen), size


@given(positions())
def test_positions_come_back_from_the_smaller_code(case: tuple[list[int], int]) -> None:
    """Encoding gives the bytes of the plain loops, the smaller of two codes; decoding undoes it."""
    at, size = case
    raw = encode(np.array(at, np.uint32), size)

    assert raw.tobytes() == slow.encoded(at, size)
    assert slow.decoded(raw.tobytes(), size) == at
    assert decode(raw, size, len(at)).tolist() == at
    assert raw.size <= min((size + 7) // 8, 3 * len(at))  # so that 4-byte indices never win


@pytest.mark.parametrize(
    ("raw", "size", "count", "what"),
    [
        ([200], 100_000, 1, "cut short"),
        ([5, 130], 100_000, 2, "cut short"),
        ([128, 128, 128, 0], 100_000, 1, "too many bytes"),
        ([128, 0], 100_000, 1, "too many bytes"),
        ([255, 255, 127], 100_000, 1, "position"),
        ([5, 5], 100_000, 3, "2 positions for 3"),
        ([], 100_000, 1, "0 positions for 1"),
        ([1] * 20, 100, 20, "more than the bitmap"),
        ([0, 16], 12, 1, "position 12 in a piece of 12"),
        ([255, 15], 12, 11, "12 positions for 11"),
    ],
)
def test_bytes_that_are_no_positions(raw: list[int], size: int, count: int, what: str) -> None:
    """Cut short, too long, out of range, and miscounted codes are refused."""
    with pytest.raises(ValueError, match=what):
        decode(np.array(raw, np.uint8), size, count)


@given(st.binary(max_size=40), st.integers(1, 400), st.integers(0, 50))
def test_no_bytes_crash_the_decoder(raw: bytes, size: int, count: int) -> None:
    """Any bytes are positions in order and in range, or a ValueError."""
    try:
        at = decode(np.frombuffer(raw, np.uint8), size, count).astype(np.int64)
    except ValueError:
        return
    assert at.size == count
    assert (np.diff(at) > 0).all()
    assert not at.size or 0 <= at[0] <= at[-1] < size


# ---------------------------------------------------------------------------------- the format

BASE = {
    "b.weight": packed([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "BF16"),
    "a.bias": packed([0.5, -0.0, 1.5], "F32"),
    "same": packed([7], "I64"),
}
TUNED = {
    "b.weight": packed([[1.0, 2.5, 3.0], [4.0, 5.0, -6.0]], "BF16"),
    "a.bias": packed([0.5, 0.0, 1.5], "F32"),
    "same": packed([7], "I64"),
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A patch of three entries in two tensors."""
    quick_disk(monkeypatch)
    monkeypatch.setattr("suture.verbs.patch.run.__version__", "0.0.0")
    save_model(tmp_path / "base", BASE)
    save_model(tmp_path / "tuned", TUNED)
    path = tmp_path / "small.patch.safetensors"
    make_patch(open_model(tmp_path / "base"), open_model(tmp_path / "tuned"), path)
    return path


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_the_bytes_of_a_patch_are_as_described(small: Path) -> None:
    """Golden bytes: header, metadata, order, codes; a change of the format must be meant."""
    header, data = parts(small)
    metadata = header.pop("__metadata__")
    facts = json.loads(metadata.pop("patch"))

    assert {k: (v["dtype"], v["shape"], v["data_offsets"]) for k, v in header.items()} == {
        "new:a.bias": ("F32", [1], [0, 4]),
        "old:a.bias": ("F32", [1], [4, 8]),
        "new:b.weight": ("BF16", [2], [8, 12]),
        "old:b.weight": ("BF16", [2], [12, 16]),
        "at:a.bias": ("U8", [1], [16, 17]),
        "at:b.weight": ("U8", [1], [17, 18]),
    }
    assert data == bytes.fromhex("00000000 00000080 2040c0c0 0040c040 02 22".replace(" ", ""))
    assert (metadata["format"], metadata["version"]) == ("suture.patch", "1")
    assert facts["tensors"].keys() == {"a.bias", "b.weight"}
    assert facts["tensors"]["b.weight"]["shape"] == [2, 3]
    assert facts["provenance"] == {
        "made": "difference", "base": "base", "tuned": "tuned", "suture": "0.0.0"
    }  # fmt: skip
    content = small.read_bytes()
    blank = content.replace(metadata["digest"].encode(), b"0" * 32)
    assert xxhash.xxh3_128_hexdigest(blank) == metadata["digest"]
    assert hashlib.sha256(content).hexdigest() == GOLDEN


GOLDEN = "f8fb7d4f76d01a7d51d311f83d9904ba23a37396f31c90f082769a817c11bdcc"


def test_the_plain_reader_reads_it(small: Path) -> None:
    """A reader of a few lines, without Suture, finds the entries."""
    metadata, entries = slow.read(small)

    assert metadata["facts"]["restricted"] is False
    assert {n: sorted(e) for n, e in entries.items()} == {"a.bias": [1], "b.weight": [1, 5]}
    assert entries["b.weight"][1] == (b"\x00\x40", b"\x20\x40")  # 2.0 becomes 2.5


def test_safetensors_reads_it(small: Path) -> None:
    """The library of the format reads the file, with the entries in their dtype."""
    from safetensors.torch import load_file

    found = load_file(small)

    assert found["new:b.weight"].tolist() == [2.5, -6.0]
    assert found["old:b.weight"].tolist() == [2.0, 6.0]


# -------------------------------------------------------------------------------------- damage


def refused(path: Path, *words: str) -> None:
    """Loading is an error of the user's with the file's name in it."""
    with pytest.raises(CheckpointError) as found:
        Patch.load(path)
    assert str(path) in str(found.value)
    for word in words:
        assert word in str(found.value)


def test_each_byte_is_guarded(small: Path) -> None:
    """Whichever byte is changed, in the length, the header or the data, the patch is refused."""
    content = small.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 + place * 37 % 255
        small.write_bytes(changed)
        refused(small)


def test_each_cut_is_seen(small: Path) -> None:
    """A file that ends early, or goes on, is refused."""
    content = small.read_bytes()
    for length in range(len(content)):
        small.write_bytes(content[:length])
        refused(small)
    small.write_bytes(content + b"\0")
    refused(small)


def forged(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], bytes | None]) -> None:
    """Write the patch anew with another header and data, and a digest that is right."""
    header, data = parts(path)
    facts = json.loads(header["__metadata__"]["patch"])
    new = change(header, facts)
    if "__metadata__" in header and "patch" in header["__metadata__"]:
        header["__metadata__"]["patch"] = json.dumps(facts)
    if "digest" in header.get("__metadata__", {}):
        header["__metadata__"]["digest"] = "0" * 32
    blank = file_of(json.dumps(header).encode(), data if new is None else new)
    digest = xxhash.xxh3_128_hexdigest(blank)
    path.write_bytes(blank.replace(b"0" * 32, digest.encode(), 1))


def put(what: str, **values: Any) -> Callable[..., None]:
    return lambda header, facts: header[what].update(values)


def fact(*keys: str, to: Any) -> Callable[..., None]:
    def change(header: Any, facts: Any) -> None:
        for key in keys[:-1]:
            facts = facts[key]
        if to is None:
            del facts[keys[-1]]
        else:
            facts[keys[-1]] = to

    return change


def without(*names: str) -> Callable[..., None]:
    def change(header: Any, facts: Any) -> None:
        for name in names:
            del header["__metadata__"][name]

    return change


def data_with(place: int, byte: int) -> Callable[..., bytes]:
    def change(header: Any, facts: Any) -> bytes:
        data = bytearray(bytes.fromhex("00000000000000802040c0c00040c0400222"))
        data[place] = byte
        return bytes(data)

    return change


def extra(header: dict[str, Any], facts: dict[str, Any]) -> bytes:
    header["at:ghost"] = {"dtype": "U8", "shape": [1], "data_offsets": [18, 19]}
    return bytes.fromhex("00000000000000802040c0c00040c040022200")


def renamed(header: dict[str, Any], facts: dict[str, Any]) -> None:
    header["at:other"] = header.pop("at:b.weight")


FORGERIES = {
    "no format": (without("format"), "not a patch"),
    "no version": (without("version"), "version None"),
    "another version": (lambda h, f: h["__metadata__"].update(version="9"), "version '9'"),
    "no digest": (without("digest"), "digest"),
    "no facts": (without("patch"), "not valid JSON"),
    "no tensors": (fact("tensors", to={}), "names no tensors"),
    "tensors are a list": (fact("tensors", to=[1]), "names no tensors"),
    "a tensor is a number": (fact("tensors", "b.weight", to=3), "no facts"),
    "a tensor too many": (fact("tensors", "ghost", to={"shape": [1]}), "ghost lacks"),
    "a tensor too few": (fact("tensors", "b.weight", to=None), "belongs to nothing"),
    "a part too many": (extra, "belongs to nothing"),
    "a part under another name": (renamed, "b.weight lacks its positions"),
    "no shape": (fact("tensors", "b.weight", "shape", to=None), "the shape of b.weight"),
    "a negative shape": (fact("tensors", "b.weight", "shape", to=[-2, -3]), "the shape"),
    "an empty shape": (fact("tensors", "b.weight", "shape", to=[0, 3]), "the shape"),
    "a shape of truths": (fact("tensors", "b.weight", "shape", to=[True, 6]), "the shape"),
    "a shape that is too small": (fact("tensors", "b.weight", "shape", to=[5]), "position 5"),
    "an absurd shape": (fact("tensors", "b.weight", "shape", to=[1 << 40, 1 << 40]), "missing"),
    "a fingerprint that is a number": (fact("base", to=7), "fingerprint"),
    "a tensor's fingerprint is a list": (fact("tensors", "a.bias", "old", to=[1]), "fingerprint"),
    "restricted is a word": (fact("restricted", to="no"), "restricted"),
    "restricted is missing": (fact("restricted", to=None), "restricted"),
    "another dtype": (put("new:b.weight", dtype="F16"), "old entries BF16[2], new F16[2]"),
    "positions of another dtype": (put("at:b.weight", dtype="I8"), "positions I8[1]"),
    "entries in another shape": (put("new:b.weight", shape=[2, 1]), "new BF16[2, 1]"),
    "positions out of range": (data_with(17, 0x62), "position 6 in a piece of 6"),
    "a position too many": (data_with(17, 0x32), "3 positions for 2"),
    "a position too few": (data_with(16, 0), "0 positions for 1"),
}


@pytest.mark.parametrize(("change", "words"), FORGERIES.values(), ids=FORGERIES.keys())
def test_a_patch_that_contradicts_itself(small: Path, change: Any, words: str) -> None:
    """What the digest cannot tell, because the one who wrote it lied, is found, too."""
    forged(small, lambda header, facts: None)
    assert Patch.load(small).count == 3  # the forger's tools are right
    forged(small, change)
    refused(small, words)


def test_deeply_nested_metadata(small: Path) -> None:
    """Metadata that would exhaust the stack is an error, not a crash."""
    header, data = parts(small)
    header["__metadata__"]["patch"] = "[" * 100_000
    small.write_bytes(file_of(json.dumps(header).encode(), data))
    refused(small, "nested too deeply")


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appeared_meanwhile_stays(
    small: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Between the check of the place and the writing, another file may come: it is not replaced
    unless that is meant, on disks with and without hard links, and nothing is left behind."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    before = small.read_bytes()
    patch = Patch.load(small)
    specs, facts = patch.specs, patch.facts()
    other = small.with_name("other.safetensors")
    other.write_bytes(b"another's")
    with closing(Spool(small.parent)) as spool:
        for piece in (p for name, spec in specs.items() for p in pieces_of(name, spec.numel)):
            entries = patch.entries(piece.name, piece.number)
            spool.add(piece.name, piece.number, piece.stop - piece.start, entries)
        with pytest.raises(OutputError, match="appeared meanwhile"):
            write_patch(other, spool, specs, facts, overwrite=False)
        assert other.read_bytes() == b"another's"
        write_patch(other, spool, specs, facts, overwrite=True)
        write_patch(small.with_name("new.safetensors"), spool, specs, facts, overwrite=False)
    assert other.read_bytes() == small.with_name("new.safetensors").read_bytes() == before
    assert not list(small.parent.glob(".*part"))


def test_a_table_of_pieces_that_does_not_add_up(tmp_path: Path) -> None:
    """A tensor of several pieces has a table, whose sums must be those of the parts."""
    size = PIECE + 100
    spec = TensorSpec("BF16", (size,))
    spool = Spool(tmp_path)
    one = np.ones(1, np.uint16)
    for number in (1, 0):
        spool.add(
            "w",
            number,
            min(PIECE, size - number * PIECE),
            Entries(np.array([5], np.uint32), one, one),
        )
    path = tmp_path / "w.safetensors"
    write_patch(path, spool, {"w": spec}, {"base": None, "result": None, "restricted": True,
                                          "tensors": {"w": {"shape": [size]}}},
                overwrite=False)  # fmt: skip
    spool.close()
    found = Patch.load(path)
    assert found.restricted
    assert found.entries("w", 1).at.tolist() == [5]
    assert sorted(slow.read(path)[1]["w"]) == [5, PIECE + 5]
    _, data = parts(path)
    for word, value in ((0, 2), (1, 0), (2, 0), (3, 2**31)):
        table = np.frombuffer(data[:16], "<u4").copy()
        assert table.tolist() == [1, 1, 1, 1]
        table[word] = value
        changed = table.tobytes() + data[16:]
        whole = path.read_bytes()
        forged(path, lambda header, facts, changed=changed: changed)
        refused(path, "counts of w do not add up")
        path.write_bytes(whole)


def test_other_files_are_no_patches(tmp_path: Path) -> None:
    """A model, a folder, nothing, what lies below a file, and a pipe: each is told what it is."""
    save_model(tmp_path / "base", BASE)
    os.mkfifo(tmp_path / "pipe")
    for path, word in {
        "base/model.safetensors": "not a patch", "base": "is not a file", "nothing": "No such file",
        "base/model.safetensors/x": "Not a directory", "pipe": "is not a file",
    }.items():  # fmt: skip
        refused(tmp_path / path, word)


def test_nothing_is_left_of_a_write_that_failed(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is an error with the file's name, and leaves neither patch nor part."""
    before = tree(small.parent)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    patch = Patch.load(small)
    monkeypatch.setattr("os.fsync", full)
    for save in (patch.reversed().save, patch.save):
        with pytest.raises(OutputError, match=r"other\.safetensors: No space"):
            save(small.parent / "other.safetensors")
        assert tree(small.parent) == before


def test_two_writers_do_not_mix(small: Path) -> None:
    """A second process that writes the same patch is told so, and does no harm."""
    import fcntl

    part = small.parent / ".other.safetensors.part"
    with part.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process"):
            Patch.load(small).reversed().save(small.parent / "other.safetensors")
    assert not (small.parent / "other.safetensors").exists()
    Patch.load(small).reversed().save(small.parent / "other.safetensors")
    assert not part.exists()


def test_every_error_is_a_suture_error(small: Path) -> None:
    """Random damage to the header never shows a traceback."""
    content = bytearray(small.read_bytes())
    draw = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(content)
        for place in draw.integers(0, len(content), 4):
            changed[place] = draw.integers(0, 256)
        small.write_bytes(changed)
        with pytest.raises(SutureError):
            Patch.load(small)


def test_raw_is_what_the_tests_write() -> None:
    """The helper of these tests packs -0.0 as its bits."""
    assert Raw("F32", (1,), b"\0\0\0\x80") == packed([-0.0])
