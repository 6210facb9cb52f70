"""Results and comparisons as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from suture.evals.results import SuiteResult
from suture.runs.tables import aligned, interval


def results_table(results: Sequence[SuiteResult]) -> Iterator[str]:
    """Every metric of every model with its interval, a line each; notes after them."""
    names = [result.model for result in results]
    rows = []
    for evaluation in dict.fromkeys(n for r in results for n in r.evaluations):
        held = [r.evaluations.get(evaluation) for r in results]
        metrics = dict.fromkeys(m.name for e in held if e for m in e.metrics)
        for metric in metrics:
            found = [next((m for m in e.metrics if m.name == metric), None) if e else None
                     for e in held]  # fmt: skip
            n = max(m.n for m in found if m is not None)
            rows.append([f"{evaluation}.{metric}", str(n), *map(interval, found)])
    yield from aligned(["", "n", *names], rows)
    for result in results:
        for evaluation, e in result.evaluations.items():
            for note in e.notes:
                yield f"note: {result.model}: {evaluation}: {note}"
