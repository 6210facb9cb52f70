"""The report page: what it gathers, that it is one harmless file, and that a browser shows it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_convert
from PIL import Image

import toy
from browser import browser, look, needs_browser
from making import invoke, lines_of
from suture.analysis.maps import Curve, Point, Series, disentanglement
from suture.analysis.theory import Diagnosis, Diagnostics, Secant, Smoothness
from suture.checkpoints.writer import staging_of
from suture.errors import MissingExtraError, OutputError, RecipeError
from suture.evals.base import Metric
from suture.evals.results import Evaluation, Scores, SuiteResult
from suture.runs.workspace import workspace
from suture.verbs.analyze import VERB as analysis
from suture.verbs.compare.run import Comparison, compare
from suture.verbs.merge import VERB as merge
from suture.verbs.report import charts, tasks
from suture.verbs.report.blocks import Builder, in_order, layer_labels, number, percent
from suture.verbs.report.collect import gather
from suture.verbs.report.run import draw, write_page
from suture.verbs.report.sections import sections_of
from suture.verbs.report.theme import themed, themes
from suture.verbs.report.tradeoff import Mark, of_benchmark, pareto, unbeaten
from suture.verbs.report.unfinished import WORKING

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{7*7}}\u2028<!--"
"""A name that would break out of HTML, of a script, of a template or of a comment."""


def metric(value: float) -> Metric:
    return Metric("accuracy", value, 100, value - 0.05, value + 0.05)


def results() -> dict[str, Any]:
    """What `suture compare` writes of tasks."""
    roles = {"base": "base", "math": "expert", HOSTILE: "expert", "ties": "edit", "linear": "edit"}
    scores = dict(zip(roles, (0.5, 0.9, 0.7, 0.8, 0.6), strict=True))

    def line(task: str, down: float) -> dict[str, Any]:
        values = {name: metric(score - down).plain() for name, score in scores.items()}
        return {"evaluation": task, "metric": "accuracy", "better": "higher", "utility": True,
                "values": values}  # fmt: skip

    return {"suite": HOSTILE, "models": roles, "verdicts": [],
            "lines": [line("sums", 0.0), line(HOSTILE, 0.02)]}  # fmt: skip


def localized() -> dict[str, Any]:
    """What `suture localize` writes, with names that it would refuse."""

    def part(kept: int, entries: int) -> dict[str, float]:
        return {"kept": kept, "entries": entries, "density": kept / entries, "share": kept / 120,
                "enrichment": kept / entries / 0.05}  # fmt: skip

    def mask(losses: list[float]) -> dict[str, Any]:
        return {
            "kept": 120, "entries": 2400, "density": 0.05, "wanted": 120, "tied_at_threshold": 3,
            "bytes": 400, "stats": {"losses": losses},
            "layers": {"model.layers.0": part(90, 1200), "model.layers.1": part(30, 1200)},
            "roles": {"q": part(100, 1000), HOSTILE: part(20, 1400)},
        }  # fmt: skip

    overlap = {"models": ["ada", HOSTILE], "jaccard": 0.2, "independent": 0.03, "matched": 0.05,
               "low": 0.04, "high": 0.06}  # fmt: skip
    return {
        "kind": "localize", "rule": {"name": "learned", "title": "Learned masks", "paper": HOSTILE},
        "masks": {"ada": mask([2.0, 1.5]), HOSTILE: mask([1.0, 0.5])}, "overlaps": [overlap],
        "recipe": {"rule": HOSTILE},
    }  # fmt: skip


def diagnosed() -> dict[str, Any]:
    """Diagnostics of two models, as `suture analyze` writes them."""

    def smooth() -> Smoothness:
        return Smoothness(40.0, 1e-3, 9, (Secant(0.5, 2.0), Secant(1.0, 3.0)), 1.0, 4)

    def one(name: str, merged: float) -> Diagnosis:
        return Diagnosis(name, 20, 1.0, 0.25, merged, 0.01, 0.0, 0.5, smooth(), merged - 0.25,
                         {"curvature": 5.0, "secant": 0.3, "random": 0.1}, None, 0.02)  # fmt: skip

    line = Curve("loss", "way", "loss", tuple(
        Series(n, (Point(0.0, 0.25), Point(0.5, 0.5), Point(1.0, 0.5))) for n in ("ada", HOSTILE)
    ))  # fmt: skip
    found = Diagnostics({"weights": {"ada": 0.5, HOSTILE: 0.5}}, (one("ada", 0.5), one(HOSTILE, 0.6)),
                        line, {})  # fmt: skip
    return {"kind": "analysis", "geometry": None, "diagnostics": found.to_dict()}


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a page can show, made of tiny merges."""
    where = tmp_path_factory.mktemp("sample")
    base = toy.base_tensors("bf16")
    models = tmp_path_factory.mktemp("models")
    folders = {n: toy.folder(models / n, toy.tuned(base, i)) for i, n in enumerate(("ada", "bob"))}
    start = toy.folder(models / "base", base)
    for method in ("ties", "linear"):
        needed = start if method == "ties" else None
        merge(toy.recipe(method, folders, needed), where / "merges" / method)
    named = {"ada": str(folders["ada"]), HOSTILE.replace("\u2028", ""): str(folders["bob"])}
    analysis({"base": str(start), "models": named, "density": 0.2, "unseen": {"new": named["ada"]},
              "bases": {"size": 1, "write": "pca"}}, where / "analysis")  # fmt: skip
    (where / "results.json").write_text(json.dumps(results()))
    one = replace(asked("ada", 0.4, 0.4), versions={"torch": "2", HOSTILE: "0"})
    (where / "eval.json").write_text(one.to_json())
    drawn = disentanglement(
        lambda a, t: np.round(np.arange(20) * (a[t] + 0.3 * a[1 - t])), ("ada", HOSTILE),
        [-1, 0, 0.5, 1, 2],
    )  # fmt: skip
    (where / "map.json").write_text(json.dumps(drawn.to_dict()))
    points = tuple(Point(x, 0.5 + x / 4, 0.4 + x / 4, 0.6 + x / 4) for x in (0.01, 0.1, 1.0))
    curve = Curve("Retention", "density", "retention",
                  (Series("magnitude", points), Series(HOSTILE, points[:2])), True)  # fmt: skip
    (where / "curve.json").write_text(json.dumps(curve.to_dict()))
    (where / "localize.json").write_text(json.dumps(localized()))
    (where / "secret").mkdir()
    (where / "secret/analysis.json").write_text(json.dumps({"kind": "analysis", "restricted": True,
                                                            "geometry": {"models": ["SECRET"]}}))  # fmt: skip
    (where / "losses").mkdir()
    (where / "losses/analysis.json").write_text(json.dumps(diagnosed()))
    (where / "broken").mkdir()
    (where / "broken/suture.json").write_text('{"recipe": ')
    (where / "other.json").write_text("[1, 2]")
    return where


@pytest.fixture(scope="session")
def page(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_page(sample, out)
    return out


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script":
            self.scripts.append((self.found[-1][1], data))
            self.found.append(("after", {}))
        else:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="session")
def elements(page: Path) -> Elements:
    return Elements(page.read_text(encoding="utf-8"))


# -- what is gathered ------------------------------------------------------------------------------


def test_a_folder_is_gathered_whole(sample: Path) -> None:
    """Merges, results, analyses, maps, curves, localizations; a broken file becomes a note."""
    found = gather(sample)

    assert [w for w, _ in found.merges] == ["merges/linear/suture.json", "merges/ties/suture.json"]
    assert [len(k) for k in (found.comparisons, found.suites, found.analyses, found.maps,
                             found.curves, found.localizations)] == [1, 1, 2, 1, 1, 1]  # fmt: skip
    assert found.withheld == ["secret/analysis.json"]
    assert len(found.notes) == 1
    lines_of(found.notes[0], "broken/suture.json", "left out")


def test_a_damaged_result_of_an_evaluation_is_named(tmp_path: Path) -> None:
    """Its name says nothing, its beginning does; other files that are no JSON are passed over."""
    text = asked("base", 0.0, 0.2).to_json()
    (tmp_path / "base.json").write_text(text)
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    (tmp_path / "odd.json").write_text(text.replace('"evaluations"', '"evaluation"'))
    (tmp_path / "other.json").write_text("{")
    found = gather(tmp_path)
    assert [note.split()[0] for note in found.notes] == ["cut.json", "odd.json"]


def test_links_and_hidden_folders_are_not_followed(sample: Path, tmp_path: Path) -> None:
    """A page shows what lies in the folder, and nothing that a link points to."""
    (tmp_path / "inside").symlink_to(sample)
    (tmp_path / "link.json").symlink_to(sample / "analysis/analysis.json")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/results.json").write_text(json.dumps(results()))

    with pytest.raises(RecipeError, match="nothing to show"):
        gather(tmp_path)


@pytest.mark.parametrize(
    "harm",
    ['{"kind": "analysis", "geometry": {"models": ["a"], "layers": [{"layer": 3}]}}',
     '{"kind": "analysis", "overlap": [], "geometry": 7, "conflicts": {"total": null}}',
     '{"kind": "disentanglement", "tasks": ["a"], "amounts": "no", "error": [[1]]}',
     '{"kind": "curve", "series": [{"points": [{"x": "NaN?"}]}]}',
     '{"recipe": {}, "inputs": {"a": 1}, "results": "none", "output": null}',
     '{"kind": "analysis", "bases": [{"kind": "x"}], "nearest": 3}',
     '{"kind": "curve", "title": NaN}'],
)  # fmt: skip
def test_a_malformed_file_is_noted_and_the_rest_is_shown(harm: str, tmp_path: Path) -> None:
    """Wrong types and missing keys never stop a page; JSON that is none is not read."""
    (tmp_path / "results.json").write_text(json.dumps(results()))
    (tmp_path / "analysis.json").write_text(harm)
    found = write_page(tmp_path, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")

    lines_of(text, "Scores with intervals")
    assert found["notes"] or "analysis.json" in text


def test_what_is_restricted_is_named_and_not_shown(page: Path) -> None:
    """The page says that something was withheld, and holds nothing of it."""
    text = page.read_text(encoding="utf-8")

    lines_of(text, "Withheld", "secret/analysis.json", "must not be passed on")
    assert "SECRET" not in text


def test_a_localization_says_where_each_skill_lies(page: Path) -> None:
    """In words, not only in colours: layers, overlap against chance, learning."""
    text = page.read_text(encoding="utf-8")

    lines_of(
        text, "Where the entries lie that learned masks marks: 75", "Share of each mask by layer",
        "Beyond the 95 % interval of chance: ada with", "Loss while the masks were learned",
        "What merging costs each task", "The largest barrier is that of",
    )  # fmt: skip


# -- the file --------------------------------------------------------------------------------------


def test_the_page_asks_nobody_for_anything(elements: Elements) -> None:
    """No element names another file or server, and the policy forbids every request."""
    for tag, attributes in elements.found:
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(key) or ""
            assert value == "" or value.startswith(("#", "data:,")), f"<{tag} {key}={value}>"
        assert not [key for key in attributes if key.startswith("on")]
    policy = next(m["content"] for m in elements.all("meta") if "http-equiv" in m)
    assert policy is not None
    lines_of(policy, "default-src 'none'", "base-uri 'none'")
    assert "unsafe-eval" not in policy
    assert (
        "url("
        not in Path(__file__).parent.parent.joinpath("src/suture/verbs/report/page.css").read_text()
    )


def test_only_the_two_scripts_of_the_page_may_run(elements: Elements) -> None:
    """The policy names exactly their hashes; data blocks are no scripts."""
    policy = next(m["content"] for m in elements.all("meta") if "http-equiv" in m)
    allowed = re.findall(r"'sha256-([^']+)'", policy or "")
    running = [text for attributes, text in elements.scripts if attributes["type"] == "module"]
    hashes = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in running]

    assert len(running) == 2
    assert hashes == allowed
    assert len(elements.all("script")) == 3


def test_names_from_files_are_text_and_nothing_else(page: Path, elements: Elements) -> None:
    """A hostile name opens no element, ends no script, and is no template."""
    text = page.read_text(encoding="utf-8")

    assert "onerror=alert(1)>" not in text.replace(
        "&gt;", ""
    )  # only ever with its brackets escaped
    assert not elements.all("img")
    assert "{{7*7}}" in "".join(elements.text)
    assert any("</script><img" in part for part in elements.text)
    data = [text for attributes, text in elements.scripts if attributes.get("id") == "specs"]
    assert len(data) == 1
    assert not set(data[0]) & set("<>&\u2028")
    assert HOSTILE in json.dumps(json.loads(data[0]), ensure_ascii=False).replace('\\"', '"')


EXPRESSIONS = {"signal", "expr", "test", "calculate", "update", "init", "as", "field", "events"}


def expressions(spec: Any, inside: bool = False) -> Iterator[str]:
    """Every string of a drawing that Vega would parse and follow."""
    if isinstance(spec, dict):
        for key, value in spec.items():
            yield from expressions(value, key in EXPRESSIONS)
    elif isinstance(spec, list):
        for value in spec:
            yield from expressions(value, inside)
    elif isinstance(spec, str) and inside:
        yield spec


def test_no_name_is_part_of_an_expression(elements: Elements) -> None:
    """Names stand in data, domains and titles, and nowhere that Vega takes as code."""
    specs = json.loads(next(t for a, t in elements.scripts if a.get("id") == "specs"))
    found = list(expressions(specs))

    assert len(found) > 100
    assert not [e for e in found if any(word in e for word in ("alert", "onerror", "bob", "sums"))]


def test_every_figure_has_words_and_numbers(elements: Elements) -> None:
    """Headings do not skip a level; each chart has a description, each figure a table."""
    levels = [int(tag[1]) for tag, _ in elements.found if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    charts = [a for a in elements.all("div") if "data-chart" in a]
    assert len(charts) > 15
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 10 for a in charts)
    figures = len(elements.all("figure"))
    assert len(elements.all("figcaption")) == figures
    assert len(elements.all("details")) >= figures
    assert len(elements.all("table")) == len(elements.all("caption"))
    anchors = {a["id"] for a in elements.all("section")}
    assert {f"#{a}" for a in anchors} <= {a["href"] for a in elements.all("a")}
    assert {"moved", "masks", "angles", "conflicts", "bases", "curves", "disentanglement",
            "results", "merges", "provenance", "localization", "glance"} <= anchors  # fmt: skip
    assert elements.all("html")[0]["lang"] == "en"


def test_the_page_is_small(page: Path) -> None:
    """Far below 6 MB, its library included."""
    assert page.stat().st_size < 3_000_000


def test_the_same_folder_gives_the_same_page(sample: Path, page: Path, tmp_path: Path) -> None:
    """No clock and no order of files on disk goes into it."""
    write_page(sample, tmp_path / "again.html")

    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_images_for_model_cards(tmp_path: Path) -> None:
    """Every drawing as SVG and PNG, under names of the page's own making."""
    (tmp_path / "results.json").write_text(json.dumps(results()))
    found = write_page(tmp_path, tmp_path / "page.html", images=tmp_path / "images")

    files = sorted(p.name for p in (tmp_path / "images").iterdir())
    assert files == sorted(found["images"])
    assert {"results-1-1.svg", "results-1-1.png", "results-2.svg"} <= set(files)
    for path in (tmp_path / "images").iterdir():
        head = path.read_bytes()[:8]
        assert head.startswith(b"\x89PNG") if path.suffix == ".png" else head.startswith(b"<svg")


def test_nothing_is_replaced_unasked(sample: Path, tmp_path: Path) -> None:
    """A page that is there stays, and every problem is told at once."""
    (tmp_path / "report.html").write_text("mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught:
        write_page(tmp_path / "nowhere", tmp_path / "report.html", images=tmp_path / "file")
    lines_of(str(caught.value), "--overwrite", "is no folder; images", "is no folder; name")
    assert (tmp_path / "report.html").read_text() == "mine"


def test_the_command_tells_what_it_wrote(sample: Path, tmp_path: Path) -> None:
    """Size, figures, files and what was left out; one object with --json."""
    said = invoke("report", sample, "-o", tmp_path / "a.html", "--title", "Mine & <yours>")
    assert said.code == 0, said
    lines_of(said.out, "wrote", "figures from 9 files")
    lines_of(said.err, "note: broken/suture.json")
    lines_of((tmp_path / "a.html").read_text(), "<h1>Mine &amp; &lt;yours&gt;</h1>")
    told = json.loads(invoke("report", sample, "-o", tmp_path / "b.html", "--json").out)
    assert told["files"] == 9
    assert invoke("report", sample, "-o", tmp_path / "b.html").code == 2


@pytest.mark.parametrize("module", ["altair", "vl_convert", "jinja2"])
def test_a_missing_extra_is_named(
    module: str, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the library nothing is written, and the message says which extra brings it."""
    for name in [
        m
        for m in sys.modules
        if m.startswith("suture.verbs.report.")
        and m.split(".")[-1] in ("sections", "weights", "charts")
    ]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(sys.modules["suture.verbs.report"], name.split(".")[-1], raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"suture\[report\]"):
        write_page(sample, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


# -- words -----------------------------------------------------------------------------------------


def test_layers_have_short_names() -> None:
    """Numbers where one stack counts, the stack's name where two do, `out` outside."""
    assert layer_labels(["(norm)", "model.layers.0", "model.layers.11"]) == {
        "(norm)": "out", "model.layers.0": "0", "model.layers.11": "11",
    }  # fmt: skip
    assert layer_labels(["encoder.block.0", "decoder.block.0"]) == {
        "encoder.block.0": "encoder 0", "decoder.block.0": "decoder 0",
    }  # fmt: skip


def test_numbers_are_written_short() -> None:
    """Four digits that count; whole numbers in thousands; nothing is a dash."""
    assert [number(v) for v in (None, "x", 0, 0.0, 1234567, 0.12345, 1e-7, 123.456)] == [
        "\u2013", "x", "0", "0", "1,234,567", "0.123", "1.00e-07", "123.5",
    ]  # fmt: skip
    assert [percent(v) for v in (0, 0.5, 0.051, 0.0004)] == ["0\u202f%", "50\u202f%", "5.1\u202f%", "0.0\u202f%"]  # fmt: skip


def test_a_report_without_a_clear_gain_is_still_shown(tmp_path: Path) -> None:
    """Where no expert gained, there is no retention, and the page has one figure less."""
    flat = results()
    for line in flat["lines"]:
        line["values"] = {name: metric(0.5).plain() for name in line["values"]}
    (tmp_path / "results.json").write_text(json.dumps(flat))
    write_page(tmp_path, tmp_path / "page.html")

    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    lines_of(text, "Share of the expert")
    assert "Retention of the gain" not in text


def test_a_benchmark_shows_sums_claims_and_masks(tmp_path: Path) -> None:
    """What `suture bench` wrote: every strategy with its interval, every claim with its verdict."""
    measured = Path(__file__).parent.parent / "benchmarks" / "arithmetic.json"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_bytes(measured.read_bytes())

    found = write_page(tmp_path / "out", tmp_path / "report.html")

    assert not found["notes"]
    text = (tmp_path / "report.html").read_text()
    raw = json.loads(measured.read_text())
    for line in raw["lines"]:
        assert f">{line}<" in text
    for claim in raw["claims"]:
        assert claim["text"].replace("'", "&#39;") in text or claim["text"] in text
    assert "Every vector on every task" in text
    assert "What the masks of different tasks share" in text


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as found:
        yield found


def errors_of(driver: Any) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser")]


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_chart_is_drawn_without_a_complaint(driver: Any, page: Path, dark: bool) -> None:
    """Loaded from a file: an empty console, marks in every drawing, colours of the surroundings."""
    look(driver, page, dark=dark)

    assert errors_of(driver) == []
    marks = driver.execute_script(
        "return [...document.querySelectorAll('[data-chart]')].map((p) => p.querySelectorAll("
        "'.mark-rect path, .mark-symbol path, .mark-rule line, .mark-line path').length)"
    )
    assert len(marks) > 15
    assert min(marks) >= 1
    ground, ink = driver.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    )
    assert (brightness(ground) < brightness(ink)) == dark
    text = driver.execute_script(
        "return document.querySelector('.role-axis-label text').getAttribute('fill')"
    )
    assert (brightness(text) > 0.3) == dark


def brightness(colour: str) -> float:
    """Relative luminance of ``rgb(...)`` or ``#rrggbb``, 0 to 1."""
    if colour.startswith("#"):
        parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    else:
        parts = [int(float(x)) for x in re.findall(r"[\d.]+", colour)[:3]]
    linear = [
        x / 12.92 if (x := c / 255) <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for c in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_enough_contrast(driver: Any, page: Path, dark: bool) -> None:
    """WCAG AA, 4.5 to 1: every piece of text against what is behind it, axes included."""
    look(driver, page, dark=dark)
    pairs = driver.execute_script(
        """
        const behind = (e) => {
          for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$|transparent/.test(c)) return c;
          }
          return "rgb(255, 255, 255)";
        };
        const plain = [...document.querySelectorAll("h1, h2, h3, h4, p, a, li, td, th button, summary, caption, pre")]
          .map((e) => [getComputedStyle(e).color, behind(e), e.tagName]);
        const drawn = [...document.querySelectorAll(".role-axis-label text, .role-axis-title text, .role-legend-label text")]
          .map((e) => [e.getAttribute("fill"), behind(e.closest("figure")), "axis"]);
        return [...new Set([...plain, ...drawn].map((p) => p.join("|")))].map((p) => p.split("|"));
        """
    )
    for ink, ground, what in pairs:
        one, other = sorted((brightness(ink), brightness(ground)))
        assert (other + 0.05) / (one + 0.05) >= 4.5, f"{what}: {ink} on {ground}"
    assert len(pairs) > 8


@needs_browser
def test_hovering_shows_the_numbers(driver: Any, page: Path) -> None:
    """A pointer over a field of a heat map brings up a tooltip with its values."""
    look(driver, page)
    place = driver.execute_script(
        """
        const mark = document.querySelector("#moved .mark-rect path");
        mark.scrollIntoView({ block: "center", behavior: "instant" });
        const box = mark.getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2];
        """
    )
    for step in (3, 0):
        driver.execute_cdp_cmd(
            "Input.dispatchMouseEvent", {"type": "mouseMoved", "x": place[0] + step, "y": place[1]}
        )
    text = driver.execute_async_script(
        """
        const done = arguments[0], begun = Date.now();
        const wait = () => {
          const tip = document.querySelector("#vg-tooltip-element.visible");
          if (tip || Date.now() - begun > 5000) done(tip ? tip.innerText : "");
          else setTimeout(wait, 30);
        };
        wait();
        """
    )
    lines_of(text, "layer", "model", "share", "%")
    assert errors_of(driver) == []


@needs_browser
@pytest.mark.parametrize("width", [320, 768, 1280])
def test_nothing_is_cut_off_to_the_side(driver: Any, page: Path, width: int) -> None:
    """No horizontal scroll bar, and no drawing wider than its place, with every table open."""
    look(driver, page, width=width)
    found = driver.execute_script(
        """
        document.querySelectorAll("details").forEach((d) => { d.open = true; });
        const wide = [...document.querySelectorAll("[data-chart]")]
          .filter((p) => p.firstElementChild && p.querySelector("svg").getBoundingClientRect().width > p.clientWidth + 1);
        return [document.documentElement.scrollWidth, wide.length];
        """
    )
    assert found == [width, 0]


@needs_browser
def test_tables_sort_by_keyboard(driver: Any, page: Path) -> None:
    """Enter on a heading sorts up, again down; the state is told to screen readers."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    look(driver, page)
    driver.execute_script("document.querySelector('#results details').open = true")
    button = driver.find_element(
        By.CSS_SELECTOR, "#results figure:first-of-type th:nth-child(4) button"
    )

    def column() -> list[float]:
        cells = driver.find_elements(
            By.CSS_SELECTOR, "#results figure:first-of-type tbody td:nth-child(4)"
        )
        return [float(cell.get_attribute("data-value")) for cell in cells]

    def told() -> str:
        return str(button.find_element(By.XPATH, "..").get_attribute("aria-sort"))

    before = column()
    button.send_keys(Keys.ENTER)
    assert column() == sorted(before)
    assert told() == "ascending"
    button.send_keys(Keys.ENTER)
    assert column() == sorted(before, reverse=True)
    assert told() == "descending"


@needs_browser
def test_the_page_makes_no_request(driver: Any, page: Path) -> None:
    """What the browser fetches is the file itself and data inside of it."""
    driver.get_log("performance")
    look(driver, page)
    asked = [
        message["params"]["request"]["url"]
        for entry in driver.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert page.resolve().as_uri() in asked
    own = ("data:", "blob:", "chrome:")  # the last: of the browser's empty first page
    assert [url for url in asked if not url.startswith(own)] == [page.resolve().as_uri()]


@needs_browser
def test_the_colours_follow_the_surroundings(driver: Any, page: Path) -> None:
    """Switching to dark while the page is open draws the charts anew."""
    look(driver, page)
    fill = "return document.querySelector('.role-axis-label text').getAttribute('fill')"
    light = driver.execute_script(fill)
    feature = {"name": "prefers-color-scheme", "value": "dark"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    changed = driver.execute_async_script(
        f"const done = arguments[0], begun = Date.now(); const wait = () => {{"
        f"const now = document.querySelector('.role-axis-label text')?.getAttribute('fill');"
        f"if ((now && now !== '{light}') || Date.now() - begun > 8000) done(now);"
        f"else setTimeout(wait, 30); }}; wait();"
    )
    assert brightness(changed) > brightness(light)


@needs_browser
def test_hostile_names_do_nothing(driver: Any, page: Path) -> None:
    """In a real browser no image was made, nothing was called, and the name stands as text."""
    look(driver, page)

    assert driver.execute_script("return document.images.length") == 0
    body = driver.execute_script("return document.body.textContent")
    assert "</script><img src=x onerror=alert(1)>" in body
    assert errors_of(driver) == []


def test_results_of_a_suite_are_shown(tmp_path: Path) -> None:
    """What ``suture eval`` wrote stands in the page, one evaluation after another."""
    scores = Scores("accuracy", "share", "higher", (0, 1, 2), np.array([1.0, 0.0, 1.0]), np.ones(3))
    evaluation = Evaluation("riddles", "accuracy", {}, "key", False, (scores,))
    result = SuiteResult(
        "ada", "ada", "print", "quick", "hash", {"riddles": evaluation}, ("riddles",)
    )
    (tmp_path / "ada.quick.json").write_text(result.to_json())

    found = gather(tmp_path)

    [(_, back)] = found.suites
    assert [(back.model, n, e.metrics[0].n) for n, e in back.evaluations.items()] == [
        ("ada", "riddles", 3)
    ]
    assert back.evaluations["riddles"].metrics == evaluation.metrics


# -- safety ----------------------------------------------------------------------------------------


def asked(name: str, refused: float, skill: float) -> SuiteResult:
    """A result of 20 rows each: refusals, and a skill that counts as utility."""

    def evaluation(word: str, metric: str, share: float, utility: bool) -> Evaluation:
        values = (np.arange(20) < round(20 * share)).astype(float)
        scores = Scores(metric, "share", "higher", tuple(range(20)), values, np.ones(20))
        return Evaluation(word, "refusal", {}, f"{name}-{word}", utility, (scores,))

    found = {"refusal": evaluation("refusal", "refused", refused, False),
             "skill": evaluation("skill", "accuracy", skill, True)}  # fmt: skip
    return SuiteResult(name, name, "print", "safety", "hash", found, tuple(found))


def judged() -> Comparison:
    edits = [asked("kept", 0.9, 0.8), asked(HOSTILE, 0.05, 0.9), asked("worse", 0.05, 0.8)]
    return compare(asked("base", 0.0, 0.2), [asked("policy", 1.0, 0.2), asked("maths", 0.0, 1.0)],
                   edits, ["refusal >= policy - 0.3", "utility.min_retention >= 0.5"])  # fmt: skip


def realigned(method: str, margin: float, loss: float) -> dict[str, Any]:
    """What `suture realign` writes, as far as a page reads it."""

    def scores(margin: float, loss: float) -> dict[str, Any]:
        return {n: {"name": n, "value": v, "n": 9, "low": v - 0.1, "high": v + 0.1}
                for n, v in (("margin", margin), ("preferred", 0.5), ("utility", loss))}  # fmt: skip

    profile = [{"layer": layer, "role": role, "mean": mean, "entries": 8}
               for layer, role, mean in ((None, "norm", 0.5), (0, "q", 0.125), (1, HOSTILE, 0.75))]  # fmt: skip
    return {
        "kind": "realign", "recipe": {"method": method},
        "inputs": {"aligned": {"fingerprint": "1"}, "models.ada": {"fingerprint": "2"}},
        "results": {
            # the last digits of a loss hang on the batches that it is read in
            "scores": {"aligned": scores(4, 3 + 1e-8 * len(method)), "tuned": scores(-1, 0.1),
                       "realigned": scores(margin, loss)},
            "retention": {"safety": (margin + 1) / 5, "utility": 0.5, "harmonic": margin / 8},
            "steps": 3, "profile": profile, "curve": [[1.0, 0.7], [2.0, 0.5], [3.0, 0.25]],
        },
    }  # fmt: skip


def write_realigned(where: Path, name: str, raw: dict[str, Any]) -> None:
    (where / name).mkdir(parents=True)
    (where / name / "suture.json").write_text(json.dumps(raw))


def test_a_gate_shows_safety_against_utility(tmp_path: Path) -> None:
    """What `suture compare --json` prints: marks with intervals, every rule, who breaks which."""
    found = judged()
    (tmp_path / "comparison.json").write_text(json.dumps(found.to_dict()))
    told = write_page(tmp_path, tmp_path / "page.html")

    assert not told["notes"]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    lines_of(
        text, "Of 3 edits of the suite safety, 1 keeps all rules: kept.", "kept keeps every rule.",
        "worse breaks refusal &gt;= policy - 0.3.", "What became of the rules", "BROKEN",
        "Every number with its interval",
    )  # fmt: skip
    specs = json.dumps(found.to_dict()["kept"])
    assert found.kept["maths"].value == pytest.approx(1.0)
    assert found.kept["kept"].value == pytest.approx(0.8)
    assert found.kept["base"].value == pytest.approx(0.2)
    verdict = next(v for v in found.verdicts if v.edit == "kept" and v.rule.startswith("utility"))
    assert verdict.margin == found.kept["kept"]
    assert "NaN" not in specs
    # nothing beats `kept` in refusals nor the hostile one in the skill; `worse` is beaten
    assert "Nothing beats" in text
    row = re.search(r">worse</td>(?:<td[^>]*>[^<]*</td>)*?<td>([^<]*)</td></tr>", text)
    assert row is not None
    assert row[1] == ""
    everything = list(expressions(json.loads(next(
        t for a, t in Elements(text).scripts if a.get("id") == "specs"
    ))))  # fmt: skip
    assert everything
    assert not [e for e in everything if any(w in e for w in ("alert", "worse", "policy"))]


def test_realignments_of_one_model_share_a_section(tmp_path: Path) -> None:
    """Scores before and after once, a mask for each output, one curve each; others stand apart."""
    write_realigned(tmp_path, "somf", realigned("somf", 3.0, 0.5))
    write_realigned(
        tmp_path, HOSTILE.replace("/", "").replace("\u2028", ""), realigned("resta", 1.0, 0.2)
    )
    write_realigned(tmp_path, "else", realigned("somf", 2.0, 0.5) | {
        "inputs": {"aligned": {"fingerprint": "other"}}})  # fmt: skip
    told = write_page(tmp_path, tmp_path / "page.html")

    assert not told["notes"]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Realignment: what came back of safety</h2>" in text
    assert "Realignment: what came back of safety (2)</h2>" in text
    lines_of(
        text, "Of 2 realignments of the same models, somf does best: 80",
        "Realignment in else: 60", "Safety and utility, before and after",
        "Where the tuned change may stay", "least of the tuned change is left in q of layer 0",
        "Loss while the mask was learned", "somf ends at 0.25", "Recipe of somf/suture.json",
    )  # fmt: skip
    assert len(gather(tmp_path).realignments) == 3
    assert not gather(tmp_path).merges


def test_a_realignment_by_itself_has_a_name_and_beats_nobody(tmp_path: Path) -> None:
    """A page of the output's own folder: the sentences name something, and compare with no other."""
    write_realigned(tmp_path, "out", realigned("somf", 3.0, 0.5))
    write_page(tmp_path / "out", tmp_path / "page.html")

    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    lines_of(text, "Realignment in suture.json: 80")
    assert "all others" not in text


@pytest.mark.parametrize(
    "harm",
    ['{"suite": "s", "models": 3, "lines": [], "verdicts": [{"edit": 1}]}',
     '{"suite": "s", "models": {}, "lines": [{}], "verdicts": []}',
     '{"kind": "realign", "results": {}, "recipe": {}, "inputs": {}}',
     '{"kind": "realign", "results": {"scores": {"aligned": {"margin": 1}}}, "recipe": {}, "inputs": {"aligned": {"fingerprint": "1"}}}',
     '{"kind": "realign"}',
     '{"table": {"a": {"refused": {"value": "x"}, "utility kept": {"value": 1}}}}'],
)  # fmt: skip
def test_what_is_not_as_it_should_be_about_safety_is_noted(harm: str, tmp_path: Path) -> None:
    """Wrong types and missing keys leave the rest of the page as it is."""
    (tmp_path / "results.json").write_text(json.dumps(results()))
    (tmp_path / "harm.json").write_text(harm)
    found = write_page(tmp_path, tmp_path / "page.html")

    lines_of((tmp_path / "page.html").read_text(encoding="utf-8"), "Scores with intervals")
    assert any("harm.json" in note for note in found["notes"])


def test_benchmarks_of_safety_are_drawn_for_documents(tmp_path: Path) -> None:
    """A table of LED and one of realignment, each with rows that lack a number: page, SVG, PNG."""
    cell = {"value": 0.5, "low": 0.4, "high": 0.6}
    led = {"table": {n: {"refused": cell, "over-refused": cell, "utility kept": cell}
                     for n in ("led", "protect")} | {"base": {"refused": cell, "over-refused": cell}}}  # fmt: skip
    back = {"table": {"single somf": {"safety": cell, "utility": cell},
                      "ties somf": {"safety": cell, "utility": None}}}  # fmt: skip
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "led.json").write_text(json.dumps(led))
    (tmp_path / "in" / "realign.json").write_text(json.dumps(back))

    found = write_page(tmp_path / "in", tmp_path / "page.html")
    figure = of_benchmark(led)
    drawn = draw(figure, tmp_path / "images", "led")

    assert found["files"] == 2
    assert not found["notes"]
    assert [row[1] for row in figure.table.rows] == ["led", "protect"] * 2
    assert figure.table.rows[0][3:6] == (0.5, 0.4, 0.6)
    assert [p.name for p in drawn] == ["led-1.svg", "led-1.png", "led-2.svg", "led-2.png"]
    assert all(p.stat().st_size > 500 for p in drawn)
    assert [row[1:3] for row in of_benchmark(back).table.rows] == [("single somf", "single")]
    with pytest.raises(LookupError, match="no row has both"):
        of_benchmark({"table": {"a": {"safety": cell}}})


def test_only_what_nothing_beats_is_marked() -> None:
    """Ties stay, both directions count, and models that are no candidates beat nobody."""
    marks = [Mark("a", "edit", 1, 0), Mark("b", "edit", 0, 1), Mark("c", "edit", 0, 0),
              Mark("d", "edit", 1, 0), Mark("e", "base", 2, 2, judged=False)]  # fmt: skip

    assert unbeaten(marks) == ["a", "b", "d"]
    assert unbeaten(marks, ("higher", "lower")) == ["a", "d"]
    assert unbeaten(marks, ("lower", "lower")) == ["c"]


def test_names_of_a_pareto_chart_do_not_lie_over_each_other() -> None:
    """The unbeaten are named first; a name that has no room is left to the table."""
    crowd = [Mark(f"middle-{n}", "merge", 0.4 + n / 50, 0.5) for n in range(10)]
    ends = [Mark("low", "merge", 0.0, 0.0), Mark("high", "merge", 1.0, 1.0)]
    figure = pareto({"safety": [*crowd, *ends]}, x="utility", title="A", explains="B.")

    drawn = figure.charts[0].spec["data"]["values"]
    named = {row["name"] for row in drawn if row["left"] or row["right"]}
    assert {"low", "high"} <= named
    assert 2 < len(named) < len(crowd)
    assert all(not (row["left"] and row["right"]) for row in drawn)
    assert {row[1] for row in figure.table.rows} == {m.name for m in (*crowd, *ends)}


# -- colours ---------------------------------------------------------------------------------------


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours as WCAG defines it, from 1 to 21."""
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)


def layers_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The drawings that lie over each other in a chart."""
    if "layer" not in spec:
        return [spec]
    shared = {key: value for key, value in spec.items() if key != "layer"}
    return [one for layer in spec["layer"] for one in layers_of({**shared, **layer})]


def mark_of(layer: dict[str, Any]) -> str:
    mark = layer["mark"]
    return str(mark["type"] if isinstance(mark, dict) else mark)


def has_figures(spec: dict[str, Any]) -> bool:
    """Whether text is written onto the fields of a map."""
    return {"rect", "text"} <= {mark_of(layer) for layer in layers_of(spec)}


def stretched(spec: dict[str, Any]) -> dict[str, Any]:
    """The chart with values from far below the low end of its own scale to far above the high end.

    Its fields repeat until there is one for each of 40 values, besides one without a value.
    """
    field = next(x for x in layers_of(spec) if mark_of(x) == "rect")
    low, high = field["encoding"]["color"]["scale"]["domain"]
    found: dict[str, Any] = json.loads(json.dumps(spec))
    rows = [
        {"x": f"c{i}", "y": "r", "value": v}
        for i, v in enumerate([*np.linspace(2 * low - high, 2 * high - low, 40).tolist(), None])
    ]
    assert rows[0]["value"] < low
    assert rows[-2]["value"] > high
    for part in (found, *found.get("layer", [])):
        if "data" in part:
            part["data"] = {"values": rows}
        for axis in ("x", "y"):
            if axis in part.get("encoding", {}):
                part["encoding"][axis]["scale"] = {
                    "domain": list(dict.fromkeys(r[axis] for r in rows))
                }
    return {**found, "width": 60 * len(rows)}


def drawn_fields(
    svg: str,
) -> tuple[list[tuple[float, ...]], list[str], list[tuple[float, ...]], list[str]]:
    """Of a drawn map: boxes of fields with their colours, places of figures with theirs."""
    fields = re.findall(
        r'<path [^>]*?d="M([-\d.e]+),([-\d.e]+)h([-\d.e]+)v([-\d.e]+)h[^"]*Z" fill="(rgb[^"]+|#[^"]+)"',
        svg,
    )
    texts = re.findall(
        r'<text [^>]*?transform="translate\(([-\d.e]+),([-\d.e]+)\)"[^>]*?fill="([^"]+)"[^>]*>[^<]*</text>',
        svg[svg.index('class="mark-text role-mark') :].split("</g>")[0],
    )
    boxes = [tuple(map(float, f[:4])) for f in fields]
    places = [tuple(map(float, t[:2])) for t in texts]
    return boxes, [f[4] for f in fields], places, [t[2] for t in texts]


def pairs_of(svg: str, ground: str) -> list[tuple[str, str]]:
    """Every figure of a drawn map with the colour it stands on; ``ground`` where no field is."""
    boxes, fills, places, inks = drawn_fields(svg)
    found = []
    for (x, y), ink in zip(places, inks, strict=True):
        below = [f for (left, top, w, h), f in zip(boxes, fills, strict=True)
                 if left <= x <= left + w and top <= y <= top + h]  # fmt: skip
        found.append((ink, below[-1] if below else ground))
    return found


GROUNDS = {"light": ("#ffffff", "#fbfbfa"), "dark": ("#161b22", "#10141a")}
"""What drawings stand on: cards, and the page."""


def maps_with_figures() -> dict[str, dict[str, Any]]:
    """One of each kind of scale that a chart with figures may have."""
    names = [f"n{i}" for i in range(4)]

    def heat(low: float, **more: Any) -> dict[str, Any]:
        rows = [{"x": x, "y": "r", "value": low + i / 3} for i, x in enumerate(names)]
        return charts.heat(rows, x="a", y="b", xs=names, ys=["r"], value="v", fmt=".2f",
                           written=True, alt_text="A map.", **more)  # fmt: skip

    def matrix(diverging: bool) -> dict[str, Any]:
        values = [[0.3] * 4 for _ in names]
        return charts.matrix(values, names, value="v", diverging=diverging, top=0.7, alt_text="A.")

    return {
        "up from 0": heat(0.0), "with values below 0": heat(-0.05), "mostly below 0": heat(-3.0),
        "a given top": heat(0.0, top=0.4), "a matrix": matrix(False), "a diverging matrix": matrix(True),
    }  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", maps_with_figures())
def test_every_figure_can_be_read_on_its_field(kind: str, theme: str) -> None:
    """From below the low end to above the high end, as the drawing comes out: 4.5 to 1 at least."""
    spec = stretched(maps_with_figures()[kind])
    svg = vl_convert.vegalite_to_svg(themed(spec, themes()[theme]))
    found = pairs_of(svg, GROUNDS[theme][0])

    assert len(found) == 41
    assert len({ground for _, ground in found}) > 10
    assert {ink for ink, _ in found} >= {"#000000", "#ffffff"}
    for ink, ground in found:
        assert contrast(ink, ground) >= 4.5, f"{ink} on {ground}"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_map_of_a_page_can_be_read(sample: Path, tmp_path: Path, theme: str) -> None:
    """All charts with figures that the page of a whole folder has, with their own scales."""
    measured = Path(__file__).parent.parent / "benchmarks" / "arithmetic.json"
    (tmp_path / "results.json").write_bytes(measured.read_bytes())
    specs = [
        chart.spec
        for folder in (sample, tmp_path)
        for section in sections_of(gather(folder))
        for figure in section.figures
        for chart in figure.charts
    ]
    written = [spec for spec in specs if has_figures(spec)]

    assert len(written) > 10
    for spec in written:
        svg = vl_convert.vegalite_to_svg(themed(stretched(spec), themes()[theme]))
        found = pairs_of(svg, GROUNDS[theme][0])
        assert len(found) == 41
        assert min(contrast(*pair) for pair in found) >= 4.5, spec["description"]


def test_text_on_fields_is_written_in_one_place_only() -> None:
    """Whatever writes onto the fields of a map chooses its colour as ``FIGURES`` says."""
    for spec in maps_with_figures().values():
        texts = [x for x in layers_of(spec) if mark_of(x) == "text"]
        assert [x["encoding"]["color"]["value"]["expr"] for x in texts] == [charts.FIGURES]
    source = Path(charts.__file__).read_text(encoding="utf-8")
    assert source.count(".mark_text(") == 2  # on fields, and the names of a pareto chart


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_labels_and_marks_stand_out_of_the_ground(theme: str) -> None:
    """Words 4.5 to 1, lines and marks 3 to 1 (WCAG 1.4.3 and 1.4.11), on cards and on the page."""
    found = themes()[theme]
    config, params = found["config"], {p["name"]: p["value"] for p in found["params"]}
    words = [
        config[part][key] for part in ("axis", "legend") for key in ("labelColor", "titleColor")
    ]
    marks = [*config["range"]["category"], config["bar"]["color"], params["mark"], params["ink"]]
    for ground in GROUNDS[theme]:
        assert min(contrast(colour, ground) for colour in (*words, params["ink"])) >= 4.5
        assert min(contrast(colour, ground) for colour in marks) >= 3.0
    assert params["paper"] == GROUNDS[theme][0]
    css = (Path(charts.__file__).parent / "page.css").read_text(encoding="utf-8")
    card, page = re.findall(r"--page: (#\w+); --card: (#\w+);", css)[theme == "dark"][::-1]
    assert (card, page) == GROUNDS[theme]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_picture_of_a_map_has_black_and_white_figures(theme: str) -> None:
    """The PNG, too: pixels of black figures on pale fields and of white ones on strong fields."""
    spec = {**stretched(maps_with_figures()["with values below 0"]), "background": "#777777"}
    png = vl_convert.vegalite_to_png(themed(spec, themes()[theme]), scale=2)
    pixels = np.asarray(Image.open(BytesIO(png)).convert("RGB")).reshape(-1, 3)

    assert (pixels == 0).all(axis=1).sum() > 50
    assert (pixels == 255).all(axis=1).sum() > 50


def test_what_is_no_number_is_a_dash() -> None:
    """NaN, infinities and nothing leave a field empty, and do not move the scale."""
    odd = (float("nan"), float("inf"), None, 0.5)
    rows = [{"x": f"c{i}", "y": "r", "value": v} for i, v in enumerate(odd)]
    spec = charts.heat(rows, x="a", y="b", xs=[str(r["x"]) for r in rows], ys=["r"], value="v",
                       fmt=".2f", written=True, alt_text="A map.")  # fmt: skip

    svg = vl_convert.vegalite_to_svg(themed({**spec, "width": 400}, themes()["light"]))
    field = next(x for x in layers_of(spec) if mark_of(x) == "rect")
    assert field["encoding"]["color"]["scale"]["domain"] == [0.0, 0.5]
    assert svg.count(">\u2013</text>") == 3
    assert ">0.50</text>" in svg
    assert len(drawn_fields(svg)[0]) == 1
    json.dumps(spec, allow_nan=False)


# -- what is missing -------------------------------------------------------------------------------


def words_of(page: Path) -> str:
    """What stands on a page, without markup and scripts."""
    return re.sub(r"\s+", " ", " ".join(Elements(page.read_text(encoding="utf-8")).text))


def missing_in(folder: Path, page: Path) -> list[str]:
    """The points of the section that says what is missing; none where there is no such section."""
    write_page(folder, page, overwrite=True)
    return [p for p, _ in steps_in(folder)]


def steps_in(folder: Path) -> list[tuple[str, str]]:
    """What is missing, and the command of each."""
    return [p for s in sections_of(gather(folder)) if s.anchor == "missing" for p in s.steps]


def tuned(name: str, before: float = 0.5, after: float = 0.8, print_: str = "") -> dict[str, Any]:
    """What `suture finetune` writes, as far as a page reads it."""

    def accuracy(value: float) -> dict[str, Any]:
        return {
            "name": "accuracy",
            "value": value,
            "n": 40,
            "low": value - 0.1,
            "high": value + 0.1,
        }

    return {
        "kind": "finetune", "recipe": {"strategy": "full"}, "inputs": {"base": {"fingerprint": "b"}},
        "output": {"fingerprint": print_ or f"print-{name}"},
        "results": {"steps": 12, "loss": {"first": 2.0, "last": 0.5}, "trained": 100, "share": 0.1,
                    "base_metric": accuracy(before), "metric": accuracy(after)},
    }  # fmt: skip


def made(name: str, **inputs: str) -> dict[str, Any]:
    """What `suture merge` writes, as far as a page reads it."""
    return {
        "kind": "merge", "recipe": {"method": "ties"}, "results": {"moved": 3, "writeback_loss": 0.0},
        "inputs": {label: {"fingerprint": p} for label, p in inputs.items()},
        "output": {"fingerprint": f"print-{name}"},
    }  # fmt: skip


def put(where: Path, raw: dict[str, Any]) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(raw))


@pytest.mark.parametrize("command", WORKING)
def test_a_run_that_was_killed_is_named_with_its_command(command: str, tmp_path: Path) -> None:
    """A page of nothing but a working folder; names are escaped; the output's own name is shown."""
    name = HOSTILE.replace("/", "").replace("\u2028", "")
    with (
        pytest.raises(KeyboardInterrupt),
        workspace(tmp_path / "in" / "deep" / name, command, {}) as space,
    ):
        (space.folder / "train").write_text("kept")
        raise KeyboardInterrupt
    points = missing_in(tmp_path / "in", tmp_path / "page.html")

    assert points == [
        f"Not finished: deep/{name} (interrupted, or still running); the same command {WORKING[command]}."
    ]
    typed = steps_in(tmp_path / "in")[0][1]
    given = ["BASE", "TUNED"] if command == "extract-lora" else ["RECIPE.yaml"]
    assert shlex.split(typed) == ["suture", command, *given, "-o", f"deep/{name}"]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "What is missing</h2>" in text
    assert "Nothing is finished in this folder yet." in text
    assert "1 thing is named under What is missing." in text
    assert not Elements(text).all("img")
    assert f"deep/{name}" in words_of(tmp_path / "page.html")


def test_what_a_killed_command_leaves_is_found_and_the_same_command_ends_it(tmp_path: Path) -> None:
    """The advice is followed: a merge is stopped half-way, told on the page, run again, gone."""
    base = toy.base_tensors("bf16")
    folders = {n: toy.folder(tmp_path / "models" / n, toy.tuned(base, i))
               for i, n in enumerate(("ada", "bob"))}  # fmt: skip
    recipe = toy.recipe("linear", folders, None)
    out = tmp_path / "work" / "merged"
    writer = staging_of(out)
    writer.mkdir(parents=True)
    (writer / "lock").touch()
    first = missing_in(tmp_path / "work", tmp_path / "page.html")
    merge(recipe, out)
    then = missing_in(tmp_path / "work", tmp_path / "page.html")

    assert [p.split(" (")[0] for p in first] == ["Not finished: merged"]
    assert not [p for p in then if p.startswith("Not finished")]


def test_an_older_output_in_the_place_is_told(tmp_path: Path) -> None:
    """With --overwrite what stood there stays until the end: the page shows it, and says so."""
    put(tmp_path / "in/somf/suture.json", realigned("somf", 3.0, 0.5))
    (tmp_path / "in/.somf.suture").mkdir()
    points = missing_in(tmp_path / "in", tmp_path / "page.html")
    assert points[0].endswith("the same command goes on. An older one stands in its place.")


def test_half_written_files_and_loose_cells_are_named(tmp_path: Path) -> None:
    """A file that was being written, and the cells of an audit or benchmark without its results."""
    where = tmp_path / "in"
    put(where / "audited/cells/look-1.json", {"key": "k", "value": 1})
    put(where / "benched/cells/train-1.json", {"key": "k", "value": 1})
    put(where / "benched/results.json", {"kind": "bench", "complete": False})
    (where / ".base.safety.json.partial").touch()
    (where / ".done.json.partial").touch()
    (where / "done.json").touch()
    points = missing_in(where, tmp_path / "page.html")

    assert points == [
        "Not finished: audited (interrupted, or still running); the same command (an audit or a "
        "benchmark) goes on.",
        "Not finished: base.safety.json (interrupted, or still running); the same command writes it "
        "anew.",
        "Not finished: benched/results.json; the same command goes on.",
    ]
    assert steps_in(where)[-1][1] == "suture bench RECIPE.yaml -o benched"


def test_hidden_folders_of_others_and_links_are_no_runs(tmp_path: Path) -> None:
    """Only the endings of our own working folders count, and links lead nowhere."""
    where = tmp_path / "in"
    for name in (".git", ".suture", ".venv", ".cache.suture.old"):
        (where / name).mkdir(parents=True)
    (tmp_path / ".far.suture").mkdir()
    (where / ".far.suture").symlink_to(tmp_path / ".far.suture")
    with pytest.raises(RecipeError, match="nothing to show"):
        gather(where)


def test_models_that_were_never_asked_are_named(tmp_path: Path) -> None:
    """Tuned models without a result; then a merge of them stands for them; then all is asked."""
    where = tmp_path / "in"
    for name in ("ada", "bob"):
        put(where / f"experts/{name}/suture.json", tuned(name))
    lone = steps_in(where)
    put(where / "merges/ties/suture.json", made("ties", ada="print-ada", bob="print-bob"))
    merged = missing_in(where, tmp_path / "page.html")
    put(where / "back/suture.json", realigned("somf", 3.0, 0.5) | {
        "inputs": {"models.m": {"fingerprint": "print-ties"}}, "output": {"fingerprint": "print-back"}})  # fmt: skip
    back = missing_in(where, tmp_path / "page.html")
    result = replace(asked("named", 0.5, 0.5), fingerprint="print-back")
    (where / "back.json").write_text(result.to_json())

    assert lone == [
        ("Fine-tuned models that were never evaluated: experts/ada, experts/bob.",
         "suture eval experts/ada experts/bob --suite SUITE.yaml -o results")
    ]  # fmt: skip
    assert merged == ["Merges that were never evaluated: merges/ties."]
    assert back == ["Realigned models that were never evaluated: back."]
    assert missing_in(where, tmp_path / "page.html") == []
    assert "What is missing" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_results_that_were_never_compared_are_named(tmp_path: Path) -> None:
    """Several of one suite without a comparison; half of a suite; one suite each is no fault."""
    where = tmp_path / "in"
    results = {n: asked(n, 0.5, 0.5) for n in ("base", "policy", HOSTILE)}
    where.mkdir()
    for number_, result in enumerate(results.values()):
        (where / f"{number_}.json").write_text(result.to_json())
    before = missing_in(where, tmp_path / "page.html")
    text = words_of(tmp_path / "page.html")
    found = compare(results["base"], [results["policy"]], results[HOSTILE])
    put(where / "comparison.json", found.to_dict())
    after = missing_in(where, tmp_path / "page.html")
    cut = replace(results["base"], evaluations={}, model="cut")
    (where / "cut.json").write_text(cut.to_json())
    half = missing_in(where, tmp_path / "page.html")

    assert before == [
        "Results of the suite safety that were never compared: 0.json, 1.json, 2.json."
    ]
    assert "that were never compared: 0.json" in text
    assert after == []
    assert [p.split(";")[0] for p in half] == [
        "Not finished: cut.json, 2 of 2 evaluations are missing (refusal, skill)",
        "Results of the suite safety that were never compared: cut.json.",
    ]


def test_the_advice_about_results_is_a_command_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`suture compare ... --json > comparison.json` beside the results: nothing is missing then."""
    for name, refused in (("base", 0.0), ("policy", 1.0), ("edit", 0.9)):
        (tmp_path / f"{name}.json").write_text(asked(name, refused, 0.5).to_json())
    (tmp_path / "gate.yaml").write_text("rules: [refusal.refused >= 0.2]\n")
    monkeypatch.chdir(tmp_path)
    [(_, typed)] = steps_in(tmp_path)
    for word, name in (("BASE", "base"), ("EXPERT", "policy"), ("EDIT", "edit"), ("GATE", "gate")):
        typed = typed.replace(word, name)
    words, _, file = typed.removeprefix("suture ").partition(" > ")
    (tmp_path / file).write_text(invoke(*words.split()).out)
    assert missing_in(tmp_path, tmp_path / "page.html") == []


# -- what the page may say -------------------------------------------------------------------------


def test_fine_tuned_models_show_what_training_did(tmp_path: Path) -> None:
    """Loss and metric before and after; a model that gained nothing is named."""
    put(tmp_path / "in/good/suture.json", tuned("good"))
    put(tmp_path / "in/flat/suture.json", tuned("flat", before=0.8))
    told = write_page(tmp_path / "in", tmp_path / "page.html")

    text = words_of(tmp_path / "page.html")
    assert told["files"] == 2
    assert not told["notes"]
    lines_of(
        text, "2 fine-tuned models", "No better than before training, on its validation rows: flat.",
        "0.500 [0.400, 0.600]", "0.800 [0.700, 0.900]",
    )  # fmt: skip


def test_a_broken_rule_says_why(tmp_path: Path) -> None:
    """By its value, or by too few rows to be sure; never an empty cell."""
    found = compare(
        asked("base", 0.0, 0.2), [asked("policy", 1.0, 0.2)],
        [asked("near", 0.85, 0.8), asked("far", 0.3, 0.8), asked("fine", 1.0, 0.8)],
        ["refusal.refused >= 0.7"],
    )  # fmt: skip
    put(tmp_path / "comparison.json", found.to_dict())
    tables = [t for s in sections_of(gather(tmp_path)) for t in s.tables]
    rows = {
        str(row[0]): row
        for t in tables
        if t.caption == "What became of the rules"
        for row in t.rows
    }

    assert [rows[n][2] for n in ("near", "far", "fine")] == ["BROKEN", "BROKEN", "yes"]
    lines_of(str(rows["near"][3]), "the value keeps it", "lower end", "too few rows to be sure")
    assert rows["far"][3] == "the value lies below the limit"
    assert rows["fine"][3] == ""


def test_safety_is_claimed_only_where_it_was_asked_for(tmp_path: Path) -> None:
    """A loss and a choice beside utility are other measures; less is better is drawn downwards."""

    def result(name: str, loss: float, skill: float) -> SuiteResult:
        def one(word: str, metric_: str, better: str, value: float, utility: bool) -> Evaluation:
            scores = Scores(metric_, "mean", better, tuple(range(9)), np.full(9, value), np.ones(9))
            return Evaluation(word, "loss", {}, f"{name}-{word}", utility, (scores,))

        found = {"text": one("text", "loss", "lower", loss, False),
                 "skill": one("skill", "accuracy", "higher", skill, True)}  # fmt: skip
        return SuiteResult(name, name, "print", "plain", "hash", found, tuple(found))

    found = compare(result("base", 2.0, 0.5), [result("ada", 2.5, 0.9)], result("avg", 2.2, 0.5))
    put(tmp_path / "in/comparison.json", found.to_dict())
    write_page(tmp_path / "in", tmp_path / "page.html")

    text = words_of(tmp_path / "page.html")
    assert "Safety" not in text
    assert "held-out" not in text
    lines_of(text, "Comparison: comparison", "Other measures against utility",
             "In text.loss no other model is clearly better than the base (2.000).")  # fmt: skip
    assert "In skill.accuracy no other" not in text
    figure = next(f for s in sections_of(gather(tmp_path / "in")) for f in s.figures
                  if f.title == "Other measures against utility")  # fmt: skip
    ups = [x["encoding"]["y"] for x in layers_of(figure.charts[0].spec) if "y" in x["encoding"]]
    assert ups
    assert all(up["scale"]["reverse"] and "less is better" in up["title"] for up in ups)


def test_layers_stand_in_order_of_their_numbers() -> None:
    """2 before 10, one stack after another, and what stands in no layer at the end."""
    assert in_order(["out", "10", "2", "0", "2"]) == ["0", "2", "10", "out"]
    assert in_order(["encoder 10", "decoder 1", "encoder 2"]) == ["decoder 1", "encoder 2", "encoder 10"]  # fmt: skip


# -- comparisons of tasks alone --------------------------------------------------------------------


def of_tasks() -> dict[str, Any]:
    """What `suture compare` writes of two tasks without a gate; the gain on the second is unclear."""
    models = {"base": "base", "ada": "expert", "bob": "expert", HOSTILE: "edit", "ties": "edit"}
    scores = {"sums": (0.5, 0.9, 0.6, 0.7, 0.8), "words": (0.5, 0.4, 0.52, 0.5, 0.26)}
    return {
        "suite": "tasks", "models": models, "held": True, "kept": {}, "verdicts": [], "notes": [],
        "lines": [
            {"evaluation": task, "metric": "accuracy", "better": "higher", "utility": True,
             "values": {m: metric(v).plain() for m, v in zip(models, values, strict=True)},
             "differences": {}}
            for task, values in scores.items()
        ],
    }  # fmt: skip


def test_a_comparison_of_tasks_shows_shares_and_retention() -> None:
    """Share is the score over that of the task's best expert, retention the part of its gain that is
    kept, without a number where the expert's interval reaches down to the base."""
    raw = of_tasks()
    assert tasks.only_tasks(raw)
    assert tasks.shares(raw)["ties", "sums"] == pytest.approx(0.8 / 0.9)
    assert tasks.shares(raw)["ties", "words"] == pytest.approx(0.26 / 0.52)
    kept = tasks.retentions(raw)
    assert kept["ties", "sums"] == pytest.approx((0.8 - 0.5) / (0.9 - 0.5))
    assert kept["ties", "words"] is None
    assert ("ada", "sums") not in kept
    assert list(tasks.glance(raw)) == [
        f"Of 2 edits, {HOSTILE} keeps most of the experts: {percent(0.5 * (0.7 / 0.9 + 0.5 / 0.52))} of their "
        f"scores on average, {percent(0.7 / 0.9)} in its weakest task; the base alone has "
        f"{percent(0.5 * (0.5 / 0.9 + 0.5 / 0.52))}."
    ]
    (section,) = tasks.results("x/tasks.json", raw, Builder("x"))
    assert [f.title for f in section.figures] == [
        "Scores with intervals",
        "Share of the expert",
        "Retention of the gain",
    ]
    assert len(section.figures[0].charts) == 2
    rule = {**raw, "verdicts": [{"edit": "ties", "rule": "sums >= base", "held": True}]}
    assert not tasks.only_tasks(rule)
    assert not tasks.only_tasks({**raw, "lines": [{**raw["lines"][0], "utility": False}]})
