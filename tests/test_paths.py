"""Relative paths start in one folder, the same for every verb, and are joined to it once.

Each verb is called in five ways from a project whose recipe names everything by relative paths. The
current folder, and the folder in which a path joined twice would end, hold decoys of every file.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import adapting
import refusing
import suture
import tiny_model
from suture import evaluate
from suture.edits.mask import localize
from suture.errors import Problems, SutureError
from suture.runs.verb import Verb
from suture.schema.paths import place_of, recipe_folder, shown
from suture.training.models import Head, save_head, save_model
from suture.verbs import VERBS as VERBS_OF
from suture.verbs.analyze import VERB as analysis
from suture.verbs.analyze.plan import make_plan as plan_analysis
from suture.verbs.audit.plan import make_plan as plan_audit
from suture.verbs.bench import VERB as bench
from suture.verbs.bench.recipe import read_bench
from suture.verbs.compare.blame import blame
from suture.verbs.evaluate.plan import plan_suite
from suture.verbs.evaluate.recipe import read_suite
from suture.verbs.finetune import VERB as finetune
from suture.verbs.finetune.plan import make_plan as plan_finetune
from suture.verbs.finetune.recipe import read_finetune
from suture.verbs.finetune.work import workshop
from suture.verbs.localize.plan import make_plan as plan_regions
from suture.verbs.merge import VERB as merge
from suture.verbs.merge.documents import read_recipe
from suture.verbs.merge.plan import make_plan
from suture.verbs.realign import VERB as realign
from suture.verbs.realign.recipe import read_realign

ROOT = Path(suture.__file__).parent
Source = Path | Mapping[str, Any]
Call = Callable[[Path, Source, Path, Path | None], Any]
"""A verb: from a recipe, an output and ``folder`` to what can be compared."""


# -- the project -----------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``project``, and decoys beside and inside of it; nobody may change them."""
    where = tmp_path_factory.mktemp("paths")
    project = where / "project"
    tiny_model.workshop(project / "models")
    for name in ("one", "two"):
        vector = suture.open(project / "models" / name) - suture.open(project / "models/base")
        mask = localize(vector, "magnitude", density=0.3)
        mask.save(project / "masks" / f"{name}.safetensors")
        localize(vector, "random", density=0.3).save(project / "again" / f"{name}.safetensors")
    rows = [{"text": r.text, "label": r.label} for r in tiny_model.rows()]
    write_rows(project / "rows/train.jsonl", rows[:24])
    write_rows(project / "rows/held.jsonl", rows[24:])
    shutil.move(project / "models/head.safetensors", project / "rows/head.safetensors")
    for seed, name in enumerate(("base", "aligned", "tuned", "other")):
        save_model(refusing.llama(seed), refusing.tokenizer(), project / "chat" / name)
    tuned = suture.open(project / "chat/tuned") - suture.open(project / "chat/base")
    localize(tuned, "magnitude", density=0.2).save(project / "masks/safety.safetensors")
    refusing.write_pairs(project / "rows/pairs.jsonl", refusing.pairs())
    answers = [{"prompt": p, "response": f"sure {t}"} for p, t in refusing.prompts(False)]
    write_rows(project / "rows/answers.jsonl", answers)
    tiny_model.folder(project / "judge/encoder", seed=3)
    draw = torch.Generator().manual_seed(1)
    labels = ("answers", "refuses")
    save_head(Head(labels, torch.randn(2, 16, generator=draw), torch.zeros(2)),
              project / "judge/head.safetensors")  # fmt: skip
    adapting.llama(project / "lora/base")
    adapting.adapter(project / "lora/base", project / "lora/adapter")
    suite = {"evaluations": {"fluency": {"kind": "loss", "data": "rows/answers.jsonl", "limit": 4,
                                         "prompt": "prompt", "response": "response"}}}  # fmt: skip
    (project / "suite.yaml").write_text(yaml.safe_dump(suite))
    for name, recipe in RECIPES.items():
        (project / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    decoys = where / "decoys"
    shutil.copytree(project, decoys)
    for path in decoys.rglob("*"):
        if path.is_file():
            path.write_bytes(b"a decoy")
    shutil.copytree(decoys, project / "project")
    for path in list(decoys.iterdir()):
        shutil.move(path, where)
    decoys.rmdir()
    return where


def absolute(value: Any, project: Path) -> Any:
    """A recipe with every path written out."""
    if isinstance(value, Mapping):
        return {k: absolute(v, project) for k, v in value.items()}
    if isinstance(value, list):
        return [absolute(v, project) for v in value]
    if not isinstance(value, str) or value not in PATHS:
        return value
    return "+".join(str(project / part) for part in value.split("+"))


WAYS = ("file", "absolute file", "mapping", "folder", "absolute folder", "written out")


def called(
    way: str, name: str, root: Path, patch: pytest.MonkeyPatch
) -> tuple[Source, Path | None]:
    """The recipe and ``folder`` of one way to call a verb, from the current folder of that way."""
    project = root / "project"
    patch.chdir(project if way == "mapping" else root)
    given = RECIPES[name]
    return {
        "file": (Path("project") / f"{name}.yaml", None),
        "absolute file": (project / f"{name}.yaml", None),
        "mapping": (given, None),
        "folder": (given, Path("project")),
        "absolute folder": (given, project),
        "written out": (absolute(given, project), None),
    }[way]  # fmt: skip


# -- every verb ------------------------------------------------------------------------------------

CLASSES = {n: {"data": "rows/train.jsonl", "head": "rows/head.safetensors", "max_length": 16}
           for n in ("one", "two")}  # fmt: skip
MODELS = {"one": "models/one", "two": "models/two"}
WHOLE: dict[str, Any] = {"exclude": []}
JUDGE = {"encoder": "judge/encoder", "head": "judge/head.safetensors"}
RECIPES: dict[str, dict[str, Any]] = {
    "merge": {
        "base": "models/base", "models": MODELS, "method": "stitch", "space": WHOLE,
        "parameters": {"masks": {n: f"masks/{n}.safetensors" for n in MODELS}},
    },
    "protected": {
        "base": "models/base", "models": MODELS, "method": "task_arithmetic",
        "space": WHOLE, "protect": {"model": "one", "mask": "masks/one.safetensors"},
        "tokenizer": "models/two",
    },
    "stages": {
        "models": {"first": "both", "two": "models/two"}, "method": "linear",
        "stages": {"both": {"base": "models/base", "models": MODELS, "method": "stitch",
                            "space": WHOLE,
                            "parameters": {"masks": {n: f"masks/{n}.safetensors" for n in MODELS}}}},
    },
    "adapters": {"models": {"plain": "lora/base", "lora": "lora/base+lora/adapter"},
                 "method": "linear"},
    "mergekit": {
        "merge_method": "task_arithmetic", "base_model": "models/base", "dtype": "float32",
        "models": [{"model": p, "parameters": {"weight": 0.5}} for p in MODELS.values()],
    },
    "localize": {
        "base": "models/base", "models": MODELS, "rule": "snip", "density": 0.2, "tasks": CLASSES,
        "without": {"one": "masks/two.safetensors"},
    },
    "finetune": {
        "base": "models/base", "strategy": "masked",
        "parameters": {"mask": "masks/one.safetensors"}, "head": "rows/head.safetensors",
        "data": {"train": "rows/train.jsonl", "validation": "rows/held.jsonl", "limit": 8},
        "training": {"epochs": 1, "batch": 8},
    },
    "realign": {
        "method": "protect", "base": "chat/base", "aligned": "chat/aligned", "ancestor": "trust",
        "models": {"tuned": "chat/tuned"}, "parameters": {"mask": "masks/safety.safetensors"},
        "data": {"train": "rows/pairs.jsonl", "validation": 0.3}, "utility": "rows/answers.jsonl",
    },
    "eval": {
        "reference": "chat/base",
        "decoding": {"max_tokens": 2},
        "evaluations": {
            "drift": {"kind": "drift", "data": "rows/answers.jsonl", "limit": 4},
            "judged": {"kind": "judged", "data": "rows/answers.jsonl", "limit": 4, "judge": JUDGE,
                       "keep": "verdicts.jsonl"},
        },
    },
    "classes": {"evaluations": {"skies": {"kind": "accuracy", "data": "rows/held.jsonl",
                                          "head": "rows/head.safetensors"}}},
    "analyze": {
        "base": "models/base", "models": MODELS, "density": 0.1, "masks": "./masks",
        "same_task": "./again", "tasks": CLASSES, "rows": 8,
        "analyses": ["masks", "function-localization", "diagnostics"],
        "diagnostics": {"merged": "models/two", "rows": 8, "iterations": 1, "directions": 1, "points": 2},
    },
    "bench": {
        "base": "models/base",
        "tasks": [{"name": n, "file": f"rows/{n}.jsonl"} for n in ("train", "held")],
        "strategies": {"masked": {"parameters": {"mask": "masks/one.safetensors"}, "lr": 1e-3}},
        "rows": {"train": 8, "validation": 4, "test": 4, "max_length": 16}, "seeds": [0],
        "training": {"epochs": 1, "batch": 8, "checkpoints": [1]}, "measure": ["addition"],
        "head": "probe",
    },
    "audit": {
        "aligned": "chat/aligned", "attacked": "chat/tuned", "control": "chat/other",
        "languages": ["en"], "onto": {"grown": "chat/other"}, "utility": "suite.yaml",
        "rows": {s: "rows/answers.jsonl" for s in ("probe", "marked", "benign")},
        "useful": {"rows": "rows/answers.jsonl"}, "shares": [0.2],
        "attack": {"train": "rows/answers.jsonl"}, "scores": {"rows": 4},
        "evaluation": {"limit": 4, "max_tokens": 2, "judge": JUDGE},
    },
    "audit-rows": {
        "aligned": "chat/aligned", "attacked": "chat/tuned", "languages": ["en"],
        "rows": {s: "rows/answers.jsonl" for s in ("probe", "marked", "benign")},
        "utility": {"data": "rows/answers.jsonl", "text": "prompt", "limit": 4}, "scores": {"rows": 4},
        "evaluation": {"limit": 4, "max_tokens": 2}, "shares": [0.2],
    },
}  # fmt: skip

PATHS = {word for word in re.findall(r"'([^']*)'", repr(RECIPES)) if re.search(r"/|\.", word)}
"""Every text of the recipes that is a path; all of them have a slash or a point."""


def plain(value: Any, project: Path) -> str:
    """A value as text, whatever the order of its keys, and with paths as seen from the project."""
    text = json.dumps(value, sort_keys=True, default=repr, indent=1)
    return text.replace(f"{project}/", "").replace("./", "")


def merging(project: Path, source: Source, out: Path, folder: Path | None) -> Any:
    return merge(source, out, folder=folder).fingerprint, sorted(p.name for p in out.iterdir())


def localizing(project: Path, source: Source, out: Path, folder: Path | None) -> Any:
    VERBS_OF["localize"](source, out, folder=folder)
    return [suture.Mask.load(out / f"{n}.safetensors").bits for n in MODELS]


def tuning(project: Path, source: Source, out: Path, folder: Path | None) -> Any:
    return finetune(source, out, folder=folder).fingerprint


def realigning(project: Path, source: Source, out: Path, folder: Path | None) -> Any:
    return realign(source, out, folder=folder).fingerprint


def asking(*models: str) -> Call:
    def ask(project: Path, source: Source, out: Path, folder: Path | None) -> Any:
        found = evaluate([project / m for m in models], source, folder=folder)
        return [{n: e.metrics for n, e in one.evaluations.items()} for one in found]

    return ask


def analysing(project: Path, source: Source, out: Path, folder: Path | None) -> Any:
    found = analysis(source, out, folder=folder).to_dict()
    return {k: v for k, v in found.items() if k not in ("request", "seconds")}


def benchmarking(project: Path, source: Source, out: Path, folder: Path | None) -> Any:
    found = bench(source, out, folder=folder)
    return found["lines"]


def auditing(project: Path, source: Source, out: Path, folder: Path | None) -> Any:
    plan = plan_audit(source, out, folder=folder)
    rows = plan.material
    cells = [[dict(r) for _, r in found] for found in (rows.attack, rows.useful)]
    return [plan.recipe.resolved(), cells, [rows.key(side) for side in rows.rows],
            {n: [q.groups, sorted(q.utility)] for n, q in plan.asked.items()},
            {n: c.path for n, c in plan.inputs.items()}]  # fmt: skip


VERBS: dict[str, Call] = {
    **dict.fromkeys(("merge", "protected", "stages", "adapters", "mergekit"), merging),
    "localize": localizing, "finetune": tuning, "realign": realigning,
    "eval": asking("chat/aligned", "chat/tuned"), "classes": asking("models/one"),
    "analyze": analysing, "bench": benchmarking, "audit": auditing, "audit-rows": auditing,
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_verb_reads_the_same_files_however_it_is_called(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file elsewhere, a mapping here, or a mapping with a folder: what comes out is equal."""
    found = {}
    for way in WAYS:
        source, folder = called(way, name, root, monkeypatch)
        out = VERBS[name](root / "project", source, tmp_path / way, folder)
        found[way] = plain(out, root / "project")

    assert {way: one == found["written out"] for way, one in found.items()} == dict.fromkeys(
        WAYS, True
    )


READERS: dict[str, Callable[[Source, Path | None], Any]] = {
    **dict.fromkeys(("merge", "protected", "stages", "adapters", "mergekit"), read_recipe),
    "localize": lambda source, folder: plan_regions(source, Path("none"), folder=folder).recipe,
    "finetune": lambda source, folder: parsed(read_finetune, source, folder),
    "realign": lambda source, folder: parsed(read_realign, source, folder),
    **dict.fromkeys(("eval", "classes"), lambda source, folder: suite_of(source, folder)),
    "analyze": lambda source, folder: plan_analysis(source, folder=folder).request,
    "bench": lambda source, folder: (parsed(read_bench, source, folder).resolved(),
                                     parsed(read_bench, source, folder).folder),
    **dict.fromkeys(("audit", "audit-rows"),
                    lambda source, folder: plan_audit(source, Path("none"), folder=folder).recipe),
}  # fmt: skip
"""From a recipe and ``folder`` to the recipe as it was read, in frozen types."""


def parsed(read: Callable[..., Any], source: Source, folder: Path | None = None) -> Any:
    problems = Problems()
    recipe = read(source, problems, folder)
    problems.raise_if_any()
    return recipe


def suite_of(source: Source, folder: Path | None) -> Any:
    found = parsed(read_suite, source, folder)
    return found.questions, found.folder, found.reference


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_same_value_however_it_is_read(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from a file or a mapping, the frozen recipe is equal, the folder in it included."""
    found = []
    for way in WAYS[:-1]:
        source, folder = called(way, name, root, monkeypatch)
        found.append(READERS[name](source, folder))

    assert all(one == found[0] for one in found)


def test_blame_takes_a_recipe_and_a_suite_as_mappings_with_a_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe, its masks and the rows of the suite are read from the folder; files have their own."""
    project = root / "project"
    recipe = {"base": "chat/base", "models": {"tuned": "chat/tuned", "other": "chat/other"},
              "method": "task_arithmetic",
              "protect": {"model": "tuned", "mask": "masks/safety.safetensors"},
              "space": WHOLE}  # fmt: skip
    suite = yaml.safe_load((project / "suite.yaml").read_text())
    merge(recipe, tmp_path / "merged", folder=project)
    names = [project / "chat/base", project / "chat/tuned", tmp_path / "merged"]
    base, expert, edit = evaluate(names, suite, folder=project)
    monkeypatch.chdir(root)

    found = {}
    for way, how in (("folder", Path("project")), ("absolute", project)):
        found[way] = blame(recipe, suite, base, [expert], edit, ["fluency <= 0.001"], folder=how)
    given = Path("project/suite.yaml")
    named = {**suite, "name": "suite"}
    assert edit.suite_hash == plan_suite(names, named, None, folder=project).suite_hash
    found["suite in a file"] = blame(recipe, given, base, [expert], edit, ["fluency <= 0.001"],
                                     folder=Path("project"))  # fmt: skip

    assert {one.expert for one in found["folder"].without} == {"tuned", "other"}
    assert found["folder"] == found["absolute"] == found["suite in a file"]


ENTRIES = (make_plan, plan_suite, evaluate, blame, Verb.__call__, Verb.plan,
           *(import_module(f"suture.verbs.{name}.plan").make_plan for name in VERBS_OF))  # fmt: skip


@pytest.mark.parametrize(
    "entry", ENTRIES, ids=lambda entry: f"{entry.__module__}.{entry.__qualname__}"
)
def test_every_entry_that_takes_a_mapping_takes_a_folder(entry: Any) -> None:
    """By the same name, and none by default."""
    assert inspect.signature(entry).parameters["folder"].default is None


# -- the rule --------------------------------------------------------------------------------------


def test_a_folder_is_made_absolute_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's folder, the current one, or the one that is given; resolving again changes nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/inner")

    assert recipe_folder(Path("deep/recipe.yaml")) == tmp_path / "deep"
    assert recipe_folder({}) == tmp_path
    assert recipe_folder(Path("deep/recipe.yaml"), Path("other")) == tmp_path / "other"
    assert recipe_folder({}, "deep") == tmp_path / "deep"
    folder = recipe_folder({}, "link")
    assert folder == tmp_path / "deep/inner"
    assert shown(place_of("rows.jsonl", folder)) == "deep/inner/rows.jsonl"
    assert shown(Path("/rows.jsonl")) == "/rows.jsonl"
    once = place_of("../rows.jsonl", folder)
    assert place_of(once, folder) == once
    assert once.resolve() == tmp_path / "deep/rows.jsonl"


def test_home_and_absolute_paths_start_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``~`` is the user's home in every key, ``~nobody`` a folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))

    assert place_of("~/rows.jsonl", Path("/recipes")) == tmp_path / "rows.jsonl"
    assert place_of("/rows.jsonl", Path("/recipes")) == Path("/rows.jsonl")
    assert place_of("~nobody-of-this-name/x", Path("/recipes")) == Path(
        "/recipes/~nobody-of-this-name/x"
    )
    assert place_of("rows.jsonl") == Path("rows.jsonl")
    assert recipe_folder({}, "~/recipes") == (tmp_path / "recipes").resolve()


def test_rows_in_the_home_of_the_user_are_found(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a data set, a head and a mask, where ``~`` was taken for the name of a folder."""
    monkeypatch.setenv("HOME", str(root / "project"))
    given = RECIPES["finetune"]
    found = parsed(read_finetune, {
        **given, "base": "~/models/base", "head": "~/rows/head.safetensors",
        "parameters": {"mask": "~/masks/one.safetensors"},
        "data": {**given["data"], "train": "~/rows/train.jsonl", "validation": 0.5},
    })  # fmt: skip

    assert found.data.train.path == str(root / "project/rows/train.jsonl")
    raw = {**given, "base": "~/models/base", "head": "~/rows/head.safetensors",
           "parameters": {"mask": "~/masks/one.safetensors"},
           "data": {"train": "~/rows/train.jsonl", "validation": "~/rows/held.jsonl"}}  # fmt: skip
    assert plan_finetune(raw, tmp_path / "out").base.path == root / "project/models/base"


def test_paths_that_are_relative_to_the_current_folder_are_not_put_into_a_given_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``folder=`` they start there, and the message names the place that was looked at."""
    monkeypatch.chdir(root)
    raw = {**RECIPES["finetune"], "data": {"train": "project/rows/none.jsonl"}}

    with pytest.raises(SutureError, match="data.train: no file project/project/rows/none.jsonl"):
        plan_finetune(raw, tmp_path / "out", folder=Path("project"))


def test_a_row_file_may_move_while_a_run_is_interrupted(root: Path, tmp_path: Path) -> None:
    """What rows hold is part of a run's key, not where they lie."""
    resumed = []
    for name in ("here", "there"):
        shutil.copytree(root / "project/rows", tmp_path / name)
        raw = absolute(RECIPES["finetune"], root / "project")
        raw["data"] = {"train": str(tmp_path / name / "train.jsonl"), "limit": 8,
                       "validation": str(tmp_path / name / "held.jsonl")}  # fmt: skip
        plan = plan_finetune(raw, tmp_path / "out")
        with pytest.raises(KeyboardInterrupt), workshop(plan, "print") as space:
            resumed.append(space.resumed)
            (space.folder / "train.safetensors").write_bytes(b"a checkpoint")
            raise KeyboardInterrupt

    assert resumed == [False, True]


JOINED = re.compile(r"\b(recipe|suite|request|job|bench|audit|found)\.folder$")
"""What holds the folder of a recipe, where it is joined to something."""
READS = ("recipe.py", "request.py", "recipe_types.py", "mergekit.py", "tasks.py", "protect.py",
         "suite.py", "judges.py", "verdicts.py")  # fmt: skip
"""Modules that read recipes: there ``folder`` is that of the recipe."""
LOADS = {"_packaged", "_check_config", "_model"}
"""Functions of these that look into the folder of a model or a package."""


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_only_one_module_joins_the_folder_of_a_recipe_and_a_path(path: Path) -> None:
    """Everybody else asks ``place_of``; the home of the user is looked up there only."""
    if path.name == "paths.py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    loads = LOADS | ({"_classifier"} if path.name == "judges.py" else set())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in loads]
    inner = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            left = ast.unparse(node.left)
            assert not JOINED.search(left), f"{path.name}:{node.lineno}: {ast.unparse(node)}"
            joins = re.search(r"(^|\.)folder$", left) and path.name in READS
            assert not joins or id(node) in inner, f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and node.attr == "expanduser":
            assert path.name in ("paths.py", "spec.py"), (
                f"{path.name}:{node.lineno}: {ast.unparse(node)}"
            )
