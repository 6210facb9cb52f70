"""The colours of the page's drawings, once for light and once for dark surroundings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def themes() -> dict[str, dict[str, Any]]:
    """For ``light`` and ``dark``: the parameters that drawings name, and the Vega-Lite config."""
    text = (Path(__file__).parent / "theme.json").read_text(encoding="utf-8")
    return {
        name: {
            "params": [{"name": k, "value": v} for k, v in theme["params"].items()],
            "config": _config(theme),
        }
        for name, theme in json.loads(text).items()
    }


def _config(theme: dict[str, Any]) -> dict[str, Any]:
    return {
        "background": "transparent",
        "aria": False,  # a drawing is one image with a description; its numbers stand in a table
        "font": FONT,
        "view": {"stroke": None},
        "axis": {
            "labelColor": theme["muted"],
            "titleColor": theme["muted"],
            "domainColor": theme["line"],
            "tickColor": theme["line"],
            "gridColor": theme["line"],
            "gridOpacity": 0.6,
            "labelFontSize": 11,
            "labelSeparation": 6,
            "titleFontSize": 11,
            "titleFontWeight": 500,
            "titlePadding": 6,
        },
        "axisBand": {"domain": False, "ticks": False, "grid": False},
        "legend": {
            "labelColor": theme["muted"],
            "titleColor": theme["muted"],
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titleFontWeight": 500,
            "symbolStrokeWidth": 2,
            "columnPadding": 8,
            "layout": {"top": {"anchor": "end"}},
        },
        "bar": {"color": theme["accent"], "cornerRadiusEnd": 2},
        "rect": {"invalid": "filter"},
        "range": {
            "category": theme["category"],
            "heatmap": theme["ramp"],
            "ramp": theme["ramp"],
            "diverging": theme["diverging"],
        },
    }


def themed(spec: dict[str, Any], theme: dict[str, Any]) -> dict[str, Any]:
    """A drawing in one theme."""
    return {
        **spec,
        "params": [*theme["params"], *spec.get("params", [])],
        "config": theme["config"],
    }
