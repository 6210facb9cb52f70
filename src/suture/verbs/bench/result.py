"""From the record of finished cells to tables, curves and claims; plain data in, plain data out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from suture.analysis.maps import Curve, Point, Series
from suture.verbs.bench.claims import QK, Record, claims, matched_pair, mean, off
from suture.verbs.bench.maths import Spread, spread
from suture.verbs.bench.recipe import Bench

POINTS = {
    "addition": ("single_mean", "absolute", "normalised"),
    "disentanglement": ("xi",),
    "movement": ("own", "elsewhere", "elsewhere_first", "bend"),
}
"""What is kept of every checkpoint."""
WORDS = (("single_mean", 1), ("absolute", 1), ("normalised", 1), ("xi", 3))
"""Columns of tables, and their digits."""


def results(
    bench: Bench, record: Record, versions: Mapping[str, str], fingerprint: str
) -> dict[str, Any]:
    """Everything that a reader needs, as plain data; what is not finished is left out."""
    names = [t.name for t in bench.tasks]
    start = list(record["base"].values())
    base: dict[str, Any] = {
        name: spread([s["test"][i] for s in start]).to_dict()
        for i, name in enumerate(t.name for t in bench.everything)
    } if start else {}  # fmt: skip
    lines = {n: _line(bench, record, n, held) for n, held in record["lines"].items()}
    judged = list(claims(bench, record))
    return {
        "kind": "bench",
        "title": f"Task arithmetic over {len(names)} tasks, {len(start)} seed(s)",
        "recipe": bench.resolved(),
        "tasks": {t.name: t.about for t in bench.everything},
        "rows": start[0]["rows"] if start else {},
        "base": base,
        "lines": lines,
        "claims": [{**asdict(c), "difference": c.difference.to_dict()} for c in judged],
        "sensitivity": _sensitivity(record["sensitivity"]),
        "versions": {**versions, "base": fingerprint},
    }


def _line(bench: Bench, record: Record, name: str, held: Record) -> dict[str, Any]:
    last = len(bench.checkpoints) - 1
    seeds = held["seeds"]
    added = {s: v["addition"][last] for s, v in seeds.items() if last in v["addition"]}
    mixed = {s: v["disentanglement"][last] for s, v in seeds.items()
             if last in v["disentanglement"]}  # fmt: skip
    removed = {s: v["negation"] for s, v in seeds.items() if v["negation"]}
    found: dict[str, Any] = {
        "lr": held["lr"], "choice": held["choice"], "seeds": sorted(seeds),
        "trained": next(f["trained"] for v in seeds.values() for f in v["facts"]),
        "validation": [spread([v["validation"][i] for v in seeds.values()]).to_dict()
                       for i in range(last + 1)],
    }  # fmt: skip
    if added:
        found["alphas"] = {str(s): v["alpha"] for s, v in added.items()}
        for word in ("single_mean", "absolute", "normalised"):
            found[word] = spread([v[word] for v in added.values()]).to_dict()
        found["tasks"] = {
            task.name: {
                "single": spread([v["single"][i] for v in added.values()]).to_dict(),
                "added": spread([v["test"][i] for v in added.values()]).to_dict(),
            }
            for i, task in enumerate(bench.tasks)
        }
    if mixed:
        for word in ("xi", "xi_mean"):
            found[word] = spread([v[word] for v in mixed.values()]).to_dict()
        for word in ("transfer", "drift"):
            found[word] = _mean_matrix([v[word] for v in mixed.values()])
        found["off_drift"] = spread([off(v["drift"]) for v in mixed.values()]).to_dict()
    moved = [v["movement"][last] for v in seeds.values() if last in v["movement"]]
    if moved:
        found["movement"] = {w: spread([m[w] for m in moved]).to_dict() for w in POINTS["movement"]}
    if removed:
        found["negation"] = {
            limit: {
                word: spread([mean([t[word] for t in v["limits"][limit]])
                              for v in removed.values()]).to_dict()
                for word in ("target", "control", "alpha")
            }
            for limit in next(iter(removed.values()))["limits"]
        }  # fmt: skip
        found["negation"]["base"] = {
            "target": mean([mean(v["base"]) for v in removed.values()]),
            "control": mean([v["control"] for v in removed.values()]),
        }
    masks = [v["masks"] for v in seeds.values() if v["masks"]]
    if masks:
        words = (QK, "iou", "random", "tensors", "lines")
        found["masks"] = {w: spread([m[w] for m in masks]).to_dict() for w in words}
        found["masks"]["ceiling"] = record["ceiling"].get(name)
        found["masks"]["cells"] = masks[0]["cells"]
    found["points"] = _points_of(bench, seeds)
    tried = [matched_pair(bench, record, name, s) for s in seeds if "matched" in seeds[s]]
    pairs = [p for p in tried if p is not None]
    if pairs:
        found["matched"] = {
            word: spread([p[word] for p in pairs]).to_dict()
            for word in pairs[0] if word not in ("steps", "within")
        }  # fmt: skip
        found["matched"]["steps"] = [p["steps"] for p in pairs]
        found["matched"]["within"] = [p["within"] for p in pairs]
    return found


def _points_of(bench: Bench, seeds: Mapping[int, Record]) -> list[dict[str, Any]]:
    """Every checkpoint that was measured on all seeds, in the order of training."""
    found = []
    for point, share in enumerate(bench.checkpoints):
        row: dict[str, Any] = {"share": share}
        for part, words in POINTS.items():
            held = [v[part][point] for v in seeds.values() if point in v[part]]
            if len(held) == len(seeds):
                row |= {word: spread([h[word] for h in held]).to_dict() for word in words}
        if len(row) > 1:
            found.append(row)
    return found


def _mean_matrix(found: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    return [[round(mean(cells), 4) for cells in zip(*rows, strict=True)]
            for rows in zip(*found, strict=True)]  # fmt: skip


def _sensitivity(record: Record) -> dict[str, Any]:
    """Accuracies left, on the task itself and on the others, by what was set to 0."""
    if not record:
        return {}
    found: dict[str, Any] = {}
    for word in ("least", "random", "most"):
        for share in next(iter(record.values()))[0]["rows"][word]:
            own = [mean([cell["rows"][word][share][t] for t, cell in enumerate(cells)])
                   for cells in record.values()]  # fmt: skip
            others = [off([cell["rows"][word][share] for cell in cells])
                      for cells in record.values()]  # fmt: skip
            found.setdefault(word, {})[share] = {
                "own": spread(own).to_dict(), "others": spread(others).to_dict()
            }  # fmt: skip
    return found


# -- words -----------------------------------------------------------------------------------------


def lines(record: Mapping[str, Any], out: Path) -> Iterator[str]:
    """Yield what to say at the end."""
    yield markdown(record)
    yield f"wrote {out / 'results.json'} and {out / 'results.md'}"


def markdown(found: Mapping[str, Any]) -> str:
    """The tables as a page."""
    recipe, lines = found["recipe"], found["lines"]
    seeds = max((len(v["seeds"]) for v in lines.values()), default=0)
    state = "" if found.get("complete") else " **Not complete yet.**"
    parts = [
        f"# {found['title']}", "",
        f"Base {recipe['base']}, heads {recipe['head']} and frozen; up to {seeds} seeds, mean and "
        f"half the width of the 95 % t interval.{state}", "",
        "## Addition and disentanglement", "",
        "`single` is the mean accuracy of single models, `absolute` that of their sum, "
        "`normalised` the mean ratio of both; `xi` the disentanglement error at (1, 1), from 0 "
        "to 2; `drift` the share of predictions on other tasks that one vector changes.", "",
    ]  # fmt: skip
    head = ["strategy", "lr", "entries", "single", "absolute", "normalised", "alpha", "xi", "drift"]
    rows = []
    base = [found["base"][t]["mean"] for t in recipe["tasks"]] if found["base"] else []
    if base:
        rows.append(["base", "", "", _points(mean(base)), "", "", "", "", ""])
    for name, line in lines.items():
        if "absolute" in line or "xi" in line:
            alphas = ", ".join(f"{a:g}" for a in line.get("alphas", {}).values())
            rows.append([
                name, f"{line['lr']:g}", f"{line['trained']:,}", _cell(line.get("single_mean")),
                _cell(line.get("absolute")), _cell(line.get("normalised")), alphas,
                _cell(line.get("xi"), 3), _cell(line.get("off_drift"), 3),
            ])  # fmt: skip
    parts += _table(head, rows)
    parts += _matched_table(recipe, lines)
    parts += _point_table(recipe, lines)
    parts += _movement_table(lines)
    parts += _negation_table(lines)
    parts += _mask_table(lines)
    parts += _transfer_tables(recipe, lines)
    if found["sensitivity"]:
        parts += ["", "## Do tasks share their insensitive weights?", "",
                  "Accuracy left, as a share of the base's, when entries chosen by one task are "
                  "set to 0: on that task, and on the others.", ""]  # fmt: skip
        parts += _table(
            ["entries set to 0", "share", "own task", "other tasks"],
            [[word, share, _cell(v["own"], 3), _cell(v["others"], 3)]
             for word, shares in found["sensitivity"].items() for share, v in shares.items()],
        )  # fmt: skip
    if found["claims"]:
        parts += ["", "## Claims", "", "Paired differences over seeds; positive ones speak for the "
                  "claim. A claim holds where the interval lies above 0.", ""]  # fmt: skip
        parts += _table(
            ["claim", "difference", "verdict"],
            [[c["text"], _cell(c["difference"], 3, signed=True), c["verdict"]]
             for c in found["claims"]],
        )  # fmt: skip
    parts += ["", "## Tasks", ""]
    for task, about in found["tasks"].items():
        sizes = found["rows"].get(task, {})
        rows_of = ", ".join(
            f"{sizes[p]} {p}" for p in ("train", "validation", "test") if p in sizes
        )
        score = found["base"].get(task)
        start = "" if score is None else f"; the base has {_cell(score)} %"
        parts.append(f"- **{task}**: {about}; {rows_of}{start}")
    return "\n".join(parts) + "\n"


def _matched_table(recipe: Mapping[str, Any], lines: Mapping[str, Any]) -> list[str]:
    reference = recipe["reference"]
    rows = []
    for name, line in lines.items():
        m = line.get("matched")
        if m:
            steps = "; ".join(f"{a:g}/{b:g}" for a, b in m["steps"])
            cells = [
                f"{_cell(m.get(f'own_{w}'), d)} / {_cell(m.get(f'reference_{w}'), d)}"
                for w, d in WORDS
            ]
            rows.append([name, *cells, steps, f"{sum(m['within'])} of {len(m['within'])}"])
    if not rows:
        return []
    return ["", f"## At matched single-task accuracy: strategy / {reference}", "",
            "The one that ends lower at its end, the other at the checkpoint nearest to it on "
            "validation rows; `steps` are shares of all steps, seed by seed, `within` how often "
            "the two lie in one interval.", "",
            *_table(["strategy", "single", "absolute", "normalised", "xi", "steps", "within"],
                    rows)]  # fmt: skip


def _point_table(recipe: Mapping[str, Any], lines: Mapping[str, Any]) -> list[str]:
    reference = recipe["reference"]
    points = lines[reference]["points"] if reference in lines else []
    if len(points) < 2:
        return []
    rows = [
        [f"{p['share']:g}", *(_cell(p.get(w), d) for w, d in WORDS)] for p in points
    ]  # fmt: skip
    head = ["share of the steps", "single", "absolute", "normalised", "xi"]
    return ["", f"## {reference}, checkpoint by checkpoint", "", *_table(head, rows)]


def _transfer_tables(recipe: Mapping[str, Any], lines: Mapping[str, Any]) -> list[str]:
    """Every vector on every task, for the reference and the first line that chooses entries."""
    talos = [n for n, s in recipe["strategies"].items() if s["strategy"] == "talos"]
    parts: list[str] = []
    for name in dict.fromkeys([recipe["reference"], *talos[:1]]):
        matrix = lines.get(name, {}).get("transfer")
        if matrix:
            parts += ["", f"## Every vector of {name} on every task", "", "Accuracy minus that of "
                      "the base, in points; rows are vectors, columns tasks.", ""]  # fmt: skip
            rows = [[task, *(f"{100 * v:+.1f}" for v in row)]
                    for task, row in zip(recipe["tasks"], matrix, strict=True)]  # fmt: skip
            parts += _table(["", *recipe["tasks"]], rows)
    return parts


def _movement_table(lines: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, line in lines.items():
        held = [p for p in line["points"] if "bend" in p]
        rows += [
            [name, f"{p['share']:g}", *(_cell(p[w], 3) for w in POINTS["movement"])] for p in held
        ]
    if not rows:
        return []
    head = ["strategy", "share of the steps", "own", "elsewhere", "elsewhere, first order", "bend"]
    return ["", "## How features move", "", "`own`: squared movement of a vector's own task's "
            "features over their squared length; `elsewhere`: what it moves on other tasks over "
            "what it moves on its own, in all and to first order (0 is perfect localization); "
            "`bend`: the share of the own movement that is not first order.", "",
            *_table(head, rows)]  # fmt: skip


def _negation_table(lines: Mapping[str, Any]) -> list[str]:
    rows, start = [], None
    for name, line in lines.items():
        found = line.get("negation")
        if found:
            start = found["base"]
            columns = [(limit, w) for limit in ("1", "2") for w in ("target", "control", "alpha")]
            cells = [_cell(found[limit][w], 2 if w == "alpha" else 1) for limit, w in columns]
            rows.append([name, *cells])
    if not rows or start is None:
        return []
    first = ["base", *[_points(start["target"]), _points(start["control"]), ""] * 2]
    return ["", "## Negation", "", "Target accuracy (lower is better) after subtracting the "
            "largest amount, up to 1 and up to 2, that keeps the wanted share of the control's "
            "accuracy on validation rows.", "",
            *_table(["strategy", "target, to 1", "control", "alpha", "target, to 2", "control",
                     "alpha"], [first, *rows])]  # fmt: skip


def _mask_table(lines: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, line in lines.items():
        m = line.get("masks")
        if m:
            top = "-" if m["ceiling"] is None else f"{m['ceiling']:.3f}"
            cells = [_cell(m[w], 3) for w in ("iou", "random", "tensors", "lines")]
            rows.append([name, f"{100 * m[QK]['mean']:.1f} %", *cells, top])
    if not rows:
        return []
    return ["", "## Masks", "", "Share of the mask in queries and keys; intersection over union of "
            "the masks of different tasks, beside what masks would have by chance: of the same "
            "size, of the same density in every tensor, in every row and column; and the ceiling, "
            "the same task with another seed.", "",
            *_table(["strategy", "in Q and K", "IoU", "same size", "same tensors",
                     "same rows and columns", "same task"], rows)]  # fmt: skip


def curves(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `suture report` draws: what is lost against single accuracy, and checkpoints."""
    made = {}
    for word, title in (("normalised", "Normalised accuracy"), ("xi", "Disentanglement error")):
        series = []
        for name, line in found["lines"].items():
            held = [
                (p["single_mean"], p[word]) for p in line["points"] if {"single_mean", word} <= {*p}
            ]
            points = [Point(x["mean"], y["mean"], y["low"], y["high"]) for x, y in held]
            if points:
                series.append(Series(name, tuple(points)))
        if series:
            made[word] = Curve(
                f"{title} over single-task accuracy", "single-task accuracy", title, tuple(series)
            ).to_dict()
    return made


def _cell(raw: Mapping[str, Any] | None, digits: int = 1, *, signed: bool = False) -> str:
    """A mean with half its interval: in percent with one digit, else plain."""
    if raw is None:
        return "-"
    value = Spread(raw["mean"], raw["low"], raw["high"], tuple(raw["values"]))
    factor = 100 if digits == 1 else 1
    mean = f"{factor * value.mean:{'+' if signed else ''}.{digits}f}"
    return mean if value.high is None else f"{mean} ± {factor * value.half:.{digits}f}"


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]
