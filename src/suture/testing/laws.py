"""The laws of merge methods: what every method keeps, whatever it computes.

A law takes a method with some of its parameters, merges small models and raises ``AssertionError``
where the result is not what it must be; the message names the tensor and the numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from suture.merges.base import Method
from suture.merges.table import METHODS
from suture.tensors.roles import role_of
from suture.testing.toys import (
    FLAVOURS,
    Cells,
    Family,
    Lab,
    Tensors,
    cells,
    different,
    digest,
    invented_stats,
    read,
    write,
)
from suture.verbs.merge import VERB as merge
from suture.verbs.merge.result import MergeReport

SIXTEEN = ("BF16", "F16")


@dataclass(frozen=True)
class Case:
    """A method with parameters of its own, and where it is tried."""

    line: Method
    parameters: Mapping[str, Any]
    lab: Lab

    def models(self, family: Family) -> dict[str, Path]:
        """As many models as the method takes."""
        return dict(list(family.paths.items())[: self.line.most])

    def base(self, family: Family) -> Path | None:
        """The base, if the method needs one."""
        return family.base_path if self.line.needs_base else None

    def recipe(
        self, models: Mapping[str, Path], base: Path | None,
        parameters: Mapping[str, Any] | None = None, own: Mapping[str, Mapping[str, Any]] = {},
    ) -> dict[str, Any]:  # fmt: skip
        """A recipe of this method; ``own`` are parameters of single models."""
        given = dict(self.parameters if parameters is None else parameters)
        for which in self.line.example.files:
            given.setdefault(which, {n: str(invented_stats(p, which)) for n, p in models.items()})
        entries = {n: {"path": str(p), **own.get(n, {})} for n, p in models.items()}
        where = {} if base is None else {"base": str(base)}
        return {"method": self.line.name, **where, "models": entries, "parameters": given}

    def follow(self, recipe: Mapping[str, Any], **options: Any) -> tuple[Tensors, MergeReport]:
        """Follow a recipe into a new folder and read the result back."""
        out = self.lab.place()
        report = merge(recipe, out, **options)
        return read(out), report

    def merged(
        self, models: Mapping[str, Path], base: Path | None,
        parameters: Mapping[str, Any] | None = None, own: Mapping[str, Mapping[str, Any]] = {},
        **options: Any,
    ) -> Tensors:  # fmt: skip
        """The tensors of a merge."""
        return self.follow(self.recipe(models, base, parameters, own), **options)[0]

    def of(self, family: Family, **options: Any) -> Tensors:
        """The merge of a family."""
        return self.merged(self.models(family), self.base(family), **options)

    @property
    def copies(self) -> list[str]:
        """Names for as many copies of one model as the method needs, two where it takes two."""
        return ["a", "b"][: self.line.most]

    @property
    def apart(self) -> dict[str, Any]:
        """Its parameters, for models or tensors that do not compete over entries."""
        scope = {"scope": "tensor"} if "scope" in self.line.parameters else {}
        return {**self.parameters, **scope}


def check(fine: bool, text: str) -> None:
    """Raise unless something holds."""
    if not fine:
        raise AssertionError(text)


def check_equal(got: Mapping[str, Cells], expected: Mapping[str, Cells], what: str) -> None:
    """Raise unless two models are the same to the bit."""
    names = different(got, expected)
    if not names:
        return
    first = names[0]
    if first not in got or first not in expected:
        raise AssertionError(f"{what}: {first} is {'new' if first in got else 'missing'}")
    one, other = got[first], expected[first]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        raise AssertionError(f"{what}: {first} is {one.dtype}{one.shape}, expected "
                             f"{other.dtype}{other.shape}")  # fmt: skip
    _tell(first, one.numbers, other.numbers, one.numbers != other.numbers, what, len(names))


def check_near(
    got: Mapping[str, Cells], expected: Mapping[str, Cells | Any], what: str, near: float = 1e-6
) -> None:
    """Raise unless numbers are the same to float32, or to one step of 16 bits."""
    for name, right in expected.items():
        one = got[name]
        numbers = right.numbers if isinstance(right, Cells) else np.asarray(right)
        wide = {"BF16": 2.0**-7, "F16": 2.0**-10}.get(one.dtype, near)
        wrong = ~(np.abs(one.numbers - numbers) <= near + wide * np.abs(numbers))
        if wrong.any():
            _tell(name, one.numbers, numbers, wrong, what, 1)


def _tell(name: str, got: Any, expected: Any, wrong: Any, what: str, tensors: int) -> None:
    at = tuple(int(i) for i in np.argwhere(wrong)[0]) if wrong.any() else ()
    entry = f"{name}{list(at)}" if at else name
    signs = "" if got[at] != expected[at] else " (but for the bits: a zero has another sign?)"
    more = f"; {tensors} tensors differ" if tensors > 1 else ""
    came, right = got[at].item(), expected[at].item()
    raise AssertionError(f"{what}: {entry} is {came!r}, expected {right!r}{signs}; "
                         f"{int(wrong.sum())} of {wrong.size} entries{more}")  # fmt: skip


def it_says_what_it_does(case: Case) -> None:
    """It has a title, a docstring, a meaning for each parameter; if it draws, a ``seed``."""
    line = case.line
    check(bool(line.title), "it has no title")
    check(bool(line.equation), "its function has no docstring: write the equation there")
    for name, parameter in line.parameters.items():
        wrong = None if parameter.required else parameter.problem(parameter.default)
        check(wrong is None, f"{name}: its default is not allowed: {wrong}")
    drawn = "seed" in line.parameters
    check(line.random == drawn, f"random={line.random}, but it has {'a' if drawn else 'no'} seed")


def one_model_alone_comes_back(case: Case) -> None:
    """With neutral parameters the only model comes back, to float32 or one step of 16 bits."""
    for flavour in FLAVOURS:
        family = case.lab.family(flavour)
        names = [f"{i}" for i in range(case.line.least)]
        copies = dict.fromkeys(names, family.paths["bob"])

        out = case.merged(copies, case.base(family), case.line.example.neutral)

        expected = {n: family.models["bob"][n] for n in family.names}
        check_near(out, expected, f"one model alone, {flavour}")


def zero_vectors_give_the_base(case: Case) -> None:
    """Where no model differs from the base, the base comes back bit for bit."""
    parameters = dict(case.parameters)
    if not case.line.needs_base:  # then parameters may be factors on the models themselves
        parameters |= case.line.example.neutral
    for flavour in FLAVOURS:
        family = case.lab.family(flavour)
        copies = dict.fromkeys(case.copies, family.base_path)

        out = case.merged(copies, case.base(family), parameters)

        same = check_equal if case.line.needs_base else check_near
        same(out, family.base, f"models like the base, {flavour}")


def negative_zeros_stay(case: Case) -> None:
    """An entry that no model changes keeps its sign even when it is a zero."""
    if not case.line.needs_base:
        return
    base = {"w": cells(np.array([-0.0, 0.0, 1.0, -1.0]), "F32")}
    place = case.lab.put(base)

    out = case.merged(dict.fromkeys(case.copies, place), place)

    check_equal(out, base, "zeros with a sign")


def names_shapes_and_dtypes_are_kept(case: Case) -> None:
    """The output has the tensors of the base: each with its name, shape and dtype."""
    family = case.lab.family("mixed")

    out = {n: (t.dtype, t.shape) for n, t in case.of(family).items()}

    expected = {n: (t.dtype, t.shape) for n, t in family.base.items()}
    check(out == expected, f"tensors: {out}, expected {expected}")


def inputs_are_left_alone(case: Case) -> None:
    """Not a byte of an input changes, and no file appears beside it."""
    family = case.lab.family("bf16")
    places = (family.base_path, *family.paths.values())
    before = digest(places)

    case.of(family)

    check(digest(places) == before, "the files of an input were changed")


def order_of_models_does_not_matter(case: Case) -> None:
    """However a recipe lists its models, the bytes are the same; unless the method is ordered."""
    family = case.lab.family()
    models, base = case.models(family), case.base(family)
    if case.line.ordered:
        _other_end(case, models, base)
        return
    first, *others = [
        case.merged(dict(order), base)
        for order in itertools.islice(itertools.permutations(models.items()), 0, None, 2)
    ] + [case.merged(dict(reversed(models.items())), base)]
    # Without a base, what is not merged comes from the model that is listed first.
    copied = {"embedding", "head", "buffer"} if base is None else set()
    kept = [n for n in first if role_of(n).kind not in copied]
    for other in others:
        check_equal({n: other[n] for n in kept}, {n: first[n] for n in kept}, "another order")


def _other_end(case: Case, models: Mapping[str, Path], base: Path | None) -> None:
    """The other way round, a path between two models is the path from its other end."""
    if "t" not in case.line.parameters:
        return
    one = case.merged(models, base, {**case.parameters, "t": 0.3})
    back = case.merged(dict(reversed([*models.items()])), base, {**case.parameters, "t": 0.7})
    names = case.lab.family().names
    check_near({n: back[n] for n in names}, {n: one[n] for n in names}, "from the other end")


def shards_and_order_of_tensors_do_not_matter(case: Case) -> None:
    """One file, four shards, or one file with its tensors backwards: the same bytes."""
    family = case.lab.family("bf16", grid=True)
    expected = case.of(family)
    for layout, shards in (("four shards", 4), ("tensors backwards", 1)):
        root = case.lab.place()
        paths = {}
        for name, tensors in {"base": family.base, **family.models}.items():
            names = sorted(tensors, reverse=shards == 1)
            paths[name] = write(root / name, {n: tensors[n] for n in names}, shards)
        base = paths.pop("base")
        chosen = dict(list(paths.items())[: case.line.most])

        out = case.merged(chosen, base if case.line.needs_base else None)

        check_equal(out, expected, layout)


RUNS = [
    (1, 1 << 16, "5GB"), (2, 1 << 12, "1MB"), (4, 1 << 18, "100kB"),
    (2, 1 << 16, "100kB"), (4, 1 << 12, "5GB"), (1, 1 << 18, "1MB"),
]  # fmt: skip
"""Threads, elements in a block, bytes in a shard: each value with each other in two runs."""


def threads_blocks_and_shards_change_no_byte(case: Case) -> None:
    """1, 2, 4 threads, three sizes of blocks and of shards: identical tensors and fingerprint."""
    family, first = case.lab.large(), None
    for threads, block, size in RUNS:
        recipe = case.recipe(case.models(family), case.base(family))
        recipe["output"] = {"shard_size": size}

        out, report = case.follow(recipe, threads=threads, block=block)

        what = f"{threads} threads, blocks of {block}, shards of {size}"
        facts = (report.fingerprint, report.moved, report.writeback_loss, report.facts)
        if first is None:
            first = out, facts
        check_equal(out, first[0], what)
        check(facts == first[1], f"{what}: the report says {facts}, expected {first[1]}")


def tiny_blocks_change_no_byte(case: Case) -> None:
    """Blocks of 8 and of 64 elements on a small model, where most tensors span several blocks."""
    family = case.lab.family("mixed", grid=True)
    whole = case.of(family)
    for block in (8, 64):
        check_equal(case.of(family, block=block, threads=3), whole, f"blocks of {block}")


def the_seed_decides(case: Case) -> None:
    """The same seed gives the same bytes, and another seed others."""
    if not case.line.random:
        return
    family = case.lab.family()
    models, base = case.models(family), case.base(family)
    one, again, other = (
        case.merged(models, base, {**case.parameters, **case.line.example.drawing, "seed": seed})
        for seed in (11, 11, 12)
    )
    check_equal(again, one, "the same seed")
    moved = set(different(one, other))
    for name in family.names:
        large = np.prod(one[name].shape) > 30
        check(not large or name in moved, f"another seed draws the same for {name}")


def disjoint_changes_do_not_touch_each_other(case: Case) -> None:
    """Where only one model changes entries, they end as if the others were not there."""
    line = case.line
    if line.averages or line.mixes:
        return
    parameters = case.parameters if line.example.apart is None else line.example.apart
    draw = np.random.default_rng(9)
    base, models = {}, {"a": {}, "b": {}}  # type: dict[str, Any], dict[str, dict[str, Any]]
    for name, shape in {"v": (301,), "w": (20, 30)}.items():
        start, noise = draw.standard_normal((2, *shape)).astype(np.float32)
        first = (np.arange(start.size) % 2 == 0).reshape(shape)
        base[name] = start
        models["a"][name] = np.where(first, start + noise, start)
        models["b"][name] = np.where(first, start, start + noise)
    place = case.lab.put({n: cells(t, "F32") for n, t in base.items()})
    root = case.lab.place()
    paths = {m: write(root / m, {n: cells(v, "F32") for n, v in t.items()})
             for m, t in models.items()}  # fmt: skip

    both = case.merged(paths, place, parameters)

    for model, path in paths.items():
        alone = case.merged({model: path}, place, parameters)
        for name, start in base.items():
            mine = models[model][name] != start
            got, expected = both[name].numbers, alone[name].numbers
            if (got[mine] != expected[mine]).any():
                wrong = mine & (got != expected)
                _tell(name, got, expected, wrong, f"beside another model, {model}'s entries (say "
                      "averages=True or mixes=True where that is meant)", 1)  # fmt: skip


ONE = "model.layers.1.mlp.down_proj.weight"


def a_number_for_one_tensor_changes_that_tensor_only(case: Case) -> None:
    """A pattern that fits one tensor changes it and no other, where tensors do not compete."""
    if case.parameters in case.line.example.together:
        return
    family, known = case.lab.family(), case.line.parameters
    models, base = case.models(family), case.base(family)
    for key in ("density", "weight", "scale"):
        if key not in known or not known[key].per_tensor:
            continue
        usual = case.parameters.get(key, known[key].default)
        rules = {ONE: usual * 0.6, "*": usual}
        last = list(models)[-1] if case.line.most else "bob"
        own = {last: {key: rules}} if known[key].per_model else {}
        shared = {**case.apart, key: usual if own else rules}

        plain = case.merged(models, base, {**case.apart, key: usual})
        other = case.merged(models, base, shared, own)

        changed = different(plain, other)
        check(changed == [ONE], f"{key}: for {ONE} alone changes {changed}")


def a_shard_merged_alone_is_the_shard_of_the_whole(case: Case) -> None:
    """Tensors may be merged in parts where they do not compete with one another."""
    if case.parameters in case.line.example.together:
        return
    family = case.lab.family("bf16", grid=True)
    part = sorted(family.base)[::2]
    root = case.lab.place()
    places = {name: write(root / name, {n: tensors[n] for n in part})
              for name, tensors in {"base": family.base, **family.models}.items()}  # fmt: skip
    base = places.pop("base")
    chosen = dict(list(places.items())[: case.line.most])

    whole = case.merged(case.models(family), case.base(family), case.apart)
    alone = case.merged(chosen, base if case.line.needs_base else None, case.apart)

    check_equal(alone, {n: whole[n] for n in part}, "half of the tensors")


def odd_tensors_survive(case: Case) -> None:
    """A model of nothing but a zero, a scalar, empty tensors, integers and booleans."""
    base = {
        "zero.weight": cells(np.zeros((4, 4)), "F32"),
        "scalar": cells(np.array(0.25), "F32"),
        "empty.weight": cells(np.zeros((0, 7)), "F32"),
        "none.weight": cells(np.zeros((3, 0, 2)), "F32"),
        "ids": cells(np.array([2**53 + 1, -(2**63), 2**63 - 1]), "I64"),
        "flags": cells(np.array([True, False]), "BOOL"),
        "bytes": cells(np.arange(256), "U8"),
    }
    tuned = {**base, "zero.weight": cells(np.full((4, 4), 0.5), "F32"),
             "scalar": cells(np.array(0.75), "F32")}  # fmt: skip
    place, path = case.lab.put(base), case.lab.put(tuned)
    copies = {f"{i}": path for i in range(case.line.least)}
    parameters = {**case.parameters, **case.line.example.neutral}

    out = case.merged(copies, place if case.line.needs_base else None, parameters)

    if case.line.tensorwise:  # singular values are found in float32
        check_near({"zero.weight": out.pop("zero.weight")},
                   {"zero.weight": tuned.pop("zero.weight")}, "odd tensors")  # fmt: skip
    check_equal(out, tuned, "odd tensors")


def the_record_makes_the_same_tensors_again(case: Case) -> None:
    """``suture.json`` of an output is a recipe: followed, it gives the same bytes."""
    family = case.lab.family("bf16")
    first, again = case.lab.place(), case.lab.place()
    report = merge(case.recipe(case.models(family), case.base(family)), first)

    other = merge(first / "suture.json", again)

    check_equal(read(again), read(first), "made again from its record")
    check(other.fingerprint == report.fingerprint, "the fingerprint is another")


def it_is_its_twin(case: Case) -> None:
    """It computes what its example's plain numpy computes, to float32 or one step of 16 bits."""
    twin = case.line.example.twin
    if twin is None:
        return
    known = case.line.parameters
    given = {n: case.parameters.get(n, p.default) for n, p in known.items()}
    for flavour in FLAVOURS:
        family = case.lab.family(flavour)
        chosen = case.models(family)
        base = {n: family.base[n].numbers * case.line.needs_base for n in family.names}
        names = chosen if case.line.ordered else sorted(chosen)
        rows = {m: {n: family.models[m][n].numbers - base[n] for n in base} for m in names}

        expected = twin(rows, **given)

        right = {n: base[n] + np.asarray(expected[n]) for n in base}
        check_near(case.of(family), right, f"its twin, {flavour}", 1e-5)


LAWS: Mapping[str, Callable[[Case], None]] = {
    law.__name__.replace("_", " "): law
    for law in (
        it_says_what_it_does, one_model_alone_comes_back, zero_vectors_give_the_base,
        negative_zeros_stay, names_shapes_and_dtypes_are_kept, inputs_are_left_alone,
        order_of_models_does_not_matter, shards_and_order_of_tensors_do_not_matter,
        threads_blocks_and_shards_change_no_byte, tiny_blocks_change_no_byte, the_seed_decides,
        disjoint_changes_do_not_touch_each_other, a_number_for_one_tensor_changes_that_tensor_only,
        a_shard_merged_alone_is_the_shard_of_the_whole, odd_tensors_survive,
        the_record_makes_the_same_tensors_again, it_is_its_twin,
    )
}  # fmt: skip
ONCE = ("it says what it does", "one model alone comes back")
"""Laws that do not ask for parameters with which there is something to do."""


def cases(line: Method, lab: Lab) -> Iterator[tuple[str, Case]]:
    """Every law with every set of parameters that it is held with."""
    variants = [*line.example.lively, *line.example.together]
    for law in LAWS:
        for parameters in variants[:1] if law in ONCE else variants:
            yield law, Case(line, parameters, lab)


def hold(law: str, case: Case) -> None:
    """Hold a method against a law; it is known by its name meanwhile.

    Raises:
        AssertionError: the law is broken; the message begins with it and the parameters.
    """
    with METHODS.also(case.line):
        try:
            LAWS[law](case)
        except AssertionError as error:
            said = ", ".join(f"{k}={v}" for k, v in case.parameters.items())
            where = f"{case.line.name}({said})"
            raise AssertionError(f"{where}: {law}: {error}") from None


__all__ = ["LAWS", "Case", "cases", "hold"]
