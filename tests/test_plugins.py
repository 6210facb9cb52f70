"""docs/plugins.md is true: its package is built, installed and used; wrong plug-ins are refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

import suture
import toy
from suture import plugins
from suture.edits.importance import RULES
from suture.errors import Problems, RecipeError
from suture.merges.base import Merge, Method, Weight
from suture.merges.table import METHODS
from suture.schema.parameters import Number, Parameter, parameters_of
from suture.schema.settings import settings
from suture.schema.table import Table, slip
from suture.schema.values import PerModel, each
from suture.training.strategies import Strategy
from suture.verbs.merge.documents import read_recipe

PAGE = Path(__file__).parent.parent / "docs" / "plugins.md"
TEXT = PAGE.read_text(encoding="utf-8")
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", TEXT, re.M | re.S))
RUNS = [line for block in re.findall(r"<!-- run -->\n```sh\n(.*?)^```$", TEXT, re.M | re.S)
        for line in block.splitlines()]  # fmt: skip


def install(
    site: Path, points: Mapping[str, Mapping[str, str]], name: str = "suture-median"
) -> None:
    """What ``pip install -e .`` leaves for ``importlib.metadata``: metadata and entry points."""
    info = site / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    groups = (f"[{group}]\n" + "".join(f"{n} = {value}\n" for n, value in these.items())
              for group, these in points.items())  # fmt: skip
    (info / "entry_points.txt").write_text("\n".join(groups))


@pytest.fixture
def package(tmp_path: Path, family: Any) -> Path:
    """The folder of the page, installed, with the models that its recipe names."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    project = tomllib.loads(FILES["pyproject.toml"])["project"]
    install(tmp_path, project["entry-points"], project["name"])
    models = family("bf16")
    for name, path in {"base": models.base_path, "math": models.paths["ada"],
                       "code": models.paths["bob"]}.items():  # fmt: skip
        (tmp_path / name).symlink_to(path)
    return tmp_path


def run(here: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command of the page in its folder, where the package is on the path."""
    words = {"suture": ["-m", "suture"], "pytest": ["-m", "pytest", "-q", "-p", "no:cacheprovider"]}
    arguments = [*words.get(command[0], [command[0]]), *command[1:]]
    source = str(Path(suture.__file__).parent.parent)
    place = os.pathsep.join([str(here), source])
    return subprocess.run(
        [sys.executable, *arguments], cwd=here, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": place, "NO_COLOR": "1"}, check=False,
    )  # fmt: skip


def test_the_page_works_from_its_first_line_to_its_last(package: Path) -> None:
    """Every command and every file of docs/plugins.md, in their order, but for pip."""
    assert [r.split()[0] for r in RUNS] == ["pip", "pytest", "suture", "suture"]
    outputs = {}
    for command in RUNS[1:]:
        done = run(package, *command.split())
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        outputs[command] = done.stdout
    assert "1 passed" in outputs["pytest"]
    shown = outputs["suture methods merge median"]
    for text in ("Median of task vectors", "scale = 1.0", "factor λ on the middle",
                 "what the middle is", ": median, midrange"):  # fmt: skip
        assert text in shown
    done = run(package, "use.py")
    assert done.returncode == 0, done.stderr
    base, math, code = (toy.read(package / n) for n in ("base", "math", "code"))
    for out, factor in (("merged", 0.8), ("midrange", 1.0)):
        found = toy.read(package / out)
        for name in toy.editable(base):
            both = (math[name].double() + code[name].double()) / 2 - base[name].double()
            right = base[name].double() + factor * both
            assert ((found[name].double() - right).abs() <= 2**-7 * right.abs() + 1e-6).all()


def test_a_plug_in_is_listed_and_meant(package: Path) -> None:
    """By ``suture methods``, by did-you-mean, and nothing false is said beside."""
    done = run(package, "suture", "methods")
    assert "Median of task vectors" in done.stdout
    assert not done.stderr
    done = run(package, "suture", "methods", "rule")
    assert "relative" not in done.stdout  # the page's rule has no entry point
    recipe = FILES["recipe.yaml"].replace("method: median", "method: medain")
    (package / "typo.yaml").write_text(recipe)
    done = run(package, "suture", "merge", "typo.yaml", "--out", "typo")
    assert done.returncode == 2
    assert "line 5: method: no merge method 'medain'; did you mean 'median'?" in done.stderr
    assert "problems" not in done.stderr
    recipe = recipe.replace("scale: 0.8", "scle: 0.8")
    (package / "typo.yaml").write_text(recipe)
    done = run(package, "suture", "merge", "typo.yaml", "--out", "typo")
    assert "median has no 'scle'; did you mean 'scale'? (if 'median' is meant)" in done.stderr
    recipe = FILES["recipe.yaml"].replace("0.8", "many")
    (package / "wrong.yaml").write_text(recipe)
    done = run(package, "suture", "merge", "wrong.yaml", "--out", "wrong")
    assert "line 7: parameters.scale: factor λ on the middle; 'many' is not a number" in done.stderr


def test_a_rule_of_a_plug_in_ranks(package: Path, family: Any, tmp_path: Path) -> None:
    """The page's rule, from an entry point to a mask of the right size."""
    install(package, {"suture.rules": {"relative": "suture_relative:RELATIVE"}}, "relative")
    (package / "regions.yaml").write_text(
        "base: ./base\nmodels: {math: ./math}\nrule: relative\ndensity: 0.1\n"
    )
    done = run(package, "suture", "localize", "regions.yaml", "--out", "masks", "--json")
    assert done.returncode == 0, done.stderr
    mask = suture.Mask.load(package / "masks" / "math.safetensors")
    total = sum(toy.read(package / "base")[n].numel() for n in mask.shapes)
    assert mask.count == round(0.1 * total)
    assert run(package, "suture", "methods", "rule", "relative").returncode == 0


WRONG: dict[str, tuple[str, str, str, str]] = {
    "a function": (
        "median", "def median():\n    pass\n", "median",
        "it is a function, not a Method; name an object made by `Method(function, title, ...)`"),
    "another value": ("median", "median = 3\n", "median", "it is of type int, not a Method"),
    "another name": (
        "middle", FILES["suture_median.py"], "MEDIAN",
        "the entry point is called 'middle', its function 'median'; give both the same name"),
    "a name that is taken": (
        "ties", FILES["suture_median.py"].replace("median(", "ties(").replace(" median,", " ties,"),
        "MEDIAN", "Suture has a merge method of this name; choose another"),
    "an import that fails": (
        "median", "import nonesuch\n", "MEDIAN",
        "its import fails: ModuleNotFoundError: No module named 'nonesuch'"),
    "an import that breaks": (
        "median", "raise KeyError('oops')\n", "MEDIAN", "its import fails: KeyError: 'oops'"),
    "an object that is not there": (
        "median", FILES["suture_median.py"], "MEDAIN", "its import fails: AttributeError"),
    "no annotation": (
        "median", FILES["suture_median.py"].replace("scale: float", "scale"), "MEDIAN",
        "parameter 'scale' has no annotation; write float, int, bool, str, Literal[...]"),
    "an annotation that no recipe can give": (
        "median", FILES["suture_median.py"].replace("scale: float", "scale: bytes"), "MEDIAN",
        "parameter 'scale' is annotated as bytes; float, int, bool, str"),
    "an annotation of a name that is not there": (
        "median", FILES["suture_median.py"].replace("scale: float", "scale: 'Flaot'"), "MEDIAN",
        "its annotations cannot be read: name 'Flaot' is not defined"),
    "any number of parameters": (
        "median", FILES["suture_median.py"].replace("scale: float = 1.0, ", "*scale: float, "),
        "MEDIAN", "parameter 'scale' is given by keyword"),
    "a default that is not allowed": (
        "median", FILES["suture_median.py"].replace("scale: float = 1.0", "scale: float = 'one'"),
        "MEDIAN", "parameter 'scale' has a default that it does not allow"),
}  # fmt: skip


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, for this process."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("suture_"):
            del sys.modules[name]


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_plug_in_is_refused_by_name_and_reason(
    what: str, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who names it is told why; the listing warns; all else goes on."""
    name, text, value, reason = WRONG[what]
    (site / "suture_median.py").write_text(text)
    install(site, {"suture.methods": {name: f"suture_median:{value}"}})

    faults = METHODS.faults()

    assert [*faults] == [name]
    assert reason in faults[name]
    start = f"the plug-in {name!r} of suture-median 0.1.0 (suture.methods: suture_median:{value})"
    assert faults[name].startswith(f"{start} cannot be used: ")
    assert list(METHODS) == list(METHODS.own)
    if name != "ties":
        with pytest.raises(RecipeError, match=re.escape(reason)):
            METHODS.find(name)
        with pytest.raises(RecipeError, match=re.escape(f"method: {faults[name]}")):
            read_recipe({"method": name, "models": {"a": "a"}, "base": "b"})
    assert METHODS.find("ties") is METHODS.own["ties"]
    from suture.cli.methods import rows_of

    assert rows_of("merge", None).keys() == METHODS.own.keys()
    assert f"warning: {faults[name]}" in capsys.readouterr().err


def test_two_packages_of_one_name_are_refused(site: Path) -> None:
    """Nobody can say which is meant; the same package twice in the path is one."""
    (site / "suture_median.py").write_text(FILES["suture_median.py"])
    (site / "suture_other.py").write_text(FILES["suture_median.py"])
    install(site, {"suture.methods": {"median": "suture_median:MEDIAN"}})
    assert METHODS.find("median").title == "Median of task vectors"
    assert "median" in METHODS
    install(site, {"suture.methods": {"median": "suture_median:MEDIAN"}}, "again")
    assert METHODS.find("median").title == "Median of task vectors"
    install(site, {"suture.methods": {"median": "suture_other:MEDIAN"}}, "other")
    with pytest.raises(RecipeError, match="there are 2 of this name; uninstall one"):
        METHODS.find("median")
    assert "median" not in METHODS


@pytest.mark.parametrize("name", plugins.__all__)
def test_every_name_for_plug_ins_is_there(name: str) -> None:
    """Also those that are imported when they are asked for, under the name they have at home."""
    value = getattr(plugins, name)
    if isinstance(value, type):
        assert value.__name__ == name


def test_the_groups_of_all_tables_are_declared_and_documented() -> None:
    """pyproject.toml and docs/plugins.md name every group that a table reads."""
    from suture.evals.table import EVALS
    from suture.training.strategies import STRATEGIES
    from suture.verbs.realign.methods import REALIGNERS

    tables: list[Table[Any]] = [METHODS, STRATEGIES, REALIGNERS, RULES, EVALS]
    declared = tomllib.loads((PAGE.parent.parent / "pyproject.toml").read_text())["project"]
    for table in tables:
        assert table.group in declared["entry-points"]
        assert f"`{table.group}`" in TEXT
        assert f"`{table.kind.__name__}`" in TEXT


# -- parameters by plain annotations ---------------------------------------------------------------


def plain(
    share: float, rounds: int = 2, kept: bool = True, word: str = "x",
    way: Literal["a", "b"] = "a", words: tuple[str, ...] = ("q",), maybe: float | None = None,
    meant: Annotated[int, "how many"] = 1, bound: Annotated[int, Number("", 1, 3)] = 2,
    weight: PerModel = each(1.0), own: Weight = each(2.0),
) -> Merge[None]:  # fmt: skip
    """What is computed.

    Args:
        share: the share of
            something.
        word (str): a word

    Raises:
        ValueError: never.
    """
    return Merge(lambda block, state: None)


def test_plain_annotations_are_parameters() -> None:
    """Types, defaults and meanings are read from the signature and the docstring."""
    known = Method(plain, "Plain", "").parameters

    assert known["share"].required
    assert known["share"].doc == "the share of something"
    assert known["word"].doc == "a word"
    assert known["rounds"].doc == "a whole number"
    assert known["meant"].doc == "how many"
    assert known["way"].choices == ("a", "b")
    assert known["weight"].per_model
    assert Method(plain, "Plain", "").equation == "What is computed."


GOOD: dict[str, Any] = {"share": 1, "rounds": 3.0, "kept": False, "word": "", "way": "b",
                        "words": "v", "maybe": None, "meant": 2, "bound": 3}  # fmt: skip
TYPED = {"share": 1.0, "rounds": 3, "kept": False, "word": "", "way": "b", "words": ("v",),
         "maybe": None, "meant": 2, "bound": 3}  # fmt: skip


def test_values_come_in_the_types_of_the_annotations() -> None:
    """A whole float is an int where an int is asked for, one word is a list of one."""
    problems = Problems()
    found = settings(Method(plain, "Plain", ""), GOOD, problems, [("m", {"weight": 3})])

    assert not problems
    assert {k: found[k] for k in TYPED} == TYPED
    assert all(type(found[k]) is type(TYPED[k]) for k in TYPED)
    assert found["weight"].at("w", 1) == (3.0,)
    assert found["own"].at("w", 1) == (2.0,)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("share", None, "parameters.share: missing; the share of something"),
        ("share", "much", "parameters.share: the share of something; 'much' is not a number"),
        ("share", True, "True is not a number"),
        ("share", float("nan"), "nan is not a number of float32"),
        ("rounds", 1.5, "parameters.rounds: a whole number; 1.5 is not a whole number"),
        ("kept", 1, "parameters.kept: true or false; 1 is not true or false"),
        ("word", 3, "parameters.word: a word; 3 is no text"),
        ("way", "c", "parameters.way: 'c' is not one of a, b"),
        ("words", 3, "parameters.words: a list of words; not 3"),
        ("words", ["a", 1], "not ['a', 1]"),
        ("maybe", "x", "parameters.maybe: a number; 'x' is not a number"),
        ("meant", 0.5, "parameters.meant: how many; 0.5 is not a whole number"),
        ("bound", 4, "parameters.bound: got 4"),
        ("shares", 1, "plain has no 'shares'; did you mean 'share'?"),
    ],
)
def test_wrong_values_are_told(key: str, value: object, text: str) -> None:
    """Where, what it means, what came."""
    problems = Problems()
    settings(Method(plain, "Plain", ""), {**GOOD, key: value}, problems, [("m", {})])

    with pytest.raises(RecipeError, match=re.escape(text)):
        problems.raise_if_any()


def test_names_follow_the_kind() -> None:
    """Words of methods are joined by ``_``, those of strategies by ``-``; ``called`` wins."""
    assert Strategy(test_names_follow_the_kind, "", "").name == "test-names-follow-the-kind"
    assert Method(plain, "", "", called="other").name == "other"
    with pytest.raises(RecipeError, match="no \\*, \\*\\* and /"):
        parameters_of(lambda *words: None)
    assert Parameter("x", float, 1.0).problem(2) is None


@pytest.mark.parametrize(
    ("word", "known", "near"),
    [
        ("tise", "ties", True), ("tiess", "ties", True), ("ties", "ties", True), ("tie", "ties", True),
        ("Ties", "ties", True), ("tees", "ties", True), ("medain", "median", True),
        ("medain", "regmean", False), ("zzzz", "ties", False), ("", "ties", False),
        ("ram", "karcher", False), ("dare", "dare_ties", False), ("teis", "ties", True),
    ],
)  # fmt: skip
def test_a_slip_of_the_pen_is_one_letter(word: str, known: str, near: bool) -> None:
    """One wrong, missing or additional letter, or two that are swapped."""
    assert slip(word, known) is near


def test_a_guess_brings_no_false_error() -> None:
    """What holds of the nearest method alone is said with a condition, or not at all."""
    recipe = {"method": "medain", "base": "b", "models": {"a": "a", "c": "c"},
              "parameters": {"scale": 2}}  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe)
    assert str(caught.value).startswith("method: no merge method 'medain'; did you mean")
    with pytest.raises(RecipeError) as caught:
        read_recipe({**recipe, "method": "regmaen"})
    lines = str(caught.value).splitlines()[1:]
    assert all("(if 'regmean' is meant)" in line or "no merge method" in line for line in lines)
    assert len(lines) >= 2
