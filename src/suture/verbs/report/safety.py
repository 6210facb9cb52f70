"""Sections about safety: results against a gate, realignments, and tables of benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from suture.verbs.report import charts
from suture.verbs.report.blocks import (
    OUTSIDE,
    Builder,
    Cell,
    Chart,
    Figure,
    Section,
    Table,
    in_order,
    listed_words,
    number,
    percent,
)
from suture.verbs.report.tradeoff import Mark, ends_of, of_benchmark, pareto

Raw = Mapping[str, Any]
Row = dict[str, Any]
MOST = 4
"""Panels of a figure."""
SAFETY = frozenset({"refused", "safe", "harmful", "unanswered"})
"""First metrics of evaluations that ask for safety: refusals, and answers before a judge."""


# -- results against a gate ------------------------------------------------------------------------


def comparison(where: str, raw: Raw, builder: Builder) -> Iterator[Section]:
    """Base, experts and edits of one suite, and what became of the rules."""
    figures = builder.attempt("safety against utility", partial(_against, raw))
    figures += builder.attempt("the numbers", partial(_numbers, raw))
    safe = any(
        builder.attempt("it", lambda: [line["metric"] in SAFETY for line in _first_lines(raw)])
    )
    verdicts = list(raw.get("verdicts") or ())
    head = ("model", "rule", "held", "why", "value", "limit", "judged on", "from", "to")
    gate = Table(
        "What became of the rules",
        head,
        tuple(
            (str(v["edit"]), str(v["rule"]), "yes" if v["held"] else "BROKEN", _why(v), v["value"],
             v["limit"], v["margin"]["value"], v["margin"]["low"], v["margin"]["high"])
            for v in verdicts
        ),
    )  # fmt: skip
    told = [str(t) for t in raw["told"]] if raw.get("told") else list(_broken(verdicts))
    told += builder.attempt("what gains nothing", partial(_no_better, raw))
    judged = " A rule is judged on the end of an interval that speaks against it."
    yield Section(
        "safety" if safe else "comparison",
        f"{'Safety against utility' if safe else 'Comparison'}: {where.removesuffix('.json')}",
        f"From {where}: suite {raw['suite']}, 95 % intervals.{judged if verdicts else ''}",
        tuple(figures),
        (gate,) if gate.rows else (),
        points=tuple(told),
    )


def _why(verdict: Raw) -> str:
    """Why a rule is broken, in words; nothing where it is held.

    An edit may keep a rule by its value and break it by an end of its interval: then rows are too
    few to be sure.
    """
    if verdict["held"]:
        return ""
    if verdict.get("reason"):
        return str(verdict["reason"])
    value, limit = verdict["value"], verdict["limit"]
    sign = next((s for s in (">=", "<=", ">", "<") if s in str(verdict["rule"])), "")
    if value is None or limit is None or not sign:
        return "nothing to judge by"
    value, limit = float(value), float(limit)
    kept = {">=": value >= limit, "<=": value <= limit, ">": value > limit, "<": value < limit}
    if not kept[sign]:
        return f"the value {'lies on' if value == limit else 'lies ' + SIDE[sign[0]]} the limit"
    low = sign[0] == ">"
    end = verdict["margin"]["low" if low else "high"]
    return (
        f"the value keeps it, but the {'lower' if low else 'upper'} end of its interval, "
        f"{number(end)} under judged on, does not: too few rows to be sure"
    )


SIDE = {">": "below", "<": "above"}
"""On which side of its limit a value lies that breaks a rule."""


def _no_better(raw: Raw) -> Iterator[str]:
    """Where neither an expert nor an edit clearly beats the base, a sentence each."""
    base = next((m for m, role in raw["models"].items() if role == "base"), None)
    for line in _first_lines(raw):
        others = {m: d for m, d in line["differences"].items() if m != base}
        ends = [
            d["low"] if line["better"] == "higher" else -float(d["high"])
            for d in others.values() if d["low"] is not None and d["high"] is not None
        ]  # fmt: skip
        if ends and base in line["values"] and not any(float(end) > 0 for end in ends):
            name = f"{line['evaluation']}.{line['metric']}"
            yield (
                f"In {name} no other model is clearly better than the base "
                f"({number(line['values'][base]['value'])})."
            )


def glance(where: str, raw: Raw) -> Iterator[str]:
    """How many edits pass, and where nothing beats the base, a sentence each."""
    for told in _no_better(raw):
        yield f"{where.removesuffix('.json')}: {told[:1].lower()}{told[1:]}"
    edits = list(dict.fromkeys(str(v["edit"]) for v in raw.get("verdicts") or ()))
    if edits:
        broken = {str(v["edit"]) for v in raw["verdicts"] if not v["held"]}
        passed = [e for e in edits if e not in broken]
        yield (
            f"Of {len(edits)} edit{'s' if len(edits) > 1 else ''} of the suite {raw['suite']}, "
            f"{len(passed)} keep{'s' if len(passed) == 1 else ''} all rules"
            + (f": {listed_words(passed)}." if passed else ".")
        )


def _broken(verdicts: Sequence[Raw]) -> Iterator[str]:
    """For every edit which rules it keeps or breaks, a sentence each."""
    for edit in dict.fromkeys(str(v["edit"]) for v in verdicts):
        broken = [str(v["rule"]) for v in verdicts if v["edit"] == edit and not v["held"]]
        yield f"{edit} breaks {listed_words(broken)}." if broken else f"{edit} keeps every rule."


def _against(raw: Raw) -> Iterator[Figure]:
    kept, roles = raw.get("kept") or {}, raw["models"]
    for safe in (True, False):
        lines = [
            line for line in _first_lines(raw)
            if not line.get("utility") and (line["metric"] in SAFETY) == safe
        ]  # fmt: skip
        yield from _traded_off(lines[:MOST], kept, roles, safe=safe)


def _traded_off(lines: Sequence[Raw], kept: Raw, roles: Raw, *, safe: bool) -> Iterator[Figure]:
    """Measures against the utility that is kept; of safety only where they ask for it."""
    panels: dict[str, list[Mark]] = {}
    better: dict[str, tuple[str, str]] = {}
    for line in lines:
        name = f"{line['evaluation']}: {line['metric']}"
        points = [
            Mark(str(m), str(roles[m]), float(kept[m]["value"]), float(v["value"]),
                  ends_of(kept[m]), ends_of(v), roles[m] == "edit")
            for m, v in line["values"].items() if m in kept and v["value"] is not None
        ]  # fmt: skip
        if points:
            panels[name], better[name] = points, ("higher", str(line["better"]))
    if panels:
        yield pareto(
            panels, x="utility kept", better=better,
            title="Safety against utility" if safe else "Other measures against utility",
            explains="Each mark is a model, its lines 95 % intervals. To the right it keeps more "
            "of what the experts can do: its number over that of the best expert, in its weakest "
            "skill. What runs up is named over each panel; further up is always better.",
        )  # fmt: skip


def _first_lines(raw: Raw) -> Iterator[Raw]:
    """The metric of every evaluation that models are compared by."""
    seen = set()
    for line in raw["lines"]:
        if line["evaluation"] not in seen:
            seen.add(line["evaluation"])
            yield line


def _numbers(raw: Raw) -> Iterator[Figure]:
    roles, drawn = raw["models"], list[Chart]()
    for line in _first_lines(raw):
        name = f"{line['evaluation']}: {line['metric']}"
        rows = [
            {"name": m, "kind": roles[m], "value": v["value"], "low": v["low"], "high": v["high"],
             "n": v["n"]}
            for m, v in line["values"].items() if v["value"] is not None
        ]  # fmt: skip
        less = " (less is better)" if line["better"] == "lower" else ""
        told = f"{name}{less}: " + ", ".join(f"{r['name']} {float(r['value']):.2f}" for r in rows)
        spec = charts.intervals(rows, names=list(roles), value=line["metric"], alt_text=told,
                                kinds=("base", "expert", "edit"))  # fmt: skip
        drawn.append(Chart(f"{name}{less}", spec, told))
    table = tuple(
        (f"{line['evaluation']}.{line['metric']}", str(m), str(roles[m]), v["value"], v["low"],
         v["high"], v["n"])
        for line in raw["lines"] for m, v in line["values"].items()
    )  # fmt: skip
    yield Figure(
        "Every number with its interval",
        "One panel an evaluation, one row a model: the dot is the first metric, the line its "
        "95 % interval. The table has all metrics.",
        tuple(drawn),
        Table("Every number", ("metric", "model", "role", "value", "from", "to", "rows"), table),
    )


def benchmark(where: str, raw: Raw) -> Iterator[Section]:
    """A table of ``benchmarks/`` that has refusals beside utility."""
    yield Section("safety", "Safety against utility", f"From {where}.", (of_benchmark(raw),))


# -- realignments ----------------------------------------------------------------------------------


def realignments(found: Sequence[tuple[str, Raw]], builders: Sequence[Builder]) -> list[Section]:
    """A section for each set of models and rows that realignments were made of."""
    groups: dict[str, list[tuple[str, Raw, Builder]]] = {}
    for (where, raw), builder in zip(found, builders, strict=True):
        for key in builder.attempt("it", partial(_group, raw)):
            groups.setdefault(key, []).append((where, raw, builder))
    made = []
    for group in groups.values():
        names = {where: where.rpartition("/")[0] or where for where, _, _ in group}
        outputs = {names[where]: raw["results"] for where, raw, _ in group}
        recipes = {names[where]: raw["recipe"] for where, raw, _ in group}
        builder = group[0][2]
        made += builder.attempt("realignments", partial(_realigned, outputs, recipes, builder))
    return made


def _group(raw: Raw) -> Iterator[str]:
    """What must agree for scores to be comparable: the models, how they are fused, the rows."""
    prints = {label: one["fingerprint"] for label, one in raw["inputs"].items()
              if label == "aligned" or label.startswith("models.")}  # fmt: skip
    recipe = raw["recipe"]
    weights = {name: one["weight"] for name, one in recipe.get("models", {}).items()}
    rows = {side: hashed for side, hashed in raw.get("data", {}).items() if side != "train"}
    yield json.dumps([prints, recipe.get("fuse"), weights, rows], sort_keys=True)


def _realigned(
    outputs: Mapping[str, Raw], recipes: Mapping[str, Raw], builder: Builder
) -> Iterator[Section]:
    figures = builder.attempt("scores", partial(_scores, outputs))
    figures += builder.attempt("safety against utility", partial(_traded, outputs))
    figures += builder.attempt("the mask", partial(_profile, outputs))
    figures += builder.attempt("training", partial(_losses, outputs))
    head = ("output", "method", "safety that came back", "utility that is left", "harmonic mean",
            "steps")  # fmt: skip
    rows = tuple(
        (name, str(recipes[name].get("method")), *(
            (r.get("retention") or {}).get(k) for k in ("safety", "utility", "harmonic")
        ), r.get("steps"))
        for name, r in outputs.items()
    )  # fmt: skip
    yield Section(
        "realignment",
        "Realignment: what came back of safety",
        "Aligned is the safe model, tuned what fine-tuning made of it, the others are what "
        "realignment made of both.",
        tuple(figures),
        (Table("Realignments", head, rows),),
    )


def told(found: Sequence[tuple[str, Raw]]) -> Iterator[str]:
    """Which realignment of the same models and rows brings back most, in a sentence each."""
    groups: dict[str, list[tuple[float, str, Raw]]] = {}
    for where, raw in found:
        mean = (raw["results"].get("retention") or {}).get("harmonic")
        if mean is not None:
            name = where.rpartition("/")[0] or where
            one = (float(mean), name, raw["results"]["retention"])
            groups.setdefault(next(_group(raw)), []).append(one)
    for means in groups.values():
        _, name, best = max(means, key=lambda m: m[0])
        which = f"Of {len(means)} realignments of the same models, {name} does best"
        which = f"Realignment in {name}" if len(means) == 1 else which
        yield (
            f"{which}: {percent(best['safety'])} of the margin that was lost came back, "
            f"{percent(best['utility'])} of the gained utility is left."
        )


KINDS = ("aligned", "tuned", "realigned")
METRICS = {
    "margin": "log-probability of the safe answer less that of the unsafe one, a token",
    "preferred": "share of pairs in which the safe answer is likelier",
    "utility": "loss a token on rows of what the model is for; less is better",
}


def _models(outputs: Mapping[str, Raw]) -> list[tuple[str, str, Raw]]:
    """Name, kind and scores: the aligned and the tuned model once, then every output."""
    first = next(iter(outputs.values()))["scores"]
    both = [(m, m, first[m]) for m in ("aligned", "tuned") if m in first]
    own = [(name, "realigned", r["scores"]["realigned"]) for name, r in outputs.items()
           if "realigned" in r["scores"]]  # fmt: skip
    return [*both, *own]


def _scores(outputs: Mapping[str, Raw]) -> Iterator[Figure]:
    models = _models(outputs)
    drawn, table = list[Chart](), list[tuple[Cell, ...]]()
    for metric, about in METRICS.items():
        rows = [
            {"name": name, "kind": kind, **{k: s[metric][k] for k in ("value", "low", "high", "n")}}
            for name, kind, s in models if metric in s
        ]  # fmt: skip
        if not rows:
            continue
        words = ", ".join(f"{r['name']} {float(r['value']):.3g}" for r in rows)
        alt_text = f"{metric}, {about}: {words}."
        spec = charts.intervals(rows, names=[r["name"] for r in rows], value=metric,
                                alt_text=alt_text, kinds=KINDS)  # fmt: skip
        drawn.append(Chart(f"{metric}: {about}", spec, alt_text))
        table += [(metric, r["name"], r["value"], r["low"], r["high"], r["n"]) for r in rows]
    if drawn:
        yield Figure(
            "Safety and utility, before and after",
            "One panel a measure, one row a model: the dot is the value, the line its 95 % "
            "interval. Realignment is to move what was tuned back to the aligned model in "
            "margin, and to leave it where it is in utility.",
            tuple(drawn),
            Table("Scores", ("measure", "model", "value", "from", "to", "rows"), tuple(table)),
        )


def _traded(outputs: Mapping[str, Raw]) -> Iterator[Figure]:
    points = [
        Mark(name, kind, float(s["utility"]["value"]), float(s["margin"]["value"]),
              ends_of(s["utility"]), ends_of(s["margin"]), kind == "realigned")
        for name, kind, s in _models(outputs) if {"utility", "margin"} <= s.keys()
    ]  # fmt: skip
    if points:
        yield pareto(
            {"margin": points}, x="loss a token on utility rows",
            title="Safety against utility", better={"margin": ("lower", "higher")},
            explains="Each mark is a model, its lines 95 % intervals: to the right it does better "
            "what it was tuned for, further up it prefers safe answers more clearly.",
        )  # fmt: skip


def _profile(outputs: Mapping[str, Raw]) -> Iterator[Figure]:
    held = {name: r["profile"] for name, r in outputs.items() if r.get("profile")}
    drawn, table = list[Chart](), list[tuple[Cell, ...]]()
    for name, parts in held.items():
        rows: list[Row] = [
            {"x": OUTSIDE if p["layer"] is None else str(p["layer"]), "y": str(p["role"]),
             "value": float(p["mean"])} for p in parts
        ]  # fmt: skip
        xs = in_order(r["x"] for r in rows)
        ys = list(dict.fromkeys(r["y"] for r in rows))
        least, most = (choose(rows, key=lambda r: float(r["value"])) for choose in (min, max))
        alt_text = (
            f"{name}: least of the tuned change is left in {least['y']} of layer {least['x']} "
            f"({percent(float(least['value']), 1)}), most in {most['y']} of layer {most['x']} "
            f"({percent(float(most['value']), 1)})."
        )
        spec = charts.heat(rows, x="layer", y="role", xs=xs, ys=ys, value="left", fmt=".2f",
                           top=1.0, alt_text=alt_text)  # fmt: skip
        drawn.append(Chart(name, spec, alt_text))
        table += [(name, p["layer"], str(p["role"]), p["mean"], p["entries"]) for p in parts]
    if drawn:
        yield Figure(
            "Where the tuned change may stay",
            "The mean of the mask by layer and role: 1 keeps what fine-tuning did, 0 falls back to "
            "the aligned model. A mask that is the same everywhere has learnt no place.",
            tuple(drawn),
            Table("Mean of the mask", ("output", "layer", "role", "mean", "entries"), tuple(table)),
            " ".join(c.alt for c in drawn),
            wide=True,
        )


def _losses(outputs: Mapping[str, Raw]) -> Iterator[Figure]:
    rows: list[Row] = [
        {"name": name, "x": float(step), "value": float(loss)}
        for name, r in outputs.items() for step, loss in r.get("curve") or ()
    ]  # fmt: skip
    if rows:
        names = list(dict.fromkeys(str(r["name"]) for r in rows))
        alt_text = "Loss on the pairs by step: " + ", ".join(
            f"{n} ends at {[r['value'] for r in rows if r['name'] == n][-1]:.3g}" for n in names
        ) + "."  # fmt: skip
        yield Figure(
            "Loss while the mask was learned",
            "DPO's loss on the training pairs, step by step; log 2 is where nothing is learnt yet.",
            (Chart("", charts.lines(rows, x="step", y="loss", logarithmic=False, names=names,
                                    alt_text=alt_text), alt_text),),
            Table("Loss by step", ("output", "step", "loss"),
                  tuple((str(r["name"]), r["x"], r["value"]) for r in rows)),
            wide=True,
        )  # fmt: skip


__all__ = ["benchmark", "comparison", "glance", "realignments", "told"]
