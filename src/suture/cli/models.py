"""Commands about whole models: what they hold, how they differ, how they merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from suture.cli.options import FAILED, Json, app, errors, stop
from suture.cli.terminal import Watch, show_json, tell
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
