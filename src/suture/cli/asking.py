"""Commands that ask models and show the answers: evaluations, comparisons, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from suture.cli.options import FAILED, DryRun, Json, app, errors, stop
from suture.cli.terminal import Watch, say, show_json, tell
from suture.errors import Problems, RecipeError
from suture.tensors.spec import listed, readable


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Folders, hub ids, GGUF files or BASE+ADAPTER.")
    ],
    suite: Annotated[Path, typer.Option("--suite", "-s", help="What to ask (YAML).")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="A folder of results; or a .json file, for one model."),
    ] = Path("results"),
    limit: Annotated[
        int, typer.Option("--limit", min=0, help="Only the first rows of each evaluation; 0: all.")
    ] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dry_run: DryRun = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of other models or suites.")
    ] = False,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Ask again what a result answers already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Evaluate models by a suite; what a result answers already is not asked again."""
    with errors(as_json):
        from suture.verbs.evaluate import plan as planning
        from suture.verbs.evaluate import run as work

        how = planning.Options(
            overwrite=overwrite, resume=not no_resume, device=device, limit=limit
        )
        plan = planning.plan_suite(models, suite, out, how)
        if dry_run:
            found = planning.describe(plan)
            show_json(found) if as_json else _show_questions(found)
            return
        with Watch(as_json) as progress:
            rows = sum(len(asked.rows) for asked in plan.asked.values())
            progress.say(f"{plan.suite.name}: {len(plan.asked)} evaluation(s), {rows} rows, "
                      f"{len(plan.subjects)} model(s) on {plan.device}")  # fmt: skip
            results = work.execute(plan, progress)
    if as_json:
        show_json({"results": [json.loads(result.to_json()) for result in results]})
        return
    from suture.verbs.evaluate.result import results_table

    for line in results_table(results):
        tell(line)
    for subject in plan.subjects:
        tell(f"wrote {subject.out}")


def _show_questions(found: dict[str, Any]) -> None:
    for name, row in found["models"].items():
        tell(f"model    {name}: {row['path']}, result in {row['output']}")
    for name, row in found["evaluations"].items():
        more = ", utility" if row["utility"] else ""
        groups = f", by {listed(row['categories'])}" if row["categories"] else ""
        tell(f"ask      {name}: {row['kind']}, {row['rows']} rows{more}{groups}")
        for note in row["notes"]:
            tell(f"note     {name}: {note}")
    tell(f"device   {found['device']}")
    tell("nothing was asked; leave out --dry-run to evaluate")


@app.command()
def compare(
    results: Annotated[
        list[Path], typer.Argument(help="BASE.json [EXPERT.json ...] EDIT.json of one suite.")
    ],
    edits: Annotated[
        list[Path] | None,
        typer.Option("--edit", help="One more edit; then all after the base are experts."),
    ] = None,
    gate: Annotated[
        Path | None, typer.Option("--gate", help="Rules that every edit must keep (YAML).")
    ] = None,
    blame: Annotated[
        Path | None,
        typer.Option(
            "--blame",
            help="The edit's merge recipe: if a rule breaks, find the expert that did it.",
        ),
    ] = None,
    suite: Annotated[
        Path | None, typer.Option("--suite", "-s", help="With --blame: what was asked (YAML).")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="With --blame: auto, cpu, cuda, cuda:1, ...")
    ] = "auto",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="With --blame: replace results of another recipe's."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show base, experts and edits side by side; with a gate, exit 1 when a rule is broken."""
    blamed = None
    with errors(as_json):
        from suture.verbs.compare import result as tables
        from suture.verbs.compare import run

        files = run.read_files(results, edits or ())
        if blame is not None or suite is not None:
            _check_blame(blame, suite, gate, len(files.edits))
        found = run.compare(files.base, files.experts, files.edits, gate, names=files.names)
        if blame is not None and suite is not None and gate is not None:
            from suture.verbs.compare import blame as blaming

            with Watch(as_json) as progress:
                case = blaming.Case(files.base, files.experts, files.edits[0], gate, files.names)
                how = blaming.How(device, overwrite)
                blamed = blaming.search(blame, suite, case, files.place, how, progress)
    if as_json:
        show_json(found.to_dict() | ({} if blamed is None else {"blame": blamed.plain()}))
    else:
        for line in tables.comparison_table(found):
            tell(line)
        if blamed is not None:
            tell("")
            for line in tables.blame_table(blamed):
                tell(line)
    if not found.held:
        stop(FAILED)


def _check_blame(blame: Path | None, suite: Path | None, gate: Path | None, edits: int) -> None:
    problems = Problems()
    if blame is None:
        problems.add(RecipeError, "--suite: only --blame asks anything; name the merge recipe")
    else:
        if gate is None:
            problems.add(RecipeError, "--blame: needs --gate, the rules that the edit may break")
        if suite is None:
            problems.add(RecipeError, "--blame: needs --suite, what base and edit were asked")
        if edits != 1:
            problems.add(RecipeError, f"--blame: takes one edit, not {edits}")
    problems.raise_if_any()


@app.command()
def proxy(
    out: Annotated[Path, typer.Option("-o", "--out", help="A folder for the rows.")],
    seed: Annotated[int, typer.Option(help="Chooses topics and wordings of the splits.")] = 0,
    languages: Annotated[str, typer.Option(help="Some of en,de,es.")] = "en,de,es",
    topics: Annotated[
        str, typer.Option(help="Test rows about new topics, or known ones in new words.")
    ] = "new",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other rows.")] = False,
    as_json: Json = False,
) -> None:
    """Write the rows of the harmless refusal policy: safety work without a harmful word."""
    with errors(as_json):
        from suture.verbs.proxy.run import write

        words = [word.strip() for word in languages.split(",")]
        counts = write(out, seed, words, topics=topics, overwrite=overwrite)
    if as_json:
        show_json(counts)
        return
    for name, number in counts.items():
        tell(f"{out / name}.jsonl: {number} rows")


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
