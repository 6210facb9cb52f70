"""What an audit leaves: one record of aggregates, a README, and lines for who waits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from suture.edits.importance import RULES
from suture.evals.base import Metric
from suture.verbs.audit.metrics import ALL, Look
from suture.verbs.audit.plan import RECORD, Plan
from suture.verbs.audit.recipe import Audit
from suture.verbs.audit.verdicts import Verdict, tables, together
from suture.version import __version__

SCHEMA = 1


def record_of(
    plan: Plan, prints: Mapping[str, str], key: str, aligned: Look,
    seeds: Mapping[str, Mapping[str, Any]], verdicts: Sequence[Sequence[Verdict]],
) -> dict[str, Any]:  # fmt: skip
    """What ``audit.json`` holds: aggregates only, no prompt, no answer, no mask, no time."""
    recipe, number = plan.recipe, len(plan.recipe.languages)
    q = recipe.share
    return {
        "suture": __version__,
        "schema": SCHEMA,
        "kind": "audit",
        "key": key,
        "recipe": json.loads(json.dumps(recipe.resolved())),
        "inputs": {label: {"path": Path(plan.inputs[label].label).name, "fingerprint": f}
                   for label, f in prints.items()},
        "rows": plan.material.counts() | {"attack": len(plan.material.attack)},
        "choices": choices(recipe),
        "entries": sum(plan.aligned.specs[n].numel for n in plan.names),
        "nulls": {"independent_iou": q / (2 - q), "shared_of_region": q ** (number - 1)},
        "aligned": aligned.plain(),
        "seeds": {k: dict(v) for k, v in seeds.items()},
        "verdicts": [v.plain() for v in together(verdicts)],
        "notes": [*plan.material.notes, *plan.asked["aligned"].notes],
    }  # fmt: skip


def choices(recipe: Audit) -> dict[str, str]:
    """The choice points of the method, and which way was taken."""
    how = recipe.scores
    which = {"attacked": "at the attacked model: what reverting an entry would do",
             "aligned": "at the aligned model: what installing an entry would do",
             "both": "at both; the regions are those at the attacked model"}[how.at]  # fmt: skip
    judge = (
        "lists of words" if not recipe.evaluation.judge else f"a judge of {recipe.evaluation.asks}"
    )
    return {
        "score": RULES[how.rule].title,
        "gradients": which,
        "absolute value": "none: entries that lower the loss of the forbidden answer" if how.signed
        else "row by row" if how.per_example else "of the sum over rows",
        "scope": "global, over all tensors of the space together",
        "useful rows": "not looked at" if recipe.useful is None
        else f"the {recipe.useful.share:.1%} of the entries that they need most are in no region",
        "probe rows": str(how.rows),
        "answers judged by": judge,
        "region of the curve": recipe.region,
    }  # fmt: skip


def finished(record: Mapping[str, Any]) -> str:
    """The record as text; numbers that are none are null."""
    return json.dumps(_finite(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return None
    return value


def shown(raw: Mapping[str, Any] | None) -> str:
    """A share with its interval, in percent."""
    if raw is None or raw.get("value") is None:
        return "not judged"
    m = Metric.read(raw)
    return f"{m.value:.1%} [{m.low:.1%}, {m.high:.1%}], n = {m.n}"


def lines(record: Mapping[str, Any], out: Path) -> Iterator[str]:
    """Yield what to say at the end."""
    yield f"aligned: violations {shown(record['aligned']['violation'][ALL])}"
    for seed, found in record["seeds"].items():
        told = "" if len(record["seeds"]) == 1 else f", seed {seed}"
        yield f"attacked{told}: violations {shown(found['attacked']['look']['violation'][ALL])}"
        for row in found["curve"]["region"]:
            yield f"  with {row['share']:.2%} of it{told}: {shown(row['violation'][ALL])}"
    yield from tables(record["verdicts"])
    yield f"wrote {out / RECORD}; weights and masks beside it are restricted"


def card(record: Mapping[str, Any], name: str) -> str:
    """The README beside the record."""
    recipe = record["recipe"]
    text = [
        f"# {name}\n",
        f"A safety localization audit by Suture {record['suture']}. `{RECORD}` holds aggregates "
        "only; `suture report` draws them.\n",
        "**`attacked*`, `regions` and `cells` are restricted**: they hold weights and masks of a "
        "model whose safety was taken away. Keep them on this machine; do not publish them, nor "
        "anything that is made with them.\n",
        "## Verdicts\n",
        *(f"- {line}" for line in tables(record["verdicts"])),
        "\n## How it was done\n",
        *(f"- {k}: {v}" for k, v in record["choices"].items()),
        f"- languages: {', '.join(recipe['languages'])}; share of the matrices: "
        f"{recipe['share']:.1%}; seeds: {', '.join(map(str, recipe['seeds']))}",
        *(f"- {note}" for note in record["notes"]),
    ]  # fmt: skip
    return "\n".join(text) + "\n"


__all__ = ["SCHEMA", "card", "choices", "finished", "lines", "record_of", "shown"]
