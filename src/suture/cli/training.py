"""The command that trains: fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from suture.cli.options import (
    Device,
    DryRun,
    Json,
    NoResume,
    Overwrite,
    ToLog,
    app,
    both,
    errors,
    show_dry,
    show_trained,
)
from suture.cli.terminal import Training


@app.command()
def finetune(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    device: Device = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    no_resume: NoResume = False,
    restricted: Annotated[
        bool,
        typer.Option("--restricted", help="Mark it, and what is made with it: not to share."),
    ] = False,
    log: ToLog = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a model by a recipe into a new folder; interrupted, the same command goes on."""
    with errors(as_json):
        from suture.training.trackers import tracker
        from suture.verbs.finetune import run

        how = run.Options(
            overwrite=overwrite, resume=not no_resume, device=device, restricted=restricted
        )
        plan = run.plan_finetune(recipe, out, how)
        if dry_run:
            found = run.describe(plan)
        else:
            unit = "images" if plan.task == "image-classification" else "tokens"
            with (
                Training(as_json, unit) as shown,
                tracker(log, out, plan.recipe.resolved()) as note,
            ):
                rows, name = len(plan.rows.train), plan.recipe.strategy.name
                shown.say(f"{name}: {rows} rows, {plan.steps} steps on {plan.device}")
                report = run.execute(plan, say=shown.say, tell=both(shown.tell, note))
    if dry_run:
        show_dry(found, as_json, "train")
    else:
        show_trained(report, run.report_rows(report), as_json)
