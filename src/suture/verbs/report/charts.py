"""The drawings, as Vega-Lite made by altair: colours come from the page's theme, names are data.

Names of models, tensors and tasks stand in data values only, under field names that are fixed here:
no name from a file ever becomes part of an expression.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from suture.errors import MissingExtraError

Row = dict[str, Any]

try:
    import altair as alt
except ImportError:
    raise MissingExtraError("the report", "report") from None

STEP = 20
"""Pixels for a row of a drawing."""
WRITTEN = 10
"""A matrix with at most so many rows has its numbers written into it."""
HALO = ((7, "paper"), (3, "ink"))
"""Strokes of a tick on a bar, below and above: its rim is the page's, so it stands out of both."""


def _finished(chart: Any, alt_text: str) -> dict[str, Any]:
    found: dict[str, Any] = chart.properties(width="container", description=alt_text).to_dict()
    found.pop("config", None)  # the page has its own, for light and dark
    return found


def _known(value: Any) -> Any:
    """The value, or ``None`` where it is a number that JSON has not: NaN and infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _chart(rows: Sequence[Row]) -> Any:
    values = [{k: _known(v) for k, v in row.items()} for row in rows]
    return alt.Chart(alt.Data(values=values))  # type: ignore[no-untyped-call]


def _order(names: Sequence[str]) -> Any:
    """An axis over names, in this order. A ``sort`` would make an expression of them."""
    return alt.Scale(domain=list(dict.fromkeys(names)))


def _legend(title: str) -> Any:
    return alt.Legend(title=title, orient="top", gradientLength=140, gradientThickness=8)


def _shades(low: float, high: float, *, diverging: bool) -> Any:
    """The scale of a map's colours; what lies beyond an end has the colour of that end.

    Args:
        low: the value of the first colour.
        high: the value of the last one.
        diverging: whether both ends are to differ from 0, which has the colour in the middle.
    """
    if diverging:
        top = max(abs(low), abs(high))
        return alt.Scale(domain=[-top, top], domainMid=0, interpolate="lab", clamp=True)
    return alt.Scale(domain=[low, high], interpolate="lab", clamp=True)


BLACK, WHITE = "#000000", "#ffffff"
FIGURES = (
    f"!isValid(datum.value) ? ink : contrast(scale('color', datum.value), '{BLACK}') >= "
    f"contrast(scale('color', datum.value), '{WHITE}') ? '{BLACK}' : '{WHITE}'"
)
"""The colour of a figure: black or white, whichever stands out more from the field it stands on.

One of the two has a contrast of 4.58 or more with any colour (the square root of 21 is the least),
and the field's colour is asked of the scale that draws it: no threshold has to agree with a theme.
A field without a value is not drawn, and its dash stands on the page's own ground.
"""


def _written(base: Any, fmt: str) -> Any:
    """The numbers on the fields of a map; a dash where there is none."""
    room = alt.expr("bandwidth('x') < 30 ? 0 : 1")  # on a phone the colours have to do
    return base.mark_text(fontSize=11, opacity=room).encode(
        text=alt.condition(
            "isValid(datum.value)", alt.Text("value:Q", format=fmt), alt.value("\u2013")
        ),
        color=alt.value(alt.expr(FIGURES)),
    )


def _numbers(rows: Sequence[Row]) -> list[float]:
    """The values of rows that have one."""
    return [v for r in rows if (v := _known(r["value"])) is not None]


def heat(
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    xs: Sequence[str],
    ys: Sequence[str],
    value: str,
    fmt: str = ".3f",
    top: float | None = None,
    alt_text: str,
    tooltips: Sequence[str] = (),
    written: bool = False,
) -> dict[str, Any]:
    """A heat map over two lists of names; ``rows`` hold ``x``, ``y``, ``value`` and more.

    Args:
        rows: one for each field of the map.
        x: what runs along.
        y: what runs down.
        xs: the names along, in order.
        ys: the names down, in order.
        value: what the colour says; where some are below 0, 0 has the colour in the middle.
        fmt: how its number is written.
        top: the value of the strongest colour, so that maps side by side can be compared.
        alt_text: the map in a sentence.
        tooltips: more fields to show.
        written: whether the numbers stand on the fields, where there are few columns.
    """
    most = top or max(map(abs, _numbers(rows)), default=1.0) or 1.0
    low = min([0.0, *_numbers(rows)])
    angle = 0 if all(len(name) < 4 for name in xs) else -35
    base = _chart(rows).encode(
        x=alt.X(
            "x:N",
            scale=_order(xs),
            title=x,
            axis=alt.Axis(labelOverlap=True, labelAngle=angle, labelLimit=90),
        ),
        y=alt.Y("y:N", scale=_order(ys), title=y, axis=alt.Axis(labelLimit=130)),
        tooltip=[
            alt.Tooltip("x:N", title=x),
            alt.Tooltip("y:N", title=y),
            alt.Tooltip("value:Q", title=value, format=fmt),
            *(alt.Tooltip(f"more{i}:Q", title=t, format=".4~g") for i, t in enumerate(tooltips)),
        ],
    )
    drawn = base.mark_rect().encode(
        color=alt.Color(
            "value:Q",
            title=value,
            legend=_legend(value),
            scale=_shades(low, most, diverging=low < 0),
        ),
    )
    if written and len(xs) <= WRITTEN:
        drawn = drawn + _written(base, fmt)
    return _finished(drawn.properties(height=alt.Step(STEP)), alt_text)


def matrix(
    values: Sequence[Sequence[float]],
    names: Sequence[str],
    *,
    value: str,
    diverging: bool = False,
    top: float,
    columns: Sequence[str] | None = None,
    fmt: str = ".2f",
    alt_text: str,
    skip_diagonal: bool = True,
) -> dict[str, Any]:
    """A small square table in colour, its numbers written in; the diagonal is left empty."""
    across = list(names) if columns is None else list(columns)
    rows = [
        {"y": names[i], "x": across[j], "value": float(v)}
        for i, line in enumerate(values)
        for j, v in enumerate(line)
        if not (skip_diagonal and columns is None and i == j)
    ]
    base = _chart(rows).encode(
        x=alt.X(
            "x:N", scale=_order(across), title=None, axis=alt.Axis(labelAngle=-35, labelLimit=90)
        ),
        y=alt.Y("y:N", scale=_order(names), title=None, axis=alt.Axis(labelLimit=110)),
        tooltip=[
            alt.Tooltip("y:N", title="row"),
            alt.Tooltip("x:N", title="column"),
            alt.Tooltip("value:Q", title=value, format=".4f"),
        ],
    )
    scale = _shades(-top if diverging else 0.0, top, diverging=diverging)
    drawn = base.mark_rect().encode(
        color=alt.Color("value:Q", title=value, scale=scale, legend=_legend(value)),
    )
    if len(names) <= WRITTEN:
        drawn = drawn + _written(base, fmt)
    return _finished(drawn.properties(height=alt.Step(max(STEP, 26))), alt_text)


def bars(
    rows: Sequence[Row],
    *,
    names: Sequence[str],
    value: str,
    fmt: str = ".3f",
    alt_text: str,
    marked: str | None = None,
) -> dict[str, Any]:
    """Lying bars, a row each; ``mark`` in a row is shown as a tick: a bound, or what chance gives.

    Args:
        rows: hold ``name``, ``value`` and perhaps ``mark``.
        names: their order.
        value: what the length says.
        fmt: how the number is written.
        alt_text: the chart in a sentence.
        marked: what the tick is.
    """
    base = _chart(rows).encode(
        y=alt.Y("name:N", scale=_order(names), title=None, axis=alt.Axis(labelLimit=130))
    )
    tips = [alt.Tooltip("name:N", title=" "), alt.Tooltip("value:Q", title=value, format=fmt)]
    if marked:
        tips.append(alt.Tooltip("mark:Q", title=marked, format=fmt))
    drawn = base.mark_bar(height={"band": 0.6}).encode(
        x=alt.X("value:Q", title=value, stack=None, scale=alt.Scale(zero=True)), tooltip=tips
    )
    if marked:
        for thickness, colour in HALO:
            drawn = drawn + base.mark_tick(thickness=thickness, size=18).encode(
                x=alt.X("mark:Q", title=value), color=alt.value(alt.expr(colour)), tooltip=tips
            )
    return _finished(drawn.properties(height=alt.Step(STEP + 4)), alt_text)


def intervals(
    rows: Sequence[Row],
    *,
    names: Sequence[str],
    value: str,
    alt_text: str,
    kinds: Sequence[str] = ("base", "expert", "merge"),
) -> dict[str, Any]:
    """A dot with its 95 % interval for each name; shape and colour tell the kinds apart."""
    # Only a domain that is written out lets the legends of colour and shape become one.
    scale, legend = alt.Scale(domain=list(kinds)), alt.Legend(orient="top")
    base = _chart(rows).encode(
        y=alt.Y("name:N", scale=_order(names), title=None, axis=alt.Axis(labelLimit=130)),
        color=alt.Color("kind:N", title=None, scale=scale, legend=legend),
        tooltip=[
            alt.Tooltip("name:N", title="model"),
            alt.Tooltip("value:Q", title="score", format=".4f"),
            alt.Tooltip("low:Q", title="from", format=".4f"),
            alt.Tooltip("high:Q", title="to", format=".4f"),
            alt.Tooltip("n:Q", title="rows"),
        ],
    )
    wide = alt.Scale(zero=False, nice=False, padding=8)  # a mark at an end keeps off the names
    lines = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", title=value, scale=wide), x2=alt.X2("high:Q")
    )
    dots = base.mark_point(filled=True, size=60, opacity=1).encode(
        x=alt.X("value:Q", title=value, scale=wide),
        shape=alt.Shape("kind:N", title=None, scale=scale, legend=legend),
    )
    return _finished((lines + dots).properties(height=alt.Step(STEP)), alt_text)


def lines(
    rows: Sequence[Row], *, x: str, y: str, logarithmic: bool, names: Sequence[str], alt_text: str
) -> dict[str, Any]:
    """Measured points joined by lines, with intervals where there are some."""
    scale = alt.Scale(type="log") if logarithmic else alt.Scale(zero=False, nice=False)
    axis = alt.Axis(format="~g") if logarithmic else alt.Axis()
    if not logarithmic and all(float(row["x"]).is_integer() for row in rows):
        axis = alt.Axis(tickMinStep=1)  # no steps between the first and the second
    series = alt.Scale(domain=list(names))
    legend = alt.Legend(orient="top", columns=3, labelLimit=120)
    picked = alt.selection_point(fields=["name"], bind="legend")
    base = _chart(rows).encode(
        x=alt.X("x:Q", title=x, scale=scale, axis=axis),
        color=alt.Color("name:N", title=None, scale=series, legend=legend),
        opacity=alt.condition(picked, alt.value(1.0), alt.value(0.2)),
        tooltip=[
            alt.Tooltip("name:N", title="series"),
            alt.Tooltip("x:Q", title="at", format=".4~g"),
            alt.Tooltip("value:Q", title="value", format=".4f"),
            alt.Tooltip("low:Q", title="from", format=".4f"),
            alt.Tooltip("high:Q", title="to", format=".4f"),
        ],
    )
    height = alt.Y("value:Q", title=y, scale=alt.Scale(zero=False))
    found = base.mark_line(strokeWidth=2).encode(y=height)
    if any(row.get("low") is not None for row in rows):
        found = found + base.mark_rule(strokeWidth=1.5).encode(
            y=alt.Y("low:Q", title=y), y2=alt.Y2("high:Q")
        )
    dots = base.mark_point(filled=True, size=45).encode(
        y=height,
        shape=alt.Shape("name:N", title=None, scale=series, legend=legend),
    )
    return _finished((found + dots).add_params(picked).properties(height=240), alt_text)


def surface(
    rows: Sequence[Row],
    *,
    xs: Sequence[float],
    x: str,
    y: str,
    value: str,
    top: float,
    alt_text: str,
) -> dict[str, Any]:
    """A map over two amounts, with the square from 0 to 1 outlined."""
    ordered = [f"{a:g}" for a in xs]
    down = ordered[::-1]
    base = _chart(rows).encode(
        x=alt.X(
            "x:N", scale=_order(ordered), title=x, axis=alt.Axis(labelOverlap=True, labelAngle=0)
        ),
        y=alt.Y("y:N", scale=_order(down), title=y, axis=alt.Axis(labelOverlap=True)),
    )
    drawn = base.mark_rect().encode(
        color=alt.Color(
            "value:Q",
            title=value,
            scale=_shades(0.0, top, diverging=False),
            legend=_legend(value),
        ),
        tooltip=[
            alt.Tooltip("x:N", title="across"),
            alt.Tooltip("y:N", title="down"),
            alt.Tooltip("value:Q", title=value, format=".3f"),
        ],
    )
    inside = [f"{a:g}" for a in xs if 0 <= a <= 1]
    if len(inside) > 1:
        ends = {"left": inside[0], "right": inside[-1], "low": inside[0], "high": inside[-1]}
        for thickness, colour in ((5, "paper"), (2, "mark")):
            frame = _chart([ends]).mark_rect(filled=False, strokeWidth=thickness)
            drawn = drawn + frame.encode(
                x=alt.X("left:N", scale=_order(ordered), bandPosition=0),
                x2=alt.X2("right", bandPosition=1),
                y=alt.Y("high:N", scale=_order(down), bandPosition=0),
                y2=alt.Y2("low", bandPosition=1),
                stroke=alt.value(alt.expr(colour)),
            )
    return _finished(drawn.properties(height=260), alt_text)


def pareto(
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    kinds: Sequence[str],
    alt_text: str,
    better: tuple[str, str] = ("higher", "higher"),
) -> dict[str, Any]:
    """Named marks over two numbers, with the intervals of both where there are some.

    Args:
        rows: hold ``name``, ``kind``, ``x``, ``y``, and perhaps ``x_low``, ``x_high``, ``y_low``,
            ``y_high``; ``left`` and ``right`` are labels that begin or end at the mark.
        x: what runs along.
        y: what runs up.
        kinds: what marks differ by, in order.
        alt_text: the chart in a sentence.
        better: ``higher`` or ``lower`` for both; a lower one is drawn backwards, so that better is
            always further right and further up.
    """
    scale, legend = alt.Scale(domain=list(kinds)), alt.Legend(orient="top", columns=4)
    sides, runs = [], []
    for title, word in zip((x, y), better, strict=True):
        back = word == "lower"
        sides.append(f"{title} (less is better)" if back else title)
        runs.append(alt.Scale(zero=False, nice=False, padding=12, reverse=back))
    across, up = (
        alt.X("x:Q", title=sides[0], scale=runs[0]),
        alt.Y("y:Q", title=sides[1], scale=runs[1]),
    )
    base = _chart(rows).encode(
        tooltip=[
            alt.Tooltip("name:N", title="model"),
            *(alt.Tooltip(f"{field}:Q", title=title, format=".4f")
              for field, title in (("x", "across"), ("x_low", "across, from"),
                                   ("x_high", "across, to"), ("y", "up"), ("y_low", "up, from"),
                                   ("y_high", "up, to"))),
        ],
    )  # fmt: skip
    coloured = base.encode(color=alt.Color("kind:N", title=None, scale=scale, legend=legend))
    drawn = coloured.mark_point(filled=True, size=70, opacity=1).encode(
        x=across, y=up, shape=alt.Shape("kind:N", title=None, scale=scale, legend=legend)
    )
    if any(row.get("y_low") is not None for row in rows):
        drawn = coloured.mark_rule(opacity=0.75).encode(
            x=across, y=alt.Y("y_low:Q", title=sides[1], scale=runs[1]), y2=alt.Y2("y_high:Q")
        ) + drawn  # fmt: skip
    if any(row.get("x_low") is not None for row in rows):
        drawn = coloured.mark_rule(opacity=0.75).encode(
            y=up, x=alt.X("x_low:Q", title=sides[0], scale=runs[0]), x2=alt.X2("x_high:Q")
        ) + drawn  # fmt: skip
    for align, dx in (("left", 8), ("right", -8)):
        drawn = drawn + base.mark_text(align=align, dx=dx, dy=-8, fontSize=10).encode(
            x=across, y=up, text=f"{align}:N", color=alt.value(alt.expr("ink"))
        )
    return _finished(drawn.properties(height=280), alt_text)
