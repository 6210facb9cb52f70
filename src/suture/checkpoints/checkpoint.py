"""A safetensors file or folder as a lazy, read-only mapping: no arithmetic, no writing.

Opening reads headers only; ``checkpoints.headers`` checks them before anything is believed.
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from suture.checkpoints.headers import JSON_LIMIT, Header, read_header, read_json
from suture.errors import CheckpointError, MissingExtraError, Problems, SutureError, brief
from suture.schema.paths import place_of
from suture.tensors.roles import role_of, tied_to
from suture.tensors.spec import BF16, DTYPES, FLOAT8, TensorSpec, listed, readable

if TYPE_CHECKING:
    import torch

    from suture.stream.vector import TaskVector

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

MEMORY = "memory:"
"""In the place of a path: what follows is the name of something that is in no file."""

Array = np.ndarray[Any, Any]


class BytePlace(NamedTuple):
    """Where the bytes of a tensor lie."""

    file: int
    """Number of the file in ``Checkpoint.files``."""
    offset: int
    """Bytes from the start of the file."""


class Checkpoint(Mapping[str, Array]):
    """Tensors of files or in memory, by name; read when asked for, never changed.

    ``checkpoint[name]`` is a new numpy array: floating tensors as float32 (float64 stays), others
    as stored. ``tensor(name)`` is the torch tensor in the dtype of the file. Subtracting another
    checkpoint gives a ``TaskVector``; adding two is an error. ``suture.open`` makes one.

    Examples:
        >>> import numpy as np, suture
        >>> base = suture.open({"layers.0.mlp.weight": np.zeros(2, np.float32)}, label="base")
        >>> tuned = suture.open({"layers.0.mlp.weight": np.ones(2, np.float32)}, label="tuned")
        >>> list(base), base.nbytes
        (['layers.0.mlp.weight'], 8)
        >>> tuned - base
        TaskVector(+1*(tuned - base), 1 tensors)
    """

    notes: tuple[str, ...] = ()
    """What whoever uses it should know."""
    has_tokenizer = False
    """Whether a tokenizer stands in the file of weights itself."""
    in_memory = False
    """Whether its tensors lie in no file, so that no record can say where to find them."""

    def __init__(
        self, where: Path, label: str, files: list[Path], index: Mapping[str, str] | None = None
    ) -> None:
        self.path = where
        """The file or folder."""
        self.label = label
        """What the user called it: a path as given, or a hub id."""
        self.files = files
        self.folder = where if where.is_dir() else where.parent
        self.specs: dict[str, TensorSpec] = {}
        self.places: dict[str, BytePlace] = {}
        self.aliases: dict[str, str] = {}
        """Second names of tied tensors, which are not in ``specs``, and what they are tied to."""
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        self._close = weakref.finalize(self, close_all, self._descriptors)
        headers = self._read_headers(index)
        self.config = self._read_config()
        if ties_embeddings(self.config):
            self.aliases = tied_to(self.specs.keys())
            self._aliased = {a: (self.specs.pop(a), self.places.pop(a)) for a in self.aliases}
        self.identity = [
            [file.name, file.stat().st_size, file.stat().st_mtime_ns, header.digest]
            for file, header in zip(files, headers, strict=True)
        ]
        """What tells cheaply whether the files are still the same: name, size, time, header."""

    @cached_property
    def restricted(self) -> bool:
        """Whether it was made from something that must not be passed on: its record says so."""
        record = self.folder / "suture.json"
        try:
            found = read_json(within(record, self.folder), JSON_LIMIT) if record.is_file() else {}
        except CheckpointError:  # some other file of that name: it says nothing
            return False
        return found.get("restricted") is True

    def _read_headers(self, index: Mapping[str, str] | None) -> list[Header]:
        problems = Problems()
        headers: list[Header] = []
        held: dict[int, dict[str, TensorSpec]] = {}
        for number, file in enumerate(self.files):
            with problems.collecting():
                header = read_header(file)
                headers.append(header)
                held[number] = header.specs
                twice = [name for name in header.specs if name in self.specs]
                if twice:
                    raise CheckpointError(f"{file}: {listed(twice)} also stand in another shard")
                self.specs.update(header.specs)
                self.places.update({n: BytePlace(number, o) for n, o in header.offsets.items()})
        if index is not None:
            _check_index(index, held, self.folder, problems)
        problems.raise_if_any()
        return headers

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        return read_json(within(path, self.folder)) if self.path.is_dir() and path.exists() else {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __getitem__(self, name: str) -> Array:
        spec = self.specs[name]
        dtype = DTYPES[spec.dtype]
        raw = np.empty(spec.numel, dtype.storage)
        self.read_into(name, 0, raw.view(np.uint8))
        if dtype.code == BF16:
            return (raw.astype(np.uint32) << 16).view(np.float32).reshape(spec.shape)
        if spec.dtype == "F16":
            raw = raw.astype(np.float32)
        return (raw.view(np.bool_) if spec.dtype == "BOOL" else raw).reshape(spec.shape)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as torch holds it, in the dtype of the file."""
        try:
            import torch
        except ImportError:
            raise MissingExtraError("a torch tensor", "models") from None
        spec, raw = self.specs[name], self.whole(name)
        return torch.frombuffer(raw, dtype=_torch_dtype(spec.dtype)).reshape(spec.shape) \
            if raw.size else torch.empty(spec.shape, dtype=_torch_dtype(spec.dtype))  # fmt: skip

    def whole(self, name: str) -> Array:
        """The bytes of a whole tensor (uint8), which nobody may change."""
        raw = np.empty(self.specs[name].nbytes, np.uint8)
        self.read_into(name, 0, raw)
        return raw

    def read_into(self, name: str, start: int, raw: Array) -> None:
        """Fill the bytes ``raw`` (uint8) from element ``start`` of a tensor. Safe from any thread.

        Raises:
            CheckpointError: the file became shorter since it was opened, or the disk failed.
        """
        place = self.places[name]
        offset = place.offset + start * DTYPES[self.specs[name].dtype].itemsize
        self.read_at(place.file, offset, raw)

    def read_at(self, file: int, offset: int, raw: Array) -> None:
        """Fill the bytes ``raw`` (uint8) from byte ``offset`` of a file."""
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            descriptor = self._open(file)
        try:
            got = _pread(descriptor, raw, offset)
            while got < raw.size:
                more = _pread(descriptor, raw[got:], offset + got)
                if more == 0:
                    raise CheckpointError(f"{self.files[file]}: became shorter while it was read")
                got += more
        except OSError as error:
            raise CheckpointError(f"{self.files[file]}: {error.strerror}") from None

    def _open(self, file: int) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(
                        self.files[file], os.O_RDONLY | getattr(os, "O_BINARY", 0)
                    )
                except OSError as error:
                    raise CheckpointError(f"{self.files[file]}: {error.strerror}") from None
            return self._descriptors[file]

    def close(self) -> None:
        """Close the files; they are opened again when something is read."""
        with self._lock:
            close_all(self._descriptors)

    def check_unchanged(self) -> None:
        """Refuse what was read from files that somebody wrote to meanwhile.

        Raises:
            CheckpointError: a file that was read is not the one whose header was read.
        """
        for file, descriptor in list(self._descriptors.items()):
            now = os.fstat(descriptor)
            if [now.st_size, now.st_mtime_ns] != self.identity[file][1:3]:
                raise CheckpointError(
                    f"{self.files[file]}: was changed while it was read; run the command again"
                )

    def untied(self) -> list[str]:
        """Aliases whose bytes differ from the tensor that ``config.json`` says they are tied to."""
        different = []
        for alias, name in self.aliases.items():
            spec, place = self._aliased[alias]
            same = spec == self.specs[name]
            step = 1 << 22
            for start in range(0, spec.nbytes if same else 0, step):
                mine = np.empty(min(step, spec.nbytes - start), np.uint8)
                other = np.empty_like(mine)
                self.read_at(place.file, place.offset + start, mine)
                self.read_at(self.places[name].file, self.places[name].offset + start, other)
                same = same and bool((mine == other).all())
            if not same:
                different.append(alias)
        return different

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def adapters(self) -> list[Any]:
        """The adapters that are on it, in order."""
        return []

    @property
    def put_on(self) -> Checkpoint | None:
        """What the last of its adapters is put on."""
        return None

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(spec.numel for spec in self.specs.values())

    def stored(self, name: str) -> str:
        """The dtype of a tensor in its file, which a view may have widened."""
        return self.specs[name].dtype

    def home(self, name: str) -> Path:
        """The file that holds a tensor; of tensors in memory, what they are called."""
        return self.files[self.places[name].file] if self.files else self.path

    def as_stored(self, name: str) -> bool:
        """Whether a tensor is read just as its file has it, under its own name."""
        return True

    @cached_property
    def vocabulary(self) -> int | None:
        """Rows of the token embedding; ``None`` where there is none."""
        sizes = [s.shape[0] for n, s in self.specs.items()
                 if role_of(n).kind == "embedding" and len(s.shape) == 2]  # fmt: skip
        return max(sizes, default=None)

    def __sub__(self, base: object) -> TaskVector:
        if not isinstance(base, Checkpoint):
            return NotImplemented
        # The one import against the order: an operator belongs to its left operand, what it gives
        # is made below. It is written here, so that nobody has to import `vector` for its effect.
        from suture.stream.vector import TaskVector

        return TaskVector.between(self, base)

    def __add__(self, other: object) -> Any:
        if isinstance(other, Checkpoint):
            raise SutureError(
                "two checkpoints cannot be added; add their task vectors: (a - base) + (b - base)"
            )
        return NotImplemented

    __radd__ = __add__

    def __repr__(self) -> str:
        return f"Checkpoint({self.label!r}: {len(self)} tensors, {readable(self.nbytes)})"

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def close_all(descriptors: dict[int, int]) -> None:
    """Close open files, and forget them."""
    while descriptors:
        os.close(descriptors.popitem()[1])


if hasattr(os, "preadv"):

    def _pread(descriptor: int, raw: Array, offset: int) -> int:
        return os.preadv(descriptor, [raw], offset)  # type: ignore[list-item]

else:  # Windows has no positioned reads
    _seek = threading.Lock()

    def _pread(descriptor: int, raw: Array, offset: int) -> int:
        with _seek:
            os.lseek(descriptor, offset, os.SEEK_SET)
            part = os.read(descriptor, raw.size)
        raw[: len(part)] = np.frombuffer(part, np.uint8)
        return len(part)


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
             "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
             "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
             "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
             "F8_E8M0": "float8_e8m0fnu"}  # fmt: skip
    found = getattr(torch, names[name])
    assert isinstance(found, torch.dtype)
    return found


_TIED_BY_DEFAULT = frozenset((
    "albert", "bart", "bert", "bloom", "distilbert", "electra", "gemma", "gemma2", "gemma3",
    "gemma3_text", "gpt2", "mbart", "opt", "roberta", "t5", "whisper", "xlm-roberta",
))  # fmt: skip
"""Architectures whose config says nothing of their ties when they have the usual ones."""


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether a configuration says that embedding and head are one tensor."""
    inner = config.get("text_config")
    sections = [config, *([inner] if isinstance(inner, dict) else [])]
    said = [s["tie_word_embeddings"] for s in sections if "tie_word_embeddings" in s]
    return True in said or (not said and config.get("model_type") in _TIED_BY_DEFAULT)


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def open_checkpoint(model: str | os.PathLike[str], near: Path | None = None) -> Checkpoint:
    """Open a safetensors file, a (sharded) folder, or a hub id with optional ``@revision``.

    Relative paths are looked up beside ``near`` (the recipe's folder) when it is given. The hub is
    asked only for what looks like a hub id and is no path; its cache is used when it is offline.

    Raises:
        CheckpointError: there is nothing there, or it is not a readable checkpoint.
    """
    text = os.fspath(model)
    where = locate(text, near)
    if where.is_dir():
        return Checkpoint(where, text, *_files_of(where, text))
    if where.suffix != ".safetensors":
        raise CheckpointError(f"{text}: {_remedy(where.suffix)}")
    return Checkpoint(where, text, [where])


def locate(text: str, near: Path | None = None) -> Path:
    """Where a file, a folder or the snapshot of a hub id lies.

    Raises:
        CheckpointError: there is nothing there.
    """
    if not text:
        raise CheckpointError("'' is no path of a file or folder")
    path = place_of(text, near)
    if _there(path):
        return path.resolve()
    refuse_memory(text)
    if _HUB_ID.fullmatch(text):
        return _from_hub(text, path)
    raise CheckpointError(f"{text}: no such file or folder{_nearby(path)}")


def address(checkpoint: Checkpoint) -> str:
    """What a recipe calls an open checkpoint: its path, or ``memory:NAME`` where it has none."""
    return f"{MEMORY}{checkpoint.label}" if checkpoint.in_memory else str(checkpoint.path)


def refuse_memory(text: str) -> None:
    """Refuse what a record calls something that was in memory only.

    Raises:
        CheckpointError: it is such a name.
    """
    name = text if text.startswith(MEMORY) else Path(text).name
    if name.startswith(MEMORY):
        raise CheckpointError(
            f"{name}: lay in memory when this was written, and in no file; save it with "
            "`suture.save`, and name that place here"
        )


def is_from_hub(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint was named by its hub id, and not by a path."""
    named = _HUB_ID.fullmatch(checkpoint.label) is not None
    return named and checkpoint.path.parent.name == "snapshots"


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than any file's
        return False


def _nearby(path: Path) -> str:
    from difflib import get_close_matches

    try:
        names = [p.name for p in path.parent.iterdir()]
    except (OSError, ValueError):
        names = []
    near = get_close_matches(path.name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f" (looked for {path})"


def _remedy(suffix: str) -> str:
    if suffix in PICKLES:
        return (
            f"a {suffix} file is a pickle, which can run code when it is read, so it is not read. "
            "Convert it once: load it with transformers where you trust it and call "
            "save_pretrained(folder), which writes safetensors"
        )
    if suffix == ".gguf":
        return (
            "GGUF files are not read. Convert it once: AutoModelForCausalLM.from_pretrained("
            "folder, gguf_file=name), then save_pretrained(folder)"
        )
    return "not a safetensors file or a folder with one"


def within(path: Path, folder: Path) -> Path:
    """Resolve ``path``, refusing links out of ``folder`` (but for the blobs of a hub cache)."""
    target = path.resolve()
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":
        roots.append((folder.parent.parent / "blobs").resolve())
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(f"{path}: is a link to {target}, outside of the model's folder")
    return target


def _files_of(folder: Path, label: str) -> tuple[list[Path], Mapping[str, str] | None]:
    """The files of a model, and the index that says which tensor is in which."""
    if (folder / INDEX).exists():
        return _from_index(folder, label)
    if (folder / WEIGHTS).exists():
        return [within(folder / WEIGHTS, folder)], None
    found = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{label}: a LoRA adapter, not a whole model; name it together with its base: "
            f"BASE+{label}, or as a model of a recipe that has a base"
        )
    if len(found) == 1:
        return [within(found[0], folder)], None
    if found:
        return _numbered(found, folder, label), None
    others = sorted({p.suffix for p in folder.iterdir() if p.suffix in (*PICKLES, ".gguf")})
    if others:
        raise CheckpointError(f"{label}: no .safetensors file in it; {_remedy(others[0])}")
    raise CheckpointError(f"{label}: a folder without a .safetensors file")


def _numbered(found: list[Path], folder: Path, label: str) -> list[Path]:
    totals = {m[1] for p in found if (m := re.search(r"-of-(\d+)\.safetensors$", p.name))}
    if len(totals) == 1 and len(found) == int(next(iter(totals))):
        return [within(p, folder) for p in found]
    raise CheckpointError(
        f"{label}: {len(found)} .safetensors files and no {INDEX}; "
        "name one file, or fetch the index and the missing shards"
    )


def _from_index(folder: Path, label: str) -> tuple[list[Path], Mapping[str, str]]:
    index = read_json(within(folder / INDEX, folder), JSON_LIMIT)
    where = index.get("weight_map")
    listed_well = isinstance(where, dict) and all(isinstance(v, str) for v in where.values())
    if not where or not listed_well:
        raise CheckpointError(f"{folder / INDEX}: no weight_map of tensor names to file names")
    if (folder / WEIGHTS).exists() and WEIGHTS not in where.values():
        raise CheckpointError(
            f"{label}: holds both {WEIGHTS} and an index of other shards, so it is not clear which "
            "model it is; remove the one that is out of date"
        )
    problems = Problems()
    files = []
    for name in sorted(set(where.values())):
        with problems.collecting():
            plain = name == Path(name).name and name.isprintable() and "\\" not in name
            if not plain or name in ("", ".", ".."):
                raise CheckpointError(f"{folder / INDEX}: {name!r} is not a plain file name")
            if not _there(folder / name):
                count = sum(v == name for v in where.values())
                raise CheckpointError(
                    f"{folder / name}: missing shard, {count} tensors of the index are in it; "
                    "fetch it again"
                )
            files.append(within(folder / name, folder))
    problems.raise_if_any()
    return files, where


def _check_index(
    where: Mapping[str, str], held: Mapping[int, Mapping[str, TensorSpec]], folder: Path,
    problems: Problems,
) -> None:  # fmt: skip
    """Note where an index and the headers of its files, by their number, do not agree."""
    said: dict[str, set[str]] = {}
    for tensor, name in where.items():
        said.setdefault(name, set()).add(tensor)
    for number, name in enumerate(sorted(said)):
        if number not in held:
            continue
        missing, extra = said[name] - held[number].keys(), held[number].keys() - said[name]
        if missing:
            told = listed(sorted(missing))
            problems.add(CheckpointError, f"{folder / name}: the index promises {told}, not there")
        if extra:
            told = listed(sorted(extra))
            problems.add(
                CheckpointError, f"{folder / name}: holds {told}, which the index does not list"
            )


def _from_hub(text: str, path: Path) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, _, revision = text.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=[
                    "*.safetensors",
                    "*.json",
                    "*.jinja",
                    "*.model",
                    "*.txt",
                    "README.md",
                    "LICENSE*",
                    "*.py",
                ],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{text}: no such file or folder here{_nearby(path)}, and the Hub did not give it: "
            f"{first}"
        ) from None


def refuse_uncomputable(checkpoint: Checkpoint) -> None:
    """Refuse quantised models, whose numbers are not what their tensors hold.

    Raises:
        CheckpointError: an 8-bit float tensor, or a quantisation method in ``config.json``.
    """
    small = [name for name, spec in checkpoint.specs.items() if spec.dtype in FLOAT8]
    settings = checkpoint.config.get("quantization_config")
    if small or settings:
        named = settings.get("quant_method") if isinstance(settings, dict) else None
        method = f" ({brief(named)})" if isinstance(named, str) and named else ""
        what = f"8-bit floats ({listed(small, 2)})" if small else f"quantised weights{method}"
        raise CheckpointError(
            f"{checkpoint.label}: holds {what}; merge the model it was made from, or dequantise it "
            "with transformers first and save it again"
        )
