"""A recipe held against its models, rows and output: all problems before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import Checkpoint, refuse_uncomputable
from suture.checkpoints.headers import read_json
from suture.checkpoints.open import open_model
from suture.errors import CheckpointError, OutputError, Problems, RecipeError, SutureError
from suture.runs.ledger import check_cells
from suture.runs.place import Options
from suture.stream.vector import align
from suture.tensors.roles import EVERYTHING, names_in
from suture.tensors.spec import readable
from suture.training.data import Dataset
from suture.training.models import device_named, load_tokenizer, longest_of
from suture.training.rows import TrainingRows as TuneRows
from suture.verbs.audit.recipe import SPARED, Audit, read_audit
from suture.verbs.audit.rows import Material, Questions, questions, read_material, tokens
from suture.verbs.evaluate.plan import Options as SuiteOptions
from suture.verbs.evaluate.plan import Plan as SuitePlan
from suture.verbs.evaluate.plan import is_causal, plan_suite
from suture.verbs.evaluate.recipe import DTYPES
from suture.verbs.finetune.plan import Plan as TunePlan
from suture.verbs.finetune.plan import make_plan as plan_finetune

RECORD = "audit.json"


@dataclass(frozen=True)
class Plan:
    """An audit whose inputs were opened and checked; no weight was read."""

    recipe: Audit
    aligned: Checkpoint
    attacked: Checkpoint | None
    """``None`` where it is trained here."""
    control: Checkpoint | None
    onto: Mapping[str, Checkpoint]
    names: tuple[str, ...]
    """The tensors in which regions lie."""
    material: Material
    probes: Mapping[str, Dataset]
    attack: Dataset | None
    asked: Mapping[str, Questions]
    """By what is patched: ``aligned``, or the name of a derivative."""
    out: Path
    device: str
    options: Options

    @property
    def inputs(self) -> dict[str, Checkpoint]:
        """Every model by what the recipe calls it."""
        found = {"aligned": self.aligned, **{f"onto.{n}": c for n, c in self.onto.items()}}
        for label, checkpoint in (("attacked", self.attacked), ("control", self.control)):
            if checkpoint is not None:
                found[label] = checkpoint
        return found


def make_plan(
    recipe: Path | Mapping[str, Any],
    out: Path,
    options: Options | None = None,
    folder: Path | None = None,
) -> Plan:
    """Read a recipe, open its models, read and tokenise its rows; check all that can be checked.

    Args:
        recipe: a YAML file, or what stands in it.
        out: the folder of cells and results.
        options: how to run.
        folder: where the relative paths of the recipe start; by default the file's folder or the
            current one.

    Raises:
        SutureError: all problems at once.
    """
    options = options or Options()
    problems = Problems()
    found = read_audit(recipe, problems, folder)
    if found is None:
        problems.raise_if_any()
    assert found is not None
    aligned = _opened("aligned", found.aligned, found, None, problems)
    others = {
        label: _opened(label, path, found, aligned, problems)
        for label, path in {
            "attacked": found.attacked, "control": found.control,
            **{f"onto.{n}": p for n, p in found.onto.items()},
        }.items() if path is not None
    }  # fmt: skip
    names: tuple[str, ...] = ()
    if aligned is not None:
        names = names_in(found.space, aligned.specs, "look in", problems)
        for label, other in others.items():
            own = Problems()
            if other is not None:
                align(aligned, other, own, buffers=True)
            with problems.collecting():
                _prefixed(own, label)
    material = read_material(found, problems)
    device = "cpu"
    with problems.collecting():
        device = device_named(options.device or found.device)
    inputs = {k: c for k, c in {"aligned": aligned, **others}.items() if c is not None}
    check_cells(out, "audit", inputs, options, problems)
    asked: dict[str, Questions] = {}
    probes: dict[str, Dataset] = {}
    attack: Dataset | None = None
    complete = all(len(side) == len(found.languages) for side in material.rows.values())
    grounds = {"aligned": aligned, **{n: others[f"onto.{n}"] for n in found.onto}}
    if aligned is not None and complete and not problems:
        opened = {n: c for n, c in grounds.items() if c is not None}
        with problems.collecting():
            asked = _asked(found, material, opened, device, problems)
        with problems.collecting():
            probes, attack = _tokens(found, material, aligned)
        if found.attack is not None:
            with problems.collecting():
                tune_plan(found, aligned, attack, out / "attacked", found.seeds[0], device, None)
    problems.raise_if_any()
    assert aligned is not None
    return Plan(
        found, aligned, others.get("attacked"), others.get("control"),
        {n: c for n, c in grounds.items() if n != "aligned" and c is not None}, names, material,
        probes, attack, asked, out, device, options,
    )  # fmt: skip


def _opened(
    label: str, path: str, recipe: Audit, ground: Checkpoint | None, problems: Problems
) -> Checkpoint | None:
    if not path:
        return None
    try:
        found = open_model(path, recipe.folder, ground)
        refuse_uncomputable(found)
        if label in ("aligned",) or label.startswith("onto."):
            if type(found) is not Checkpoint or not found.path.is_dir() or not found.config:
                raise CheckpointError(f"{path}: a model folder with a config.json is needed")
            if not is_causal(found):
                raise CheckpointError(f"{path}: a causal language model is needed")
    except SutureError as error:
        for line in getattr(error, "problems", (str(error),)):
            problems.add(type(error), f"{label}: {line}")
        return None
    return found


def _prefixed(own: Problems, label: str) -> None:
    """Raise what was noted, saying whose fault it is."""
    try:
        own.raise_if_any()
    except SutureError as error:
        why = "; only a model tuned from the aligned one has its weights changed, and no others"
        told = [f"{label}: {t}{why}" for t in getattr(error, "problems", (str(error),))]
        again = type(error)("\n".join(told))
        again.problems = tuple(told)  # type: ignore[attr-defined]
        raise again from None


def check_finished(plan: Plan, key: str) -> None:
    """Refuse to replace the result of another recipe.

    Raises:
        OutputError: one is there, and ``overwrite`` is not asked for.
    """
    path = plan.out / RECORD
    if not path.is_file() or plan.options.overwrite:
        return
    try:
        known = read_json(path, 64 << 20).get("key")
    except SutureError:
        return  # damaged: it is written anew, out of the cells
    if known != key:
        raise OutputError(f"{plan.out}: holds the audit of another recipe, model or rows; name "
                          "another folder, or add --overwrite")  # fmt: skip


def _asked(
    recipe: Audit, material: Material, grounds: Mapping[str, Checkpoint], device: str,
    problems: Problems,
) -> dict[str, Questions]:  # fmt: skip
    """The questions to every ground, with those of the utility suite."""
    suite: SuitePlan | None = None
    if recipe.utility is not None:
        given = recipe.utility
        with problems.collecting():
            what = given if isinstance(given, Path) else _suite(recipe, given.asked())
            suite = plan_suite(list(grounds.values()), what, None, SuiteOptions(device=device))
    if suite is not None and suite.suite.dtype != DTYPES[0]:
        problems.add(RecipeError, f"utility: stitched models are asked in {DTYPES[0]}, not in "
                                  f"{suite.suite.dtype}")  # fmt: skip
    for name, one in {} if suite is None else dict(suite.asked).items():
        if one.question.line.needs != "language-model" or one.question.line.reference:
            problems.add(
                RecipeError,
                f"utility: {name}: {one.question.kind} cannot be asked of a stitched model alone; "
                "take loss, choice or exact-match",
            )
    found = {}
    for at, (ground, checkpoint) in enumerate(grounds.items()):
        own = Problems()
        runs = {} if suite is None else {
            n: p.run for n, p in suite.subjects[at].prepared.items()
        }  # fmt: skip
        key = "" if suite is None else suite.suite_hash
        found[ground] = questions(recipe, material, checkpoint, own, runs, key)
        with problems.collecting():
            own.raise_if_any()
    return found


def _suite(recipe: Audit, given: Mapping[str, Any]) -> dict[str, Any]:
    """Rows for perplexity, as a suite of one question."""
    chat = recipe.evaluation.decoding.chat
    return {
        "name": "utility",
        "decoding": {"chat": chat and "response" in given},
        "evaluations": {"utility-loss": {"kind": "loss", "too_long": "cut", **given}},
    }


def _tokens(
    recipe: Audit, material: Material, aligned: Checkpoint
) -> tuple[dict[str, Dataset], Dataset | None]:
    tokenizer = load_tokenizer(aligned.folder)
    longest = longest_of(aligned.config, tokenizer)
    probes = {
        language: tokens(rows, recipe, tokenizer, longest, recipe.columns.response)
        for language, rows in material.rows["probe"].items()
    }
    if recipe.useful is not None:
        probes[SPARED] = tokens(material.useful, recipe, tokenizer, longest, recipe.useful.response)
    how = recipe.attack
    if how is None:
        return probes, None
    return probes, tokens(material.attack, recipe, tokenizer, longest, how.response)


def tune_plan(
    recipe: Audit, aligned: Checkpoint, rows: Dataset | None, out: Path, seed: int, device: str,
    mask: Path | None, resume: bool = True,
) -> TunePlan:  # fmt: skip
    """The attack as a fine-tuning run of the entries that a mask allows; all where there is none.

    Raises:
        SutureError: the rows, the training or the output is at fault.
    """
    how = recipe.attack
    assert how is not None
    source: dict[str, Any] = {"path": how.train.path}
    if how.train.split:
        source |= {"split": how.train.split, "config": how.train.config}
    raw = {
        "base": str(aligned.folder.resolve()),
        "strategy": "masked",
        "parameters": {"mask": "dense" if mask is None else str(mask.resolve())},
        "task": "language-model",
        "data": {
            "train": source, "validation": 0, "prompt": recipe.columns.prompt,
            "response": how.response, "format": "prompt", "chat": recipe.evaluation.decoding.chat,
        },
        "training": {**vars(how.training), "seed": seed},
        "output": {"dtype": "float32"},
        "device": device,
    }  # fmt: skip
    options = Options(overwrite=True, resume=resume, device=device, restricted=True)
    found = plan_finetune(raw, out, options)
    assert rows is not None
    empty = Dataset((), (), rows.pad)
    return TunePlan(**{**vars(found), "rows": TuneRows(rows, empty, (), ())})


def describe(plan: Plan) -> dict[str, Any]:
    """What a plan will do, as plain data: how many models are looked at, and what that takes."""
    looks = counts(plan.recipe, plan.attacked is None)
    seeds = len(plan.recipe.seeds)
    answers = {n: q.generations for n, q in plan.asked.items()}
    own = looks["looks"] * seeds * answers["aligned"]
    others = sum((looks["onto"] * seeds + 1) * answers[n] for n in plan.onto)
    entries = sum(plan.aligned.specs[n].numel for n in plan.names)
    notes = [*plan.material.notes, *plan.asked["aligned"].notes]
    if plan.attacked is not None and len(plan.names) < len(EVERYTHING.names(plan.aligned.specs)):
        notes.append(f"{more_looks(plan.recipe)} more looks if the attacked model differs outside "
                     "of `space`, too")  # fmt: skip
    return {
        "aligned": plan.aligned.label,
        "attacked": "trained here" if plan.attacked is None else plan.attacked.label,
        "languages": plan.material.counts(),
        "attack": len(plan.material.attack),
        "score": f"|change| times gradient, rule {plan.recipe.scores.rule}, at "
                 f"{plan.recipe.scores.at}, {plan.recipe.scores.rows} rows a language",
        **({} if plan.recipe.useful is None else {
            "spared": f"{plan.recipe.useful.share:.1%} of the entries, by "
                      f"{len(plan.material.useful)} useful rows",
        }),
        "entries": entries,
        "trainings": looks["trainings"] * seeds,
        "looks": 1 + looks["looks"] * seeds + (looks["onto"] * seeds + 1) * len(plan.onto),
        "generations": own + others + answers["aligned"],
        "memory": readable(4 * plan.aligned.numel * 3) + ", and activations",
        "device": plan.device,
        "output": str(plan.out),
        "notes": notes,
    }  # fmt: skip


def more_looks(recipe: Audit) -> int:
    """Models that are looked at besides where an attack moved tensors in which no region lies."""
    return len({*recipe.shares, recipe.share} & {1.0}) + sum(s < 1 for s in recipe.shares)


def counts(recipe: Audit, trains: bool) -> dict[str, int]:
    """How many models are looked at for one seed, the aligned one left out, and trainings."""
    inner = [s for s in recipe.shares if s < 1]
    controls = len(recipe.controls)
    own = len({*inner, recipe.share} - {1.0})
    several = len(recipe.languages) - 1
    looks = 1 + own * (1 + controls) + len(inner) + several + (several > 0)
    looks += recipe.control is not None
    freezes = 0 if recipe.freeze is None else 1 + len(recipe.freeze.controls)
    return {
        "looks": looks + freezes,
        "onto": 1 + controls,
        "trainings": trains + freezes,
    }


__all__ = [
    "RECORD",
    "Options",
    "Plan",
    "check_finished",
    "counts",
    "describe",
    "make_plan",
    "more_looks",
    "tune_plan",
]  # fmt: skip
