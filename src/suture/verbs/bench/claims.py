"""What the paper on TaLoS claims, judged by the numbers of a benchmark; plain data in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from suture.verbs.bench.maths import Claim, claim, within_one_interval
from suture.verbs.bench.recipe import Bench

Record = Mapping[str, Any]
"""What the cells of a run hold, by strategy and seed."""
QK = "query_key"


def matched_pair(bench: Bench, record: Record, name: str, seed: int) -> dict[str, Any] | None:
    """A strategy and the reference, each where their single models are nearest in accuracy."""
    own = record["lines"][name]["seeds"][seed]
    other = record["lines"][bench.reference]["seeds"][seed]
    here, there = own["matched"]
    found: dict[str, Any] = {"steps": [bench.checkpoints[here], bench.checkpoints[there]]}
    for word, held, point in (("own", own, here), ("reference", other, there)):
        if point in held["addition"]:
            for key in ("single_mean", "absolute", "normalised"):
                found[f"{word}_{key}"] = held["addition"][point][key]
        if point in held["disentanglement"]:
            found[f"{word}_xi"] = held["disentanglement"][point]["xi"]
            found[f"{word}_drift"] = off(held["disentanglement"][point]["drift"])
        if point in held["movement"]:
            for key in ("elsewhere", "elsewhere_first", "bend"):
                found[f"{word}_{key}"] = held["movement"][point][key]
    if len(found) < 3:
        return None
    start = record["base"][seed]["rows"]
    rows = sum(start[t.name]["validation"] for t in bench.tasks)
    found["within"] = within_one_interval(own["validation"][here], other["validation"][there], rows)
    return found


def off(matrix: Sequence[Sequence[float]]) -> float:
    """Mean of what is not on the diagonal."""
    return mean([v for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j])


def mean(values: Sequence[float]) -> float:
    """The mean of plain numbers."""
    return sum(values) / len(values)


def claims(bench: Bench, record: Record) -> Iterator[Claim]:
    """What the paper on TaLoS claims, judged by the paired differences of seeds."""
    lines = record["lines"]
    talos = [line.name for line in bench.lines if line.strategy.name == "talos"]
    subject = next((n for n in talos if n in lines and n != bench.reference), None)
    if subject is None:
        return
    last = len(bench.checkpoints) - 1

    def ends(name: str, part: str, word: str) -> dict[int, float]:
        return {
            s: v[part][last][word]
            for s, v in lines[name]["seeds"].items() if last in v[part]
        }  # fmt: skip

    def compare(
        text: str, better: Mapping[int, float], worse: Mapping[int, float]
    ) -> Iterator[Claim]:
        common = sorted(set(better) & set(worse))
        if common:
            yield claim(text, [better[s] for s in common], [worse[s] for s in common])

    reference = bench.reference
    others = [line.name for line in bench.lines if line.name in lines and line.name != subject]
    for name in others:
        yield from compare(
            f"{subject} has a higher normalised accuracy than {name}",
            ends(subject, "addition", "normalised"), ends(name, "addition", "normalised"),
        )  # fmt: skip
    yield from compare(
        f"{subject} has a higher absolute accuracy than {reference}",
        ends(subject, "addition", "absolute"), ends(reference, "addition", "absolute"),
    )  # fmt: skip
    for name in others:
        yield from compare(
            f"{subject} is more disentangled (lower xi at 1, 1) than {name}",
            ends(name, "disentanglement", "xi"), ends(subject, "disentanglement", "xi"),
        )  # fmt: skip
    pairs = {s: p for s in lines[subject]["seeds"]
             if (p := matched_pair(bench, record, subject, s)) is not None}  # fmt: skip
    at = "at matched single-task accuracy"
    for text, own, other, sign in (
        (f"{subject} has a higher normalised accuracy than {reference} {at}",
         "own_normalised", "reference_normalised", 1),
        (f"{subject} has a higher absolute accuracy than {reference} {at}",
         "own_absolute", "reference_absolute", 1),
        (f"{subject} is more disentangled than {reference} {at}", "own_xi", "reference_xi", -1),
        (f"{subject} changes other tasks' predictions less than {reference} {at}",
         "own_drift", "reference_drift", -1),
        (f"to first order, {subject} moves other tasks' features less than {reference}, relative "
         f"to its own, {at}", "own_elsewhere_first", "reference_elsewhere_first", -1),
        (f"{subject} trains nearer to first order than {reference} {at}", "own_bend",
         "reference_bend", -1),
    ):  # fmt: skip
        yield from compare(
            text, {s: sign * p[own] for s, p in pairs.items() if own in p},
            {s: sign * p[other] for s, p in pairs.items() if other in p},
        )  # fmt: skip
    for name in others:
        for limit in ("1", "2"):
            yield from compare(
                f"{subject}, subtracted by up to {limit}, forgets its task more than {name}",
                _targets(lines[name], limit), _targets(lines[subject], limit),
            )  # fmt: skip
    yield from _mask_claims(record, subject, compare)


def _targets(line: Record, limit: str) -> dict[int, float]:
    return {
        s: mean([t["target"] for t in v["negation"]["limits"][limit]])
        for s, v in line["seeds"].items() if v["negation"]
    }  # fmt: skip


def _mask_claims(record: Record, subject: str, compare: Any) -> Iterator[Claim]:
    masks = {s: v["masks"] for s, v in record["lines"][subject]["seeds"].items() if v["masks"]}
    for text, better, worse in (
        (f"masks of {subject} lie in queries and keys: more than 95 %",
         {s: m[QK] for s, m in masks.items()}, dict.fromkeys(masks, 0.95)),
        (f"masks of {subject} for different tasks share more than their rows and columns explain",
         {s: m["iou"] for s, m in masks.items()}, {s: m["lines"] for s, m in masks.items()}),
    ):  # fmt: skip
        yield from compare(text, better, worse)
    found = record["sensitivity"]
    if found:
        for share in next(iter(found.values()))[0]["rows"]["least"]:
            left = {
                word: {s: off([c["rows"][word][share] for c in cells])
                       for s, cells in found.items()}
                for word in ("least", "random")
            }  # fmt: skip
            yield from compare(
                f"setting the least sensitive {float(share):.0%} of one task to 0 harms other "
                "tasks less than as many random entries", left["least"], left["random"],
            )  # fmt: skip
