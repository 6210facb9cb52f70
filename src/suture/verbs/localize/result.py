"""What a localization gave, in lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from suture.tensors.spec import readable
from suture.verbs.localize.plan import RECORD


def outline(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a plan would do, a line each."""
    needs = f", from {', '.join(facts['needs'])}" if facts["needs"] else ", without data"
    yield f"rule     {facts['rule']}{needs}; scope {facts['scope']}"
    for model, label in facts["models"].items():
        rows = f", {facts['rows'][model]} rows" if model in facts["rows"] else ""
        density = facts["densities"][model]
        share = "every positive entry" if density is None else f"density {density:g}"
        yield f"model    {model}: {label}, {share}{rows}"
    output = facts["output"]
    yield (f"output   {output['path']}: {facts['tensors']} tensors, {facts['entries']:,} entries, "
           f"{readable(output['bytes'])}")  # fmt: skip


def lines(record: Mapping[str, Any], out: Path) -> Iterator[str]:
    """Yield what to say at the end."""
    for model, found in record["masks"].items():
        kept, entries = found["kept"], found["entries"]
        yield f"{model}: kept {kept:,} of {entries:,} entries ({found['density']:.4%}), " + (
            f"{found['tied_at_threshold']:,} exactly at the threshold"
        )
        if found["wanted"] is not None and found["kept"] < found["wanted"]:
            yield f"  {found['wanted']:,} were asked for; the others have no importance at all"
        rows = sorted(found["roles"].items(), key=lambda r: -r[1]["enrichment"])[:3]
        yield "  densest in " + ", ".join(f"{k} ({r['density']:.2%})" for k, r in rows)
    for pair in record["overlaps"]:
        one, other = pair["models"]
        yield (f"overlap of {one} and {other}: Jaccard {pair['jaccard']:.4f}; by chance "
               f"{pair['independent']:.4f}, by profile {pair['matched']:.4f}")  # fmt: skip
    if record.get("restricted"):
        yield "restricted: neither the masks nor what is made with them may be passed on"
    yield f"wrote {out} ({len(record['masks'])} masks and {RECORD})"


__all__ = ["lines", "outline"]
