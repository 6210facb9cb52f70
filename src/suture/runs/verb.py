"""A command with a recipe: the one shape of its folder, its call and its place in the terminal.

The folder ``verbs/NAME`` of a command holds::

    __init__.py   VERB, the only name that other commands and the command line need
    recipe.py     the keys of the recipe; needs neither torch nor numpy
    plan.py       Options; make_plan(recipe, out, options, folder): open and check, read no weight;
                  describe(plan): what would be done, as plain data
    run.py        execute(plan, progress): do it, and publish the output
    result.py     lines(result, out): what to say at the end; outline(facts): a dry run's own lines
    explain.py    explain(recipe) and lines(told), where the command has the flag ``explain``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from suture.runs.progress import Progress

if TYPE_CHECKING:
    from suture.runs.place import Options

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Verb(Generic[Result]):
    """A command with a recipe; what it imports is imported when it is used."""

    name: str
    """Of the command, and of its folder in ``verbs``."""
    help: str
    recipe: str = "A recipe (YAML)."
    """What the recipe says, for the command's help."""
    out: str = "The folder to write."
    """What the output is, for the command's help."""
    purpose: str
    """What is not done after ``--dry-run``: "leave out --dry-run to PURPOSE"."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """The options it takes besides ``--dry-run`` and ``--json``, in the order of the help; each
    with its own words, or '' for those that all commands have."""

    def _part(self, part: str) -> Any:
        return import_module(f"suture.verbs.{self.name}.{part}")

    def options(self, **given: Any) -> Options:
        """Return its options, from the fields that are given."""
        options: Options = self._part("plan").Options(**given)
        return options

    def plan(
        self,
        recipe: Path | Mapping[str, Any],
        out: Path,
        options: Options | None = None,
        folder: Path | None = None,
    ) -> Any:
        """Read a recipe, open what it names and check all that can be checked.

        Args:
            recipe: a YAML file, or what stands in it.
            out: the folder to write.
            options: how to run.
            folder: where relative paths start; by default the file's folder or the current one.

        Raises:
            SutureError: all problems at once.
        """
        return self._part("plan").make_plan(recipe, out, options, folder)

    def describe(self, plan: Any) -> dict[str, Any]:
        """Return what a plan will do, as plain data."""
        facts: dict[str, Any] = self._part("plan").describe(plan)
        return facts

    def outline(self, facts: Mapping[str, Any]) -> Iterator[str] | None:
        """Return the lines of a dry run, where the command has its own words for them."""
        outline = getattr(self._part("result"), "outline", None)
        return None if outline is None else outline(facts)

    def explain(self, recipe: Path | Mapping[str, Any]) -> dict[str, Any]:
        """Return what a recipe means, as plain data; where the command has the flag ``explain``.

        Raises:
            RecipeError: everything that is wrong with it, at once; nothing is opened.
        """
        told: dict[str, Any] = self._part("explain").explain(recipe)
        return told

    def explanation(self, told: Mapping[str, Any]) -> Iterator[str]:
        """Yield an explanation as lines."""
        lines: Iterator[str] = self._part("explain").lines(told)
        return lines

    def run(self, plan: Any, progress: Progress | None = None) -> Result:
        """Do what was planned and publish the output; interrupted, the same call goes on.

        Raises:
            SutureError: an input or the output is at fault.
        """
        result: Result = self._part("run").execute(plan, progress or Progress())
        return result

    def lines(self, result: Result, out: Path) -> Iterator[str]:
        """Yield what to say at the end."""
        lines: Iterator[str] = self._part("result").lines(result, out)
        return lines

    def __call__(
        self,
        recipe: Path | Mapping[str, Any],
        out: Path,
        *,
        folder: Path | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Result:
        """Follow a recipe into a folder: ``plan``, then ``run``; keywords as the fields of options.

        Raises:
            SutureError: the recipe, an input or the output is at fault; all problems at once.
        """
        return self.run(self.plan(recipe, Path(out), self.options(**options), folder), progress)


__all__ = ["Verb"]
