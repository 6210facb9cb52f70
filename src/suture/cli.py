"""The command line: parse, call, print; everything heavy is imported inside the commands."""

from __future__ import annotations

import gc
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import suture
from suture.errors import Problems, RecipeError, SutureError
from suture.spec import listed, readable
from suture.terminal import Asking, Bars, Training, say, show_json, tell

DONE, FAILED, WRONG, INTERRUPTED = range(4)

app = typer.Typer(
    name="suture",
    help="Edit open-weight models like code.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads to use; default: every core. Changes no byte.")
]
Cores = Annotated[int | None, typer.Option(min=1, help="Threads to use; default: every core.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; overrides the recipe.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and say what would be done.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an older output, in one step, at the end.")
]
NoResume = Annotated[
    bool, typer.Option("--no-resume", help="Start anew even if an interrupted run left work.")
]
ToLog = Annotated[
    str | None, typer.Option("--log", help="Also write curves: tensorboard or trackio.")
]
OneOf = Annotated[str | None, typer.Argument(help="Show this one in full.")]


def _stop(code: int) -> NoReturn:
    raise typer.Exit(code)


@contextmanager
def _errors(as_json: bool = False) -> Iterator[None]:
    """Show an error of the user's as a message; let one of ours through with its traceback."""
    try:
        yield
    except SutureError as error:
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        if as_json:
            show_json({"error": str(error), "kind": type(error).__name__})
        say(f"error: {error}{notes}")
        _stop(WRONG)
    except KeyboardInterrupt:
        if as_json:
            show_json({"error": "interrupted", "kind": "Interrupted"})
        say("interrupted; run the same command again: it goes on from what is done")
        _stop(INTERRUPTED)


def _version(value: bool) -> None:
    if value:
        tell(f"suture {suture.__version__}")
        _stop(DONE)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Edit open-weight models like code."""
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


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
    with _errors(as_json), Bars(as_json) as bars:
        from suture.opening import open_model
        from suture.profile import inspect_model

        checkpoint = open_model(model)
        progress = bars.stage("check", checkpoint.nbytes) if check else None
        found = inspect_model(checkpoint, check=check, each=each, progress=progress)
    if as_json:
        show_json(found)
    else:
        _show_model(found)
    if check and not found["integrity"]["ok"]:
        _stop(FAILED)


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
    with _errors(as_json), Bars(as_json) as bars:
        from suture import profile
        from suture.opening import open_model

        one, other = open_model(base), open_model(tuned)
        found = profile.diff(one, other, bars.stage("diff", one.nbytes + other.nbytes))
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
    with _errors(as_json), Bars(as_json) as bars:
        from suture import machine, run

        if explain:
            told = run.explain(recipe)
            show_json(told) if as_json else _show_explanation(told)
            return
        if out is None:
            raise typer.BadParameter(
                "name the folder to write: -o OUT", param_hint="'--out' / '-o'"
            )
        machine.announce = lambda: say("compiling for this processor (once, some ten seconds)")
        how = run.Options(threads=threads, overwrite=overwrite, resume=not no_resume,
                          allow_nonfinite=allow_nonfinite, link=link)  # fmt: skip
        plan = run.plan_recipe(recipe, out, how)
        if dry_run:
            run.check_contents(plan)
            found = run.describe(plan)
        else:
            if not as_json:
                say(_intention(plan))
            report = run.execute(plan, bars.stage)
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
    with _errors(as_json), Bars(as_json) as bars:
        from suture import lowrank
        from suture.opening import open_model

        start = open_model(base)
        tuned = [open_model(model, base=start) for model in models]
        size = start.nbytes + sum(model.nbytes for model in tuned)
        report = lowrank.extract_lora(
            start, tuned, out, rank=rank, energy=energy, weights=weight or None,
            save_others=save_others, dtype=dtype, progress=bars.stage("extract", size),
        )  # fmt: skip
    if as_json:
        show_json(report.to_dict())
    else:
        for line in lowrank.report_lines(report):
            tell(line)


patches = typer.Typer(
    help="Make, apply, revert and show patches: the entries in which two models differ.",
    no_args_is_help=True,
)
app.add_typer(patches, name="patch")
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Go on with another base: entries with other bits get the delta added. It is noted.",
    ),
]


@patches.command("make")
def patch_make(
    base: Annotated[str, typer.Argument(help="The model that the patch will be put on.")],
    tuned: Annotated[str, typer.Argument(help="What it makes of it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="NAME.patch.safetensors, to write.")],
    mask: Annotated[
        Path | None, typer.Option(help="A mask, as a file: only its entries are taken.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="The share of entries to take, those that moved most, in (0, 1]."),
    ] = None,
    scope: Annotated[
        str, typer.Option(help="Where entries compete for the density: global, layer or tensor.")
    ] = "global",
    restricted: Annotated[
        bool,
        typer.Option("--restricted", help="Mark it, and what is made with it: not to share."),
    ] = False,
    threads: Threads = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the entries in which two models differ, all or some, as a patch.

    Without --mask and --density it has every entry whose bits differ.
    """
    with _errors(as_json), Bars(as_json) as bars:
        from suture import patching
        from suture.mask import Mask
        from suture.opening import open_model

        chosen = None if mask is None else Mask.load(mask)
        patch = patching.make_patch(
            open_model(base), open_model(tuned), out, mask=chosen, density=density, scope=scope,
            restricted=restricted, threads=threads, overwrite=overwrite, stage=bars.stage,
        )  # fmt: skip
        found = patching.describe(patch)
    if as_json:
        show_json(found)
    else:
        tell(f"wrote {out}: {found['entries']:,} entries of {len(found['tensors'])} tensors in "
              f"{readable(found['bytes'])}, {found['share']:.2%} of their size")  # fmt: skip


@patches.command("apply")
def patch_apply(
    model: Annotated[str, typer.Argument(help="The model that the patches were made on.")],
    patch: Annotated[list[Path], typer.Argument(help="Patches, made on the same base.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    scale: Annotated[
        float, typer.Option(help="Factor on the deltas; other than 1: float32, rounded once.")
    ] = 1.0,
    on_overlap: Annotated[
        str,
        typer.Option(help="Entries in several patches: error, last (wins) or mean (of deltas)."),
    ] = "error",
    force: Force = False,
    threads: Threads = None,
    overwrite: Overwrite = False,
    no_resume: NoResume = False,
    as_json: Json = False,
) -> None:
    """Put patches on a model, and write it with a patch that undoes it.

    OUT/undo.patch.safetensors records what was really done, also with --scale and --force:
    suture patch revert OUT OUT/undo.patch.safetensors -o BACK gives the model back, bit for bit.
    """
    with _errors(as_json), Bars(as_json) as bars:
        from suture import patching
        from suture.opening import open_model

        report = patching.apply_patches(
            open_model(model), patching.load_patches(patch), out, scale=scale,
            on_overlap=on_overlap, force=force, stage=bars.stage, threads=threads,
            overwrite=overwrite, resume=not no_resume,
        )  # fmt: skip
        lines = patching.report_lines(report)
    _show_patched(report, lines, as_json)


def _show_patched(report: Any, lines: Iterator[str], as_json: bool) -> None:
    if as_json:
        show_json(report.to_dict())
        return
    for line in lines:
        tell(line)


@patches.command("revert")
def patch_revert(
    model: Annotated[str, typer.Argument(help="The model with the patch on it.")],
    patch: Annotated[
        Path, typer.Argument(help="The patch, or the undo patch beside the patched model.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    force: Force = False,
    threads: Threads = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Take a patch off a model again, bit for bit."""
    with _errors(as_json), Bars(as_json) as bars:
        from suture import patching
        from suture.opening import open_model
        from suture.patch import Patch

        report = patching.revert_patch(
            open_model(model), Patch.load(patch), out, force=force, stage=bars.stage,
            threads=threads, overwrite=overwrite,
        )  # fmt: skip
        lines = patching.report_lines(report)
    _show_patched(report, lines, as_json)


@patches.command("show")
def patch_show(
    patch: Annotated[Path, typer.Argument(help="A patch.")],
    as_json: Json = False,
) -> None:
    """Check a patch, and show what it holds and what it was made of."""
    with _errors(as_json):
        from suture import patching
        from suture.patch import Patch

        found = patching.describe(Patch.load(patch))
    if as_json:
        show_json(found)
        return
    tell(f"{found['path']}: {found['entries']:,} entries in {len(found['tensors'])} tensors "
          f"({found['density']:.3%}), {readable(found['bytes'])}, {found['share']:.2%} of their "
          "size")  # fmt: skip
    for key, what in (("base", "base"), ("result", "result"), ("digest", "file")):
        tell(f"  fingerprint of the {what:<7} {found[key] or 'not known'}")
    if found["restricted"]:
        tell("  restricted: must not be passed on, nor what is made with it")
    for key, value in found["provenance"].items():
        tell(f"  {key:<8} {value if isinstance(value, str) else json.dumps(value)}")
    width = max(len("tensor"), *(len(name) for name in found["tensors"]))
    tell(f"\n{'tensor':<{width}}{'dtype':>9}{'entries':>14}{'density':>10}{'size':>11}")
    for name, row in found["tensors"].items():
        tell(f"{name:<{width}}{row['dtype']:>9}{row['entries']:>14,}{row['density']:>10.3%}"
              f"{readable(row['bytes']):>11}")  # fmt: skip


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
    with _errors(as_json), Bars(as_json) as bars:
        from suture import machine, regions

        machine.announce = lambda: say("compiling for this processor (once, some ten seconds)")
        plan = regions.plan_regions(recipe, out, threads=threads, overwrite=overwrite,
                                    values=values, restricted=restricted)  # fmt: skip
        if not dry_run:
            record = regions.execute(plan, bars.stage, _silent if as_json else say)
    if dry_run:
        found = plan.describe()
        show_json(found) if as_json else _show_regions(found)
    elif as_json:
        show_json(record)
    else:
        for line in regions.lines(record, out):
            tell(line)


def _silent(text: str) -> None:
    """For --json: say nothing."""


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
    with _errors(as_json), Bars(as_json) as bars:
        from suture import analyze as work

        plan = work.plan_analysis(recipe, out, overwrite=overwrite, threads=threads)
        found = plan.describe() if dry_run else work.run_analysis(plan, bars.stage).to_dict()
        told = work.summary_lines(plan, found) if not as_json else ()
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
    with _errors(as_json):
        from suture.page import write_page

        found = write_page(folder, out, images=images, title=title, overwrite=overwrite)
    if as_json:
        show_json(found)
        return
    for note in found["notes"]:
        say(f"note: {note}")
    figures = f"{found['figures']} figures from {found['files']} files"
    tell(f"wrote {out} ({readable(found['bytes'])}, {figures})")


@app.command()
def methods(
    name: OneOf = None,
    as_json: Json = False,
) -> None:
    """List the merge methods with their parameters, defaults, papers and needs."""
    with _errors(as_json):
        from suture.merges import METHODS, method

        chosen = list(METHODS.values()) if name is None else [method(name)]
        found = {m.name: _method_data(m) for m in chosen}
    if as_json:
        show_json(found)
        return
    for key, row in found.items():
        _show_line(key, row, whole=name is not None)


def _show_line(key: str, row: dict[str, Any], *, whole: bool) -> None:
    """One line of a table of methods or strategies: in short, or with all that is known of it."""
    tell(f"{key:<17} {row['title']}: {row['paper']}")
    presets = row.get("presets", {})
    if not whole:
        parameters = (f"{k}={v['default']}" for k, v in row["parameters"].items())
        tell(" " * 18 + ", ".join(parameters))
        if presets:
            tell(" " * 18 + "presets: " + ", ".join(presets))
        return
    from suture.spec import in_letters

    tell(f"\n{in_letters(row['equation'])}\n")
    if "needs" in row:
        tell(f"{row['needs']}\n")
    for parameter, facts in row["parameters"].items():
        choices = f": {', '.join(facts['choices'])}" if facts["choices"] else ""
        tell(f"  {parameter} = {facts['default']}{facts.get('scope', '')}")
        tell(f"      {facts['doc']}{choices}")
    for preset, facts in presets.items():
        given = ", ".join(f"{k}={v}" for k, v in facts["parameters"].items())
        where = f" ({facts['note']})" if facts["note"] else ""
        tell(f"\n  preset {preset}: {facts['source']}{where}\n      {given}")


def _method_data(method: Any) -> dict[str, Any]:
    from suture.merges.presets import PRESETS

    scopes = {(True, True): ", for each model and tensor", (False, True): ", for each tensor"}
    return {
        "title": method.title,
        "paper": method.paper,
        "equation": method.equation,
        "needs": method.needs,
        "needs_base": method.needs_base,
        "random": method.random,
        "parameters": {
            p.name: {
                "default": p.default,
                "doc": p.doc,
                "choices": list(p.choices),
                "scope": scopes.get((p.per_model, p.per_tensor), ""),
            }
            for p in method.parameters.values()
        },
        "presets": {
            p.name: {"parameters": dict(p.parameters), "source": p.source, "note": p.note}
            for p in PRESETS.values()
            if p.method == method.name
        },
    }


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
    with _errors(as_json):
        from suture.finetune import run
        from suture.finetune.trackers import tracker

        how = run.Options(overwrite, not no_resume, device, restricted)
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

                def step(phase: str, at: Any) -> None:
                    shown.tell(phase, at)
                    note(phase, at)

                report = run.execute(plan, say=shown.say, tell=step)
    if dry_run:
        if as_json:
            show_json(found)
            return
        for key, value in found.items():
            tell(f"{key:<11}{value if isinstance(value, str) else json.dumps(value)}")
        tell("nothing was written; leave out --dry-run to train")
    elif as_json:
        show_json(report.to_dict())
    else:
        for line in report.notes:
            tell(f"note: {line}")
        for key, text in run.report_rows(report):
            tell(f"{key:<18}{text}")


@app.command()
def strategies(
    name: OneOf = None,
    as_json: Json = False,
) -> None:
    """List the fine-tuning strategies with their parameters, defaults and papers."""
    with _errors(as_json):
        from suture.finetune import STRATEGIES, strategy

        chosen = list(STRATEGIES.values()) if name is None else [strategy(name)]
        found = {s.name: _strategy_data(s) for s in chosen}
    if as_json:
        show_json(found)
        return
    for key, row in found.items():
        _show_line(key, row, whole=name is not None)


def _strategy_data(line: Any) -> dict[str, Any]:
    return {
        "title": line.title,
        "paper": line.paper,
        "equation": line.equation,
        "sparse": line.sparse,
        "parameters": {
            p.name: {
                "default": "(required)" if p.required else p.default,
                "doc": p.doc,
                "choices": list(p.choices),
            }
            for p in line.parameters.values()
        },
    }


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
    with _errors(as_json):
        from suture.suites import plan as planning
        from suture.suites import work

        how = planning.Options(overwrite, not no_resume, device, limit)
        plan = planning.plan_suite(models, suite, out, how)
        if dry_run:
            found = planning.describe(plan)
            show_json(found) if as_json else _show_questions(found)
            return
        with Asking(as_json) as shown, Bars(as_json or sys.stderr.isatty()) as bars:
            rows = sum(len(asked.rows) for asked in plan.asked.values())
            shown.say(f"{plan.suite.name}: {len(plan.asked)} evaluation(s), {rows} rows, "
                      f"{len(plan.subjects)} model(s) on {plan.device}")  # fmt: skip
            results = work.execute(plan, stage=bars.stage, say=shown.say, tell=shown.tell)
    if as_json:
        show_json({"results": [json.loads(result.to_json()) for result in results]})
        return
    from suture.suites.tables import results_table

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
    with _errors(as_json):
        from suture.suites import comparison, tables

        files = comparison.read_files(results, edits or ())
        if blame is not None or suite is not None:
            _check_blame(blame, suite, gate, len(files.edits))
        found = comparison.compare(files.base, files.experts, files.edits, gate, names=files.names)
        if blame is not None and suite is not None and gate is not None:
            from suture.suites import blame as blaming

            with Asking(as_json) as shown, Bars(as_json or sys.stderr.isatty()) as bars:
                case = blaming.Case(files.base, files.experts, files.edits[0], gate, files.names)
                how = blaming.How(device, overwrite)
                to = blaming.Shown(bars.stage, shown.say, shown.tell)
                blamed = blaming.search(blame, suite, case, files.place, how, to)
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
        _stop(FAILED)


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
def bench(
    recipe: Annotated[Path, typer.Argument(help="Base, tasks, strategies, seeds (YAML).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of cells and tables.")],
    threads: Cores = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compare fine-tuning strategies by task arithmetic; interrupted, the same command goes on."""
    with _errors(as_json):
        from suture.bench import run as work
        from suture.bench.tables import markdown

        plan = work.plan_bench(recipe, out)
        if dry_run:
            found = work.describe(plan)
        else:
            found = work.bench(plan, out, threads=threads, say=_silent if as_json else say)
    if as_json:
        show_json(found)
    elif dry_run:
        for key, value in found.items():
            tell(f"{key:<11}{value if isinstance(value, str) else json.dumps(value)}")
        tell("nothing was written; leave out --dry-run to begin")
    else:
        tell(markdown(found))
        tell(f"wrote {out / 'results.json'} and {out / 'results.md'}")


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
    with _errors(as_json):
        from suture.policy import write

        words = [word.strip() for word in languages.split(",")]
        counts = write(out, seed, words, topics=topics, overwrite=overwrite)
    if as_json:
        show_json(counts)
        return
    for name, number in counts.items():
        tell(f"{out / name}.jsonl: {number} rows")


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
    with _errors(as_json):
        from suture.finetune.trackers import tracker
        from suture.realign import describe, execute, plan_realign, report_rows
        from suture.realign.plan import Options as How

        how = How(overwrite=overwrite, resume=not no_resume, device=device, threads=threads)
        plan = plan_realign(recipe, out, how)
        if dry_run:
            found = describe(plan)
        else:
            with Training(as_json) as shown, tracker(log, out, plan.recipe.resolved()) as note:
                steps = f", {plan.steps} steps" if plan.steps else ""
                shown.say(f"{plan.recipe.method.name}: on {plan.device}{steps}")

                def step(phase: str, at: Any) -> None:
                    shown.tell(phase, at)
                    note(phase, at)

                report = execute(plan, say=shown.say, tell=step)
    if dry_run:
        if as_json:
            show_json(found)
            return
        for key, value in found.items():
            tell(f"{key:<11}{value if isinstance(value, str) else json.dumps(value)}")
        tell("nothing was written; leave out --dry-run to realign")
    elif as_json:
        show_json(report.to_dict())
    else:
        for line in report.notes:
            tell(f"note: {line}")
        for key, text in report_rows(report):
            tell(f"{key:<22}{text}")


@app.command()
def realigners(
    name: OneOf = None,
    as_json: Json = False,
) -> None:
    """List the ways to realign with their parameters, defaults, papers and needs."""
    with _errors(as_json):
        from suture.realign import METHODS, method

        chosen = list(METHODS.values()) if name is None else [method(name)]
        found = {m.name: _strategy_data(m) for m in chosen}
        for m in chosen:
            found[m.name]["needs"] = "needs " + ", ".join(("aligned", "models", *m.needs))
    if as_json:
        show_json(found)
        return
    for key, row in found.items():
        _show_line(key, row, whole=name is not None)


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
    with _errors(as_json):
        from suture.audit import describe, execute, lines, plan_audit
        from suture.audit.plan import Options as How

        how = How(overwrite, not no_resume, device, threads)
        plan = plan_audit(recipe, out, how)
        found = describe(plan) if dry_run else execute(plan, say=_silent if as_json else say)
    if as_json:
        show_json(found)
    elif dry_run:
        for key, value in found.items():
            tell(f"{key:<12}{value if isinstance(value, str) else json.dumps(value)}")
        tell("nothing was written; leave out --dry-run to begin")
    else:
        for line in lines(found):
            tell(line)
        tell(f"wrote {out / 'audit.json'}; weights and masks beside it are restricted")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where to write.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer steps: about seven minutes.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option("--only", help="One half: edits (of encoders), or safety (of a chat model)."),
    ] = None,
) -> None:
    """Tune, merge, localize, patch, evaluate and realign small real models, end to end."""
    with _errors():
        try:
            from suture.demo_run import run_demo
        except ImportError as error:
            if error.name and error.name.startswith("suture"):
                raise
            raise SutureError(
                f"the demo needs {error.name}: run `make demo` in a clone of Suture, or "
                "pip install 'suture[demo]' and pip install --no-deps -r requirements/demo.txt"
            ) from None
        done = run_demo(out, quick=quick, only=only, say=say)
    tell(str(done.page))


def main() -> None:
    """Run the command line."""
    # Headers of many tensors are many small values that live to the end: looking through all of
    # them for cycles, again and again, would take a quarter of the time.
    gc.set_threshold(200_000, 50, 50)
    app(prog_name="suture")
