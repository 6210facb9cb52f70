"""Models as whatever there is, and the algebra on them: open, look at, merge, localize, save.

Models are given as whatever there is: a path or hub id (with ``+ADAPTER``), an open ``Checkpoint``,
a ``torch.nn.Module``, a ``state_dict`` or another mapping from names to torch or numpy tensors, a
``Merged``. Errors speak of these functions' own arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from suture.checkpoints.checkpoint import Checkpoint, refuse_uncomputable
from suture.checkpoints.memory import TensorCheckpoint
from suture.checkpoints.open import open_model
from suture.edits.inputs import open_input
from suture.edits.mask import Mask
from suture.edits.mask import localize as find_mask
from suture.edits.mask_file import StoredMask
from suture.edits.patch import StoredPatch
from suture.edits.stats import Stats
from suture.errors import Problems, RecipeError, brief, spoken_in_python
from suture.merges.apply import Stage
from suture.merges.policy import Policy
from suture.stream.vector import TaskVector
from suture.tensors.roles import ParamSpace
from suture.verbs.merge import run
from suture.verbs.merge.lazy import Merged
from suture.verbs.merge.recipe import short
from suture.verbs.merge.result import MergeReport

if TYPE_CHECKING:
    from torch import nn

    from suture.training.data import Dataset

    Model: TypeAlias = str | os.PathLike[str] | Checkpoint | Merged | nn.Module | Mapping[str, Any]

PathLike: TypeAlias = str | os.PathLike[str]


def is_module(model: object) -> bool:
    """Whether something is a network of torch; torch is not imported for that."""
    torch = sys.modules.get("torch")  # without it there is no module
    return torch is not None and isinstance(model, torch.nn.Module)


# -- models ----------------------------------------------------------------------------------------


@spoken_in_python
def open(
    model: Model, *, config: Mapping[str, Any] | None = None, files: PathLike | None = None,
    label: str | None = None,
) -> Checkpoint:  # fmt: skip
    """Open a model as a ``Checkpoint``: a lazy, read-only mapping from names to arrays.

    Of files only headers are read; tensors in memory are not copied, and a tensor with two names
    (a ``state_dict`` with tied embeddings) is held once.

    Args:
        model: a safetensors or GGUF file, a (sharded) folder, a hub id with an optional
            ``@revision``, ``BASE+ADAPTER``; a ``torch.nn.Module``; a mapping from names to torch or
            numpy tensors of any dtype that safetensors has; a ``Merged``, which is merged now.
        config: of a model in memory, what its ``config.json`` would say; default the module's own.
            It tells what a tensor is for, and which embeddings are tied.
        files: of a model in memory, the folder with its tokenizer; default the one that
            transformers loaded the module from.
        label: of a model in memory, what messages and records call it.

    Raises:
        CheckpointError: there is nothing there, or it is not a readable model.
        MismatchError: an adapter does not fit its base.
        RecipeError: it is nothing of these.

    Examples:
        >>> import numpy as np, suture
        >>> model = suture.open({"layers.0.mlp.weight": np.ones((2, 3), np.float16)}, label="tiny")
        >>> model
        Checkpoint('tiny': 1 tensors, 12 B)
        >>> model.specs["layers.0.mlp.weight"]
        TensorSpec(dtype='F16', shape=(2, 3))
        >>> model["layers.0.mlp.weight"].dtype
        dtype('float32')
    """
    return opened(model, config=config, files=files, label=label)


def opened(
    model: Any, *, config: Mapping[str, Any] | None = None, files: PathLike | None = None,
    label: str | None = None, base: Checkpoint | None = None,
) -> Checkpoint:  # fmt: skip
    """``open``, and an adapter alone on ``base``."""
    given = [k for k, v in (("config", config), ("files", files), ("label", label)) if v]
    if isinstance(model, str | os.PathLike | Checkpoint):
        if given:
            raise RecipeError(f"{given[0]}: is for a model in memory; {model} has its own")
        return model if isinstance(model, Checkpoint) else open_model(model, base=base)
    folder = None if files is None else Path(files)
    if folder is not None and not folder.is_dir():
        raise RecipeError(f"files: {folder} is no folder")
    if isinstance(model, Merged):
        return model.checkpoint(label)
    if is_module(model):
        from suture.training.modules import open_network

        return open_network(model, label=label, config=config, files=folder)
    if isinstance(model, Mapping) and not isinstance(model, TaskVector):
        return TensorCheckpoint(model, label or "tensors", config=config, folder=folder)
    raise RecipeError(f"{_what(model)} is no model; {_KINDS}")


_KINDS = (
    "a model is a path or hub id, an open checkpoint, a torch module, a mapping from names to "
    "tensors, or a merge"
)


def _what(value: object) -> str:
    if isinstance(value, TaskVector):
        return "a task vector, a difference of two models,"
    return f"{brief(value)} ({type(value).__name__})"


@spoken_in_python
def inspect(model: Model, *, check: bool = False, tensors: bool = False) -> dict[str, Any]:
    """Return what a model holds: tensors, elements and bytes, by dtype and by role; layers; ties.

    Args:
        model: as for ``open``.
        check: also read every byte, and name tensors with NaN or infinity, all zero, or equal.
        tensors: also list every tensor: dtype, shape, role, layer, bytes, file.

    Raises:
        CheckpointError: it is not a readable model.

    Examples:
        >>> import numpy as np, suture
        >>> suture.inspect({"layers.0.mlp.weight": np.ones((2, 3), np.float16)})["bytes"]
        12
    """
    from suture.analysis.profile import inspect_model

    return inspect_model(opened(model), check=check, each=tensors)


@spoken_in_python
def diff(base: Model, tuned: Model) -> dict[str, Any]:
    """Return how far a model is from its base: in all, by layer, by role, by tensor.

    Every row holds elements, the share that changed, the Euclidean norm of the change, that norm
    relative to the base's, the largest change, and the cosine of base and tuned weights.

    Args:
        base: as for ``open``.
        tuned: what was made of it.

    Raises:
        MismatchError: the two do not hold the same tensors.

    Examples:
        >>> import numpy as np, suture
        >>> base = {"layers.0.mlp.weight": np.array([3.0, 4.0], np.float32)}
        >>> found = suture.diff(base, {"layers.0.mlp.weight": np.array([3.0, 4.5], np.float32)})
        >>> found["total"]["norm"], found["total"]["relative_norm"]
        (0.5, 0.1)
    """
    from suture.analysis import profile

    start = opened(base)
    return profile.diff(start, opened(tuned, base=start))


@spoken_in_python
def measure(model: nn.Module, data: Dataset, kinds: Sequence[str], **options: Any) -> Stats:
    """Gather statistics of a model over rows in one pass: Fisher, gradients, input norms, Gram.

    Args:
        model: one of ``suture.training.models``, or any network; left as it was.
        data: tokenised rows, as ``suture.training.data.tokenise`` gives them.
        kinds: any of ``suture.edits.stats.KINDS``.
        **options: ``names``, ``objective``, ``batch``, ``draws``, ``seed``, ``device``, ``facts``,
            ``progress`` of ``suture.measure.measure``.

    Returns:
        Statistics by kind and parameter, float32, each of the shape of the parameter (``gram``: n
        by n for n inputs); what ``localize`` and merges take as ``stats``.

    Raises:
        NonFiniteError: the loss of a row is NaN or infinite.
        RecipeError: there is nothing to measure, labels are missing, or no such kind.

    Examples:
        >>> import torch, suture
        >>> from suture.training.data import Dataset
        >>> from suture.training.models import Classifier, Head
        >>> class Body(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = torch.nn.Embedding(5, 2)
        ...     def forward(self, input_ids, attention_mask):
        ...         return self.table(input_ids).mean(1)
        >>> head = Head(("no", "yes"), torch.eye(2), torch.zeros(2))
        >>> data = Dataset(((1, 2), (3, 4)), (0, 1), pad=0)
        >>> stats = suture.measure(Classifier(Body(), head), data, ["fisher"])
        >>> stats.kinds, stats.shape("fisher", "table.weight")
        (['fisher'], (5, 2))
    """
    from suture.training.measure import measure as measured

    return measured(model, data, kinds, **options)


# -- merging and localizing ------------------------------------------------------------------------


@spoken_in_python
def merge(
    base: Model | None,
    models: Mapping[str, Model] | Sequence[Model] | TaskVector,
    method: str | None = None,
    *,
    preset: str | None = None,
    space: ParamSpace | None = None,
    dtype: str | None = None,
    policy: Policy | Mapping[str, str] | None = None,
    protect: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> Merged:
    """Describe a merge; ``Merged`` says what can be done with it, and reads nothing before.

    Args:
        base: what the models were fine-tuned from, as for ``open``; ``None`` for methods that need
            none. Also a patch or a graft may stand for a model, as its file.
        models: by name, or a list of them; or a task vector, which is added to its base.
        method: one of ``METHODS``, by default ``task_arithmetic``.
        preset: one of ``PRESETS``: a method with the parameters of a paper or tool.
        space: which tensors are merged; default all but token embeddings and heads.
        dtype: of the output; default that of the base.
        policy: what to do where the models do not hold the same tensors, as in a recipe.
        protect: entries that one model alone may write: ``model``, and a ``mask`` or a ``rule``.
        **parameters: of the method; a mapping from names of models gives each its own. ``masks``
            and ``stats`` take files, a folder, or ``Mask`` and ``Stats`` themselves, by model.

    Raises:
        RecipeError: everything that is wrong with the parameters, at once.
        CheckpointError: a model cannot be opened.

    Examples:
        >>> import numpy as np, suture
        >>> name = "layers.0.mlp.weight"
        >>> base = {name: np.zeros((1, 4), np.float32)}
        >>> math = {name: np.array([[4.0, 0.0, 1.0, -2.0]], np.float32)}
        >>> code = {name: np.array([[2.0, 1.0, 0.0, 3.0]], np.float32)}
        >>> merged = suture.merge(base, {"math": math, "code": code}, "ties", density=0.5)
        >>> merged[name].tolist()
        [[3.0, 0.0, 0.0, 3.0]]
        >>> mask = suture.localize(suture.open(math) - suture.open(base), density=0.25)
        >>> suture.merge(base, [math], "stitch", masks=[mask])[name].tolist()
        [[4.0, 0.0, 0.0, 0.0]]
    """
    start = None if base is None else _mergeable("base", base, None)
    if isinstance(models, TaskVector):
        return run.merged(models.base if start is None else start, models, method, preset=preset,
                          space=space, dtype=dtype, policy=policy, protect=protect,
                          **parameters)  # fmt: skip
    named = _named(models)
    problems, opened = Problems(), dict[str, Checkpoint]()
    for name, model in named.items():
        with problems.collecting():
            opened[name] = _mergeable(name, model, start)
    problems.raise_if_any()
    for key, value in parameters.items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], Mask | Stats):
            if len(value) != len(named):
                raise RecipeError(f"{key}: one for each of {len(named)} models, not {len(value)}")
            parameters[key] = dict(zip(named, value, strict=True))
    return run.merged(start, opened, method, preset=preset, space=space, dtype=dtype,
                      policy=policy, protect=protect, **parameters)  # fmt: skip


def _mergeable(name: str, model: Any, base: Checkpoint | None) -> Checkpoint:
    """A model as merges take it: a file also as the patch or graft that it may be."""
    if isinstance(model, str | os.PathLike):
        return open_input(os.fspath(model), None, base)
    label = None if isinstance(model, Checkpoint) else name
    found = opened(model, label=label, base=base)
    refuse_uncomputable(found)
    return found


def _named(models: Any) -> dict[str, Any]:
    """Models by name; those of a list are called as a recipe would, or by their number."""
    if isinstance(models, Mapping):
        tensors = [n for n, m in models.items() if _is_tensor(m)]
        if tensors or isinstance(models, Checkpoint | Merged):
            raise RecipeError("models: a mapping from names to models, or a list; this is one "
                              "model: write {name: model}")  # fmt: skip
        return dict(models)
    if isinstance(models, str | os.PathLike) or is_module(models):
        raise RecipeError("models: a mapping from names to models, or a list; this is one model: "
                          "write {name: model}")  # fmt: skip
    if not isinstance(models, Iterable):
        raise RecipeError(f"models: a mapping from names to models, or a list, not {brief(models)}")
    found = list(models)
    if any(found[i] is found[j] for i in range(len(found)) for j in range(i)):
        raise RecipeError("models: one stands twice; give it one larger weight")
    paths = [os.fspath(m) for m in found if isinstance(m, str | os.PathLike)]
    for path in paths:
        if paths.count(path) > 1:
            raise RecipeError(f"models: {path} stands twice; give the model one larger weight")
    names: dict[str, Any] = {}
    for number, model in enumerate(found, 1):
        is_path = isinstance(model, str | os.PathLike)
        name = short(os.fspath(model), paths) if is_path else f"model{number}"
        names[name] = model
    return names


def _is_tensor(value: object) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")


@spoken_in_python
def localize(
    vector: TaskVector,
    rule: str = "magnitude",
    *,
    density: float | None = None,
    scope: str = "global",
    stats: Stats | PathLike | None = None,
    positive: bool = False,
    seed: int = 0,
    label: str = "",
    without: Mask | StoredMask | None = None,
    threads: int | None = None,
) -> Mask:
    """Return the entries of a task vector that matter most by a rule: ``round(density * n)``.

    Ties are broken by position. Entries that cannot matter, whose score is 0 by a rule without
    signs, are never kept, even if fewer are left.

    Args:
        vector: tuned minus base, over the tensors that compete.
        rule: one of ``RULES``; ``magnitude`` needs no data (He et al. 2025, arXiv:2408.13656).
        density: the share to keep, in (0, 1]; may be left out with ``positive``.
        scope: whether entries compete over all tensors (``global``), a ``layer``, a ``tensor``.
        stats: what the rule needs, from ``measure``, or the file it was saved to.
        positive: keep only entries whose score is above 0 (rules with a sign).
        seed: of the rule ``random``.
        label: the name of the model, from which ``random`` draws another mask for each.
        without: entries that are never kept (set difference: Wei et al. 2024, arXiv:2402.05162);
            the density stays that of all entries.
        threads: default every core; changes no bit.

    Raises:
        RecipeError: no such rule or scope, ``density`` is not in (0, 1], statistics are missing.
        MismatchError: the statistics, or the mask of ``without``, are those of other tensors.

    Examples:
        >>> import numpy as np, suture
        >>> base = suture.open({"layers.0.mlp.weight": np.zeros((1, 4), np.float32)})
        >>> moved = np.array([[4.0, 0.0, 1.0, -2.0]], np.float32)
        >>> mask = suture.localize(suture.open({"layers.0.mlp.weight": moved}) - base, density=0.5)
        >>> mask
        Mask(2 of 4 entries, 50.000%, 1 tensor)
        >>> mask["layers.0.mlp.weight"].tolist()
        [[True, False, False, True]]
    """
    if not isinstance(vector, TaskVector):
        raise RecipeError(f"vector: a task vector, `tuned - base`, not {type(vector).__name__}")
    found = stats if isinstance(stats, Stats) or stats is None else Path(stats)
    return find_mask(vector, rule, density=density, scope=scope, stats=found, positive=positive,
                     seed=seed, label=label, without=without, threads=threads)  # fmt: skip


@spoken_in_python
def save(
    what: Merged | Model,
    out: PathLike,
    *,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    link: bool = False,
    stage: Stage | None = None,
) -> MergeReport:
    """Write a merge, or a model, as a folder: weights, configuration, tokenizer, record, card.

    The folder appears whole or not at all; an interrupted call, made again, goes on.

    Args:
        what: what ``merge`` gave, or a model as for ``open``, which is written as it is.
        out: the folder.
        overwrite: replace an older output of Suture, in one step, at the end.
        resume: go on with what an interrupted run left; models in memory are read anew.
        threads: default every core; changes no byte.
        allow_nonfinite: go on where weights are NaN or infinite.
        link: link files that stay as they are, instead of copying.
        stage: is told when a stage begins and of how many bytes; gives what is told of each tensor.

    Raises:
        RecipeError: it is neither a merge nor a model.
        SutureError: an input does not fit, or the output cannot be written; all problems at once.

    Examples:
        >>> import numpy as np, suture, tempfile
        >>> place = tempfile.TemporaryDirectory()
        >>> model = {"layers.0.mlp.weight": np.ones(3, np.float32)}
        >>> report = suture.save(model, f"{place.name}/m")
        >>> suture.open(f"{place.name}/m")["layers.0.mlp.weight"].tolist()
        [1.0, 1.0, 1.0]
        >>> place.cleanup()
    """
    _refuse_unsaved(what)
    if not isinstance(what, Merged):
        what = run.merged(None, {"model": opened(what)}, "passthrough")
    return run.save(what, out, stage=stage, overwrite=overwrite, resume=resume, threads=threads,
                    allow_nonfinite=allow_nonfinite, link=link)  # fmt: skip


def _refuse_unsaved(what: object) -> None:
    if isinstance(what, TaskVector):
        raise RecipeError(
            "a task vector is a difference and no model. `save(merge(None, vector), out)` writes "
            "its base with it added; `patch_make(base, tuned, out)` writes the difference as a "
            "patch, `extract_lora(base, tuned, out, rank=16)` as an adapter"
        )
    if isinstance(what, Mask | Stats):
        kind = type(what).__name__.lower()
        raise RecipeError(f"a {kind} is one file: write `{kind}.save(path)`")
    if isinstance(what, StoredPatch):
        raise RecipeError("a patch is a file already; copy it")


__all__ = [
    "Model", "PathLike", "diff", "inspect", "is_module", "localize", "measure", "merge", "open",
    "opened", "save",
]  # fmt: skip
