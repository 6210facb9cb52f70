"""From a folder to one HTML file, and to images for model cards."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from suture.checkpoints.atomic import write_whole
from suture.errors import MissingExtraError, OutputError, Problems
from suture.verbs.report.blocks import Chart, Figure, Section, number
from suture.verbs.report.collect import Found, gather
from suture.verbs.report.theme import themed, themes
from suture.version import __version__

HERE = Path(__file__).parent
WIDTH = 560
"""Pixels of an image's drawing."""


def write_page(
    folder: Path,
    out: Path,
    *,
    images: Path | None = None,
    title: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Gather what lies below ``folder`` into the page ``out``; with ``images`` also draw files.

    Returns:
        How many files and figures it shows, its size, the images, and notes on what was left out.

    Raises:
        RecipeError: the folder holds nothing to show.
        OutputError: the page or an image cannot be written, or is there already.
        MissingExtraError: altair, vl-convert or jinja2 is not installed.
    """
    problems = Problems()
    if out.is_dir():
        problems.add(OutputError, f"{out}: is a folder; name a file such as report.html")
    elif out.exists() and not overwrite:
        problems.add(OutputError, f"{out}: exists; name another file, or add --overwrite")
    if images is not None and images.exists() and not images.is_dir():
        problems.add(OutputError, f"{images}: is no folder; images are written into one")
    found = None
    with problems.collecting():
        found = gather(folder)
    problems.raise_if_any()
    assert found is not None
    try:
        from suture.verbs.report.sections import sections_of
    except ImportError as error:
        raise MissingExtraError(f"the report ({error.name})", "report") from None

    sections = sections_of(found)
    text = render(found, sections, title or f"Report on {folder.resolve().name}")
    drawn = [] if images is None else _draw(sections, images)
    write_whole(out, text)
    notes = [p for s in sections if s.anchor == "notes" for p in s.points]
    return {
        "out": str(out),
        "bytes": len(text.encode("utf-8")),
        "files": found.files,
        "figures": sum(len(s.figures) for s in sections),
        "images": drawn,
        "notes": [note for note in notes if note in found.notes or "cannot be shown" in note],
    }


def render(found: Found, sections: list[Section], title: str) -> str:
    """The page as text: everything inlined, every name from a file escaped.

    The content policy allows exactly the two scripts of the page, by their hashes, and no request:
    even a name that slipped through as markup could neither run nor load anything.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from vl_convert import javascript_bundle
    except ImportError as error:
        raise MissingExtraError(f"the report ({error.name})", "report") from None

    charts = [c for s in sections for f in s.figures for c in f.charts]
    numbers = {id(chart): i for i, chart in enumerate(charts)}
    # As modules, like the page's own script: strict, and their names stay their own.
    library = _harmless(javascript_bundle())  # type: ignore[call-arg]
    script = _harmless((HERE / "page.js").read_text(encoding="utf-8"))
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["short"] = number
    return environment.get_template("page.html.jinja").render(
        title=title,
        about=_about(found),
        version=__version__,
        files=found.files,
        sections=sections,
        number_of=lambda chart: numbers[id(chart)],
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        specs=_data([_compiled(chart) for chart in charts]),
        library=library,
        script=script,
        hashes=" ".join(_hash(text) for text in (library, script)),
    )


def _compiled(chart: Chart) -> dict[str, Any]:
    """A drawing as Vega, in each theme: the page has nothing left to translate."""
    from vl_convert import vegalite_to_vega

    return {name: vegalite_to_vega(themed(chart.spec, theme)) for name, theme in themes().items()}


def _about(found: Found) -> str:
    kinds = (
        (len(found.tunings), "fine-tuned model", "fine-tuned models"),
        (len(found.merges), "merge", "merges"),
        (len(found.analyses), "analysis of task vectors", "analyses of task vectors"),
        (len(found.localizations), "localization", "localizations"),
        (len(found.maps), "disentanglement map", "disentanglement maps"),
        (len(found.curves), "curve", "curves"),
        (len(found.benchmarks) + len(found.tables), "benchmark", "benchmarks"),
        (len(found.comparisons), "comparison of models", "comparisons of models"),
        (len(found.realignments), "realignment", "realignments"),
        (len(found.audits), "safety audit", "safety audits"),
    )
    parts = [f"{count} {one if count == 1 else many}" for count, one, many in kinds if count]
    what = ", ".join(parts) or ("evaluations" if found.suites else "")
    if not what:
        return "Nothing is finished in this folder yet."
    return (
        f"{what[:1].upper()}{what[1:]}. Every figure has a sentence on how to read it, and its "
        "numbers as a table that sorts by a click on a heading."
    )


def _data(value: Any) -> str:
    """JSON that can stand inside of HTML: nothing in it opens or closes an element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _harmless(script: str) -> str:
    """A script that the HTML parser reads to its end."""
    return re.sub(r"<(?=/script|!--)", r"\\x3c", script, flags=re.IGNORECASE)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _draw(sections: list[Section], folder: Path) -> list[str]:
    """Write every drawing as SVG and PNG, on white, under names of the page's own making."""
    written = []
    for section in sections:
        for i, figure in enumerate(section.figures, 1):
            for j, chart in enumerate(figure.charts, 1):
                name = f"{section.anchor}-{i}" + (f"-{j}" if len(figure.charts) > 1 else "")
                written += _image(chart, figure.title, folder, name)
    return written


def draw(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write the drawings of one figure as SVG and PNG; ``NAME``, or ``NAME-1``, ``NAME-2``, ...

    Raises:
        OutputError: a file cannot be written.
        MissingExtraError: vl-convert is not installed.
    """
    many = len(figure.charts) > 1
    return [
        folder / file
        for j, chart in enumerate(figure.charts, 1)
        for file in _image(chart, figure.title, folder, f"{name}-{j}" if many else name)
    ]


def _image(chart: Chart, title: str, folder: Path, name: str) -> list[str]:
    """One drawing in both formats, on white."""
    try:
        from vl_convert import vegalite_to_png, vegalite_to_svg
    except ImportError as error:
        raise MissingExtraError(f"the report ({error.name})", "report") from None
    spec = themed(_sized(chart, title), themes()["light"])
    spec["config"] = {**spec["config"], "background": "#ffffff"}
    write_whole(folder / f"{name}.svg", vegalite_to_svg(spec, allowed_base_urls=[]))
    write_whole(folder / f"{name}.png", vegalite_to_png(spec, scale=2, allowed_base_urls=[]))
    return [f"{name}.svg", f"{name}.png"]


def _sized(chart: Chart, title: str) -> dict[str, Any]:
    heading = f"{title}: {chart.label}" if chart.label else title
    text = {"text": heading, "anchor": "start", "fontSize": 13}
    return {**chart.spec, "width": WIDTH, "title": text, "padding": 12}


__all__ = ["draw", "render", "write_page"]
