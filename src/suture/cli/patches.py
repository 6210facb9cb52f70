"""Commands about patches: make, apply, revert, show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from suture.cli.options import Json, NoResume, Overwrite, Threads, app, errors
from suture.cli.terminal import Watch, show_json, tell
from suture.tensors.spec import readable

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
    with errors(as_json), Watch(as_json) as progress:
        from suture.checkpoints.open import open_model
        from suture.edits.mask import Mask
        from suture.verbs.patch import run

        chosen = None if mask is None else Mask.load(mask)
        patch = run.make_patch(
            open_model(base), open_model(tuned), out, mask=chosen, density=density, scope=scope,
            restricted=restricted, threads=threads, overwrite=overwrite, stage=progress.stage,
        )  # fmt: skip
        found = run.describe(patch)
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
    with errors(as_json), Watch(as_json) as progress:
        from suture.checkpoints.open import open_model
        from suture.verbs.patch import run

        report = run.apply_patches(
            open_model(model), run.load_patches(patch), out, scale=scale,
            on_overlap=on_overlap, force=force, stage=progress.stage, threads=threads,
            overwrite=overwrite, resume=not no_resume,
        )  # fmt: skip
        lines = run.report_lines(report)
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
    with errors(as_json), Watch(as_json) as progress:
        from suture.checkpoints.open import open_model
        from suture.edits.patch import Patch
        from suture.verbs.patch import run

        report = run.revert_patch(
            open_model(model), Patch.load(patch), out, force=force, stage=progress.stage,
            threads=threads, overwrite=overwrite,
        )  # fmt: skip
        lines = run.report_lines(report)
    _show_patched(report, lines, as_json)


@patches.command("show")
def patch_show(
    patch: Annotated[Path, typer.Argument(help="A patch.")],
    as_json: Json = False,
) -> None:
    """Check a patch, and show what it holds and what it was made of."""
    with errors(as_json):
        from suture.edits.patch import Patch
        from suture.verbs.patch import run

        found = run.describe(Patch.load(patch))
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
