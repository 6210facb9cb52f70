"""A merge that was asked for and not yet done: looked at, computed in memory, tensor by tensor."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from suture.checkpoints.checkpoint import Array, Checkpoint
from suture.checkpoints.headers import JSON_LIMIT, read_json
from suture.checkpoints.memory import Held, MemorySink
from suture.errors import MismatchError, Problems, told_in_python
from suture.merges.apply import Outcome, Stage, apply, make_tensor, prepared
from suture.runs.place import MergeOptions
from suture.tensors.spec import TensorSpec
from suture.verbs.merge.plan import Plan, check_contents, plan_merge
from suture.verbs.merge.recipe import MergeRecipe

if TYPE_CHECKING:
    import torch


class _Ready:
    """A merge that was planned, and what it has to know of all tensors, once that is asked for."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._lock = threading.Lock()
        self._states: list[Any] | None = None

    @property
    def states(self) -> list[Any]:
        with self._lock:
            if self._states is None:
                check_contents(self.plan)
                self._states = prepared(self.plan.jobs)
            return self._states


class Merged(Mapping[str, Array]):
    """A merge that was asked for and not yet done; nothing is read before a tensor is asked for.

    ``suture.save`` writes it, ``state_dict()`` gives torch tensors, ``numpy()`` arrays, and
    ``load_into(module)`` fills a network; none of the last three touches the disk. ``merged[name]``
    is one tensor as a numpy array: floating tensors as float32 (float64 stays), others as stored.

    Args:
        recipe: what is to be done.
        inputs: the open checkpoints by label, the base first.

    Examples:
        >>> import numpy as np, suture
        >>> base = {"layers.0.mlp.weight": np.zeros((2, 2), np.float32)}
        >>> tuned = {"layers.0.mlp.weight": np.ones((2, 2), np.float32)}
        >>> merged = suture.merge(base, {"math": tuned}, weight=0.5)
        >>> merged
        Merged(task_arithmetic: math on a base)
        >>> merged.names
        ('layers.0.mlp.weight',)
        >>> merged["layers.0.mlp.weight"].tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """

    def __init__(self, recipe: MergeRecipe, inputs: Mapping[str, Checkpoint]) -> None:
        self.recipe = recipe
        self.inputs = dict(inputs)
        self._ready: dict[MergeOptions, _Ready] = {}
        self._lock = threading.Lock()

    @property
    def plan(self) -> Plan:
        """The merge held against its inputs; every problem is told when it is first asked for."""
        return self._planned(MergeOptions()).plan

    def _planned(self, options: MergeOptions) -> _Ready:
        with self._lock, told_in_python():
            if options not in self._ready:
                plan = plan_merge(self.recipe, None, options, dict(self.inputs))
                self._ready[options] = _Ready(plan)
            return self._ready[options]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the output, sorted.

        Raises:
            SutureError: the inputs do not fit; all problems at once.
        """
        return tuple(sorted(self.specs))

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of each tensor of the output, by name; raises as ``names`` does."""
        return self.plan.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __getitem__(self, name: str) -> Array:
        return self._one(name, MergeOptions())[name]

    def tensor(
        self, name: str, *, threads: int | None = None, allow_nonfinite: bool = False
    ) -> torch.Tensor:
        """One tensor as torch holds it, in the dtype of the output, merged now.

        What a method has to know of all tensors, such as a threshold, is found once and kept.

        Args:
            name: of the tensor.
            threads: default every core; changes no bit.
            allow_nonfinite: go on where weights are NaN or infinite.

        Raises:
            KeyError: there is no such tensor.
            SutureError: the inputs do not fit, or hold NaN or infinity.
        """
        how = MergeOptions(threads=threads, allow_nonfinite=allow_nonfinite)
        return self._one(name, how).tensor(name)

    def _one(self, name: str, options: MergeOptions) -> Held:
        ready = self._planned(options)
        if name not in ready.plan.specs:
            raise KeyError(name)
        specs = {name: ready.plan.specs[name]}
        held = Held(str(self), None, specs, {})
        with told_in_python():
            make_tensor(name, ready.plan.jobs, ready.states, MemorySink(specs, held.bytes))
        return held

    def checkpoint(
        self, label: str | None = None, *, threads: int | None = None, allow_nonfinite: bool = False
    ) -> Held:
        """The output in memory, as a checkpoint like any other; merged now.

        Args:
            label: what to call it; default the method and its models.
            threads: default every core; changes no bit.
            allow_nonfinite: go on where weights are NaN or infinite.

        Raises:
            SutureError: the inputs do not fit, hold NaN or infinity, or are not those that a mask
                or statistics were made from.
        """
        plan = self._planned(MergeOptions(threads=threads, allow_nonfinite=allow_nonfinite)).plan
        held = Held(label or str(self), None, plan.specs, plan.config)
        with told_in_python():
            computed(plan, MemorySink(plan.specs, held.bytes))
        held.aliases = {a: n for a, n in plan.lead.aliases.items() if n in plan.specs}
        held.restricted = any(c.restricted for c in self.inputs.values())
        return held

    def state_dict(self, **options: Any) -> dict[str, torch.Tensor]:
        """All tensors as torch holds them, by name, in the dtypes of the output; merged now.

        A tensor with a second name, such as a head tied to its embedding, stands under both and is
        one tensor. Keywords and errors as for ``checkpoint``.
        """
        held = self.checkpoint(**options)
        found = {name: held.tensor(name) for name in held.specs}
        return found | {alias: found[name] for alias, name in held.aliases.items()}

    def numpy(self, **options: Any) -> dict[str, Array]:
        """All tensors as numpy arrays, by name: floating tensors as float32 (float64 stays).

        numpy has no bfloat16, so that its values are widened. Keywords and errors as for
        ``checkpoint``.
        """
        held = self.checkpoint(**options)
        found = {name: held[name] for name in held.specs}
        return found | {alias: found[name] for alias, name in held.aliases.items()}

    def load_into(self, module: Any, **options: Any) -> Any:
        """Copy the merge into a ``torch.nn.Module`` of the same architecture, and return it.

        The module keeps its dtype and device. Nothing is copied unless everything fits.

        Raises:
            MismatchError: names or shapes are not those of the module; all problems at once.
            SutureError: as for ``checkpoint``, whose keywords it takes.
        """
        from suture.training.modules import load_into

        with told_in_python():
            return load_into(module, self.checkpoint(**options))

    def __repr__(self) -> str:
        return f"Merged({self})"

    def __str__(self) -> str:
        models = ", ".join(self.recipe.models)
        based = " on a base" if "base" in self.inputs else ""
        return f"{self.recipe.method.name}: {models}{based}"

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def computed(plan: Plan, sink: MemorySink, stage: Stage | None = None) -> Outcome:
    """Merge as planned into memory; nothing is published.

    Raises:
        SutureError: an input is at fault.
    """
    check_contents(plan)
    outcome = apply(plan.jobs, sink, plan.inputs, stage or (lambda name, nbytes: None))
    for checkpoint in plan.inputs.values():
        checkpoint.check_unchanged()
    check_fingerprints(plan, outcome)
    return outcome


def check_fingerprints(plan: Plan, outcome: Outcome) -> None:
    """Refuse inputs that are not those that the recipe, its masks or statistics were made from.

    Raises:
        MismatchError: names each of them.
    """
    problems = Problems()
    for label, expected in plan.recipe.fingerprints.items():
        found = outcome.fingerprints.get(label)
        if found != expected:
            problems.add(
                MismatchError,
                f"{label}: {plan.inputs[label].label} is not the model that was merged then "
                f"(fingerprint {found}, not {expected})",
            )
    for label, expected in [item for one in plan.beside for item in one.expected.items()]:
        if outcome.fingerprints.get(label) != expected:
            problems.add(
                MismatchError,
                f"{label}: {plan.inputs[label].label} is not the model that the masks or "
                "statistics of this recipe were made from; make them again",
            )
    for label in plan.made:
        folder = plan.inputs[label].path
        kept = read_json(folder / "suture.json", JSON_LIMIT).get("output")
        if not isinstance(kept, dict) or kept.get("fingerprint") != outcome.fingerprints[label]:
            problems.add(
                MismatchError, f"{label}: {folder} was changed since it was made; remove it"
            )
    problems.raise_if_any()


__all__ = ["Merged", "check_fingerprints", "computed"]
