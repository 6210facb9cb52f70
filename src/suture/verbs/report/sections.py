"""The sections of a page, in the order in which a reader asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from suture.verbs.report import arithmetic, audits, charts, masks, safety, tasks, weights
from suture.verbs.report.blocks import Builder, Cell, Chart, Figure, Section, Table, percent
from suture.verbs.report.collect import Found
from suture.verbs.report.missing import missing, summary
from suture.verbs.report.records import NOTHING, folder_of, merges, provenance
from suture.verbs.report.tunings import tunings

Raw = Mapping[str, Any]


def sections_of(found: Found) -> list[Section]:
    """Everything that was found, as sections; numbers that do not fit become notes."""
    made: list[Section] = []
    builders: list[Builder] = []

    def builder(where: str) -> Builder:
        builders.append(Builder(where))
        return builders[-1]

    made += _safety(found, builder)
    made += _evaluations(found)
    for what, records, sections_of in (
        ("it", found.benchmarks, arithmetic.arithmetic),
        ("the audit", found.audits, audits.audits),
        ("the analysis", found.analyses, weights.sections),
        ("it", found.localizations, masks.localization),
    ):
        for where, raw in records:
            one = builder(where)
            made += one.attempt(what, partial(sections_of, where, raw, one))
    made += _curves(found, builder)
    made += _maps(found, builder)
    made += tunings(found.tunings, [builder(where) for where, _ in found.tunings])
    made += merges(found, builder)
    lacking = missing(found)
    told = (*summary(lacking), *_glance(found, builder))
    made[:0] = [Section("glance", "At a glance", points=told), *lacking]
    made += builder("inputs").attempt("provenance", partial(provenance, found))
    if found.withheld:
        made.append(_withheld(found))
    notes = [*found.notes, *(note for b in builders for note in b.notes)]
    if notes:
        made.append(Section("notes", "Notes", points=tuple(notes)))
    filled = [s for s in made if s.figures or s.tables or s.points or s.steps or s.listings]
    return _distinct(filled)


def _safety(found: Found, builder: Callable[[str], Builder]) -> Iterator[Section]:
    for where, raw in found.comparisons:
        one = builder(where)
        draw = tasks.results if tasks.only_tasks(raw) else safety.comparison
        yield from one.attempt("it", partial(draw, where, raw, one))
    builders = [builder(where) for where, _ in found.realignments]
    yield from safety.realignments(found.realignments, builders)
    for where, raw in found.tables:
        yield from builder(where).attempt("it", partial(safety.benchmark, where, raw))


def _withheld(found: Found) -> Section:
    """What must not be passed on is named, and nothing of it shown."""
    return Section(
        "withheld",
        "Withheld",
        "These files are marked restricted: what they hold must not be passed on, so nothing of it "
        "is on this page.",
        points=tuple(found.withheld),
    )


def _distinct(sections: Sequence[Section]) -> list[Section]:
    """The sections with anchors and titles that differ, where there are several of a kind."""
    seen: dict[str, int] = {}
    found = []
    for section in sections:
        anchor, title = section.anchor, section.title
        for word in (anchor, title):
            seen[word] = seen.get(word, 0) + 1
        anchor += f"-{seen[anchor]}" if seen[anchor] > 1 else ""
        title += f" ({seen[title]})" if seen[title] > 1 else ""
        found.append(replace(section, anchor=anchor, title=title))
    return found


def _glance(found: Found, builder: Callable[[str], Builder]) -> Iterator[str]:
    for where, raw in found.benchmarks:
        yield from builder(where).attempt("the summary", partial(arithmetic.glance, raw))
    for where, raw in found.audits:
        yield from builder(where).attempt("the summary", partial(audits.glance, where, raw))
    for where, raw in found.comparisons:
        yield from builder(where).attempt("the summary", partial(safety.glance, where, raw))
    told = partial(safety.told, found.realignments)
    yield from builder("realignments").attempt("the summary", told)
    for where, raw in found.analyses:
        yield from builder(where).attempt("the summary", partial(weights.glance, raw))
    for where, raw in found.localizations:
        yield from builder(where).attempt("the summary", partial(masks.glance, raw))
    worst = [
        (float(loss), where)
        for where, raw in found.merges
        if isinstance(loss := _results_of(raw).get("writeback_loss"), int | float)
    ]
    if worst:
        loss, where = max(worst)
        yield (
            f"Rounding to the output dtype undid up to {percent(loss, 1)} of the entries that a "
            f"merge moved (most in {folder_of(where)})."
            if loss >= NOTHING
            else "Rounding to the output dtype lost next to nothing in any merge."
        )


def _results_of(raw: Raw) -> Raw:
    found = raw.get("results")
    return found if isinstance(found, Mapping) else {}


# -- results ---------------------------------------------------------------------------------------


def _evaluations(found: Found) -> Iterator[Section]:
    rows = [
        (result.model, name, m.name, m.value, m.low, m.high, m.n, where)
        for where, result in found.suites
        for name, evaluation in result.evaluations.items()
        for m in evaluation.metrics
    ]
    if not rows:
        return
    head = ("model", "task", "metric", "score", "from", "to", "rows", "file")
    yield Section(
        "evaluations",
        "Evaluations",
        "Results of single evaluations.",
        tables=(Table("Scores with 95 % intervals", head, tuple(rows)),),
    )


# -- curves and maps -------------------------------------------------------------------------------


def _curves(found: Found, builder: Callable[[str], Builder]) -> Iterator[Section]:
    figures: list[Figure] = []
    for where, raw in found.curves:
        figures += builder(where).attempt("the curve", partial(_curve, raw))
    yield Section("curves", "Curves", figures=tuple(figures))


def _curve(raw: Raw) -> Iterator[Figure]:
    names = [str(s["name"]) for s in raw["series"]]
    rows = [
        {
            "name": str(s["name"]),
            "x": float(p["x"]),
            "value": float(p["value"]),
            "low": p.get("low"),
            "high": p.get("high"),
        }
        for s in raw["series"]
        for p in s["points"]
    ]
    x, y, title = str(raw["x"]), str(raw["y"]), str(raw["title"])
    ends = [(s["name"], s["points"][-1]["value"]) for s in raw["series"] if s["points"]]
    alt_text = (
        f"{title}: {y} over {x}; at the end "
        + ", ".join(f"{name} {float(value):.3f}" for name, value in ends)
        + "."
    )
    explains = (
        f"How {y} changes with the share of entries that is grafted onto the base; a curve that "
        "rises early needs few entries."
        if x == "density"
        else f"How {y} changes along {x}; a hump between two ends is a barrier."
    )
    yield Figure(
        title,
        explains,
        (
            Chart(
                "",
                charts.lines(
                    rows,
                    x=x,
                    y=y,
                    logarithmic=bool(raw.get("logarithmic")),
                    names=names,
                    alt_text=alt_text,
                ),
                alt_text,
            ),
        ),
        Table(
            title,
            ("series", x, y, "from", "to"),
            tuple((r["name"], r["x"], r["value"], r["low"], r["high"]) for r in rows),
        ),
        wide=True,
    )


def _maps(found: Found, builder: Callable[[str], Builder]) -> Iterator[Section]:
    drawn: list[Chart] = []
    table: list[tuple[Cell, ...]] = []
    told = []
    for where, raw in found.maps:

        def make(raw: Raw = raw) -> list[Figure]:
            chart, rows = _map(raw)
            drawn.append(chart)
            table.extend(rows)
            told.append((float(raw["mean"]), str(raw["tasks"][0]), str(raw["tasks"][1])))
            return []

        builder(where).attempt("the map", make)
    if drawn:
        low, high = min(told), max(told)
        yield Section(
            "disentanglement",
            "Do tasks disturb each other?",
            "",
            (
                Figure(
                    "Disentanglement maps",
                    "The share of predictions, of both tasks together (0 to 2), that change when "
                    "the other task vector is added, too, over the amounts of both; the nearer to "
                    "0, the better. Maps of features have 1 - cosine of the encoder's vectors "
                    "instead. The frame holds amounts from 0 to 1.",
                    tuple(drawn),
                    Table(
                        "Disentanglement error",
                        ("first task", "amount", "second task", "amount", "xi"),
                        tuple(table),
                    ),
                    f"On average within the frame, {high[1]} and {high[2]} disturb each other most "
                    f"({high[0]:.3f})"
                    + (f", {low[1]} and {low[2]} least ({low[0]:.3f})." if low != high else "."),
                ),
            ),
        )


def _map(raw: Raw) -> tuple[Chart, list[tuple[Cell, ...]]]:
    first, second = (str(t) for t in raw["tasks"])
    amounts = [float(a) for a in raw["amounts"]]
    rows: list[dict[str, Any]] = []
    table: list[tuple[Cell, ...]] = []
    for a, line in zip(amounts, raw["error"], strict=True):
        for b, value in zip(amounts, line, strict=True):
            rows.append({"x": f"{a:g}", "y": f"{b:g}", "value": float(value)})
            table.append((first, a, second, b, float(value)))
    alt_text = f"Disentanglement error of {first} and {second}: mean {float(raw['mean']):.3f}"
    alt_text += f", at (1, 1) {float(raw['at_one']):.3f}." if raw.get("at_one") is not None else "."
    features = raw.get("metric") == "features"
    top = max(0.0 if features else 1.0, *(r["value"] for r in rows))
    spec = charts.surface(
        rows,
        xs=amounts,
        x=f"amount of {first}",
        y=f"amount of {second}",
        value="xi",
        top=top,
        alt_text=alt_text,
    )
    name = f"{first} and {second}" + (", features" if features else "")
    return Chart(name, spec, alt_text), table
