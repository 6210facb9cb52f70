"""Localize-and-Stitch: regions of task vectors pasted on the base, averaged where they overlap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from suture.edits.mask import stored_mask
from suture.errors import MismatchError, Problems
from suture.kernels import compiled
from suture.merges.base import (
    Array,
    Beside,
    Context,
    Density,
    Merge,
    ModelFiles,
    Scale,
    Scope,
    Weight,
)
from suture.merges.elect import scaled
from suture.merges.marks import StoredMasks, check_mask
from suture.merges.ties import selected, selection_facts
from suture.schema.values import Scalar, each
from suture.stream.sweep import Block, Combine
from suture.stream.topk import Selection, exact_count

Masks = Annotated[
    Mapping[str, str] | None,
    ModelFiles("the mask of each model: a folder that `suture localize` wrote, or a file a model",
          instead=("density", "scope")),
]  # fmt: skip


def stitch(
    *,
    weight: Weight = each(1.0),
    density: Density = each(0.05),
    scale: Scale = Scalar(1.0),
    scope: Scope = "global",
    masks: Masks = None,
) -> Merge[Selection | StoredMasks]:
    r"""Keep the marked entries of each task vector; average where the marked regions overlap.

    With masks :math:`\gamma_i`: :math:`\theta = \theta_0 + \sum_i \gamma_i \tau_i / \max(1,
    \sum_i \gamma_i)`. An entry that one model alone marks arrives whole, so nothing has to be
    tuned. Without ``masks`` the ``density`` largest entries of each task vector are marked
    (dataless); ``density`` and ``scope`` are refused beside them. Models may be grafts, which
    carry their mask: name the same files as ``masks``.
    """
    return _from_masks(masks, weight, scale) if masks is not None else Merge(
        _combine(weight, scale), lambda c: selected(c, density, scope, exact_count), passes=1,
        facts=selection_facts,  # type: ignore[arg-type]
    )  # fmt: skip


def _combine(weight: Any, scale: Scalar) -> Any:
    def combine(block: Block, state: Selection) -> None:
        weights: Array = weight.row(block)
        for start, stop, keys in state.segments(block):
            block.fuse(Combine(compiled.MASKED_MEAN, weights, keys, factor=scale.at(block.name)),
                       start=start, stop=stop)  # fmt: skip

    return combine


def _from_masks(files: Mapping[str, str], weight: Any, scale: Scalar) -> Merge[Any]:
    def opened(context: Context) -> StoredMasks:
        return StoredMasks(tuple(stored_mask(files[model]) for model in context.models))

    def combine(block: Block, state: StoredMasks) -> None:
        bits = state.bits(block.name, block.start, block.count)
        compiled.stitched(block.rows, weight.row(block), bits, block.count, block.out)
        scaled(block, scale)

    def facts(state: StoredMasks) -> dict[str, Any]:
        return {"masks": [{**mask.about, "file": mask.path.name} for mask in state.masks]}

    return Merge(combine, opened, facts=facts, beside=lambda c, p: _beside(files, c, p))


def _beside(files: Mapping[str, str], context: Context, problems: Problems) -> Beside:
    """Check the masks: by their digests, and by their headers against the models."""
    found: list[list[Any]] = []
    expected: dict[str, str] = {}
    marked = []
    for model, checkpoint in zip(context.models, context.sources.models, strict=True):
        with problems.collecting(f"parameters.masks.{model}: "):
            mask = stored_mask(files[model])
            found.append(mask.checkpoint.identity)
            marked += [model] if mask.restricted else []
            known = check_mask(mask, checkpoint, model, context.names)
            if expected.get("base", known.get("base")) != known.get("base", expected.get("base")):
                raise MismatchError(f"{mask.path}: was made for another base than the other masks")
            expected |= known
    return Beside(tuple(map(tuple, found)), expected, tuple(marked))
