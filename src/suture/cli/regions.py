"""Commands that look into models: regions, analyses, the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from suture.cli.options import DryRun, Json, Threads, app, errors, silent
from suture.cli.terminal import Bars, say, show_json, tell
from suture.tensors.spec import readable


@app.command()
def localize(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML): base, models, rule, density.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of masks to write.")],
    threads: Threads = None,
    dry_run: DryRun = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older folder of masks.")
    ] = False,
    values: Annotated[
        bool,
        typer.Option(
            "--values",
            help="Write the marked weights, too: grafts, which stitch without their models.",
        ),
    ] = False,
    restricted: Annotated[
        bool,
        typer.Option("--restricted", help="Mark them, and what is made with them: not to share."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Find the entries that carry a model's skill: a mask for each model, by an importance rule."""
    with errors(as_json), Bars(as_json) as bars:
        from suture.kernels import cache
        from suture.verbs.localize.plan import plan_regions
        from suture.verbs.localize.run import execute, lines

        cache.announce = lambda: say("compiling for this processor (once, some ten seconds)")
        plan = plan_regions(recipe, out, threads=threads, overwrite=overwrite,
                                    values=values, restricted=restricted)  # fmt: skip
        if not dry_run:
            record = execute(plan, bars.stage, silent if as_json else say)
    if dry_run:
        found = plan.describe()
        show_json(found) if as_json else _show_regions(found)
    elif as_json:
        show_json(record)
    else:
        for line in lines(record, out):
            tell(line)


def _show_regions(found: dict[str, Any]) -> None:
    needs = f", from {', '.join(found['needs'])}" if found["needs"] else ", without data"
    tell(f"rule     {found['rule']}{needs}; scope {found['scope']}")
    for model, label in found["models"].items():
        rows = f", {found['rows'][model]} rows" if model in found["rows"] else ""
        density = found["densities"][model]
        share = "every positive entry" if density is None else f"density {density:g}"
        tell(f"model    {model}: {label}, {share}{rows}")
    tell(f"output   {found['output']['path']}: {found['tensors']} tensors, {found['entries']:,} "
          f"entries, {readable(found['output']['bytes'])}")  # fmt: skip
    tell("nothing was written; leave out --dry-run to localize")


@app.command()
def analyze(
    recipe: Annotated[Path, typer.Argument(help="What to look at (YAML).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    threads: Threads = None,
    dry_run: DryRun = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older analysis, at the end.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Look at several task vectors at once: profiles, angles, conflicts, masks, bases."""
    with errors(as_json), Bars(as_json) as bars:
        from suture.verbs.analyze.plan import plan_analysis
        from suture.verbs.analyze.result import summary_lines
        from suture.verbs.analyze.run import run_analysis

        plan = plan_analysis(recipe, out, overwrite=overwrite, threads=threads)
        found = plan.describe() if dry_run else run_analysis(plan, bars.stage).to_dict()
        told = summary_lines(plan, found) if not as_json else ()
        for line in told:
            tell(line)
    if as_json:
        show_json(found)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Where results, merges and analyses lie.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")],
    images: Annotated[
        Path | None, typer.Option("--images", help="Also write each figure as SVG and PNG here.")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="The heading of the page.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an older file of that name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Gather what a folder holds into one self-contained HTML page that works offline."""
    with errors(as_json):
        from suture.verbs.report.run import write_page

        found = write_page(folder, out, images=images, title=title, overwrite=overwrite)
    if as_json:
        show_json(found)
        return
    for note in found["notes"]:
        say(f"note: {note}")
    figures = f"{found['figures']} figures from {found['files']} files"
    tell(f"wrote {out} ({readable(found['bytes'])}, {figures})")
