"""Commands about whole models: what they hold, how they differ, how they merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from suture.cli.options import FAILED, DryRun, Json, NoResume, Threads, app, errors, stop
from suture.cli.terminal import Watch, say, show_json, tell
from suture.tensors.spec import listed, readable


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A file, a folder, a hub id, or BASE+ADAPTER.")],
    check: Annotated[
        bool, typer.Option("--check", help="Read every byte: NaN, infinities, duplicates.")
    ] = False,
    each: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a model holds: tensors, dtypes, roles, size, integrity."""
    with errors(as_json), Watch(as_json) as progress:
        from suture.analysis.profile import inspect_model
        from suture.checkpoints.open import open_model

        checkpoint = open_model(model)
        counted = progress.stage("check", checkpoint.nbytes) if check else None
        found = inspect_model(checkpoint, check=check, each=each, progress=counted)
    if as_json:
        show_json(found)
    else:
        _show_model(found)
    if check and not found["integrity"]["ok"]:
        stop(FAILED)


def _show_model(found: dict[str, Any]) -> None:
    tell(f"{found['path']}: {found['tensors']} tensors, {found['elements']:,} elements, "
          f"{readable(found['bytes'])} in {found['files']} file(s)")  # fmt: skip
    facts = {"architecture": found["architecture"], "layers": found["layers"],
             "vocabulary": found["vocabulary"]}  # fmt: skip
    tell("  " + ", ".join(f"{k} {v}" for k, v in facts.items() if v))
    for alias, name in found["tied"].items():
        tell(f"  {alias} is tied to {name}")
    for section in ("dtypes", "roles"):
        tell(f"\n{section[:-1]:<16}{'tensors':>9}{'elements':>16}{'size':>11}{'share':>9}")
        for name, row in found[section].items():
            share = row["bytes"] / max(1, found["bytes"])
            tell(f"{name:<16}{row['tensors']:>9}{row['elements']:>16,}"
                  f"{readable(row['bytes']):>11}{share:>9.2%}")  # fmt: skip
    for name, row in found.get("each", {}).items():
        layer = "" if row["layer"] is None else f" of layer {row['layer']}"
        tell(f"{name}: {row['dtype']}{row['shape']}, {row['role']}{layer}, "
              f"{readable(row['bytes'])} in {row['file']}")  # fmt: skip
    if "integrity" in found:
        _show_integrity(found["integrity"])


def _show_integrity(found: dict[str, Any]) -> None:
    tell("\nintegrity: " + ("ok" if found["ok"] else "NOT ok"))
    for name, count in found["nonfinite"].items():
        tell(f"  {name}: {count} NaN or infinite values")
    for name in found["untied"]:
        tell(f"  {name}: differs from the tensor that config.json ties it to")
    for names in found["duplicates"][:10]:
        tell(f"  the same bytes: {', '.join(names)}")


@app.command()
def diff(
    base: Annotated[str, typer.Argument(help="What the model was fine-tuned from.")],
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    as_json: Json = False,
) -> None:
    """Show the task vector between two models: norms, cosine, profile by layer and role."""
    with errors(as_json), Watch(as_json) as progress:
        from suture.analysis import profile
        from suture.checkpoints.open import open_model

        found = profile.diff(open_model(base), open_model(tuned), progress.stage)
    if as_json:
        show_json(found)
        return
    tell(f"{tuned} - {base}\n")
    head = f"{'changed':>9}{'norm':>12}{'relative':>10}{'largest':>11}{'cosine':>11}"
    for section in ("roles", "layers"):
        width = max(len(section), *(len(k) for k in found[section]))
        tell(f"{section[:-1]:<{width}}{head}")
        for name, row in found[section].items():
            tell(f"{name:<{width}}{_profile_row(row)}")
        tell()
    tell(f"{'total':<8}{_profile_row(found['total'])}")
    for side in ("base", "tuned"):
        if names := found[f"only_in_{side}"]:
            tell(f"only in the {side} model: {listed(names)}")


def _profile_row(row: dict[str, Any]) -> str:
    relative = "-" if row["relative_norm"] is None else f"{row['relative_norm']:.5f}"
    cosine = "-" if row["cosine"] is None else f"{row['cosine']:.7f}"
    return (f"{row['changed_share']:>9.2%}{row['norm']:>12.5g}{relative:>10}"
            f"{row['largest']:>11.4g}{cosine:>11}")  # fmt: skip


@app.command()
def merge(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe (YAML), also mergekit's, or a suture.json.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write.", show_default=False)
    ] = None,
    threads: Threads = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Say what a mergekit recipe means here, and where Suture's defaults differ.",
        ),
    ] = False,
    dry_run: DryRun = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace an older output with all that is in it, in one step, at the end.",
        ),
    ] = False,
    no_resume: NoResume = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Go on where weights are NaN or infinite.")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Link files that stay as they are, instead of copying.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge models by a recipe into a new folder; interrupted, the same command goes on."""
    with errors(as_json), Watch(as_json) as progress:
        from suture.kernels import cache
        from suture.runs import place
        from suture.verbs.merge import describe, run
        from suture.verbs.merge import plan as planning

        if explain:
            told = describe.explain(recipe)
            show_json(told) if as_json else _show_explanation(told)
            return
        if out is None:
            raise typer.BadParameter(
                "name the folder to write: -o OUT", param_hint="'--out' / '-o'"
            )
        cache.announce = lambda: say("compiling for this processor (once, some ten seconds)")
        how = place.MergeOptions(threads=threads, overwrite=overwrite, resume=not no_resume,
                          allow_nonfinite=allow_nonfinite, link=link)  # fmt: skip
        plan = planning.plan_recipe(recipe, out, how)
        if dry_run:
            planning.check_contents(plan)
            found = describe.describe(plan)
        else:
            if not as_json:
                say(_intention(plan))
            report = run.execute(plan, progress.stage)
    if dry_run:
        show_json(found) if as_json else _show_plan(found)
    elif as_json:
        show_json(report.to_dict())
    else:
        for line in run.report_lines(report):
            tell(line)


def _show_explanation(found: dict[str, Any]) -> None:
    import yaml

    if not found["mergekit"]:
        tell("# A recipe of Suture's own; without what is a default it reads:\n")
    else:
        tell("# With mergekit's meaning, which this recipe keeps, Suture's defaults differ in:\n#")
    for stage, sentences in found["differences"].items():
        if stage:
            tell(f"# stage {stage}:")
        for text in sentences or ["nothing"]:
            tell(_comment(text))
    for note in found["notes"]:
        tell(_comment(f"note: {note}"))
    if found["mergekit"]:
        tell("#\n# The same merge as a recipe of Suture's own:\n")
    tell(yaml.safe_dump(found["native"], sort_keys=False, default_flow_style=None, width=100,
                         allow_unicode=True).rstrip())  # fmt: skip


def _comment(text: str) -> str:
    """A sentence as an item of a YAML comment."""
    from textwrap import fill

    return fill(text, 98, initial_indent="# - ", subsequent_indent="#   ")


def _intention(plan: Any) -> str:
    return (f"merging {len(plan.recipe.models)} model(s) by {plan.recipe.method.name}: "
            f"{plan.merged} tensors merged, {len(plan.specs) - plan.merged} copied, "
            f"{readable(plan.nbytes)} to {plan.out}")  # fmt: skip


def _show_plan(found: dict[str, Any]) -> None:
    tell(f"method   {found['method']} " + json.dumps(found["parameters"]))
    for name, row in found["stages"].items():
        tell(f"stage    {name}: {row['method']}, {row['tensors']} tensors, "
              f"{readable(row['bytes'])}, {'there already' if row['kept'] else 'to be made'} in "
              f"{row['path']}")  # fmt: skip
    for label, row in found["inputs"].items():
        tell(f"input    {label}: {row['path']}, {row['tensors']} tensors, "
              f"{readable(row['bytes'])}, {row['files']} file(s)")  # fmt: skip
    out = found["output"]
    tell(f"output   {out['path']}: {out['merged']} tensors merged ({out['merged_elements']:,} "
          f"elements), {out['copied']} copied, {readable(out['bytes'])}, "
          f"{out['shards']} file(s)")  # fmt: skip
    tell(f"reading  {readable(found['bytes_read'])} in {found['passes']} pass(es), "
          f"{found['threads']} thread(s)")  # fmt: skip
    tell(f"memory   about {readable(found['peak_memory'])} above the interpreter")
    tell(f"time     about {found['seconds']:.1f} s")
    for note in found["notes"]:
        tell(f"note     {note}")
    tell("nothing was written; leave out --dry-run to merge")


@app.command("extract-lora")
def extract_lora(
    base: Annotated[str, typer.Argument(help="What the adapter will be put on.")],
    models: Annotated[
        list[str],
        typer.Argument(help="A tuned model; or adapters of the base, which are added up."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Of each module; adapters keep all theirs without it."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", help="Keep the ranks with this share of the squared norm."),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", help="The factor of a model; one for each, in their order."),
    ] = None,
    save_others: Annotated[
        bool,
        typer.Option("--save-others", help="Write norms, biases and the like as they are."),
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the factors.")] = "float32",
    as_json: Json = False,
) -> None:
    """Make a LoRA adapter of the difference between models, and tell the error."""
    with errors(as_json), Watch(as_json) as progress:
        from suture.checkpoints.open import open_model
        from suture.verbs.extract_lora import run as lowrank

        start = open_model(base)
        tuned = [open_model(model, base=start) for model in models]
        report = lowrank.extract_lora(
            start, tuned, out, rank=rank, energy=energy, weights=weight or None,
            save_others=save_others, dtype=dtype, stage=progress.stage,
        )  # fmt: skip
    if as_json:
        show_json(report.to_dict())
    else:
        for line in lowrank.report_lines(report):
            tell(line)
