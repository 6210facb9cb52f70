"""What came out of a merge, and what is told of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from suture.tensors.spec import readable


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote and what it cost.

    Examples:
        >>> import numpy as np, suture, tempfile
        >>> place = tempfile.TemporaryDirectory()
        >>> base, math = ({"layers.0.mlp.weight": np.full(4, v, np.float32)} for v in (0, 1))
        >>> report = suture.save(suture.merge(base, {"math": math}, weight=0.5), f"{place.name}/m")
        >>> report.method, report.merged, report.moved, report.writeback_loss
        ('task_arithmetic', 1, 4, 0.0)
        >>> place.cleanup()
    """

    out: Path
    method: str
    fingerprint: str
    """Of the output."""
    tensors: int
    merged: int
    """Tensors that were merged; the others were copied."""
    bytes_read: int
    bytes_written: int
    seconds: Mapping[str, float]
    writeback_loss: float | None
    """Share of the changed entries that rounding to the output dtype undid."""
    moved: int
    """Entries that the merge changes before rounding."""
    facts: Mapping[str, Any]
    resumed: int
    """Pieces taken over from an interrupted run."""
    notes: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    """What the method has to say, a line each."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "out": str(self.out)}


def lines(report: MergeReport, _: Path) -> Iterator[str]:
    """Yield what to tell at the end of a merge."""
    if report.resumed:
        yield f"took over {report.resumed} finished pieces of an interrupted run"
    for note in report.notes:
        yield f"note: {note}"
    if "density" in report.facts and "owned" not in report.facts:  # an election names them
        kept = ", ".join(f"{d:.4g}" for d in report.facts["density"])
        yield f"kept shares: {kept}"
    yield from report.told
    if report.writeback_loss is not None:
        yield (
            f"{report.moved:,} entries moved; rounding to the output dtype undid "
            f"{report.writeback_loss:.2%} of them"
        )
    rate = readable((report.bytes_read + report.bytes_written) / max(1e-9, report.seconds["total"]))
    yield (
        f"wrote {report.out} ({report.tensors} tensors, {readable(report.bytes_written)}) in "
        f"{report.seconds['total']:.2f} s, {rate}/s; fingerprint {report.fingerprint}"
    )


def outline(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a dry run tells."""
    yield (f"method   {found['method']} " + json.dumps(found["parameters"]))
    for name, row in found["stages"].items():
        yield (f"stage    {name}: {row['method']}, {row['tensors']} tensors, "
              f"{readable(row['bytes'])}, {'there already' if row['kept'] else 'to be made'} in "
              f"{row['path']}")  # fmt: skip
    for label, row in found["inputs"].items():
        yield (f"input    {label}: {row['path']}, {row['tensors']} tensors, "
              f"{readable(row['bytes'])}, {row['files']} file(s)")  # fmt: skip
    out = found["output"]
    yield (f"output   {out['path']}: {out['merged']} tensors merged ({out['merged_elements']:,} "
          f"elements), {out['copied']} copied, {readable(out['bytes'])}, "
          f"{out['shards']} file(s)")  # fmt: skip
    yield (f"reading  {readable(found['bytes_read'])} in {found['passes']} pass(es), "
          f"{found['threads']} thread(s)")  # fmt: skip
    yield f"memory   about {readable(found['peak_memory'])} above the interpreter"
    yield f"time     about {found['seconds']:.1f} s"
    for note in found["notes"]:
        yield f"note     {note}"
