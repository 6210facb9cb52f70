"""The verbs: what every command does, from Python, with one signature: ``VERB(recipe, out, ...)``.

Recipes are files or mappings, whose relative paths start in the file's folder or in the current
one. Models are given as for ``suture.open``. Errors speak of these functions' own arguments.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from suture.api.algebra import (
    PathLike,
    diff,
    inspect,
    is_module,
    localize,
    measure,
    merge,
    open,
    opened,
    save,
)
from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.vocabulary import tokenizer_files
from suture.edits.mask import Mask
from suture.edits.patch import Patch, StoredPatch
from suture.errors import RecipeError, spoken_in_python
from suture.merges.apply import Stage
from suture.runs.card import carry
from suture.runs.progress import Progress, Say
from suture.verbs.analyze import VERB as ANALYZE
from suture.verbs.audit import VERB as AUDIT
from suture.verbs.bench import VERB as BENCH
from suture.verbs.finetune import VERB as FINETUNE
from suture.verbs.localize import VERB as LOCALIZE
from suture.verbs.merge import VERB as MERGE
from suture.verbs.merge.lazy import Merged
from suture.verbs.merge.result import MergeReport
from suture.verbs.merge.run import progress_of
from suture.verbs.realign import VERB as REALIGN

if TYPE_CHECKING:
    from suture.api.algebra import Model
    from suture.evals.results import SuiteResult
    from suture.verbs.analyze.run import Analysis
    from suture.verbs.compare.blame import Blame
    from suture.verbs.compare.run import Comparison
    from suture.verbs.extract_lora.run import Extracted
    from suture.verbs.finetune.result import FinetuneReport
    from suture.verbs.patch.run import PatchReport
    from suture.verbs.realign.result import RealignReport

Recipe: TypeAlias = str | os.PathLike[str] | Mapping[str, Any]

VERBS: Mapping[str, str] = {
    "merge_recipe": "merge", "localize_recipe": "localize", "finetune": "finetune",
    "realign": "realign", "evaluate": "eval", "compare": "compare", "analyze": "analyze",
    "audit": "audit", "bench": "bench", "report": "report", "patch_make": "patch make",
    "patch_apply": "patch apply", "patch_revert": "patch revert", "extract_lora": "extract-lora",
    "inspect": "inspect", "diff": "diff", "measure": "",
}  # fmt: skip
"""Each function that does what a command does, and that command; ``measure`` has none."""


def _quiet(text: str) -> None:
    """Say nothing."""


def _place(folder: PathLike | None) -> Path | None:
    return None if folder is None else Path(folder)


def _source(recipe: Recipe) -> Path | Mapping[str, Any]:
    if isinstance(recipe, Mapping):
        return recipe
    if not isinstance(recipe, str | os.PathLike):
        raise RecipeError(f"recipe: a file or a mapping, not {type(recipe).__name__}")
    return Path(recipe)


@spoken_in_python
def merge_recipe(
    recipe: Recipe,
    out: PathLike,
    *,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    link: bool = False,
    folder: PathLike | None = None,
    stage: Stage | None = None,
) -> MergeReport:
    """Merge models by a recipe into a folder; ``suture merge`` from Python.

    Args:
        recipe: a file, also mergekit's or a ``suture.json``; or what stands in one.
        out: the folder to write.
        overwrite: as for ``save``, as are ``resume``, ``threads``, ``allow_nonfinite``, ``link``
            and ``stage``.
        resume: see there.
        threads: see there.
        allow_nonfinite: see there.
        link: see there.
        folder: where relative paths start; default the file's folder, or the current one.
        stage: see there.

    Returns:
        What was written and what it cost: fingerprint, bytes, seconds, write-back loss, facts.

    Raises:
        SutureError: the recipe, an input or the output is at fault; all problems at once.

    Examples:
        >>> import suture
        >>> suture.merge_recipe({"method": "tis", "models": {"a": "nowhere"}}, "out")
        Traceback (most recent call last):
        suture.errors.RecipeError: 3 problems:
          - method: no merge method 'tis'; did you mean 'ties'?
          - base: ties works on differences to a base; name one
          - nowhere: no such file or folder (looked for ...nowhere)
    """
    return MERGE(
        _source(recipe), Path(out), folder=_place(folder),
        progress=progress_of(stage), overwrite=overwrite,
        resume=resume, threads=threads, allow_nonfinite=allow_nonfinite, link=link,
    )  # fmt: skip


run_recipe = merge_recipe
"""The name of ``merge_recipe`` before there was one list of verbs."""


@spoken_in_python
def localize_recipe(
    recipe: Recipe,
    out: PathLike,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    restricted: bool = False,
    values: bool = False,
    folder: PathLike | None = None,
    say: Say = _quiet,
) -> dict[str, Any]:
    """Find the entries that carry skills: a folder of masks; ``suture localize`` from Python.

    Args:
        recipe: a file, or what stands in it: base, models, rule, density.
        out: the folder to write.
        overwrite: replace an older folder of masks.
        threads: default every core; changes no bit.
        restricted: mark the masks: neither they nor what is made with them may be passed on.
        values: write the marked weights, too: grafts, which stitch without their models.
        folder: where relative paths start; default the file's folder, or the current one.
        say: is told how far it is.

    Returns:
        What ``localize.json`` holds: recipe, fingerprints, counts and shares by layer and role.

    Raises:
        SutureError: the recipe, an input or the output is at fault; all problems at once.

    Examples:
        >>> import numpy as np, suture, tempfile
        >>> place = tempfile.TemporaryDirectory()
        >>> at = {name: f"{place.name}/{name}" for name in ("base", "math", "masks")}
        >>> for name, value in (("base", 0), ("math", 1)):
        ...     model = {"layers.0.mlp.weight": np.full((2, 2), value, np.float32)}
        ...     _ = suture.save(model, at[name])
        >>> recipe = {"base": at["base"], "models": {"math": at["math"]}, "density": 0.5}
        >>> found = suture.localize_recipe(recipe, at["masks"])
        >>> suture.Mask.load(f"{at['masks']}/math.safetensors").count
        2
        >>> place.cleanup()
    """
    return LOCALIZE(_source(recipe), Path(out), folder=_place(folder), progress=Progress(say=say),
                    overwrite=overwrite, threads=threads, restricted=restricted,
                    values=values)  # fmt: skip


@spoken_in_python
def finetune(
    recipe: Recipe,
    out: PathLike,
    *,
    overwrite: bool = False,
    resume: bool = True,
    device: str | None = None,
    restricted: bool = False,
    folder: PathLike | None = None,
    say: Say = _quiet,
) -> FinetuneReport:
    """Fine-tune a model by a recipe into a folder; ``suture finetune`` from Python.

    Args:
        recipe: a file, or what stands in it: base, data, strategy (one of ``STRATEGIES``).
        out: the folder to write.
        overwrite: replace an older output of Suture, in one step, at the end.
        resume: go on with what an interrupted run left.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; overrides the recipe's.
        restricted: mark the output: neither it nor what is made with it may be passed on.
        folder: where relative paths start; default the file's folder, or the current one.
        say: is told what happens.

    Returns:
        Losses (nats), metrics with 95 % intervals, steps, seconds, fingerprint.

    Raises:
        SutureError: the recipe, an input or the output is at fault; all problems at once.

    Examples:
        >>> import suture
        >>> suture.finetune({"base": "nowhere", "strategy": "lroa"}, "out")
        Traceback (most recent call last):
        suture.errors.RecipeError: ...
    """
    return FINETUNE(_source(recipe), Path(out), folder=_place(folder),
                    progress=Progress(say=say), overwrite=overwrite, resume=resume,
                   device=device, restricted=restricted)  # fmt: skip


@spoken_in_python
def realign(
    recipe: Recipe,
    out: PathLike,
    *,
    overwrite: bool = False,
    resume: bool = True,
    device: str | None = None,
    threads: int | None = None,
    folder: PathLike | None = None,
    say: Say = _quiet,
) -> RealignReport:
    """Put safety that fine-tuning took away back into a model; ``suture realign`` from Python.

    Args:
        recipe: a file, or what stands in it: aligned, models, method (one of ``REALIGNERS``).
        out: the folder to write.
        overwrite: as for ``finetune``, as are ``resume``, ``device`` and ``say``.
        resume: see there.
        device: see there.
        threads: default every core.
        folder: where relative paths start; default the file's folder, or the current one.
        say: see there.

    Returns:
        Metrics before and after with 95 % intervals, masks by layer and role, fingerprint.

    Raises:
        SutureError: the recipe, an input or the output is at fault; all problems at once.

    Examples:
        >>> import suture
        >>> suture.realign({"aligned": "nowhere", "method": "somv"}, "out")
        Traceback (most recent call last):
        suture.errors.RecipeError: ...
    """
    return REALIGN(_source(recipe), Path(out), folder=_place(folder),
                    progress=Progress(say=say), overwrite=overwrite, resume=resume,
                   device=device, threads=threads)  # fmt: skip


@spoken_in_python
def audit(
    recipe: Recipe,
    out: PathLike,
    *,
    overwrite: bool = False,
    resume: bool = True,
    device: str | None = None,
    threads: int | None = None,
    folder: PathLike | None = None,
    say: Say = _quiet,
) -> dict[str, Any]:
    """Find out where the safety of a model lives; ``suture audit`` from Python.

    Args:
        recipe: a file, or what stands in it: models, rows by language, shares.
        out: the folder of cells and results.
        overwrite: as for ``finetune``, as are ``resume``, ``device`` and ``say``.
        resume: see there.
        device: see there.
        threads: default every core.
        folder: where relative paths start; default the file's folder, or the current one.
        say: see there.

    Returns:
        What ``audit.json`` holds: every share with its 95 % interval, verdicts, notes.

    Raises:
        SutureError: the recipe, an input or the output is at fault; all problems at once.

    Examples:
        >>> import suture
        >>> suture.audit({"aligned": "nowhere"}, "out")
        Traceback (most recent call last):
        suture.errors.RecipeError: ...
    """
    return AUDIT(_source(recipe), Path(out), folder=_place(folder),
                    progress=Progress(say=say), overwrite=overwrite, resume=resume,
                   device=device, threads=threads)  # fmt: skip


@spoken_in_python
def bench(
    recipe: Recipe,
    out: PathLike,
    *,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
    folder: PathLike | None = None,
    say: Say = _quiet,
) -> dict[str, Any]:
    """Compare fine-tuning strategies by task arithmetic; ``suture bench`` from Python.

    Interrupted, the same call goes on.

    Args:
        recipe: a file, or what stands in it: base, tasks, strategies, seeds.
        out: the folder of cells and tables.
        overwrite: remove what an older benchmark left there, and begin.
        resume: go on with what an interrupted run left.
        threads: of torch; as they are without it.
        folder: where relative paths start; default the file's folder, or the current one.
        say: is told of every cell, and how long the rest will take.

    Returns:
        What ``results.json`` holds: accuracies in [0, 1] with 95 % intervals, claims.

    Raises:
        SutureError: the recipe, a package, a file or the output is at fault.

    Examples:
        >>> import suture
        >>> suture.bench({"strategies": []}, "out")
        Traceback (most recent call last):
        suture.errors.RecipeError: ...
    """
    return BENCH(_source(recipe), Path(out), folder=_place(folder), progress=Progress(say=say),
                 overwrite=overwrite, resume=resume, threads=threads)  # fmt: skip


@spoken_in_python
def analyze(
    recipe: Recipe, out: PathLike, *, overwrite: bool = False, threads: int | None = None,
    folder: PathLike | None = None,
) -> Analysis:  # fmt: skip
    """Look at several task vectors at once; ``suture analyze`` from Python.

    Args:
        recipe: a file, or what stands in it: base, models, analyses.
        out: the folder to write.
        overwrite: replace an older analysis, at the end.
        threads: default every core; changes no number.
        folder: where relative paths start; default the file's folder, or the current one.

    Returns:
        What ``analysis.json`` holds: norms, cosines, conflicts, overlaps beside chance, bases.

    Raises:
        SutureError: the recipe, an input or the output is at fault; all problems at once.

    Examples:
        >>> import numpy as np, suture, tempfile
        >>> place = tempfile.TemporaryDirectory()
        >>> at = {name: f"{place.name}/{name}" for name in ("base", "math", "code", "look")}
        >>> for name, value in (("base", [0, 0]), ("math", [1, 0]), ("code", [0, 2])):
        ...     model = {"layers.0.mlp.weight": np.array([value], np.float32)}
        ...     _ = suture.save(model, at[name])
        >>> recipe = {"base": at["base"], "models": {n: at[n] for n in ("math", "code")},
        ...           "analyses": ["geometry"]}
        >>> found = suture.analyze(recipe, at["look"]).to_dict()
        >>> found["geometry"]["cosine"]
        ((1.0, 0.0), (0.0, 1.0))
        >>> place.cleanup()
    """
    return ANALYZE(_source(recipe), Path(out), folder=_place(folder), overwrite=overwrite,
                   threads=threads)  # fmt: skip


@spoken_in_python
def report(
    folder: PathLike,
    out: PathLike,
    *,
    overwrite: bool = False,
    images: PathLike | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    """Write what a folder holds as one HTML page that works offline; ``suture report``.

    Args:
        folder: where results, merges and analyses lie.
        out: the HTML file.
        overwrite: replace an older file of that name.
        images: a folder for each figure as SVG and PNG.
        title: the heading.

    Returns:
        How many files and figures it shows, its size in bytes, notes on what was left out.

    Raises:
        RecipeError: the folder holds nothing to show.
        OutputError: the page or an image cannot be written, or is there already.
        MissingExtraError: what draws is not installed.

    Examples:
        >>> import suture
        >>> suture.report("nowhere", "page.html")
        Traceback (most recent call last):
        suture.errors.RecipeError: nowhere: ...
    """
    from suture.verbs.report.run import write_page

    return write_page(Path(folder), Path(out), images=None if images is None else Path(images),
                      title=title, overwrite=overwrite)  # fmt: skip


@spoken_in_python
def evaluate(
    models: Model | Sequence[Model] | Mapping[str, Model],
    suite: Recipe,
    out: PathLike | None = None,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    resume: bool = True,
    device: str = "auto",
    limit: int = 0,
    folder: PathLike | None = None,
    say: Say = _quiet,
) -> list[SuiteResult]:
    """Ask models what a suite asks; ``suture eval`` from Python.

    Models in memory go into the network as they are; their configuration and tokenizer lie in a
    temporary folder meanwhile.

    Args:
        models: one or several, as for ``open``; by name to call them so.
        suite: a file, or what stands in it: evaluations (of ``EVALS``), data, options.
        out: a folder, or a ``.json`` file for one model; by default nothing is written.
        tokenizer: of models in memory that have none: a folder, or a tokenizer of transformers.
        overwrite: replace results of other models or suites.
        resume: keep what a result answers already.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        limit: only the first so many rows of each evaluation; 0 for what the suite says.
        folder: where relative paths of the suite start; default the file's folder, or the current
            one, where those of ``models`` and ``out`` always start.
        say: is told what is there already.

    Returns:
        A result for each model, in their order: metrics with n and 95 % interval, rows' numbers.

    Raises:
        SutureError: the suite, its rows, a model or the output is at fault; all problems at once.

    Examples:
        >>> import suture
        >>> suture.evaluate("nowhere", {"name": "quick", "evaluations": {}})
        Traceback (most recent call last):
        suture.errors.RecipeError: ...
    """
    from suture.verbs.evaluate.plan import Options, plan_suite
    from suture.verbs.evaluate.run import execute

    with tempfile.TemporaryDirectory(prefix="suture-eval-") as place:
        asked = [
            _asked(name, model, tokenizer, Path(place) / str(number))
            for number, (name, model) in enumerate(_several(models))
        ]
        how = Options(overwrite=overwrite, resume=resume, device=device, limit=limit)
        place_of_results = None if out is None else Path(out)
        plan = plan_suite(asked, _source(suite), place_of_results, how, _place(folder))
        return execute(plan, Progress(say=say))


def _several(models: Any) -> list[tuple[str | None, Any]]:
    """The models that are to be asked, each with what it shall be called, if that is said."""
    if isinstance(models, Mapping) and not isinstance(models, Checkpoint | Merged) and not any(
        hasattr(value, "dtype") and hasattr(value, "shape") for value in models.values()
    ):  # fmt: skip
        return list(models.items())
    alone = isinstance(models, str | os.PathLike | Mapping) or is_module(models)
    return [(None, models)] if alone else [(None, model) for model in models]


def _asked(
    name: str | None, model: Any, tokenizer: Any, folder: Path
) -> str | os.PathLike[str] | Checkpoint:
    """A model as suites take one; of a model in memory the small files are put into a folder."""
    if isinstance(model, str | os.PathLike) and name is None:
        return model
    if isinstance(model, Merged):
        from suture.verbs.merge import leave_one_out

        held = leave_one_out.prepare(model.plan, name or _named_after(model), folder)
        leave_one_out.fill(held, model.plan)
        _give(tokenizer, folder)
        _check_askable(held)
        return held
    checkpoint = copy.copy(opened(model))
    checkpoint.label = name or checkpoint.label
    if not checkpoint.in_memory:
        return checkpoint
    folder.mkdir(parents=True)
    if checkpoint.config:
        (folder / "config.json").write_text(json.dumps(checkpoint.config), encoding="utf-8")
    carry([checkpoint], folder)
    _give(tokenizer, folder)
    checkpoint.path = checkpoint.folder = folder
    _save_head(model, folder)
    _check_askable(checkpoint)
    return checkpoint


def _check_askable(checkpoint: Checkpoint) -> None:
    """Refuse a model in memory of which it is not known what it computes, or on which tokens."""
    from suture.training.models import reads_images

    if not checkpoint.config:
        raise RecipeError(f"{checkpoint.label}: has no configuration; open it with "
                          "`suture.open(model, config=...)`, or as its module")  # fmt: skip
    if not reads_images(checkpoint.config) and not tokenizer_files(checkpoint.folder):
        raise RecipeError(f"{checkpoint.label}: has no tokenizer; give `tokenizer=`, a folder or a "
                          "tokenizer of transformers")  # fmt: skip


def _named_after(merged: Merged) -> str:
    return f"{merged.recipe.method.name}-of-{'-'.join(merged.recipe.models)}"


def _give(tokenizer: Any, folder: Path) -> None:
    """Put the tokenizer that was given into a folder."""
    if tokenizer is None:
        return
    if isinstance(tokenizer, str | os.PathLike):
        from suture.training.models import load_tokenizer

        tokenizer = load_tokenizer(Path(tokenizer))
    if not hasattr(tokenizer, "save_pretrained"):
        raise RecipeError("tokenizer: a folder, or a tokenizer of transformers, not "
                          f"{type(tokenizer).__name__}")  # fmt: skip
    tokenizer.save_pretrained(str(folder))


def _save_head(model: Any, folder: Path) -> None:
    """Put the head of a classifier beside its encoder, where evaluations look for it."""
    if is_module(model):
        from suture.training.models import Classifier, save_head

        if isinstance(model, Classifier):
            save_head(model.head(), folder / "head.safetensors")


@spoken_in_python
def compare(
    base: SuiteResult | PathLike,
    experts: Sequence[SuiteResult | PathLike] = (),
    edits: Sequence[SuiteResult | PathLike] | SuiteResult | PathLike = (),
    gate: PathLike | Sequence[str] | None = None,
    *,
    names: Mapping[int, str] | None = None,
) -> Comparison:
    """Put results of one suite side by side, and hold edits against rules; ``suture compare``.

    Args:
        base: the result of what the others were made of, from ``evaluate``, or its file.
        experts: models that edits are to keep up with.
        edits: what is judged.
        gate: rules such as ``"accuracy >= -0.01"``, or a file of them.
        names: other names for results than their models', by ``id``; for models of one name.

    Returns:
        Every metric of every model, differences to the base with paired 95 % intervals, verdicts;
        ``held`` says whether no rule is broken.

    Raises:
        SutureError: not the same was asked of all, or a rule is none; all problems at once.

    Examples:
        >>> import suture
        >>> import numpy as np
        >>> from suture.evals.results import Evaluation, Scores, SuiteResult
        >>> def result(model, hits):
        ...     values = np.array(hits, float)
        ...     scores = Scores("accuracy", "share", "higher", (0, 1, 2, 3), values, np.ones(4))
        ...     quick = Evaluation("quick", "accuracy", {}, "", False, (scores,))
        ...     return SuiteResult(model, model, "", "mine", "", {"quick": quick}, ("quick",), {})
        >>> base, edit = result("base", [1, 1, 0, 0]), result("edit", [1, 1, 1, 0])
        >>> found = suture.compare(base, edits=edit, gate=["quick.accuracy >= 0.9"])
        >>> found.lines[0].differences["edit"].value, found.held
        (0.25, False)
    """
    from suture.evals.results import read_result
    from suture.verbs.compare import run as comparison

    def read(result: Any) -> SuiteResult:
        is_path = isinstance(result, str | os.PathLike)
        return read_result(Path(result)) if is_path else result

    judged = [edits] if isinstance(edits, str | os.PathLike) or hasattr(edits, "metrics") \
        or not isinstance(edits, Sequence) else edits  # fmt: skip
    rules = Path(gate) if isinstance(gate, str | os.PathLike) else gate
    return comparison.compare(read(base), [read(e) for e in experts], [read(e) for e in judged],
                              rules, names=names)  # fmt: skip


@spoken_in_python
def blame(
    recipe: Recipe,
    suite: Recipe,
    base: SuiteResult,
    experts: Sequence[SuiteResult],
    edit: SuiteResult,
    gate: PathLike | Sequence[str],
    out: PathLike | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    folder: PathLike | None = None,
) -> Blame:
    """Leave out every expert of a merge in turn and ask which broken rules then hold.

    Args:
        recipe: what made the edit: a recipe, or the ``suture.json`` beside it.
        suite: what was asked of all.
        base: as for ``compare``, as are ``experts``, ``edit`` and ``gate``.
        experts: see there.
        edit: the merge that is judged.
        gate: the rules.
        out: a folder for the results of the candidates; by default they are not kept.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        overwrite: replace results of candidates of another recipe.
        folder: where relative paths of a recipe and a suite start that are mappings.

    Returns:
        For each expert: rules repaired and broken without it, or why there is no such merge.

    Raises:
        SutureError: the recipe, the suite or a result is at fault; all problems at once.

    Examples:
        >>> import suture
        >>> suture.blame("merge.yaml", "suite.yaml", None, [], None, [], devices="cpu")
        Traceback (most recent call last):
        suture.errors.RecipeError: blame: no keyword 'devices'; did you mean 'device'?
    """
    from suture.verbs.compare import blame as work

    rules = Path(gate) if isinstance(gate, str | os.PathLike) else gate
    return work.blame(_source(recipe), _source(suite), base, experts, edit, rules,
                      None if out is None else Path(out), device=device,
                      overwrite=overwrite, folder=_place(folder))  # fmt: skip


@spoken_in_python
def patch_make(
    base: Model,
    tuned: Model,
    out: PathLike,
    *,
    mask: Mask | PathLike | None = None,
    density: float | None = None,
    scope: str = "global",
    restricted: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
) -> StoredPatch:
    """Write the entries in which two models differ, all or some, as a patch file.

    Without ``mask`` and ``density`` it has every entry whose bits differ: applied to the base, it
    gives the tuned model, bit for bit.

    Args:
        base: the model that the patch will be put on, as for ``open``.
        tuned: what it makes of it.
        out: ``NAME.patch.safetensors``.
        mask: only its entries are taken; a ``Mask``, or its file.
        density: the share of entries to take, those that moved most, in (0, 1].
        scope: where entries compete for the density: ``global``, ``layer`` or ``tensor``.
        restricted: mark it: neither it nor what is made with it may be passed on.
        overwrite: replace an older file.
        threads: default every core; changes no byte.

    Raises:
        SutureError: the models do not fit, the parameters are wrong, or the output cannot be
            written; all problems at once.

    Examples:
        >>> import numpy as np, suture, tempfile
        >>> place = tempfile.TemporaryDirectory()
        >>> base = {"layers.0.mlp.weight": np.zeros(4, np.float32)}
        >>> tuned = {"layers.0.mlp.weight": np.array([0, 1, 0, 2], np.float32)}
        >>> patch = suture.patch_make(base, tuned, f"{place.name}/math.patch.safetensors")
        >>> _ = suture.patch_apply(base, patch, f"{place.name}/patched")
        >>> suture.open(f"{place.name}/patched")["layers.0.mlp.weight"].tolist()
        [0.0, 1.0, 0.0, 2.0]
        >>> undo = f"{place.name}/patched/undo.patch.safetensors"
        >>> _ = suture.patch_revert(f"{place.name}/patched", undo, f"{place.name}/back")
        >>> suture.open(f"{place.name}/back")["layers.0.mlp.weight"].tolist()
        [0.0, 0.0, 0.0, 0.0]
        >>> place.cleanup()
    """
    from suture.verbs.patch import run as patching

    start = opened(base)
    chosen = mask if isinstance(mask, Mask) or mask is None else Mask.load(mask)
    return patching.make_patch(
        start, opened(tuned, base=start), out, mask=chosen, density=density, scope=scope,
        restricted=restricted, overwrite=overwrite, threads=threads,
    )  # fmt: skip


def _patches(patches: Any) -> list[StoredPatch]:
    from suture.verbs.patch.run import load_patches

    alone = isinstance(patches, str | os.PathLike | Patch)
    return [p if isinstance(p, StoredPatch) else load_patches([Path(p)])[0]
            for p in ([patches] if alone else patches)]  # fmt: skip


@spoken_in_python
def patch_apply(
    model: Model,
    patches: StoredPatch | PathLike | Sequence[StoredPatch | PathLike],
    out: PathLike,
    *,
    scale: float = 1.0,
    on_overlap: str = "error",
    force: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    threads: int | None = None,
) -> PatchReport:
    """Put patches on their base and write the folder, with a patch that undoes it.

    Args:
        model: the base of the patches, as for ``open``.
        patches: one or several, open or as files.
        out: the folder to write.
        scale: factor on the deltas; other than 1 it is arithmetic, in float32 with one rounding.
        on_overlap: ``error``, ``last`` (the last patch wins) or ``mean`` (of the deltas).
        force: let the model be another than the base; the deltas are then added, and it is noted.
        overwrite: replace an older output of Suture, in one step, at the end.
        resume: go on with what an interrupted run left.
        threads: default every core; changes no byte.

    Raises:
        SutureError: what is wrong, with nothing written.

    Examples:
        See ``patch_make``, which makes one, puts it on and takes it off again.

        >>> import suture
        >>> suture.patch_apply({}, [], "out")
        Traceback (most recent call last):
        suture.errors.RecipeError: patches: name at least one
    """
    from suture.verbs.patch import run as patching

    found = _patches(patches)
    if not found:
        raise RecipeError("patches: name at least one")
    return patching.apply_patches(
        opened(model), found, out, scale=scale, on_overlap=on_overlap, force=force,
        overwrite=overwrite, resume=resume, threads=threads,
    )  # fmt: skip


@spoken_in_python
def patch_revert(
    model: Model,
    patch: StoredPatch | PathLike,
    out: PathLike,
    *,
    force: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
) -> PatchReport:
    """Take a patch off a model again, bit for bit, and write the folder.

    Args:
        model: the model with the patch on it, as for ``open``.
        patch: the patch, or the undo patch beside the patched model; open or as a file.
        out: the folder to write.
        force: let the model be another; the deltas are then subtracted, and it is noted.
        overwrite: replace an older output of Suture, in one step, at the end.
        threads: default every core; changes no byte.

    Raises:
        SutureError: what is wrong, with nothing written.

    Examples:
        See ``patch_make``, which makes one, puts it on and takes it off again.

        >>> import suture
        >>> suture.patch_revert({}, "nowhere.patch.safetensors", "out")
        Traceback (most recent call last):
        suture.errors.CheckpointError: ...nowhere.patch.safetensors: No such file or directory
    """
    from suture.verbs.patch import run as patching

    (found,) = _patches(patch)
    return patching.revert_patch(opened(model), found, out, force=force, overwrite=overwrite,
                                 threads=threads)  # fmt: skip


@spoken_in_python
def extract_lora(
    base: Model,
    models: Model | Sequence[Model],
    out: PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    weights: Sequence[float] | None = None,
    save_others: bool = False,
    dtype: str = "float32",
    stage: Stage | None = None,
) -> Extracted:
    """Write the LoRA adapter that is nearest to ``sum w_i (model_i - base)``, and tell the error.

    Args:
        base: what the adapter will be put on, as for ``open``.
        models: a tuned model, or several; or adapters of the base, which are added up.
        out: the folder to write, as PEFT reads it.
        rank: of every module; without it adapters keep all their ranks.
        energy: keep only as many ranks of each module as hold this share of its squared norm.
        weights: the factor of each model; by default 1.
        save_others: put what has no low rank, such as norms and biases, into the adapter whole.
        dtype: of the factors.
        stage: is told when reading begins, and of how many bytes.

    Returns:
        Rank and relative error (Frobenius) of each module, and of the whole difference.

    Raises:
        SutureError: a model does not fit the base, or the folder cannot be written; all problems
            at once.

    Examples:
        >>> import numpy as np, suture, tempfile
        >>> place = tempfile.TemporaryDirectory()
        >>> name = "model.layers.0.self_attn.q_proj.weight"
        >>> base = {name: np.zeros((4, 4), np.float32)}
        >>> found = suture.extract_lora(base, {name: np.ones((4, 4), np.float32)},
        ...                             f"{place.name}/lora", rank=1)
        >>> round(found.error, 6)
        0.0
        >>> place.cleanup()
    """
    from suture.verbs.extract_lora import run as lowrank

    start = opened(base)
    alone = isinstance(models, str | os.PathLike | Mapping) or is_module(models)
    several: Any = [models] if alone else models
    tuned = [opened(model, base=start) for model in several]
    return lowrank.extract_lora(start, tuned, out, rank=rank, energy=energy, weights=weights,
                                save_others=save_others, dtype=dtype, stage=stage)  # fmt: skip


make_patch, apply_patches, revert_patch = patch_make, patch_apply, patch_revert
"""What these verbs were called before they had the names of their commands."""

__all__ = [
    "VERBS", "analyze", "apply_patches", "audit", "bench", "blame", "compare", "diff", "evaluate",
    "extract_lora", "finetune", "inspect", "localize", "localize_recipe", "make_patch", "measure",
    "merge", "merge_recipe", "open", "patch_apply", "patch_make", "patch_revert", "realign",
    "report", "revert_patch", "run_recipe", "save",
]  # fmt: skip


def _late(module: str, name: str) -> Callable[..., Any]:
    """Return a function that is imported when it is called."""

    def called(*args: Any, **options: Any) -> Any:
        return getattr(import_module(module), name)(*args, **options)

    return called


# Names of before there was one list, kept for one release.
vars(finetune)["load_tuned"] = _late("suture.training.load", "load_tuned")
vars(analyze)["analysis"] = analyze
