"""Tables of what Suture can do by name: merge methods, strategies, rules, ...; open to plug-ins.

A line is a function with what there is to know of it. Another package adds one by an entry point
of the table's group, whose name is that of the line::

    [project.entry-points."suture.methods"]
    median = "my_package:MEDIAN"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from suture.errors import RecipeError, did_you_mean, nearest
from suture.schema.parameters import Parameter, parameters_of, told

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@dataclass(frozen=True)
class Line:
    """A function with what there is to know of it; its signature lists its parameters."""

    make: Callable[..., Any]
    title: str
    paper: str
    """Where it comes from: authors, year, identifier; empty for what is nobody's."""
    called: str = field(default="", kw_only=True)
    """Its name in recipes, where that is not the function's."""
    joint: ClassVar[str] = "_"
    """What joins the words of names."""
    inputs: ClassVar[int] = 0
    """How many leading arguments of the function are no parameters."""

    @property
    def name(self) -> str:
        """The name in recipes."""
        return self.called or getattr(self.make, "__name__", "").replace("_", self.joint)

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The parameters, by name, in the order of the signature.

        Raises:
            RecipeError: an annotation is missing or cannot be read.
        """
        return parameters_of(self.make, self.inputs)

    @property
    def equation(self) -> str:
        """What is computed, in Markdown: the body of the docstring."""
        return told(self.make)

    @property
    def requires(self) -> str:
        """What a recipe must give, in a sentence; empty where that is nothing special."""
        return ""

    def idle(self, given: Mapping[str, Any]) -> dict[str, str]:
        """The parameters that have no meaning beside what is given, each with what decides."""
        metas = [(n, p.meta) for n, p in self.parameters.items() if given.get(n) is not None]
        return {name: by for by, meta in metas for name in getattr(meta, "instead", ())}

    def to_dict(self) -> dict[str, Any]:
        """What listings show, as plain data: for every kind of line the same, and its own."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()
                 if isinstance(v, bool | int | float | str | tuple) or v is None}  # fmt: skip
        plain.pop("called")
        more = {"needs": self.requires} if self.requires else {}
        parameters = {name: p.to_dict() for name, p in self.parameters.items()}
        return {**plain, "equation": self.equation, "parameters": parameters, **more}


class Named(Protocol):
    """What a table holds: anything with a name that can tell of itself."""

    @property
    def name(self) -> str:
        """The name in recipes."""

    def to_dict(self) -> dict[str, Any]:
        """What listings show."""


class Deferred:
    """A module that is imported when something of it is used.

    Tables name what their lines do without importing what it needs: recipes are read, and their
    faults told, where no framework is installed.

    Args:
        module: its full name.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._module), name)


L = TypeVar("L", bound=Named)


class Table(Mapping[str, L], Generic[L]):
    """Lines by name: Suture's own, and those of plug-ins, which are loaded when they are asked for.

    Examples:
        >>> from suture.merges.table import METHODS
        >>> METHODS["ties"].title
        'TIES'
        >>> METHODS.find("tiess")
        Traceback (most recent call last):
        suture.errors.RecipeError: no merge method 'tiess'; did you mean 'ties'?
    """

    def __init__(self, noun: str, kind: type[L], lines: Iterable[L], group: str = "") -> None:
        self.noun, self.kind, self.group = noun, kind, group
        self.own: dict[str, L] = {}
        """Suture's own lines."""
        for line in lines:
            assert line.name not in self.own, f"two lines are called {line.name}"
            self.own[line.name] = line

    def find(self, name: str) -> L:
        """Return the line of a name.

        Raises:
            RecipeError: there is none, and the message names the nearest; or it is that of a
                plug-in that cannot be used, and the message says why.
        """
        if name in self.own:
            return self.own[name]
        points = self._points().get(name)
        if points is None:
            raise RecipeError(f"no {self.noun} {name!r}; {did_you_mean(name, self.names())}")
        return self._loaded(points)

    def likely(self, name: object) -> L | None:
        """The line of this name, or the one of which it is a slip of the pen; for further checks.

        ``None`` where no name is so near that another cannot be meant.
        """
        if not isinstance(name, str):
            return None
        near = nearest(name, self.names()) or ""
        word = name if name in self.own or not slip(name, near) else near
        with suppress(RecipeError):
            return self.find(word)
        return None

    def names(self) -> list[str]:
        """Every name, those of plug-ins that were not tried yet among them."""
        return list(dict.fromkeys([*self.own, *self._points()]))

    def faults(self) -> dict[str, str]:
        """The plug-ins that cannot be used, each by its name with the reason."""
        found = {}
        for name, points in self._points().items():
            try:
                self._loaded(points)
            except RecipeError as error:
                found[name] = str(error)
        return found

    @contextmanager
    def also(self, line: L) -> Iterator[None]:
        """Know a line for a while that no installed package brings.

        Raises:
            RecipeError: Suture has another of its name.
        """
        before = self.own.get(line.name)
        if before is not None and before is not line:
            raise RecipeError(f"{line.name}: {_taken(self.noun)}")
        self.own[line.name] = line
        try:
            yield
        finally:
            if before is None:
                del self.own[line.name]

    def __getitem__(self, name: str) -> L:
        try:
            return self.find(name)
        except RecipeError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        """Every name that can be used: Suture's own first, then those of plug-ins."""
        yield from self.own
        for name, points in self._points().items():
            if name not in self.own:
                with suppress(RecipeError):
                    yield self._loaded(points).name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _points(self) -> dict[str, list[EntryPoint]]:
        """The entry points of the group, by name: usually one each."""
        if not self.group:
            return {}
        from importlib.metadata import entry_points

        found: dict[str, list[EntryPoint]] = {}
        for point in sorted(entry_points(group=self.group), key=lambda p: p.name):
            known = found.setdefault(point.name, [])
            if point.value not in [p.value for p in known]:  # a package may stand in the path twice
                known.append(point)
        return found

    def _loaded(self, points: list[EntryPoint]) -> L:
        """The line of an entry point.

        Raises:
            RecipeError: it cannot be used.
        """
        point = points[0]
        whose = " and ".join(dict.fromkeys(_package(p) for p in points))
        where = (f"the plug-in {point.name!r} of {whose} ({self.group}: {point.value}) "
                 "cannot be used: ")  # fmt: skip
        if len(points) > 1:
            raise RecipeError(f"{where}there are {len(points)} of this name; uninstall one")
        try:
            line = point.load()
        except Exception as error:  # noqa: BLE001  it is another's code, which may fail in any way
            said = f"{type(error).__name__}: {error}"
            raise RecipeError(f"{where}its import fails: {said}") from None
        wrong = self._wrong(point.name, line)
        if wrong:
            raise RecipeError(where + wrong)
        assert isinstance(line, self.kind)
        return line

    def _wrong(self, name: str, line: object) -> str:
        """What is wrong with what an entry point of some name gives; empty when nothing is."""
        kind = self.kind.__name__
        if not isinstance(line, self.kind):
            a = "a function" if callable(line) and hasattr(line, "__name__") else (
                f"of type {type(line).__name__}")  # fmt: skip
            return f"it is {a}, not a {kind}; name an object made by `{kind}(function, title, ...)`"
        if name in self.own:
            return _taken(self.noun)
        if line.name != name:
            return (f"the entry point is called {name!r}, its function {line.name!r}; give both "
                    "the same name")  # fmt: skip
        return _wrong_parameters(line) if isinstance(line, Line) else ""


def _taken(noun: str) -> str:
    return f"Suture has a {noun} of this name; choose another"


def _package(point: EntryPoint) -> str:
    """The package that declares an entry point, with its version."""
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _wrong_parameters(line: Line) -> str:
    """What is wrong with the signature of a line; empty when nothing is."""
    try:
        parameters = line.parameters
    except RecipeError as error:
        return str(error)
    for name, parameter in parameters.items():
        wrong = None if parameter.required else parameter.problem(parameter.default)
        if wrong is not None:
            return f"parameter {name!r} has a default that it does not allow: {wrong}"
    return ""


def slip(word: str, known: str) -> bool:
    """Whether ``word`` is ``known`` with one letter wrong, missing, too many, or two swapped."""
    word, known = word.lower(), known.lower()
    if not known or abs(len(word) - len(known)) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(word, known, strict=False)) if a != b), None)
    if start is None:
        return True
    one, other = word[start:], known[start:]
    swapped = one[:2] == other[1::-1] and one[2:] == other[2:]
    return swapped or one[1:] == other or one == other[1:] or one[1:] == other[1:]


__all__ = ["Deferred", "Line", "Named", "Table", "slip"]
