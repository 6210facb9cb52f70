"""Recipes: YAML read once into frozen types, every fault found before anything is opened.

Two languages are read. Suture's own has ``method`` at the top; one with ``merge_method`` is a
mergekit recipe, which is translated into the other with mergekit's own per-tensor semantics.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from suture.errors import Problems, RecipeError, brief, did_you_mean
from suture.merges import METHODS, Method, method, settings
from suture.roles import DEFAULT_SPACE, ParamSpace
from suture.spec import WORD_OF, bytes_from, dtype_named
from suture.writer import SHARD_SIZE

SCHEMA = 1
"""Version of the layout of ``suture.json``."""
RECIPE_LIMIT = 1 << 20
"""Bytes a recipe may have; sixteen times that with what was made of it, as JSON."""
NODE_LIMIT = 100_000
"""Values a recipe may have, aliases written out."""


@dataclass(frozen=True)
class Policy:
    """What to do where the models do not hold the same tensors."""

    missing: str = "error"
    """A model lacks a tensor: ``error``, or ``base`` to take it from the base."""
    extra: str = "error"
    """A model has one more: ``error``, or ``drop``."""
    buffers: str = "equal"
    """Integer and boolean tensors: ``equal`` in all models, or those of the ``base``."""


POLICIES = {
    "missing": ("error", "base"),
    "extra": ("error", "drop"),
    "buffers": ("equal", "base"),
}


@dataclass(frozen=True)
class ModelEntry:
    """One model of a recipe."""

    path: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A merge, as data: after ``read_recipe`` every key is known and every value checked."""

    method: Method
    models: Mapping[str, ModelEntry]
    base: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    space: ParamSpace = DEFAULT_SPACE
    policy: Policy = Policy()
    dtype: str | None = None
    """The dtype of floating tensors of the output; ``None`` keeps that of the base."""
    shard_size: int = SHARD_SIZE
    folder: Path = Path()
    """Where relative paths start."""
    notes: tuple[str, ...] = ()
    """What a reader of the recipe should know: options that were accepted and do nothing, ..."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """What the inputs must have, when the recipe is the provenance of an earlier output."""

    @property
    def settings(self) -> dict[str, Any]:
        """The parameters in the types that the method asks for."""
        problems = Problems()
        found = settings(self.method, self.parameters, self._own, problems)
        problems.raise_if_any()
        return found

    @property
    def _own(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [(name, entry.parameters) for name, entry in self.models.items()]

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out, as plain data that can be read again."""
        known = self.method.parameters
        shared = {n: self.parameters.get(n, p.default) for n, p in known.items()}
        return {
            "base": self.base,
            "models": {n: {"path": e.path, **e.parameters} for n, e in self.models.items()},
            "method": self.method.name,
            "parameters": shared,
            "space": {"include": list(self.space.include), "exclude": list(self.space.exclude)},
            "policy": {k: getattr(self.policy, k) for k in POLICIES},
            "output": {
                "dtype": None if self.dtype is None else WORD_OF[self.dtype],
                "shard_size": self.shard_size,
            },
        }


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-3 is a number and a key that stands twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    own: set[Any] = set()
    for key_node, _ in node.value:
        line = f"line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{line}: a key must be a word")
        merged = key_node.tag == "tag:yaml.org,2002:merge"
        key = key_node.value if merged else loader.construct_object(key_node)
        if key in own:
            raise RecipeError(f"{line}: the key {key!r} stands twice")
        own.add(key)
    loader.flatten_mapping(node)  # `<<: *defaults`, which own keys override
    return {
        loader.construct_object(k, deep=True): loader.construct_object(v, deep=True)
        for k, v in node.value
    }


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _unfolded(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values a node holds when every alias is written out."""
    if id(node) not in known:
        known[id(node)] = 0  # while it is counted, so that one that holds itself comes to an end
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [p for item in inner for p in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in parts)
    return known[id(node)]


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        RecipeError: it is not YAML, not a mapping, or a key stands twice.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if _unfolded(node, {}) > NODE_LIMIT:
            raise RecipeError("its aliases unfold to far more than a recipe holds")
        found = None if node is None else loader.construct_document(node)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        deep = isinstance(error, RecursionError)
        reason = "nested too deeply" if deep else " ".join(str(error).split())
        raise RecipeError(f"{where}: not valid YAML: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(k, str) for k in found):
        raise RecipeError(f"{where}: a recipe is a mapping with keys such as base, models, method")
    return found


def read_recipe(source: Path | Mapping[str, Any], folder: Path | None = None) -> Recipe:
    """Read a recipe file, the ``suture.json`` of an earlier output, or a mapping.

    Args:
        source: the file, or what stands in it.
        folder: where relative paths start; by default the file's folder or the current one.

    Raises:
        RecipeError: everything that is wrong with it, at once.
    """
    problems = Problems()
    recipe = parse_recipe(source, folder, problems)
    problems.raise_if_any()
    assert recipe is not None
    return recipe


def parse_recipe(
    source: Path | Mapping[str, Any], folder: Path | None, problems: Problems
) -> Recipe | None:
    """The same, but with faults noted in ``problems``.

    A recipe with faults comes back as far as it is understood, so that its models can be looked at
    too and all that is wrong be told at once; ``None`` where there is no recipe at all.
    """
    with problems.collecting():
        if isinstance(source, Mapping):
            return _from_raw(dict(source), folder or Path(), problems)
        return _from_file(source, folder or source.parent, problems)
    return None


def _from_file(source: Path, folder: Path, problems: Problems) -> Recipe | None:
    try:
        if source.is_dir():
            raise RecipeError(f"{source}: is a folder; a recipe is a YAML file")
        if source.stat().st_size > RECIPE_LIMIT * (16 if source.suffix == ".json" else 1):
            raise RecipeError(f"{source}: too large for a recipe")
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{source}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{source}: not a text file") from None
    if source.suffix == ".json":
        return _from_provenance(text, source, folder, problems)
    return _from_raw(parse_yaml(text, str(source)), folder, problems)


def _from_provenance(text: str, source: Path, folder: Path, problems: Problems) -> Recipe | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("recipe"), dict):
        raise RecipeError(f"{source}: holds no recipe; give the suture.json of a merged model")
    if found.get("schema", SCHEMA) != SCHEMA:
        raise RecipeError(
            f"{source}: has the schema {found['schema']!r}, this version reads {SCHEMA}; "
            f"it was written by Suture {found.get('suture')}"
        )
    recipe = _from_raw(found["recipe"], folder, problems)
    inputs = found.get("inputs")
    prints = {
        label: entry["fingerprint"]
        for label, entry in (inputs.items() if isinstance(inputs, dict) else ())
        if isinstance(entry, dict) and isinstance(entry.get("fingerprint"), str)
    }
    labels = {*recipe.models, *(["base"] if recipe.base is not None else [])}
    for label in sorted(labels ^ prints.keys()):
        text = "no fingerprint of this input" if label in labels else "not an input of the recipe"
        problems.add(RecipeError, f"inputs.{label}: {text}; a changed recipe is written as YAML")
    return replace(recipe, fingerprints=prints)


def _from_raw(raw: dict[str, Any], folder: Path, problems: Problems) -> Recipe:
    if "merge_method" in raw:
        return _Mergekit(raw, problems).recipe(folder)
    return _native(raw, problems, folder)


def _checked(recipe: Recipe, problems: Problems) -> Recipe:
    """The recipe, with its parameters and models held against what its method asks for."""
    settings(recipe.method, recipe.parameters, recipe._own, problems)
    _check_models(recipe, problems)
    return recipe


_UNKNOWN = METHODS["linear"]
"""Stands in a recipe whose method does not exist, until that is reported."""


KEYS = ("base", "models", "method", "parameters", "space", "policy", "output")


def _native(raw: dict[str, Any], problems: Problems, folder: Path) -> Recipe:
    _known(raw, KEYS, "", problems)
    found = None
    name = raw.get("method")
    if not isinstance(name, str):
        problems.add(RecipeError, "method: missing; `suture methods` lists them")
    else:
        with problems.collecting():
            found = method(name)
    base = raw.get("base")
    if base is not None and not isinstance(base, str):
        problems.add(RecipeError, f"base: a path or hub id, not {brief(base)}")
    models = _models(raw.get("models"), problems)
    parameters = _section(raw, "parameters", problems)
    space = _space(_section(raw, "space", problems), problems)
    policy = _policy(_section(raw, "policy", problems), problems)
    output = _section(raw, "output", problems)
    _known(output, ("dtype", "shard_size"), "output: ", problems)
    dtype, shard_size = None, SHARD_SIZE
    with problems.collecting():
        dtype = None if output.get("dtype") is None else dtype_named(str(output["dtype"]))
    with problems.collecting():
        shard_size = bytes_from(output.get("shard_size", SHARD_SIZE))
    base = base if isinstance(base, str) else None
    recipe = Recipe(_UNKNOWN, models, base, {}, space, policy, dtype, shard_size, folder)
    if found is None:
        return recipe
    parameters = _located(found, parameters, folder)
    return _checked(replace(recipe, method=found, parameters=parameters), problems)


def _located(how: Method, parameters: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The parameters with the paths of files taken from the recipe's folder on."""

    def at(path: object) -> object:
        return str(folder / path) if isinstance(path, str) else path

    found = dict(parameters)
    for name in found.keys() & {n for n, p in how.parameters.items() if p.files}:
        value = found[name]
        by_model = isinstance(value, Mapping)
        found[name] = {k: at(v) for k, v in value.items()} if by_model else at(value)
    return found


def _known(raw: Mapping[str, Any], keys: Sequence[str], where: str, problems: Problems) -> None:
    for key in raw:
        if key not in keys:
            problems.add(RecipeError, f"{where}unknown key {key!r}; {did_you_mean(str(key), keys)}")


def _section(raw: Mapping[str, Any], key: str, problems: Problems) -> dict[str, Any]:
    found = raw.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        problems.add(RecipeError, f"{key}: a mapping, not {brief(found)}")
        return {}
    return {str(k): v for k, v in found.items()}


def _models(raw: object, problems: Problems) -> dict[str, ModelEntry]:
    if isinstance(raw, list) and all(isinstance(m, str) for m in raw):
        _once(raw, problems)
        raw = {_short(path, raw): path for path in raw}
    if not isinstance(raw, Mapping) or not raw:
        problems.add(RecipeError, "models: a mapping from names to paths, with at least one model")
        return {}
    found = {}
    for name, entry in raw.items():
        entry = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            problems.add(
                RecipeError, f"models.{name}: a path, or a mapping with a path, not {brief(entry)}"
            )
            continue
        if str(name) in found or str(name) in _TAKEN or not str(name).isprintable():
            problems.add(RecipeError, f"models: {name!r} cannot be the name of a model")
        own = {str(k): v for k, v in entry.items() if k != "path"}
        found[str(name)] = ModelEntry(entry["path"], own)
    return found


_TAKEN = ("base", "output")
"""Names that reports use for other things than models."""


def _once(paths: Sequence[str], problems: Problems) -> None:
    for path in sorted({p for p in paths if paths.count(p) > 1}):
        problems.add(RecipeError, f"models: {path} stands twice; give the model one larger weight")


def _short(path: str, all_paths: Sequence[str]) -> str:
    """A name for a model that has only a path: as many last parts as tell it from the others."""
    for number in range(1, len(Path(path).parts) + 1):
        name = _end(path, number)
        if name not in _TAKEN and [_end(p, number) for p in all_paths].count(name) == 1:
            return name
    return path


def _end(path: str, number: int) -> str:
    whole = Path(path.partition("@")[0])
    return "/".join(whole.relative_to(whole.anchor).parts[-number:])


def _words(value: object, where: str, problems: Problems) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        problems.add(RecipeError, f"{where}: a list of roles or name patterns, not {brief(value)}")
        return ()
    return tuple(words)


def _space(raw: dict[str, Any], problems: Problems) -> ParamSpace:
    _known(raw, ("include", "exclude"), "space: ", problems)
    default = ParamSpace()
    include = _words(raw.get("include", list(default.include)), "space.include", problems)
    exclude = _words(raw.get("exclude", list(default.exclude)), "space.exclude", problems)
    return ParamSpace(include, exclude)


def _policy(raw: dict[str, Any], problems: Problems) -> Policy:
    _known(raw, list(POLICIES), "policy: ", problems)
    for key, choices in POLICIES.items():
        if key in raw and raw[key] not in choices:
            hint = did_you_mean(str(raw[key]), choices)
            problems.add(RecipeError, f"policy.{key}: {brief(raw[key])} is not known; {hint}")
    return Policy(**{k: v for k, v in raw.items() if k in POLICIES and v in POLICIES[k]})


def _check_models(recipe: Recipe, problems: Problems) -> None:
    how, number = recipe.method, len(recipe.models)
    if how.needs_base and recipe.base is None:
        problems.add(RecipeError, f"base: {how.name} works on differences to a base; name one")
    if recipe.models and number < how.least:
        problems.add(RecipeError, f"models: {how.name} takes {how.least}, not {number}")
    if how.most is not None and number > how.most:
        problems.add(RecipeError, f"models: {how.name} takes {how.most}, not {number}")
    if recipe.policy.missing == "base" and recipe.base is None:
        problems.add(RecipeError, "policy.missing: base needs a base")


_MERGEKIT_LATER = (
    "slices", "modules", "tokenizer", "tokenizer_source", "chat_template",
)  # fmt: skip
_MERGEKIT_KEYS = ("models", "merge_method", "base_model", "dtype", "out_dtype", "parameters")
_MERGEKIT_METHODS = {
    "linear": {"weight", "normalize"},
    "task_arithmetic": {"weight", "normalize", "lambda"},
    "ties": {"weight", "density", "normalize", "lambda", "rescale"},
    "dare_linear": {"weight", "density", "normalize", "lambda", "rescale"},
    "dare_ties": {"weight", "density", "normalize", "lambda", "rescale"},
    "slerp": {"t"},
}
_MERGEKIT_LATER_METHODS = (
    "nuslerp", "multislerp", "karcher", "nearswap", "breadcrumbs", "breadcrumbs_ties", "della",
    "della_linear", "sce", "model_stock", "ram", "ramplus_tl", "arcee_fusion", "passthrough",
)  # fmt: skip
_OWN = ("weight", "density")


class _Mergekit:
    """Translates a mergekit recipe; what is not supported yet is refused by name."""

    def __init__(self, raw: dict[str, Any], problems: Problems) -> None:
        self.raw, self.problems = raw, problems
        self.notes: list[str] = []
        name = raw["merge_method"]
        self.name = name if isinstance(name, str) else str(name)

    def refuse(self, text: str) -> None:
        self.problems.add(RecipeError, text)

    def recipe(self, folder: Path) -> Recipe:
        """The recipe in Suture's terms."""
        for key in self.raw:
            if key in _MERGEKIT_LATER and not (
                key == "tokenizer_source" and self.raw[key] in ("base", None)
            ):
                self.refuse(f"{key}: mergekit's {key} is not supported yet")
        _known({k: v for k, v in self.raw.items() if k not in _MERGEKIT_LATER}, _MERGEKIT_KEYS, "",
               self.problems)  # fmt: skip
        if self.name not in _MERGEKIT_METHODS:
            if self.name in _MERGEKIT_LATER_METHODS:
                self.refuse(f"merge_method: mergekit's {self.name} is not supported yet")
            else:
                hint = did_you_mean(self.name, [*_MERGEKIT_METHODS, *_MERGEKIT_LATER_METHODS])
                self.refuse(f"merge_method: no method {self.name!r}; {hint}")
        shared = self._parameters(_section(self.raw, "parameters", self.problems), "parameters")
        entries = self._entries()
        base = (
            self._path(self.raw["base_model"], "base_model") if self.raw.get("base_model") else None
        )
        dtype = None
        with self.problems.collecting():
            word = self.raw.get("out_dtype") or self.raw.get("dtype")
            dtype = None if word is None else dtype_named(str(word))
        return self._translated(base, entries, shared, dtype, folder)

    def _path(self, value: object, where: str) -> str:
        if isinstance(value, Mapping):  # mergekit's long form: {model: {path: ..., revision: ...}}
            inner = value.get("model", value)
            if isinstance(inner, Mapping) and isinstance(inner.get("path"), str):
                revision = inner.get("revision")
                return f"{inner['path']}@{revision}" if revision else str(inner["path"])
        if not isinstance(value, str):
            self.refuse(f"{where}: a path or hub id, not {brief(value)}")
            return ""
        if "+" in value and not Path(value).exists():
            self.refuse(f"{where}: {value!r}: base+lora models are not supported yet")
        return value

    def _entries(self) -> list[tuple[str, dict[str, Any]]]:
        raw = self.raw.get("models")
        if not isinstance(raw, list) or not raw:
            if "slices" not in self.raw and "modules" not in self.raw:
                self.refuse("models: a list of models, with at least one")
            return []
        found = []
        for number, entry in enumerate(raw):
            where = f"models[{number}]"
            if not isinstance(entry, Mapping) or "model" not in entry:
                self.refuse(f"{where}: a mapping with a model, not {brief(entry)}")
                continue
            _known(entry, ("model", "parameters"), f"{where}: ", self.problems)
            own = self._parameters(
                _section(entry, "parameters", self.problems), f"{where}.parameters"
            )
            found.append((self._path(entry["model"], f"{where}.model"), own))
        return found

    def _parameters(self, raw: dict[str, Any], where: str) -> dict[str, Any]:
        known = _MERGEKIT_METHODS.get(self.name, set(raw))
        found = {}
        for key, value in raw.items():
            if key == "int8_mask":
                self.notes.append("int8_mask changes nothing here: masks are never stored")
            elif key not in known:
                hint = did_you_mean(key, sorted(known))
                self.refuse(f"{where}: {self.name} has no {key!r}; {hint}")
            elif isinstance(value, list | Mapping):
                kind = "a gradient" if isinstance(value, list) else "a filter"
                if isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
                    kind = "a filter"
                self.refuse(f"{where}.{key}: {kind} is not supported yet; give one number")
            else:
                found[key] = value
        return found

    def _translated(
        self,
        base: str | None,
        entries: list[tuple[str, dict[str, Any]]],
        shared: dict[str, Any],
        dtype: str | None,
        folder: Path,
    ) -> Recipe:
        paths = [path for path, _ in entries]
        if self.name not in _MERGEKIT_METHODS:
            models = {_short(path, paths): ModelEntry(path) for path in paths}
            return Recipe(_UNKNOWN, models, base, folder=folder)
        how = method(self.name)
        if how.needs_base or self.name == "slerp":
            entries = [(path, own) for path, own in entries if path != base]
        if self.name == "slerp":
            entries = [(base or "", {}), *entries]
            if base is None:
                self.refuse("base_model: slerp starts from the base model; name one")
        _once([path for path, _ in entries], self.problems)
        models = {
            _short(path, paths): ModelEntry(path, self._own(path, own, shared))
            for path, own in entries
        }
        parameters = self._shared(shared)
        recipe = Recipe(
            how, models, base if how.needs_base else None, parameters, ParamSpace((), ()), Policy(),
            dtype, SHARD_SIZE, folder, tuple(dict.fromkeys(self.notes)),
        )  # fmt: skip
        return _checked(recipe, self.problems)

    def _own(self, path: str, own: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
        both = {**shared, **own}
        for key in own:
            if key not in _OWN:
                self.refuse(f"models: {path}: {key!r} belongs under the recipe's parameters")
        if self.name == "slerp":
            return {}
        if "weight" not in both:
            self.refuse(f"models: {path}: mergekit's {self.name} needs a weight")
        known = _MERGEKIT_METHODS[self.name] & set(_OWN)
        defaults = {"weight": 1.0, "density": 1.0}
        return {key: both.get(key, defaults[key]) for key in sorted(known)}

    def _shared(self, shared: dict[str, Any]) -> dict[str, Any]:
        normalize = shared.get("normalize", self.name in ("linear", "ties"))
        rescale = shared.get("rescale", self.name.startswith("dare"))
        for key, value in (("normalize", normalize), ("rescale", rescale)):
            if value not in (True, False):
                self.refuse(f"parameters.{key}: true or false, not {brief(value)}")
        found: dict[str, Any] = {}
        if "lambda" in shared:
            found["scale"] = shared["lambda"]
        if self.name == "slerp":
            if "t" not in shared:
                self.refuse("parameters.t: slerp needs a t")
            return {"t": shared.get("t", 0.5)}
        if self.name in ("linear", "task_arithmetic", "dare_linear"):
            found["normalize"] = bool(normalize)
        else:
            found["aggregate"] = "weighted_mean" if normalize else "sum"
            found["zero_sign"] = "positive"
        if self.name == "ties":
            found |= {"scope": "tensor", "rounding": "floor"}
            if rescale:
                self.refuse("parameters.rescale: rescaling after trimming is not supported yet")
        elif self.name.startswith("dare"):
            found["rescale"] = "l1" if rescale else "none"
        return found
