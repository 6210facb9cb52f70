"""Patches made, applied and reverted: from checkpoints to files and folders; prints nothing.

What is applied is a view of the model, compared with the model once before anything is written and
then copied by the engine like any checkpoint: resumed, fingerprinted, published whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import Checkpoint
from suture.checkpoints.open import check_ties
from suture.checkpoints.views import Same, View
from suture.checkpoints.writer import SHARD_SIZE, Writer, plan_shards
from suture.edits.diff import Checked, Gather, compare, differing, masked, selected
from suture.edits.mask import Mask
from suture.edits.patch import ON_OVERLAP, UNDO, Patch, StoredPatch, check_free
from suture.edits.patch_file import Spool, write_patch
from suture.errors import (
    CheckpointError,
    MismatchError,
    NonFiniteError,
    OutputError,
    Problems,
    RecipeError,
    did_you_mean,
)
from suture.merges.apply import MergeJob, Outcome, Stage, apply
from suture.merges.base import Merge
from suture.runs.card import carried_files, config_text, model_name, patch_card
from suture.runs.envelope import portable
from suture.runs.place import SCHEMA, MergeOptions, check_place, check_room
from suture.stream.sweep import (
    DELTA,
    RAW,
    Block,
    Progress,
    Sources,
    cores,
    fingerprint,
    sweep,
    tasks_of,
)
from suture.stream.topk import SCOPES, Selection, select
from suture.tensors.roles import DEFAULT_SPACE
from suture.tensors.spec import TensorSpec, listed, readable
from suture.version import __version__


@contextmanager
def _spooling(folder: Path) -> Iterator[Spool]:
    while not folder.is_dir():
        folder = folder.parent
    spool = Spool(folder)
    try:
        yield spool
    finally:
        spool.close()


def _silent(stage: str, nbytes: int) -> Progress | None:
    return None


def load_patches(paths: Sequence[Path]) -> list[StoredPatch]:
    """Open patches and check every byte of them.

    Raises:
        CheckpointError: what is wrong with any of them, at once.
    """
    problems, found = Problems(), []
    for path in paths:
        with problems.collecting():
            found.append(Patch.load(path))
    problems.raise_if_any()
    return found


def make_patch(
    base: Checkpoint,
    tuned: Checkpoint,
    out: str | os.PathLike[str],
    *,
    mask: Mask | None = None,
    density: float | None = None,
    scope: str = "global",
    restricted: bool = False,
    stage: Stage = _silent,
    **options: Any,
) -> StoredPatch:  # fmt: skip
    """Write the patch that makes of ``base`` what ``tuned`` is, in all entries or some of them.

    Without ``mask`` and ``density`` it has every entry whose bits differ, of every tensor: applied,
    it gives the tuned model, bit for bit. With ``density`` it has the share of entries that moved
    most, over floating tensors other than embeddings, heads and buffers; with ``mask``, those.
    Keywords beyond these are fields of ``MergeOptions``.

    Raises:
        SutureError: the models do not fit, the parameters are wrong, or the output cannot be
            written; all problems at once, before a tensor is read.
    """
    path, how = Path(out), MergeOptions(**options)
    problems = Problems()
    _check_choice(mask, density, scope, problems)
    names = DEFAULT_SPACE.names(base.specs) if density is not None else sorted(base.specs)
    names = sorted(mask.shapes) if mask is not None else names
    with problems.collecting():
        check_free(path, how.overwrite)
    if path.resolve() in {f.resolve() for c in (base, tuned) for f in c.files}:
        problems.add(OutputError, f"{path}: is an input; write somewhere else")
    _check_pair(base, tuned, names, mask, problems)
    problems.raise_if_any()
    check_ties({"base": base, "tuned": tuned})

    view = View(tuned, {n: Same(tuned, n) for n in names})
    raw = frozenset(base.specs.keys() - set(names if density is not None else ()))
    sources = Sources((view,), base, DELTA, raw)
    with _spooling(path.resolve().parent) as spool:
        pick = differing if mask is None else masked(mask)
        if density is not None:
            pick = selected(_selection(sources, names, density, scope, how.threads, stage))
        gather = Gather(pick, frozenset(names), spool)
        sweep(sources, tasks_of(sorted(base.specs), base.specs), gather, threads=how.threads,
              progress=stage("compare", base.nbytes + view.nbytes))  # fmt: skip
        if not spool.names:
            raise MismatchError(f"{tuned.label}: no entry differs from {base.label}; no patch")
        for checkpoint in (base, tuned):
            checkpoint.check_unchanged()
        prints = gather.prints(base.specs)
        chosen: dict[str, Any] = {"made": "difference" if mask is None else "mask"}
        if density is not None:
            chosen = {"made": "density", "density": density, "scope": scope}
        provenance = {
            **chosen,
            "base": model_name(base),
            "tuned": model_name(tuned),
            "suture": __version__,
        }
        tainted = restricted or base.restricted or tuned.restricted
        tainted = tainted or (mask is not None and mask.restricted)
        facts = _facts(spool, base.specs, prints, tainted, provenance)
        write_patch(path, spool, base.specs, facts, overwrite=how.overwrite)
    return Patch.load(path)


def _check_choice(mask: Mask | None, density: float | None, scope: str, problems: Problems) -> None:
    if mask is not None and density is not None:
        problems.add(RecipeError, "give a mask or a density, not both")
    if density is not None and not 0 < density <= 1:
        problems.add(RecipeError, f"density is the share of entries kept, in (0, 1]; got {density}")
    if scope not in SCOPES:
        problems.add(RecipeError, f"no scope {scope!r}; {did_you_mean(scope, SCOPES)}")


def _check_pair(
    base: Checkpoint, tuned: Checkpoint, names: Sequence[str], mask: Mask | None,
    problems: Problems,
) -> None:  # fmt: skip
    """Note where two models cannot make a patch over some tensors."""
    who = f"{tuned.label} against {base.label}"
    if mask is not None:
        odd = [n for n, shape in mask.shapes.items()
               if n not in base.specs or base.specs[n].shape != shape]  # fmt: skip
        if odd:
            text = f"the mask does not fit {base.label}: it has {listed(sorted(odd))} otherwise"
            problems.add(MismatchError, f"{text}; it was made of another model")
    names = [n for n in names if n in base.specs]
    lacking = [n for n in names if n not in tuned.specs]
    if lacking:
        problems.add(MismatchError, f"{who}: lacks {listed(lacking)}")
    beyond = sorted(tuned.specs.keys() - base.specs.keys())
    if beyond:
        problems.add(MismatchError, f"{who}: has {listed(beyond)} besides, which no patch can add")
    for name in names:
        if name in tuned.specs and tuned.specs[name] != base.specs[name]:
            text = f"{who}: {name} is {tuned.specs[name]}, not {base.specs[name]}"
            problems.add(MismatchError, f"{text}; a patch replaces bits, so they must be alike")


def _selection(
    sources: Sources, names: Sequence[str], density: float, scope: str, threads: int | None,
    stage: Stage,
) -> Selection:  # fmt: skip
    progress = stage("select", sum(c.specs[n].nbytes for n in names for c in sources.all))
    try:
        return select(sources, names, lambda _: [density], scope=scope, threads=threads,
                      progress=progress)  # fmt: skip
    except NonFiniteError as error:
        found = [text.split("; repair")[0] for text in getattr(error, "problems", (str(error),))]
        raise NonFiniteError(
            f"{'; '.join(found)}; they have no magnitude to rank by: leave the density out, and "
            "the patch has every entry that differs"
        ) from None


def _facts(
    spool: Spool, specs: Mapping[str, TensorSpec], prints: Mapping[str, tuple[str, str]],
    restricted: bool, provenance: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The metadata of a patch, from the fingerprints of all tensors before and after."""
    return {
        "base": fingerprint(specs, {n: old for n, (old, _) in prints.items()}),
        "result": fingerprint(specs, {n: new for n, (_, new) in prints.items()}),
        "restricted": restricted,
        "tensors": {
            n: {"shape": list(specs[n].shape), "old": prints[n][0], "new": prints[n][1]}
            for n in spool.names
        },
        "provenance": provenance,
    }


@dataclass(frozen=True)
class PatchReport:
    """What applying a patch wrote and what it cost."""

    out: Path
    action: str
    fingerprint: str
    """Of the output."""
    tensors: int
    touched: int
    """Tensors in which entries were replaced."""
    entries: int
    forced: tuple[str, ...]
    """Tensors that were not those of the patch's base."""
    restricted: bool
    bytes_written: int
    undo_bytes: int
    seconds: float
    resumed: int
    """Pieces taken over from an interrupted run."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "out": str(self.out)}


@dataclass(frozen=True)
class _Work:
    """One application: the patch, the model, and what the user said."""

    action: str
    patch: Patch
    given: Sequence[StoredPatch]
    model: Checkpoint
    view: View
    said: Mapping[str, Any]
    out: Path
    options: MergeOptions

    @property
    def restricted(self) -> bool:
        return self.view.restricted


def apply_patches(
    model: Checkpoint,
    patches: Sequence[StoredPatch],
    out: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    on_overlap: str = "error",
    force: bool = False,
    stage: Stage = _silent,
    **options: Any,
) -> PatchReport:
    """Put patches on their base and write the folder, with ``undo.patch.safetensors`` in it.

    Args:
        model: the base of the patches.
        patches: they touch different entries, or ``on_overlap`` says what is done.
        out: the folder to write.
        scale: factor on the deltas; other than 1 it is arithmetic, in float32 with one rounding.
        on_overlap: ``error``, ``last`` (the last patch wins) or ``mean`` (of the deltas).
        force: whether the model may be another than the base; the deltas are then added.
        stage: told what begins.
        **options: fields of ``MergeOptions``.

    Raises:
        SutureError: what is wrong, with nothing written.
    """
    single = len(patches) == 1 and on_overlap in ON_OVERLAP
    composed = patches[0] if single else Patch.compose(patches, on_overlap)
    said = {"scale": scale, "on_overlap": on_overlap, "force": force}
    return _run("apply", composed.scaled(scale), patches, model, out, said, options, stage)


def revert_patch(
    model: Checkpoint,
    patch: StoredPatch,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    stage: Stage = _silent,
    **options: Any,
) -> PatchReport:
    """Write the base again, bit for bit, from the model with the patch on it.

    Raises:
        SutureError: what is wrong, with nothing written.
    """
    return _run("revert", patch.reversed(), [patch], model, out, {"force": force}, options, stage)


def _run(
    action: str, patch: Patch, given: Sequence[StoredPatch], model: Checkpoint,
    out: str | os.PathLike[str], said: Mapping[str, Any], options: Mapping[str, Any], stage: Stage,
) -> PatchReport:  # fmt: skip
    begun = time.perf_counter()
    problems = Problems()
    how = MergeOptions(**options)
    place = Path(out)
    inputs = {"model": model, **{p.label: p.file.held for p in given}}
    check_place(place, inputs, how.overwrite, problems)
    with problems.collecting():
        patch.check_fit(model)
    with problems.collecting():
        carried_files([model])
    problems.raise_if_any()
    check_ties({"model": model})
    view = patch.apply(model, force=True)
    work = _Work(action, patch, given, model, view, said, place, how)
    job = MergeJob(
        Sources((view,), how=RAW, allow_nonfinite=True), ("patched",), Merge(_no_merge), (),
        view.specs, False, how.threads or cores(),
    )  # fmt: skip
    check_room(place, view.nbytes, how.resume, problems)
    problems.raise_if_any()
    with _spooling(place.resolve().parent) as spool:
        nbytes = 2 * sum(view.specs[n].nbytes for n in patch.specs)
        found = compare(patch, model, view, spool, threads=how.threads,
                        progress=stage("compare", nbytes))  # fmt: skip
        if found.foreign and not said["force"]:
            raise MismatchError(_refusal(work, found))
        writer = Writer(
            place.resolve(), view.specs, key=_key(work), overwrite=how.overwrite, resume=how.resume
        )
        try:
            inner: Stage = lambda _, nbytes: stage(action, nbytes)  # noqa: E731
            outcome = apply([job], writer, {"patched": view}, inner)
            view.check_unchanged()
            undo = _add_files(work, writer, found, outcome, spool)
            check_place(place, inputs, how.overwrite, problems)  # once more: time has passed
            problems.raise_if_any()
            writer.publish()
        except (MismatchError, NonFiniteError, RecipeError):  # the same again would fail the same
            writer.discard()
            raise
        except BaseException:
            writer.close()
            raise
        entries = sum(int(spool.counts(n, view.specs[n])[:, 0].sum()) for n in spool.names)
    return PatchReport(
        place, action, outcome.fingerprints["output"], len(view.specs), len(patch.specs), entries,
        found.foreign, work.restricted, view.nbytes, undo, time.perf_counter() - begun,
        outcome.resumed,
    )  # fmt: skip


def _no_merge(block: Block, state: None) -> None:
    raise AssertionError("every tensor of a view is copied")


def _refusal(work: _Work, found: Checked) -> str:
    patch, model = work.patch, work.model.label
    other = f"{len(found.foreign)} of {len(patch.specs)} tensors ({listed(found.foreign, 3)})"
    text = f"{model}: not what {patch.label} was made on: {other} are not the same"
    if found.changed:
        text += f", and entries that it replaces hold other bits in {listed(found.changed, 3)}"
    else:
        text += ", but every entry that it replaces holds the right bits"
    if work.action == "revert":
        text += f"; if it was applied with --scale or --force, {UNDO} beside that output reverts it"
    return f"{text}; --force goes on: it adds the deltas where the bits are others"


def _key(work: _Work) -> str:
    """What a staging folder is for: everything that decides the bytes of the output."""
    facts = {
        "version": __version__,
        "action": work.action,
        "view": work.view.identity,
        "shards": [[s.name, s.size, hashlib.sha256(s.header).hexdigest()]
                   for s in plan_shards(work.view.specs, SHARD_SIZE)],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _add_files(work: _Work, writer: Writer, found: Checked, outcome: Outcome, spool: Spool) -> int:
    """Put everything beside the weights; return the bytes of the undo patch."""
    specs, model = work.view.specs, work.model
    same = {n: (p, p) for n, p in outcome.tensors.items()}
    prints = {**same, **found.prints}
    provenance = {"made": work.action, "suture": __version__, "model": model_name(model),
                  "patches": [p.file.digest for p in work.given], **work.said}  # fmt: skip
    facts = _facts(spool, specs, prints, work.restricted, provenance)
    undo = 0
    if work.action == "apply":
        undo = write_patch(writer.beside(UNDO), spool, specs, facts, overwrite=True)
    for name, path in carried_files([model]).items():
        try:
            writer.add_file(name, path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
    if model.config:
        writer.add_file("config.json", config_text(model.config, None))
    record = _record(work, found, facts, outcome)
    writer.add_file("suture.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    writer.add_file("README.md", patch_card(record, model, work.out.resolve().name))
    return undo


def _record(
    work: _Work, found: Checked, facts: Mapping[str, Any], outcome: Outcome
) -> dict[str, Any]:
    """What ``suture.json`` holds."""
    out, specs = work.out.resolve(), work.view.specs
    return {
        "suture": __version__,
        "schema": SCHEMA,
        "kind": "patch",
        "action": work.action,
        "restricted": work.restricted,
        **work.said,
        "forced": list(found.foreign),
        "inputs": {
            "model": {"path": portable(work.model, out), "fingerprint": facts["base"],
                      "tensors": len(specs), "bytes": work.model.nbytes},
        },
        "patches": [
            {"path": os.path.relpath(p.path.resolve(), out), "digest": p.file.digest,
             "entries": p.count, "bytes": p.nbytes, "base": p.base, "result": p.result,
             "provenance": p.provenance()}
            for p in work.given
        ],
        "output": {"fingerprint": outcome.fingerprints["output"], "tensors": len(specs),
                   "bytes": work.view.nbytes},
        "results": {"touched_tensors": len(work.patch.specs)},
    }  # fmt: skip


def describe(patch: StoredPatch) -> dict[str, Any]:
    """What a patch holds, as plain data."""
    tensors = {}
    size = 0
    for name, spec in patch.specs.items():
        count = patch.file.count(name)
        held = sum(patch.file.held.specs[f"{k}:{name}"].nbytes for k in ("at", "old", "new"))
        tensors[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "entries": count,
                         "density": count / spec.numel, "bytes": held}  # fmt: skip
        size += spec.nbytes
    return {
        "path": str(patch.path),
        "bytes": patch.nbytes,
        "entries": patch.count,
        "density": patch.count / sum(s.numel for s in patch.specs.values()),
        "touched_bytes": size,
        "share": patch.nbytes / size,
        "digest": patch.file.digest,
        "base": patch.base,
        "result": patch.result,
        "restricted": patch.restricted,
        "provenance": patch.provenance(),
        "tensors": tensors,
    }


def report_lines(report: PatchReport) -> Iterator[str]:
    """What to tell at the end, a line each."""
    if report.resumed:
        yield f"took over {report.resumed} finished pieces of an interrupted run"
    if report.forced:
        yield f"forced: {len(report.forced)} tensors were not those of the patch's base"
    if report.restricted:
        yield "restricted: this output must not be passed on"
    yield f"{report.entries:,} entries replaced in {report.touched} of {report.tensors} tensors"
    if report.undo_bytes:
        yield f"to undo it: suture patch revert {report.out} {report.out / UNDO} -o BACK"
    yield (
        f"wrote {report.out} ({readable(report.bytes_written)}, undo {readable(report.undo_bytes)})"
        f" in {report.seconds:.2f} s; fingerprint {report.fingerprint}"
    )


__all__ = [
    "PatchReport",
    "apply_patches",
    "describe",
    "load_patches",
    "make_patch",
    "report_lines",
    "revert_patch",
]
