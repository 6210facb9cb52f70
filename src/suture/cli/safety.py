"""Commands about safety: realignment, the audit; and the demo of everything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from suture.cli.options import (
    Cores,
    Device,
    DryRun,
    Json,
    NoResume,
    Overwrite,
    Threads,
    ToLog,
    app,
    both,
    errors,
    show_dry,
    show_trained,
    silent,
)
from suture.cli.terminal import Training, say, show_json, tell


@app.command()
def realign(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    device: Device = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    no_resume: NoResume = False,
    threads: Threads = None,
    log: ToLog = None,
    as_json: Json = False,
) -> None:
    """Put safety that fine-tuning took away back into a new model; interrupted, it goes on."""
    with errors(as_json):
        from suture.runs.place import Options as How
        from suture.training.trackers import tracker
        from suture.verbs.realign.plan import describe, plan_realign
        from suture.verbs.realign.result import report_rows
        from suture.verbs.realign.run import execute

        how = How(overwrite=overwrite, resume=not no_resume, device=device, threads=threads)
        plan = plan_realign(recipe, out, how)
        if dry_run:
            found = describe(plan)
        else:
            with Training(as_json) as shown, tracker(log, out, plan.recipe.resolved()) as note:
                steps = f", {plan.steps} steps" if plan.steps else ""
                shown.say(f"{plan.recipe.method.name}: on {plan.device}{steps}")
                report = execute(plan, say=shown.say, tell=both(shown.tell, note))
    if dry_run:
        show_dry(found, as_json, "realign")
    else:
        show_trained(report, report_rows(report), as_json)


@app.command()
def audit(
    recipe: Annotated[Path, typer.Argument(help="Models, rows by language, shares (YAML).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of cells and results.")],
    device: Device = None,
    dry_run: DryRun = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove what an older audit left there, and begin.")
    ] = False,
    no_resume: NoResume = False,
    threads: Cores = None,
    as_json: Json = False,
) -> None:
    """Find out where the safety of a model lives; interrupted, the same command goes on."""
    with errors(as_json):
        from suture.runs.place import Options as How
        from suture.verbs.audit.plan import describe, plan_audit
        from suture.verbs.audit.result import lines
        from suture.verbs.audit.run import execute

        how = How(overwrite=overwrite, resume=not no_resume, device=device, threads=threads)
        plan = plan_audit(recipe, out, how)
        found = describe(plan) if dry_run else execute(plan, say=silent if as_json else say)
    if as_json:
        show_json(found)
    elif dry_run:
        show_dry(found, as_json, "begin")
    else:
        for line in lines(found):
            tell(line)
        tell(f"wrote {out / 'audit.json'}; weights and masks beside it are restricted")
