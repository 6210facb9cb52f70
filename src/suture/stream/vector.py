"""Task vectors: what a model became, minus what it was; lazy, with the arithmetic of vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from suture.checkpoints.checkpoint import Array, Checkpoint
from suture.errors import MismatchError, Problems, SutureError
from suture.kernels import compiled
from suture.stream.sweep import BLOCK, Block, Progress, Sources, Visitor, sweep, tasks_of
from suture.tensors.roles import EVERYTHING, ParamSpace, check_selectors
from suture.tensors.spec import DTYPES, Piece, TensorSpec, listed


def align(
    reference: Checkpoint, model: Checkpoint, problems: Problems, missing: bool = False,
    extra: bool = False, buffers: bool = False,
) -> None:  # fmt: skip
    """Note every tensor in which ``model`` does not have the names and shapes of ``reference``.

    Args:
        reference: the base, or the first model.
        model: the checkpoint that has to fit.
        problems: takes one note for every fault.
        missing: whether the model may lack tensors.
        extra: whether it may have tensors that the reference lacks.
        buffers: whether tensors that are not learned may be missing on either side, as where
            models are compared; only a merge has a ``policy`` that could help.
    """
    here, there = reference.specs, model.specs
    lacking = sorted(here.keys() - there.keys())
    beyond = sorted(there.keys() - here.keys())
    if buffers:
        lacking, beyond = (
            [n for n in lacking if _learned(n, here[n])],
            [n for n in beyond if _learned(n, there[n])],
        )
    who = f"{model.label} against {reference.label}"
    tied = {**reference.aliases, **model.aliases}.keys() & {*lacking, *beyond}
    if tied:  # a tensor of its own in one, and only a second name of another tensor in the other
        who += f" (only one of them ties {listed(sorted(tied))} in its config.json)"
    if lacking and not missing:
        problems.add(
            MismatchError,
            f"{who}: lacks {listed(lacking)}"
            + ("" if buffers else "; `policy: {missing: base}` takes them from the base"),
        )
    if beyond and not extra:
        problems.add(
            MismatchError,
            f"{who}: has {listed(beyond)} besides"
            + ("" if buffers else "; `policy: {extra: drop}` leaves them out"),
        )
    different = [n for n in sorted(here.keys() & there.keys()) if here[n].shape != there[n].shape]
    rows = (reference.vocabulary, model.vocabulary)
    if different and None not in rows and rows[0] != rows[1]:
        problems.add(
            MismatchError,
            f"{who}: vocabularies of {rows[0]} and {rows[1]} tokens ({listed(different, 2)} differ "
            "in shape)"
            + (
                ""
                if buffers
                else "; match them by tokenizer with `policy: {vocabulary: union}` (or "
                "base), or row by row with `policy: {vocabulary: shared-rows}`"
            ),
        )
        return
    for name in different[:10]:
        problems.add(
            MismatchError,
            f"{who}: {name} is {list(there[name].shape)}, not {list(here[name].shape)}",
        )
    if len(different) > 10:
        problems.add(MismatchError, f"{who}: {len(different) - 10} more tensors differ in shape")
    odd = [n for n in sorted(here.keys() & there.keys())
           if DTYPES[here[n].dtype].computable > DTYPES[there[n].dtype].computable]  # fmt: skip
    if odd:
        kinds = f"{there[odd[0]].dtype}, not {here[odd[0]].dtype}"
        problems.add(MismatchError, f"{who}: {listed(odd)} cannot be computed with: {kinds}")


def _learned(name: str, spec: TensorSpec) -> bool:
    return EVERYTHING.holds(name, spec)


class Gram(Visitor["dict[str, Array]"]):
    """Dot products of all pairs of rows, tensor by tensor, in float64.

    The sums do not depend on threads or blocks: eight lanes a piece whose order of addition is
    fixed, and pieces added exactly.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._parts: dict[str, list[Array]] = {}

    def local(self) -> dict[str, Array]:
        """The lanes of the current piece, and the pieces since the last task."""
        return {"": np.zeros((self.rows, self.rows, 8))}

    def see(self, local: dict[str, Array], block: Block) -> None:
        """Add a block to the lanes."""
        compiled.gram(block.rows, block.count, local[""])

    def end_piece(self, local: dict[str, Array], piece: Piece) -> None:
        """Put the lanes of a piece aside."""
        local[f"{piece.start} {piece.name}"] = local[""]
        local[""] = np.zeros_like(local[""])

    def end_task(self, local: dict[str, Array], task: Sequence[Piece]) -> None:
        """Hand the finished pieces over."""
        for key in [k for k in local if k]:
            self._parts.setdefault(key.split(" ", 1)[1], []).append(local.pop(key))

    def of(self, *names: str) -> Array:
        """The Gram matrix of some tensors taken together: float64[rows, rows]."""
        found = np.zeros((self.rows, self.rows))
        for a in range(self.rows):
            for b in range(a + 1):
                lanes = (x for n in names for part in self._parts[n] for x in part[a, b].tolist())
                found[a, b] = found[b, a] = math.fsum(lanes)
        return found


class TaskVector(Mapping[str, Array]):
    """A weighted sum of differences to one base; ``vector[name]`` is a float32 delta, read now.

    Made by subtracting checkpoints: ``tuned - base``. Task vectors over the same base add, subtract
    and scale; ``select`` narrows them to some tensors.

    Examples:
        >>> import numpy as np, suture
        >>> base, math, code = (
        ...     suture.open({"layers.0.mlp.weight": np.array(value, np.float32)}, label=label)
        ...     for label, value in (("base", [0, 0]), ("math", [3, 4]), ("code", [0, 2]))
        ... )
        >>> both = (math - base) + 0.5 * (code - base)
        >>> both["layers.0.mlp.weight"].tolist()
        [3.0, 5.0]
        >>> (math - base).norm(), (math - base).dot(code - base)
        (5.0, 8.0)
    """

    def __init__(
        self, base: Checkpoint, terms: Sequence[tuple[Checkpoint, float]], names: Sequence[str]
    ) -> None:
        self.base = base
        self.terms = tuple(terms)
        self.names = tuple(names)
        self._held = frozenset(self.names)

    @classmethod
    def between(cls, tuned: Checkpoint, base: Checkpoint) -> TaskVector:
        """The difference ``tuned - base`` over every floating tensor that is no buffer.

        Raises:
            MismatchError: the two do not have the same names and shapes.
        """
        problems = Problems()
        align(base, tuned, problems, buffers=True)
        problems.raise_if_any()
        return cls(base, [(tuned, 1.0)], ParamSpace((), ()).names(base.specs))

    def __getitem__(self, name: str) -> Array:
        if name not in self:
            raise KeyError(name)
        start = self.base[name]
        delta = np.zeros(start.shape, np.float32)
        for tuned, factor in self.terms:
            delta += np.float32(factor) * (tuned[name] - start).astype(np.float32)
        return delta

    def __contains__(self, name: object) -> bool:
        return name in self._held  # without reading it, as a mapping would

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _with(self, terms: Sequence[tuple[Checkpoint, float]]) -> TaskVector:
        return TaskVector(self.base, terms, self.names)

    def _matching(self, other: object) -> TaskVector:
        if not isinstance(other, TaskVector):
            raise SutureError(f"a task vector and {type(other).__name__} cannot be added")
        if other.base is not self.base or other.names != self.names:
            raise SutureError("task vectors add only over the same base and the same tensors")
        return other

    def __add__(self, other: object) -> TaskVector:
        return self._with(self.terms + self._matching(other).terms)

    def __sub__(self, other: object) -> TaskVector:
        return self + -self._matching(other)

    def __mul__(self, factor: float) -> TaskVector:
        return self._with([(tuned, f * factor) for tuned, f in self.terms])

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def select(self, *include: str, exclude: Sequence[str] = ()) -> TaskVector:
        """The same over the tensors whose role or name fits: ``select("q", "*.layers.3.*")``.

        Raises:
            RecipeError: a word is no role and fits no tensor.
        """
        check_selectors((*include, *exclude), self.names, "select")
        space = ParamSpace(tuple(include), tuple(exclude))
        names = [n for n in self.names if space.holds(n, self.base.specs[n])]
        return TaskVector(self.base, self.terms, names)

    def dot(self, other: TaskVector, **how: Any) -> float:
        """The inner product, streamed, added in float64; keywords as for ``gram``."""
        mine, theirs = len(self.terms), self._matching(other).terms
        gram = self._with(self.terms + theirs).gram(**how).of(*self.names)
        left = np.array([f for _, f in self.terms])
        right = np.array([f for _, f in theirs])
        return float(left @ gram[:mine, mine:] @ right)

    def norm(self, **how: Any) -> float:
        """The Euclidean length, streamed; keywords as for ``gram``."""
        factors = np.array([f for _, f in self.terms])
        return math.sqrt(max(0.0, float(factors @ self.gram(**how).of(*self.names) @ factors)))

    def gram(
        self, *, threads: int | None = None, block: int = BLOCK, progress: Progress | None = None
    ) -> Gram:
        """Dot products between the terms (without their factors), tensor by tensor."""
        gram = Gram(len(self.terms))
        sources = Sources(tuple(tuned for tuned, _ in self.terms), self.base)
        sweep(sources, tasks_of(self.names, self.base.specs), gram, threads=threads, block=block,
              progress=progress)  # fmt: skip
        return gram

    def __repr__(self) -> str:
        parts = " ".join(f"{f:+g}*({t.label} - {self.base.label})" for t, f in self.terms)
        return f"TaskVector({parts}, {len(self)} tensors)"

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other
