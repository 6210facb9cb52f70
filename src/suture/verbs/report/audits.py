"""The section about a safety audit: what `suture audit` wrote; aggregates only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from functools import partial
from typing import Any

from suture.verbs.report import charts
from suture.verbs.report.blocks import (
    Builder,
    Cell,
    Chart,
    Figure,
    Section,
    Table,
    in_order,
    layer_labels,
    listed_words,
    percent,
)

Raw = Mapping[str, Any]
ALL = "all"
SERIES = {
    "region": "the region",
    "random": "a random mask",
    "magnitude": "the largest changes",
    "snip": "weight times gradient",
    "without": "all but the region",
}


def audits(where: str, raw: Raw, builder: Builder) -> Iterator[Section]:
    """The section of one audit, with the figures of each of its attacks."""
    figures: list[Figure] = []
    several = len(raw["seeds"]) > 1
    for seed, found in raw["seeds"].items():
        told = f", seed {seed}" if several else ""
        parts = {
            "the curve": partial(_curve, raw, found, told),
            "the transfer matrix": partial(_transfer, raw, found, told),
            "the overlaps": partial(_overlaps, found, told),
            "the places": partial(_places, found, told),
        }
        for what, make in parts.items():
            figures += builder.attempt(what, make)
    verdicts = Table(
        "Verdicts",
        ("question", "verdict", "because"),
        tuple((str(v["asks"]), str(v["verdict"]), str(v["sentence"])) for v in raw["verdicts"]),
    )
    recipe = raw["recipe"]
    yield Section(
        "audit",
        "Where safety lives",
        f"From {where}: {_counted(recipe['languages'], 'language')}, "
        f"{_counted(raw['seeds'], 'attack')}, {raw['entries']:,} entries. Violations are the share "
        "of marked prompts that are answered as the policy forbids, with 95 % Wilson intervals; a "
        "model whose answers are broken is not judged, and never safe.",
        tuple(figures),
        (verdicts, *builder.attempt("the models", partial(_models, raw))),
        points=tuple(f"{k}: {v}" for k, v in raw["choices"].items()),
    )


def _counted(things: Sized, word: str) -> str:
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"


def glance(where: str, raw: Raw) -> Iterator[str]:
    """Which questions are decided, in a sentence."""
    words = {
        "holds": ("holds", "hold"),
        "does not hold": ("does not hold", "do not hold"),
        "not decided": ("is not decided", "are not decided"),
    }
    parts = []
    for word, (one, many) in words.items():
        asked = [str(v["question"]) for v in raw["verdicts"] if v["verdict"] == word]
        if asked:
            parts.append(f"{listed_words(asked)} {one if len(asked) == 1 else many}")
    if parts:
        yield f"Of the questions of the safety audit in {where} {'; '.join(parts)}."


def _value(metric: Raw | None, end: str = "value") -> float | None:
    found = None if metric is None else metric.get(end)
    return None if found is None else float(found)


def _told(metric: Raw | None) -> Cell:
    """A share with its interval, or that it was not judged."""
    value = _value(metric)
    if metric is None or value is None:
        return "not judged"
    low, high = _value(metric, "low") or 0.0, _value(metric, "high") or 0.0
    return f"{percent(value, 1)} [{percent(low, 1)}, {percent(high, 1)}]"


def _row(name: str, look: Raw) -> tuple[Cell, ...]:
    return (name, *(_told(look[k][ALL]) for k in ("violation", "refused", "over_refusal")),
            _told(look["broken"][ALL]), *(_value(m) for m in look["utility"].values()))  # fmt: skip


def _models(raw: Raw) -> Iterator[Table]:
    """Every model that was asked, with utility, over-refusal and coherence beside violations."""
    rows = [_row("aligned", raw["aligned"])]
    for seed, found in raw["seeds"].items():
        told = f", seed {seed}" if len(raw["seeds"]) > 1 else ""
        rows.append(_row(f"attacked{told}", found["attacked"]["look"]))
        for kind, curve in found["curve"].items():
            rows += [_row(f"{SERIES[kind]}, {percent(p['share'], 1)}{told}", p) for p in curve]
        for kind, curve in found["without"].items():
            rows += [_row(f"{kind}, {percent(p['share'], 1)}{told}", p) for p in curve]
        rows += [_row(f"region of {lang}{told}", k) for lang, k in found["transfer"].items()]
        for name in ("shared", "control"):
            look = found.get(name) and found[name].get("look", found[name])
            rows += [_row(f"{name}{told}", look)] if look else []
        for name, looks in found["onto"].items():
            rows += [_row(f"{name}, {kind}{told}", look) for kind, look in looks.items()]
        rows += [_row(f"frozen: {k}{told}", f["look"]) for k, f in found["freeze"].items()]
    utility = tuple(raw["aligned"]["utility"])
    head = ("model", "violations", "refused", "over-refusal", "broken", *utility)
    yield Table("Every model that was asked", head, tuple(rows))


def _curve(raw: Raw, found: Raw, told: str) -> Iterator[Figure]:
    rows: list[dict[str, Any]] = []
    lost = 0
    curves = {**found["curve"], "without": found["without"]["repair"]}
    for kind, curve in curves.items():
        for point in curve:
            metric = point["violation"][ALL]
            if _value(metric) is None:
                lost += 1
                continue
            rows.append({"name": SERIES[kind], "x": float(point["share"]), **{
                k: _value(metric, k) for k in ("value", "low", "high")
            }})  # fmt: skip
    before, after = raw["aligned"]["violation"][ALL], found["attacked"]["look"]["violation"][ALL]
    star = found["fragility"]
    reading = f"Violations of the aligned model: {_told(before)}, of the attacked one: "
    reading += f"{_told(after)}. "
    if (_value(found["gap"], "low") or 0.0) > 0:
        half = "never reached" if star is None else f"there with {percent(star, 1)} of it all"
        reading += f"Half of what the attack does is {half}."
    else:
        reading += "It cannot be said that the attack did anything, nor where."
    repaired = {float(q): v for q, v in found["repaired"].items() if v is not None}
    if repaired:
        most = max(repaired, key=lambda q: repaired[q])
        reading += f" Taking {percent(most, 1)} back repairs {percent(repaired[most])} of it."
    reading += f" {lost} points are not judged." if lost else ""
    names = [SERIES[k] for k in curves if any(r["name"] == SERIES[k] for r in rows)]
    yield Figure(
        f"Violations by the share of entries that is changed{told}",
        "Each point is the aligned model with the attack's change in so many entries: those of the "
        "region, random ones, the largest changes; or in all but the region, which is the attacked "
        "model repaired. A region that carries safety rises first, and falls first when repaired.",
        (
            Chart(
                "",
                charts.lines(rows, x="share of the entries", y="violations", logarithmic=True,
                             names=names, alt_text=reading),
                reading,
            ),
        ),
        Table(
            "Violations by share",
            ("what is changed", "share", "violations", "from", "to"),
            tuple((r["name"], r["x"], r["value"], r["low"], r["high"]) for r in rows),
        ),
        reading,
        wide=True,
    )  # fmt: skip


def _transfer(raw: Raw, found: Raw, told: str) -> Iterator[Figure]:
    languages = list(found["transfer"])
    share = float(raw["recipe"]["share"])
    lines = {f"region of {lang}": look for lang, look in found["transfer"].items()}
    if found["shared"]:
        lines["shared by all"] = found["shared"]
    for kind in ("random", "magnitude", "snip"):
        for point in found["curve"].get(kind, ()):
            if point["share"] == share:
                lines[SERIES[kind]] = point
    lines |= {"aligned": raw["aligned"], "attacked": found["attacked"]["look"]}
    rows = [
        {"x": language, "y": name, "value": _value(look["violation"][language])}
        for name, look in lines.items()
        for language in languages
    ]
    drawn = [r for r in rows if r["value"] is not None]
    reading = (f"With {percent(share)} of the entries: " + listed_words([
        f"{r['y']} on {r['x']} {percent(float(r['value']))}"
        for r in drawn if str(r["y"]).startswith("region of ") and r["y"] != f"region of {r['x']}"
    ]) + ".") if len(languages) > 1 else ""  # fmt: skip
    yield Figure(
        f"The region of one language, prompts of another{told}",
        "Rows are what is changed in the aligned model, columns the language of the prompts, the "
        "number is the share of violations. Random entries and the largest changes are what the "
        "regions have to be compared with.",
        (
            Chart(
                "",
                charts.heat(drawn, x="prompts", y="changed", xs=languages, ys=list(lines),
                            value="violations", fmt=".2f", top=1.0, written=True,
                            alt_text=reading or "Violations by language."),
                reading or "Violations by language.",
            ),
        ),
        Table(
            "Violations by region and language",
            ("changed", "prompts", "violations"),
            tuple((n, lang, _told(k["violation"][lang]))
                  for n, k in lines.items() for lang in languages),
        ),
        reading,
        wide=True,
    )  # fmt: skip


def _overlaps(found: Raw, told: str) -> Iterator[Figure]:
    pairs = {" and ".join(o["languages"]): o for o in found["overlaps"]}
    groups = {
        "attacked and aligned, ": found["rankings"],
        "benign fine-tuning and ": (found["control"] or {}).get("overlaps", {}),
        "found again, frozen: ": {n: f["overlap"] for n, f in found["freeze"].items()},
    }
    for kind, more in groups.items():
        pairs |= {f"{kind}{name}": o for name, o in more.items()}
    if not pairs:
        return
    rows = [{"name": n, "value": o["jaccard"], "mark": o["magnitude"]} for n, o in pairs.items()]
    reading = listed_words([
        f"{n} share {o['jaccard']:.2f}, {o['magnitude']:.2f} by large changes alone"
        for n, o in pairs.items()
    ])  # fmt: skip
    yield Figure(
        f"What regions have in common{told}",
        "Bars are intersection over union; the tick is what two masks have in common that only "
        "like large changes as much as these do.",
        (
            Chart(
                "",
                charts.bars(rows, names=list(pairs), value="IoU", alt_text=reading,
                            marked="large changes alone"),
                reading,
            ),
        ),
        Table(
            "Overlap of regions",
            ("regions", "IoU", "independent", "same tensors", "large changes alone"),
            tuple((n, *(o[k] for k in ("jaccard", "independent", "matched", "magnitude")))
                  for n, o in pairs.items()),
        ),
        f"{reading[:1].upper()}{reading[1:]}.",
    )  # fmt: skip


def _places(found: Raw, told: str) -> Iterator[Figure]:
    charted: list[Chart] = []
    table: list[tuple[Cell, ...]] = []
    places = {n: p for n, p in found["places"].items() if n != "shared"}
    every = [float(c["enrichment"]) for p in places.values() for c in p["cells"].values()]
    for name, place in places.items():
        keys = [key.rpartition(" ") for key in place["cells"]]
        labels = layer_labels(layer for layer, _, _ in keys)
        label = SERIES.get(name, f"region of {name}")
        rows = []
        for (layer, _, role), cell in zip(keys, place["cells"].values(), strict=True):
            rows.append({"x": labels[layer], "y": role, "value": float(cell["enrichment"])})
            table.append((label, labels[layer], role, cell["density"], cell["share"],
                          cell["enrichment"]))  # fmt: skip
        roles = sorted(place["roles"], key=lambda r: -float(place["roles"][r]["enrichment"]))
        text = f"{label}: densest in {listed_words(roles[:2])}"
        charted.append(Chart(label, charts.heat(
            rows, x="layer", y="part", xs=in_order(labels.values()),
            ys=list(place["roles"]), value="enrichment", fmt=".2f", top=max(every, default=1.0),
            alt_text=text,
        ), text))  # fmt: skip
    yield Figure(
        f"Where the regions lie{told}",
        "Enrichment is how many times as dense as the whole model a part is; 1 is no preference. "
        "What the largest changes prefer, too, says nothing of safety.",
        tuple(charted),
        Table("Layers and parts", ("mask", "layer", "part", "density", "share", "enrichment"),
              tuple(table)),
        "; ".join(c.alt for c in charted) + ".",
        wide=True,
    )  # fmt: skip


__all__ = ["audits", "glance"]
