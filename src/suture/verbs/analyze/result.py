"""What an analysis found, in lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suture.tensors.spec import readable

if TYPE_CHECKING:
    from suture.verbs.analyze.run import Analysis


def outline(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a plan would do, a line each."""
    for label, row in facts["inputs"].items():
        yield f"input    {label}: {row['path']}, {row['tensors']} tensors"
    for name, about in facts["analyses"].items():
        yield f"analysis {name}: {about}"
    yield f"reading  {readable(facts['bytes_read'])}"


def lines(analysis: Analysis, out: Path) -> Iterator[str]:
    """Yield what to say at the end."""
    found = analysis.to_dict()
    if found["geometry"] is not None:
        yield from _norms(found["geometry"])
    if found["conflicts"] is not None and found["conflicts"]["total"]["rate"] is not None:
        total = found["conflicts"]["total"]
        yield (
            f"opposite signs in {total['rate']:.1%} of the entries that two or more models move "
            f"({total['null']:.1%} by chance)"
        )
    if found["overlap"] is not None:
        alike = found["overlap"]
        names = alike["models"]
        pairs = [
            (alike["jaccard"][a][b], alike["placed"][a][b], names[b], names[a])
            for a in range(len(names))
            for b in range(a)
        ]
        if pairs:
            value, chance, one, other = max(pairs)
            yield (
                f"most alike masks: {one} and {other}, Jaccard {value:.3f} ({chance:.3f} expected "
                "of random masks with as many entries in each tensor)"
            )
    for basis in found["bases"]:
        yield (
            f"basis {basis['kind']}: {len(basis['names'])} vectors leave {basis['loss']:.2%} of "
            f"the squared length (at best {basis['bound']:.2%})"
        )
    if found["diagnostics"] is not None:
        yield from _diagnosed(found["diagnostics"])
    yield from _answered(found)
    yield f"wrote {out}"


def _answered(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each analysis of masks and of classifiers."""
    if found.get("masks"):
        means = found["masks"]["means"]
        top = "" if means["same_task"] is None else f", {means['same_task']:.3f} of the same task"
        yield (
            f"masks share {means['iou']:.3f} on average (by chance {means['random']:.3f}, with "
            f"the same tensors {means['tensors']:.3f}, the same rows and columns "
            f"{means['lines']:.3f}{top})"
        )
    for name, one in found.get("structure", {}).get("models", {}).items():
        yield f"mask of {name}: {one['query_key']:.1%} in queries and keys"
    if found.get("disentanglement"):
        mixed = found["disentanglement"]
        at_one = "" if mixed["xi"] is None else f", {mixed['xi']:.3f} at (1, 1)"
        if any(0 < a <= 1 for a in mixed["amounts"]):
            yield f"disentanglement error: {mixed['xi_mean']:.3f} on average up to 1{at_one}"
        else:  # an average over amounts that nothing was measured at would be 0 by its making
            most = max(e for m in mixed["maps"] for row in m["error"] for e in row)
            yield f"disentanglement error: at most {most:.3f}; no amount is above 0 and up to 1"
    if found.get("function_localization"):
        local = found["function_localization"]
        own = [row[i] for i, row in enumerate(local["transfer"])]
        rest = [abs(v) for i, row in enumerate(local["transfer"]) for j, v in enumerate(row)
                if i != j]  # fmt: skip
        yield (
            f"vectors change their own task by {sum(own) / len(own):+.1%}, others by "
            f"{sum(rest) / len(rest):.1%} up or down; features move {local['elsewhere']:.2f} "
            "times as much elsewhere"
        )
    if found.get("sensitivity"):
        yield from _shared(found["sensitivity"])


def _shared(found: Mapping[str, Any]) -> Iterator[str]:
    share = f"{found['shares'][-1]:g}"
    for word in ("least", "random", "most"):
        kept = [
            value
            for i, one in enumerate(found["tasks"].values())
            for j, value in enumerate(one[word][share])
            if i != j
        ]
        yield (
            f"without the {word if word == 'random' else word + ' sensitive'} "
            f"{float(share):.0%}, other tasks keep {sum(kept) / len(kept):.1%} of their accuracy"
        )


def _diagnosed(found: Mapping[str, Any]) -> Iterator[str]:
    for one in found["models"]:
        smooth = one["smoothness"]
        secants = [s["value"] for s in smooth["secants"]]
        bounds = ", ".join(f"{k} {v:.4g}" for k, v in one["bounds"].items())
        yield (
            f"{one['model']}: loss {one['expert_loss']:.4f} as expert, {one['merged_loss']:.4f} "
            f"merged, {one['base_loss']:.4f} as base; gradient {one['gradient_norm']:.3g} at the "
            "expert"
        )
        yield (
            f"  gap {one['gap']:.4g}, at most (by the L of) {bounds}; L {smooth['curvature']:.3g}"
            + (f", along the way {max(secants):.3g}" if secants else "")
            + f"; barrier {one['barrier']:.3g}"
        )


def _norms(geometry: Mapping[str, Any]) -> Iterator[str]:
    for move in geometry["total"]:
        parts = [m for m in geometry["layers"] if m["model"] == move["model"]]
        parts.sort(key=lambda m: -m["share"])
        where = ", ".join(f"{m['layer']} {m['share']:.0%}" for m in parts[:3])
        relative = move["relative_norm"]
        against = "" if relative is None else f", {relative:.3%} of the base"
        yield f"{move['model']}: norm {move['norm']:.4g}{against}; most in {where}"
    if len(geometry["models"]) > 1:
        yield f"largest cosine between two task vectors: {geometry['epsilon']:.3f}"
