"""LoRA adapters: a base and the small factors that change it, read as one checkpoint.

An adapter is a folder as PEFT writes it: ``adapter_config.json`` and ``adapter_model.safetensors``.
Put on a base it is a view whose changed tensors are computed while they are read, in float32:
``W + scale * B @ A`` (LoRA, Hu et al. 2021, arXiv:2106.09685), for DoRA (Liu et al. 2024,
arXiv:2402.09353) every line of that brought to its length ``m``. No changed tensor is ever kept.
What cannot be written as a change of the base's weights is refused by name.
"""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from suture.checkpoints.checkpoint import PICKLES, Array, Checkpoint, ties_embeddings, within
from suture.checkpoints.headers import read_json
from suture.checkpoints.views import LazyTensor, Same, View
from suture.errors import CheckpointError, MismatchError, NonFiniteError, Problems, brief
from suture.kernels import compiled
from suture.tensors.roles import role_of, tied_to
from suture.tensors.spec import DTYPES, F32, TensorSpec, listed

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CACHE_BYTES = 64 << 20
"""Factors that an adapter keeps between reads; those of a few neighbouring tensors."""
_CHUNK = 1 << 18
PATTERN_LIMIT = 2000
"""Characters of a pattern in an adapter's configuration."""

_MERGE_FIRST = (
    "merge it into its base with PEFT first: PeftModel.from_pretrained(base, adapter)"
    ".merge_and_unload().save_pretrained(folder)"
)
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA works on some tokens only and is no change of the "
    "weights",
    "arrow_config": "Arrow chooses among adapters token by token and is no change of the weights",
    "layer_replication": "layer_replication makes a model with more layers than its base; "
    + _MERGE_FIRST,
    "target_parameters": "LoRA on single parameters (target_parameters) is not read; "
    + _MERGE_FIRST,
    "trainable_token_indices": "trainable tokens are not read; " + _MERGE_FIRST,
    "use_bdlora": "block-diagonal LoRA is not read; " + _MERGE_FIRST,
    "use_qalora": "QALoRA pools its inputs and is not read; " + _MERGE_FIRST,
    "kasa_config": "KaSA is not read; " + _MERGE_FIRST,
    "monteclora_config": "MonteCLoRA is not read; " + _MERGE_FIRST,
}
"""Options of PEFT under which ``W + scale * B @ A`` would not be the model, and what to do."""
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of adapters for which PEFT changes the base's weights, too, when it loads them."""
_PEFT_TYPES = {
    "ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr", "IA3": "IA3", "OFT": "OFT",
    "BOFT": "BOFT", "VERA": "VeRA", "VBLORA": "VB-LoRA", "FOURIERFT": "FourierFT", "HRA": "HRA",
    "XLORA": "X-LoRA", "LN_TUNING": "LN tuning", "RANDLORA": "RandLoRA", "MISS": "MiSS",
    "BONE": "Bone", "SHIRA": "SHiRA", "ROAD": "RoAd", "POLY": "Poly", "C3A": "C3A",
}  # fmt: skip
_PROMPTS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT",
    "CPT", "CARTRIDGE",
)  # fmt: skip

_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.(weight|bias)")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.default)?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
_WRAPPER = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.|$)")
CONV1D = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)$")
_REPEATED = re.compile(r"\)[*+{]")
"""A group that is repeated; with a repetition inside it may take for ever to match."""


class Product(NamedTuple):
    """Two factors whose product is a delta: ``scale * left @ right``, seen as a matrix."""

    left: Array
    """float32[rows, rank]."""
    right: Array
    """float32[rank, columns]."""
    scale: float


@dataclass
class _Module:
    """The tensors of one module, by their names in the adapter's file."""

    name: str
    a: str = ""
    b: str = ""
    bias: str = ""
    magnitude: str = ""
    embedding: bool = False


@dataclass(eq=False)
class Adapter:
    """An adapter whose configuration and header were read and checked."""

    folder: Path
    label: str
    config: Mapping[str, Any]
    weights: Checkpoint
    modules: dict[str, _Module] = field(default_factory=dict)
    """What LoRA changes, by the name of the module in the model that PEFT wrapped."""
    whole: dict[str, str] = field(default_factory=dict)
    """Tensors that take the place of the base's: their name in the model, and in the file."""
    _held: OrderedDict[str, Product] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def said_base(self) -> str:
        """The base that the adapter says it was trained on; may be empty."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def tying(self) -> bool:
        """Whether embedding and head, where they are tied, were trained as one."""
        return self.config.get("ensure_weight_tying") is True

    def rank(self, module: str) -> int:
        """The rank that the configuration gives to a module."""
        return int(_fitting(self.config.get("rank_pattern"), module, self.config["r"]))

    def scale(self, module: str) -> float:
        """The factor on ``B @ A``: alpha over the rank, with rsLoRA over the rank's root."""
        rank = self.rank(module)
        pattern = self.config.get("alpha_pattern")
        alpha = float(_fitting(pattern, module, self.config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def factors(self, key: str, kind: str, a: str, b: str, scale: float) -> Product:
        """The two factors of a tensor, as its lens needs them; the last ones are kept."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        found = Product(*_oriented(kind, self._matrix(a), self._matrix(b)), scale)
        with self._lock:
            self._held[key] = found
            while len(self._held) > 1 and _size(self._held.values()) > CACHE_BYTES:
                self._held.popitem(last=False)
        return found

    def _matrix(self, key: str) -> Array:
        if not key:
            return np.ones((1, 1), np.float32)
        values = np.asarray(self.weights[key], np.float32)
        return values.reshape(values.shape[0], -1) if values.ndim > 1 else values[None, :]

    def check_finite(self) -> None:
        """Read every factor and refuse NaN and infinity in them.

        Raises:
            NonFiniteError: names file, tensor and count, for all at once.
        """
        problems = Problems()
        for key, spec in self.weights.specs.items():
            wild = int((~np.isfinite(self.weights[key])).sum()) if _computable(spec) else 0
            if wild:
                problems.add(
                    NonFiniteError,
                    f"{self.weights.files[0]}: {key} holds {wild} NaN or infinite values of "
                    f"{spec.numel}; the training may have diverged: take an earlier checkpoint, or "
                    "go on with --allow-nonfinite",
                )
        problems.raise_if_any()


def _size(products: Iterable[Product]) -> int:
    return sum(p.left.nbytes + p.right.nbytes for p in products)


def _oriented(kind: str, a: Array, b: Array) -> tuple[Array, Array]:
    """Left and right factor of the delta as the base's tensor lies in its file."""
    if kind == "bias":
        return b, a  # 1 x 1 and 1 x out
    left, right = (b, a) if kind == "linear" else (a.T, b.T)
    return np.ascontiguousarray(left), np.ascontiguousarray(right)


def _computable(spec: TensorSpec) -> bool:
    return DTYPES[spec.dtype].computable


# -- the folder ------------------------------------------------------------------------------------


def is_adapter(path: Path) -> bool:
    """Whether a path is the folder of an adapter, and not also of a whole model."""
    whole = ("model.safetensors", "model.safetensors.index.json")
    return (path / CONFIG).is_file() and not any((path / name).exists() for name in whole)


def open_adapter(folder: Path, label: str) -> Adapter:
    """Open an adapter's folder: its configuration and the header of its weights.

    Raises:
        CheckpointError: everything that is wrong with it, at once.
    """
    config = read_json(within(folder / CONFIG, folder))
    problems = Problems()
    _check_config(config, label, problems)
    problems.raise_if_any()
    file = folder / WEIGHTS
    if not file.exists():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickled:
            raise CheckpointError(
                f"{label}: {pickled[0]} is a pickle, which can run code when it is read, so it is "
                "not read. Convert it once where you trust it: load it with PEFT and call "
                f"save_pretrained(folder), which writes {WEIGHTS}"
            )
        raise CheckpointError(f"{label}: has {CONFIG} but no {WEIGHTS}; fetch it again")
    file = within(file, folder)
    adapter = Adapter(folder, label, config, Checkpoint(file, label, [file]))
    _sort(adapter, problems)
    problems.raise_if_any()
    return adapter


def _check_config(config: Mapping[str, Any], label: str, problems: Problems) -> None:
    where = f"{label}: {CONFIG}: "

    def refuse(text: str) -> None:
        problems.add(CheckpointError, where + text)

    if config.get("peft_type") != "LORA":
        refuse(_other_kind(config.get("peft_type")))
        return
    if "r" not in config or type(config["r"]) is not int or config["r"] < 1:
        refuse(f"r, the rank, is a whole number from 1, not {brief(config.get('r'))}")
    if not _number(config.get("lora_alpha")):
        refuse(f"lora_alpha, which sets the scale, is a number, not "
               f"{brief(config.get('lora_alpha'))}")  # fmt: skip
    _check_patterns(config, refuse)
    for key, reason in _REFUSED.items():
        if config.get(key):
            refuse(f"{key}: {reason}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        refuse(
            f"init_lora_weights: {brief(start)} changes the base's weights, too; save the adapter "
            "as plain LoRA with PEFT: save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...)"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        refuse(f"bias: none, all or lora_only, not {brief(config['bias'])}")


def _other_kind(kind: object) -> str:
    """Why an adapter that is not LoRA is refused."""
    if kind is None:
        return "no peft_type, so it is not known what the factors mean"
    if kind in _PROMPTS:
        return f"{kind} learns a prompt and changes no weight, so it cannot be merged"
    name = _PEFT_TYPES.get(str(kind))
    if name is None:
        return f"the peft_type {brief(kind)} is not known, only LORA is read; {_MERGE_FIRST}"
    return f"{name} adapters are not read, only LoRA and DoRA; {_MERGE_FIRST}"


def _check_patterns(config: Mapping[str, Any], refuse: Any) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        found = config.get(key) or {}
        if not isinstance(found, Mapping):
            refuse(f"{key}: a mapping from names of modules to numbers, not {brief(found)}")
            continue
        for pattern, value in found.items():
            whole = key == "rank_pattern"
            if not _number(value) or (whole and (type(value) is not int or value < 1)):
                refuse(f"{key}: {brief(pattern)} has {brief(value)}, not a number"
                       + (" from 1" if whole else ""))  # fmt: skip
            _check_pattern(pattern, key, refuse)
    for key in ("target_modules", "exclude_modules"):
        found = config.get(key)
        if isinstance(found, str):
            _check_pattern(found, key, refuse)
        elif found is not None and not _texts(found):
            refuse(f"{key}: a list of names or a pattern, not {brief(found)}")
    if not _texts(config.get("modules_to_save") or []):
        refuse(f"modules_to_save: a list of names, not {brief(config['modules_to_save'])}")


def _check_pattern(pattern: str, key: str, refuse: Any) -> None:
    try:
        many = len(pattern) > PATTERN_LIMIT or len(re.findall(r"[*+]|,\}", pattern)) > 6
        if many or _REPEATED.search(pattern):
            refuse(f"{key}: the pattern {brief(pattern)} may take for ever to match")
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        refuse(f"{key}: {brief(pattern)} is no pattern")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _fitting(patterns: object, module: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a module's name, as PEFT chooses it."""
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _sort(adapter: Adapter, problems: Problems) -> None:
    """Tell what each tensor of the file is for, and check that the parts fit each other."""
    unknown = [key for key in adapter.weights.specs if not _took(adapter, key)]
    where = f"{adapter.weights.files[0]}: "
    if unknown:
        problems.add(CheckpointError, f"{where}{listed(unknown)} belong to no LoRA that is known")
    odd = [k for k, s in adapter.weights.specs.items() if not _computable(s)]
    if odd:
        problems.add(
            CheckpointError,
            f"{where}{listed(odd)} cannot be computed with: {adapter.weights.specs[odd[0]].dtype}",
        )
    if not adapter.modules and not adapter.whole:
        problems.add(CheckpointError, f"{where}holds no factors; it changes nothing")
    for module in adapter.modules.values():
        _check_module(adapter, module, where, problems)
    _check_targets(adapter, where, problems)


def _took(adapter: Adapter, key: str) -> bool:
    """Enter one tensor of the file where it belongs; ``False`` where that is not known."""
    name = key.removeprefix("base_model.model.")
    if found := _FACTOR.fullmatch(name):
        part = found[2].lower() if found[3] == "weight" else "bias"
        if found[2] == "A" and part == "bias":
            return False
        setattr(adapter.modules.setdefault(found[1], _Module(found[1])), part, key)
    elif found := _EMBEDDING.fullmatch(name):
        module = adapter.modules.setdefault(found[1], _Module(found[1]))
        module.embedding = True
        setattr(module, found[2].lower(), key)
    elif found := _MAGNITUDE.fullmatch(name):
        adapter.modules.setdefault(found[1], _Module(found[1])).magnitude = key
    elif "lora_" in name:
        return False
    elif ".original_module." not in name:
        adapter.whole[_WRAPPER.sub("", name)] = key
    return True


def _check_module(adapter: Adapter, module: _Module, where: str, problems: Problems) -> None:
    def refuse(text: str) -> None:
        problems.add(CheckpointError, f"{where}{module.name}: {text}")

    if not module.a or not module.b:
        there, lacking = ("B", "A") if module.b else ("A", "B")
        if not module.a and not module.b:
            there, lacking = "magnitude or bias", "A and B"
        refuse(f"has {there} but no {lacking}; the file is not whole, fetch it again")
        return
    a, b = (adapter.weights.specs[k].shape for k in (module.a, module.b))
    expected = adapter.rank(module.name)
    if len(a) < 2 or len(b) < 2 or 0 in a or 0 in b:
        refuse(f"A is {list(a)} and B is {list(b)}; parts of a sharded training were not gathered")
    elif a[0] != b[1]:
        refuse(f"A has the rank {a[0]}, but B has {b[1]}")
    elif a[0] != expected:
        refuse(f"has the rank {a[0]}, but {CONFIG} says {expected}")
    dora = bool(adapter.config.get("use_dora"))
    if dora and not module.magnitude:
        refuse("has no magnitude vector, but use_dora is true")
    if module.magnitude and not dora:
        refuse("has a magnitude vector, but use_dora is not true")
    if module.magnitude and len(a) > 2:
        refuse(f"DoRA on convolutions is not read; {_MERGE_FIRST}")


def _check_targets(adapter: Adapter, where: str, problems: Problems) -> None:
    """Refuse factors for modules that the configuration does not name: PEFT would drop them."""
    outside = sorted(
        m for m in adapter.modules
        if not _targeted(adapter.config, m)
        and not (adapter.tying and role_of(f"{m}.weight").kind in ("embedding", "head"))
    )  # fmt: skip
    if outside:
        problems.add(
            CheckpointError,
            f"{where}holds factors for {listed(outside)}, which the target_modules and "
            f"layers_to_transform of {CONFIG} do not name; one of the two files is another's",
        )


def _targeted(config: Mapping[str, Any], module: str) -> bool:
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if not any(module == t or module.endswith(f".{t}") for t in targets):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
        if found:
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


# -- on a base -------------------------------------------------------------------------------------


class LowRank:
    """A matrix of a base plus the product of two factors, computed while it is read."""

    def __init__(
        self, origin: tuple[Checkpoint, str], adapter: Adapter, module: _Module, kind: str
    ) -> None:
        self.origin = origin
        self.adapter, self.module, self.kind = adapter, module, kind
        self.sources = (origin[0], adapter.weights)
        self.spec = TensorSpec("F32", origin[0].specs[origin[1]].shape)
        self.scale = adapter.scale(module.name)
        self.magnitude = module.magnitude if kind != "bias" else ""
        self._lines: Array | None = None
        self._lock = threading.Lock()

    @property
    def identity(self) -> object:
        """Which factors change it, and how."""
        parts = [self.module.a, self.module.b, self.module.bias, self.magnitude]
        return ["lora", self.kind, self.scale, *parts]

    @property
    def columns(self) -> int:
        """Columns of the tensor, seen as a matrix."""
        shape = self.spec.shape
        return self.spec.numel if self.kind == "bias" else self.spec.numel // max(1, shape[0])

    def product(self) -> Product:
        """The factors, oriented as the tensor lies in the base's file."""
        a, b = self.module.a, self.module.b
        if self.kind == "bias":
            a, b = self.module.bias, ""
        return self.adapter.factors(f"{self.kind} {a}", self.kind, a, b, self.scale)

    def read(self, start: int, raw: Array) -> None:
        """Fill the bytes ``raw`` (float32) from element ``start`` on."""
        values = raw.view(np.float32)
        self._changed(start, values)
        if self.magnitude:
            compiled.scale_lines(values, start, values.size, self.columns, self._by_row,
                                self._factors())  # fmt: skip

    def _changed(self, start: int, values: Array) -> None:
        checkpoint, name = self.origin
        dtype = DTYPES[checkpoint.specs[name].dtype]
        if dtype.code == F32:
            checkpoint.read_into(name, start, values.view(np.uint8))
        else:
            narrow = np.empty(values.size * dtype.itemsize, np.uint8)
            checkpoint.read_into(name, start, narrow)
            compiled.widen(narrow, dtype.code, values.size, values)
        left, right, scale = self.product()
        compiled.add_low_rank(values, start, values.size, left, right, scale)

    @property
    def _by_row(self) -> int:
        return int(self.kind == "linear")

    def _factors(self) -> Array:
        """What brings every row (or column) to its magnitude; the whole tensor is read for it."""
        with self._lock:
            if self._lines is None:
                magnitude = np.asarray(self.adapter.weights[self.magnitude], np.float64).ravel()
                squares = np.zeros(magnitude.size)
                for start in range(0, self.spec.numel, _CHUNK):
                    values = np.empty(min(_CHUNK, self.spec.numel - start), np.float32)
                    self._changed(start, values)
                    compiled.add_squares(values, start, values.size, self.columns, self._by_row,
                                        squares)  # fmt: skip
                with np.errstate(divide="ignore", invalid="ignore"):
                    self._lines = (magnitude / np.sqrt(squares)).astype(np.float32)
            return self._lines


class Adapted(View):
    """A base with an adapter on it; like any checkpoint, but changed tensors are computed."""

    def __init__(
        self,
        base: Checkpoint,
        adapter: Adapter,
        lenses: Mapping[str, LazyTensor],
        config: Mapping[str, Any],
        notes: tuple[str, ...],
    ) -> None:
        super().__init__(base, lenses, config)
        self.aliases = {a: n for a, n in self.aliases.items() if a not in lenses}
        self.base, self.adapter, self.notes = base, adapter, notes
        self.label = f"{base.label}+{adapter.label}"

    @property
    def adapters(self) -> list[Adapter]:
        """The adapters on the base, the first one first."""
        return [*self.base.adapters, self.adapter]

    @property
    def put_on(self) -> Checkpoint:
        """What the last of its adapters is put on."""
        return self.base

    def untied(self) -> list[str]:
        """Aliases of the base whose bytes differ from the tensor they should be tied to."""
        return [a for a in self.base.untied() if a in self.aliases]


def adapted(base: Checkpoint, adapter: Adapter) -> Adapted:
    """Put an adapter on a base.

    Several are put on one after the other; the changes add up. A module whose weight the base ties
    to another tensor is untied, as the adapter changes only one of the two.

    Raises:
        MismatchError: the adapter changes modules that the base lacks or that have other shapes.
    """
    problems = Problems()
    fit = _Fit(base, adapter, problems)
    fit.place()
    problems.raise_if_any()
    return Adapted(base, adapter, fit.lenses, fit.config, fit.notes())


class _Fit:
    """Finds the tensor of the base that each part of an adapter changes."""

    def __init__(self, base: Checkpoint, adapter: Adapter, problems: Problems) -> None:
        self.base, self.adapter, self.problems = base, adapter, problems
        self.lenses: dict[str, LazyTensor] = {n: Same(base, n) for n in base.specs}
        self.config = dict(base.config)
        parts = [*adapter.modules, *(n.rpartition(".")[0] for n in adapter.whole)]
        self.strip, self.prefix = _renaming(parts, base.specs)
        self.ties = tied_to({*base.specs, *base.aliases, "lm_head.weight"})
        self.absent: list[str] = []
        self.shapes: list[str] = []

    def place(self) -> None:
        """Set a lens for every tensor that the adapter changes."""
        for name, key in self.adapter.whole.items():
            self._replace(self._here(name), key)
        for module in self.adapter.modules.values():
            self._change(module)
        who = f"{self.adapter.label} does not fit {self.base.label}"
        said = f" (it says it was trained on {self.adapter.said_base})" * bool(
            self.adapter.said_base
        )
        if self.absent:
            self.problems.add(
                MismatchError,
                f"{who}: it changes {listed(self.absent)}, which the base lacks{said}",
            )
        for text in self.shapes[:10]:
            self.problems.add(MismatchError, f"{who}: {text}{said}")
        if len(self.shapes) > 10:
            more = len(self.shapes) - 10
            self.problems.add(MismatchError, f"{who}: {more} more tensors have other shapes")

    def _here(self, name: str) -> str:
        """The name that the base's files give to a tensor of the model that PEFT wrapped."""
        return self.prefix + ".".join(name.split(".")[self.strip :])

    def _origin(self, name: str) -> tuple[Checkpoint, str] | None:
        """What a change of this tensor starts from; unties what was tied."""
        lens = self.lenses.get(name)
        if lens is not None:
            return lens.origin if isinstance(lens, Same) else (self.base, name)
        original = self._tied(name)
        return None if original is None else (self.base, original)

    def _tied(self, name: str) -> str | None:
        return self.ties.get(name) if ties_embeddings(self.config) else None

    def _set(self, name: str, lens: LazyTensor) -> None:
        tied = self._tied(name)
        if tied is not None and self.adapter.tying:
            return  # the same change is made to the tensor it is tied to
        copies = [copy for copy in self.ties if self._tied(copy) == name]
        if not self.adapter.tying and (tied is not None or copies):
            for copy in copies:
                self.lenses.setdefault(copy, Same(self.base, name))
            self.config = _untied(self.config)
        self.lenses[name] = lens

    def _replace(self, name: str, key: str) -> None:
        spec = self.adapter.weights.specs[key]
        module = name.rpartition(".")[0]
        saved = self.adapter.config.get("modules_to_save") or []
        origin = self._origin(name)
        if origin is None and not any(module == m or module.endswith(f".{m}") for m in saved):
            self.absent.append(name)
            return
        if origin is not None and origin[0].specs[origin[1]].shape != spec.shape:
            shape = origin[0].specs[origin[1]].shape
            kind = role_of(name).kind
            if kind in ("embedding", "head") and shape[1:] == spec.shape[1:]:
                self.config = _with_vocabulary(self.config, spec.shape[0])
            else:
                self.shapes.append(f"{name} is {list(spec.shape)}, not {list(shape)}")
                return
        self._set(name, Same(self.adapter.weights, key))

    def _change(self, module: _Module) -> None:
        name = self._here(module.name) + ".weight"
        origin = self._origin(name)
        if origin is None:
            self.absent.append(name)
            return
        spec = origin[0].specs[origin[1]]
        kind = self._kind(module, spec)
        if kind is None or not _computable(spec):
            return
        if module.magnitude and isinstance(self.base, Adapted):
            below = self.base.lenses.get(name)
            if not isinstance(below, Same):
                self.shapes.append(
                    f"{name}: DoRA on top of another adapter is not defined; merge that one first"
                )
                return
        self._set(name, LowRank(origin, self.adapter, module, kind))
        if module.bias:
            self._change_bias(module)

    def _change_bias(self, module: _Module) -> None:
        name = self._here(module.name) + ".bias"
        origin = self._origin(name)
        if origin is None:
            self.absent.append(name)
            return
        shape = origin[0].specs[origin[1]].shape
        mine = self.adapter.weights.specs[module.bias].shape
        if shape != mine:
            self.shapes.append(f"{name} is {list(mine)}, not {list(shape)}")
            return
        self._set(name, LowRank(origin, self.adapter, module, "bias"))

    def _kind(self, module: _Module, spec: TensorSpec) -> str | None:
        """How the factors lie to the base's tensor; notes where they do not fit it."""
        a, b = (self.adapter.weights.specs[k].shape for k in (module.a, module.b))
        shape = spec.shape
        plain = (b[0], *a[1:])
        found = None
        if module.embedding:
            found = "embedding" if shape == (a[1], b[0]) else None
            plain = (a[1], b[0])
        elif len(a) > 2:
            found = "linear" if shape == plain and set(b[2:]) <= {1} else None
        else:
            conv1d = CONV1D.search(module.name) is not None
            flipped = conv1d and shape == (a[1], b[0])
            square = a[1] == b[0]
            if flipped and (not square or self.adapter.config.get("fan_in_fan_out")):
                found = "transposed"
            elif shape == plain:
                found = "linear"
        name = self._here(module.name)
        if found is None:
            self.shapes.append(
                f"{name}: its factors make {list(plain)}, the base's weight is {list(shape)}"
            )
        elif not _computable(spec):
            self.shapes.append(
                f"{name}: the base's weight is {spec.dtype}, which cannot be computed with; take "
                "the base before it was quantised"
            )
        elif module.magnitude:
            length = self.adapter.weights.specs[module.magnitude].numel
            if length != b[0]:
                self.shapes.append(f"{name}: its magnitude has {length} entries, not {b[0]}")
        return found

    def notes(self) -> tuple[str, ...]:
        """What the user should know: another base than the one the adapter names."""
        said = self.adapter.said_base
        below = self.base
        while isinstance(below, Adapted):
            below = below.base
        known = {Path(below.label.partition("@")[0]).name, below.path.name, below.folder.name}
        known |= {below.path.parent.parent.name.rpartition("--")[2]}  # the cache of the Hub
        if not said or Path(said).name in known:
            return ()
        return (
            f"{self.adapter.label} says it was trained on {said}; it is put on {below.label}, "
            "whose names and shapes fit",
        )


def _renaming(modules: Collection[str], names: Collection[str]) -> tuple[int, str]:
    """How the base's files name the modules: parts dropped in front, and what is put there.

    PEFT names modules as the model that it wrapped does; files of the bare model (``h.0.attn``) or
    of a larger one (``model.language_model.layers``) begin differently.
    """
    there = {n.rpartition(".")[0] for n in names}
    wanted = [m for m in modules if m not in there]
    if not wanted or any(m in there for m in modules):
        return 0, ""
    for strip in range(3):
        rest = ".".join(wanted[0].split(".")[strip:])
        if not rest or "." not in rest:
            break
        prefixes = {n.removesuffix(rest) for n in there if n == rest or n.endswith("." + rest)}
        for prefix in sorted(prefixes):
            if all(prefix + ".".join(m.split(".")[strip:]) in there for m in wanted):
                return strip, prefix
    return 0, ""


def _sections(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    new = dict(config)
    parts = [new]
    if isinstance(new.get("text_config"), Mapping):
        new["text_config"] = dict(new["text_config"])
        parts.append(new["text_config"])
    return new, parts


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    new, parts = _sections(config)
    for part in parts:
        if "tie_word_embeddings" in part or part is new:
            part["tie_word_embeddings"] = False
    return new


def _with_vocabulary(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    new, parts = _sections(config)
    for part in parts:
        if "vocab_size" in part:
            part["vocab_size"] = size
    return new


__all__ = [
    "CONFIG", "WEIGHTS", "Adapted", "Adapter", "LowRank", "Product", "adapted", "is_adapter",
    "open_adapter",
]  # fmt: skip
