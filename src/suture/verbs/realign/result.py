"""What a realignment has done: the report, its table, the card and the record beside the output."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from suture.checkpoints.checkpoint import is_from_hub
from suture.evals.base import Metric
from suture.runs.card import licence_of, model_name, open_ones, restricted_note, tags
from suture.runs.place import SCHEMA
from suture.tensors.roles import role_of
from suture.tensors.spec import readable
from suture.training.data import data_digest
from suture.verbs.realign.base import Scores
from suture.verbs.realign.plan import Plan
from suture.version import __version__


@dataclass(frozen=True)
class RealignReport:
    """What a realignment has done and what it cost."""

    out: Path
    method: str
    fingerprint: str
    """Of the output."""
    scores: Mapping[str, Scores]
    """Of the models ``aligned``, ``tuned`` (their fusion, as it came) and ``realigned``."""
    retention: Mapping[str, float | None]
    """``safety``: how much of the margin that was lost came back; ``utility``: the share of the
    gain over the aligned model that is left; ``harmonic``: their harmonic mean."""
    steps: int
    losses: tuple[float, ...]
    """Mean losses of the first and the last steps."""
    best: int | None
    """The step whose masks were kept, where ``patience`` asks for the best."""
    changed: int
    """Entries of the tensors that may change."""
    seconds: Mapping[str, float]
    peak_memory: int
    facts: Mapping[str, Any]
    notes: tuple[str, ...]
    restricted: bool
    """Whether it must not be passed on, because an input must not."""
    curve: tuple[tuple[float, float], ...] = ()
    """Where training was, in steps, and the mean loss of the steps since the point before."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "out": str(self.out)}


def retention(scores: Mapping[str, Scores]) -> dict[str, float | None]:
    """What came back of safety and what is left of utility, 1 for all of it.

    Safety is ``(realigned - tuned) / (aligned - tuned)`` of the margin; utility is
    ``(aligned - realigned) / (aligned - tuned)`` of the loss. ``None`` where nothing was lost, or
    nothing was gained.
    """
    if len(scores) < 3:
        return {"safety": None, "utility": None, "harmonic": None}

    def between(name: str, one: str, other: str, sign: float) -> float | None:
        if not all(name in scores[m] for m in scores):
            return None
        value = {m: scores[m][name].value for m in scores}
        whole = sign * (value[one] - value[other])
        return sign * (value["realigned"] - value[other]) / whole if whole > 0 else None

    safety = between("margin", "aligned", "tuned", 1.0)
    utility = between("utility", "tuned", "aligned", -1.0)
    harmonic = None
    if safety is not None and utility is not None:
        positive = safety > 0 and utility > 0
        harmonic = 2 * safety * utility / (safety + utility) if positive else 0.0
    return {"safety": safety, "utility": utility, "harmonic": harmonic}


def nothing_lost(scores: Mapping[str, Scores]) -> tuple[str, ...]:
    """Why a retention will be missing: the tuned model lost no margin, or gained no utility."""
    told = []
    for name, why in (
        ("margin", "the tuned model prefers safe answers no less than the aligned one ({} "
         "against {} a token), so there is nothing to bring back; are the columns of `chosen` and "
         "`rejected` exchanged?"),
        ("utility", "the tuned model is no better than the aligned one on the utility rows "
         "(loss {} against {}), so there is no gain to keep"),
    ):  # fmt: skip
        if scores and name in scores["tuned"]:
            tuned, aligned = (scores[model][name].value for model in ("tuned", "aligned"))
            if aligned <= tuned:  # a margin that is lost and a loss that is gained both fall
                told.append(why.format(f"{tuned:.4g}", f"{aligned:.4g}"))
    return tuple(told)


MOST = 200
"""Points of a curve of losses."""


def curve_of(losses: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """The losses of all steps as at most ``MOST`` points: the last step and the mean of each."""
    each = max(1, -(-len(losses) // MOST))
    parts = [losses[at : at + each] for at in range(0, len(losses), each)]
    ends = [min(len(losses), at + each) for at in range(0, len(losses), each)]
    return tuple((float(end), sum(p) / len(p)) for end, p in zip(ends, parts, strict=True))


def profile_of(shares: Mapping[str, tuple[float, int]]) -> list[dict[str, Any]]:
    """How much of the tuned change may stay, by layer and role, averaged over entries.

    Factors of a tensor, ``NAME:left`` and ``NAME:right``, count for the tensor. The layer is
    ``None`` outside of blocks.
    """
    held: dict[tuple[int, str], list[tuple[float, int]]] = {}
    for key, share in shares.items():
        role = role_of(key.partition(":")[0])
        layer = -1 if role.layer is None else role.layer
        held.setdefault((layer, role.kind), []).append(share)
    found = []
    for (layer, kind), parts in sorted(held.items()):
        entries = sum(n for _, n in parts)
        mean = sum(m * n for m, n in parts) / max(1, entries)
        found.append({"layer": None if layer < 0 else layer, "role": kind, "mean": mean,
                      "entries": entries})  # fmt: skip
    return found


def lines(report: RealignReport, out: Path) -> Iterator[str]:
    """Yield the notes, then a table: what it is, and its value."""
    yield from (f"note: {note}" for note in report.notes)
    yield from (f"{key:<22}{text}" for key, text in _rows(report))


def _rows(report: RealignReport) -> list[tuple[str, str]]:
    rows = [("method", report.method)]
    if report.losses:
        ends = f"{report.losses[0]:.4f} -> {report.losses[-1]:.4f} in {report.steps} steps"
        rows.append(("loss", ends))
    for model, scores in report.scores.items():
        rows += [(f"{name}, {model}", _shown(metric)) for name, metric in scores.items()]
    for word, value in report.retention.items():
        if value is not None:
            rows.append((f"retention, {word}", _percent(value)))
    rows += [(word, _fact(value)) for word, value in report.facts.items()
             if not isinstance(value, list)]  # fmt: skip
    rows.append(("time", ", ".join(f"{v:.1f} s {k}" for k, v in report.seconds.items())))
    rows.append(("peak memory", readable(report.peak_memory)))
    rows.append(("output", f"{report.out}, fingerprint {report.fingerprint}"))
    if report.restricted:
        rows.append(("restricted", "this output must not be passed on"))
    return rows


def _percent(value: float) -> str:
    """One decimal; never a zero with a sign."""
    return f"{round(value, 3) + 0.0:.1%}"


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{word} {_fact(v)}" for word, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shown(metric: Metric) -> str:
    return f"{metric.value:.4f} [{metric.low:.4f}, {metric.high:.4f}], n = {metric.n}"


def provenance(
    plan: Plan, report: RealignReport, fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """What ``suture.json`` holds."""
    places = {label: _place(c, plan.out) for label, c in plan.inputs.items()}
    recipe = plan.recipe.resolved()
    for label, path in places.items():
        if label.startswith("models."):
            recipe["models"][label.removeprefix("models.")]["path"] = path
        else:
            recipe[label] = path
    for spec in (recipe["data"], recipe["utility"]):
        for side in ("train", "validation", "test", "rows") if spec else ():
            if isinstance(spec.get(side), dict) and not spec[side]["split"]:
                spec[side]["path"] = Path(spec[side]["path"]).name  # of files, not where they were
    return {
        "suture": __version__,
        "schema": SCHEMA,
        "kind": "realign",
        "form": "plain",
        **({"restricted": True} if report.restricted else {}),
        "recipe": recipe,
        "inputs": {
            label: {"path": places[label], "fingerprint": fingerprints[label]} for label in places
        },
        "data": digests(plan),
        "output": {"fingerprint": report.fingerprint},
        "results": {
            "steps": report.steps,
            "losses": list(report.losses),
            "curve": [list(point) for point in report.curve],
            "best": report.best,
            "scores": {m: {k: asdict(v) for k, v in s.items()} for m, s in report.scores.items()},
            "retention": dict(report.retention),
            **report.facts,
        },
        "versions": {tool: version(tool) for tool in ("torch", "transformers")},
    }


def digests(plan: Plan) -> dict[str, str]:
    """Hashes of the tokenised rows."""
    sides = {} if plan.rows is None else {
        "train": plan.rows.train.rows,
        "validation": plan.rows.validation.rows,
        "test": plan.rows.test.rows,
    }  # fmt: skip
    if plan.utility is not None:
        sides["utility"] = plan.utility
    if plan.choosing is not None:
        sides["utility validation"] = plan.choosing
    return {side: data_digest(rows) for side, rows in sides.items()}


def _place(checkpoint: Any, out: Path) -> str:
    if is_from_hub(checkpoint):
        return str(checkpoint.label)
    own = [os.path.relpath(a.folder, out.resolve()) for a in checkpoint.adapters]
    return "+".join([os.path.relpath(checkpoint.path, out.resolve()), *own])


def restricted(plan: Plan) -> bool:
    """Whether the output must not be passed on: so it was asked, or an input is restricted."""
    return plan.options.restricted or any(c.restricted for c in plan.inputs.values())


def key_of(plan: Plan, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What decides the bytes of a run, as plain data; where files lie does not."""
    recipe = plan.recipe.resolved()
    places = ("aligned", "base", "safety", "output", "device", "data", "utility", "ancestor")
    recipe |= dict.fromkeys(places, "")
    recipe["models"] = dict(plan.recipe.weights)
    how = recipe["training"]
    recipe["training"] = {k: v for k, v in how.items() if not k.startswith("activations")}
    text = json.dumps(recipe, sort_keys=True, default=str)
    return {
        "recipe": hashlib.sha256(text.encode()).hexdigest(),
        "inputs": dict(fingerprints),
        "rows": digests(plan),
    }


def card(plan: Plan, record: Mapping[str, Any], name: str) -> str:
    """The README of a realigned model: front matter for the hub, then what was done, in words."""
    method = plan.recipe.line
    secret = record.get("restricted") is True
    named = open_ones(list(plan.inputs.values()))
    front: dict[str, Any] = {
        "tags": tags("realignment", restricted=secret),
        "library_name": "transformers",
        "base_model": [model_name(c) for c in named],
    }
    licences = {licence_of(c) for c in named}
    if len(licences) == 1 and None not in licences:
        front["license"] = licences.pop()
    results = record["results"]
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        f"Realigned with Suture {record['suture']} by **{method.title}** ({method.paper}).\n",
        f"{method.equation}\n",
        "| model | what it is |\n|---|---|",
        *(f"| {'withheld' if c.restricted else model_name(c)} | {label} |"
          for label, c in plan.inputs.items()),
        "",
        *([restricted_note([n for n, c in plan.inputs.items() if c.restricted])] if secret else []),
        "## Result\n",
    ]  # fmt: skip
    scores = {} if secret else results["scores"]
    if scores:
        metrics = list(scores["realigned"])
        lines += [
            f"| | {' | '.join(metrics)} |",
            f"|---|{'---|' * len(metrics)}",
            *(f"| {m} | {' | '.join(_shown(Metric.read(s[k])) for k in metrics)} |"
              for m, s in scores.items()),
            "",
            "margin: mean of log p(safe) - log p(unsafe) a token of the answer; preferred: share "
            "of pairs in which it is positive; utility: loss a token.\n",
        ]  # fmt: skip
    for word, value in results["retention"].items():
        if value is not None and not secret:
            lines.append(f"- retention, {word}: {_percent(value)}")
    lines.append(f"- output fingerprint `{record['output']['fingerprint']}`")
    return "\n".join(lines) + "\n"


__all__ = [
    "RealignReport",
    "card",
    "curve_of",
    "digests",
    "key_of",
    "lines",
    "nothing_lost",
    "profile_of",
    "provenance",
    "restricted",
    "retention",
]  # fmt: skip
