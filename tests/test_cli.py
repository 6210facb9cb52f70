"""The command line: what goes where, exit codes, dry runs, interruptions, and what is imported."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import suture as package
from making import (
    CONFIG,
    RECIPE,
    Raw,
    environment,
    family,
    file_of,
    invoke,
    lines_of,
    packed,
    read_model,
    save_model,
    staging,
    start,
    suture,
    tree,
    weights,
    write_recipe,
)
from suture.cli.methods import KINDS, table_of
from suture.cli.terminal import Watch
from suture.merges.table import METHODS
from suture.tensors.spec import UNCOUNTED

COMMANDS = [
    "inspect",
    "diff",
    "merge",
    "extract-lora",
    "patch",
    "localize",
    "analyze",
    "report",
    "finetune",
    "realign",
    "eval",
    "compare",
    "bench",
    "audit",
    "proxy",
    "demo",
    "methods",
    "strategies",
    "realigners",
]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A base, two models near it and a recipe."""
    family(tmp_path, "math", "code", config=CONFIG)
    write_recipe(tmp_path)
    return tmp_path


# -------------------------------------------------------------------------------- help and imports


def test_the_version() -> None:
    """One line on standard output."""
    said = invoke("--version")

    assert said == (0, f"suture {package.__version__}\n", "")


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(command: str, flag: str) -> None:
    """Every command explains itself, with exit code 0."""
    said = invoke(*([command] if command else []), flag)

    assert said.code == 0
    lines_of(said.out, "Usage: suture", "--help")


def imported(cwd: Path, *commands: list[str]) -> set[str]:
    """The modules that some commands have imported when they are done."""
    code = ("import sys, json\nfrom suture.cli import app\nfor arguments in json.loads(sys.argv[1]):\n"
            "  try: app(arguments, prog_name='suture')\n"
            "  except SystemExit as error: assert not error.code, error.code\n"
            "print(json.dumps(sorted(sys.modules)), file=sys.stderr)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], cwd=cwd,
                          capture_output=True, text=True, env=environment(), check=True)  # fmt: skip
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """Help answers at once because nothing is loaded that only work needs."""
    found = imported(tmp_path, ["--help"], *([c, "--help"] for c in COMMANDS))

    assert not found & {
        "torch",
        "transformers",
        "numba",
        "llvmlite",
        "numpy",
        "huggingface_hub",
        "yaml",
    }


def test_a_merge_imports_neither_torch_nor_transformers(here: Path) -> None:
    """An entrywise merge of local files needs no framework; after the first, no compiler either."""
    assert invoke("merge", here / "recipe.yaml", "-o", here / "first").code == 0
    found = imported(here, ["merge", "recipe.yaml", "-o", "out"])

    assert not found & {"torch", "transformers", "numba", "huggingface_hub"}


# ------------------------------------------------------------------------------- what goes where


@pytest.mark.parametrize(
    "arguments",
    [("inspect", "base"), ("inspect", "base", "--check"), ("diff", "base", "math"), ("methods",),
     ("methods", "ties"), ("merge", "recipe.yaml", "-o", "out"),
     ("merge", "recipe.yaml", "-o", "out", "--dry-run")],
    ids=" ".join,
)  # fmt: skip
def test_json_is_one_object_and_nothing_else(
    here: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard output parses as one object; the same command without --json speaks to people."""
    monkeypatch.chdir(here)
    said = invoke(*arguments, "--json")

    assert said.code == 0, said
    assert said.json
    assert "NaN" not in said.out
    if arguments[0] == "merge" and "--dry-run" not in arguments:
        return
    plain = invoke(*arguments)
    assert plain.code == 0
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(plain.out)


def test_progress_goes_to_standard_error(here: Path) -> None:
    """What is going on is told there; standard output holds the result, and with --json only that."""
    plain = suture("merge", "recipe.yaml", "-o", "one", cwd=here)
    quiet = suture("merge", "recipe.yaml", "-o", "two", "--json", cwd=here)

    lines_of(plain.err, "merging 2 model(s) by ties", "prepare: reading", "merge: reading")
    lines_of(plain.out, "wrote", "one", "fingerprint")
    assert quiet.code == 0
    assert quiet.json["fingerprint"] in plain.out
    assert quiet.err == ""


def on_a_terminal(here: Path, *arguments: str) -> tuple[int, str, str]:
    """Run a command whose standard error is a terminal, which is read as it writes.

    A terminal that nobody reads takes some 4 kB; then its writer waits.
    """
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the other side was closed
            while more := os.read(ours, 1 << 16):
                shown.append(more)

    env = environment(TERM="xterm-256color")
    with subprocess.Popen([sys.executable, "-m", "suture", *arguments], cwd=here, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=theirs, stdin=theirs) as process:  # fmt: skip
        os.close(theirs)
        reader = threading.Thread(target=read)
        reader.start()
        try:
            out, _ = process.communicate(timeout=120)
        finally:
            process.kill()
            reader.join()
    os.close(ours)
    return process.returncode, out, b"".join(shown).decode(errors="replace")


def test_on_a_terminal_there_are_bars(here: Path) -> None:
    """Watch are drawn on standard error only, and taken away; an error is readable below them."""
    code, out, shown = on_a_terminal(here, "merge", "recipe.yaml", "-o", "out")

    assert code == 0, shown
    assert out.startswith("kept shares") or "wrote" in out
    assert "\x1b[" in shown
    assert "\x1b[" not in out

    tensors = read_model(here / "math")
    save_model(
        here / "math", tensors | {"model.norm.weight": packed(np.full(16, np.nan))}, config=CONFIG
    )
    code, out, shown = on_a_terminal(here, "merge", "recipe.yaml", "-o", "again")
    assert code == 2
    assert out == ""
    assert "error: " in shown
    assert "16 NaN or infinite" in shown.replace("\r\n", "")


def test_a_reader_that_goes_away_does_no_harm(here: Path) -> None:
    """``suture methods | head -1`` ends without a traceback."""
    process = start("methods", "ties", cwd=here)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()

    assert "Traceback" not in err


# ------------------------------------------------------------------------------------------ inspect


def test_inspect_shows_what_a_model_holds(here: Path) -> None:
    """Counts, sizes, dtypes and roles, for people and as data."""
    found = invoke("inspect", here / "base", "--json").json
    said = invoke("inspect", here / "base")

    assert found["tensors"] == 21
    assert found["elements"] == sum(r.values.size for r in read_model(here / "base").values())
    assert found["dtypes"] == {"float32": {"tensors": 21, "elements": 5968, "bytes": 23872}}
    assert found["layers"] == 2
    assert found["architecture"] == "LlamaForCausalLM"
    lines_of(said.out, "21 tensors", "5,968 elements", "23.9 kB", "float32", "mlp.down", "layers 2")


@pytest.mark.parametrize("fault", ["none", "nan", "untied"])
def test_inspect_check_is_for_scripts(here: Path, fault: str) -> None:
    """Exit code 1 where the check fails, with the tensor and the count."""
    tensors = read_model(here / "math")
    config = dict(CONFIG)
    if fault == "nan":
        values = tensors["model.norm.weight"].values.copy()
        values[[1, 2]] = np.nan, np.inf
        tensors["model.norm.weight"] = packed(values)
    if fault == "untied":
        config["tie_word_embeddings"] = True
    save_model(here / "math", tensors, config=config)
    said, found = (
        invoke("inspect", here / "math", "--check"),
        invoke("inspect", here / "math", "--check", "--json"),
    )

    assert said.code == found.code == (0 if fault == "none" else 1)
    integrity = found.json["integrity"]
    assert integrity["ok"] == (fault == "none")
    assert integrity["nonfinite"] == ({"model.norm.weight": 2} if fault == "nan" else {})
    assert integrity["untied"] == (["lm_head.weight"] if fault == "untied" else [])
    lines_of(said.out, "integrity: " + ("ok" if fault == "none" else "NOT ok"))
    if fault == "nan":
        lines_of(said.out, "model.norm.weight: 2 NaN or infinite values")


# ------------------------------------------------------------------------------------------ methods


def test_methods_lists_every_method() -> None:
    """Name, title, paper, equation and parameters with their defaults: the table, as it is."""
    found = invoke("methods", "--json").json
    said = invoke("methods")

    assert found.keys() == METHODS.keys()
    for name, method in METHODS.items():
        row = found[name]
        assert row["paper"] == method.paper
        assert re.search(r"(19|20)\d\d", row["paper"]), f"{name}: who wrote of it, and when?"
        assert row["equation"]
        assert {n: p["default"] for n, p in row["parameters"].items()} == {
            n: p.default for n, p in method.parameters.items()
        }
        assert all(p["doc"] for p in row["parameters"].values())
        lines_of(said.out, name, method.title)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_one_method_in_full(name: str) -> None:
    """Its equation in plain letters, what it needs, and each parameter in a sentence."""
    said = invoke("methods", name)

    assert said.code == 0
    assert not set("$\\{}") & set(said.out)
    lines_of(said.out, name, "Needs", *(f"  {p} = " for p in METHODS[name].parameters))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_listed_in_the_same_way(kind: str) -> None:
    """A title or source, parameters with their meanings; one line in full, a misspelt one refused."""
    found = invoke("methods", kind, "--json").json
    table = table_of(kind)
    assert found.keys() == table.keys()
    name = next(iter(found))
    one = invoke("methods", kind, name)
    assert one.code == 0
    if kind != "preset":
        assert all(row["title"] and row["equation"] for row in found.values())
        assert all(p["doc"] for row in found.values() for p in row["parameters"].values())
        lines_of(one.out, name, found[name]["title"])
    wrong = invoke("methods", kind, f"{name}x")
    assert wrong.code == 2
    lines_of(wrong.err, f"no {table.noun} '{name}x'; did you mean '{name}'?")


def test_a_name_is_found_in_any_kind() -> None:
    """Without a kind; and what is no kind is told."""
    for name in ("snip", "ties-peft", "talos", "safelora", "refusal-odds"):
        assert invoke("methods", name, "--json").json.keys() == {name}
    wrong = invoke("methods", "rules", "snip")
    assert wrong.code == 2
    lines_of(wrong.err, "no kind 'rules'; did you mean 'rule'?")


def test_a_method_that_is_none() -> None:
    """The nearest one is suggested."""
    said = invoke("methods", "tiess")

    assert said.code == 2
    lines_of(said.err, "'tiess'", "did you mean 'ties'?")


# ------------------------------------------------------------------------------------------ dry run


def test_a_dry_run_writes_nothing_and_tells_all(here: Path) -> None:
    """Inputs, output, bytes, passes, memory, time and notes; the folder is as it was."""
    before = tree(here)
    found = invoke("merge", here / "recipe.yaml", "-o", here / "out", "--dry-run", "--json").json
    said = invoke("merge", here / "recipe.yaml", "-o", here / "out", "--dry-run")

    assert tree(here) == before
    assert said.code == 0
    assert set(found["inputs"]) == {"base", "math", "code"}
    assert found["inputs"]["base"]["bytes"] == 23872
    output = found["output"]
    assert (output["tensors"], output["merged"], output["copied"], output["shards"]) == (
        21,
        19,
        2,
        1,
    )
    assert output["bytes"] == 23872
    assert output["path"] == str(here / "out")
    assert found["passes"] >= 2
    assert found["bytes_read"] > 3 * 23872
    assert found["peak_memory"] > 0
    assert found["seconds"] >= 0
    lines_of(said.out, "method   ties", "input    base", "output   ", "reading  ", "memory   ", "time     ",
             "nothing was written")  # fmt: skip


def test_a_dry_run_counts_as_the_merge_does(here: Path) -> None:
    """What was announced is what was read and written."""
    arguments = ("merge", here / "recipe.yaml", "-o", here / "out", "--json")
    plan, report = invoke(*arguments, "--dry-run").json, invoke(*arguments).json

    assert plan["bytes_read"] == report["bytes_read"]
    assert plan["output"]["bytes"] == report["bytes_written"]
    assert (plan["output"]["tensors"], plan["output"]["merged"]) == (
        report["tensors"],
        report["merged"],
    )


def test_a_dry_run_refuses_what_the_merge_refuses(here: Path) -> None:
    """For CI: the same problems, the same exit code."""
    write_recipe(here, {**RECIPE, "parameters": {"densty": 1}})
    codes = [
        invoke("merge", here / "recipe.yaml", "-o", here / "out", *f).code
        for f in ((), ("--dry-run",))
    ]

    assert codes == [2, 2]


# ---------------------------------------------------------------------------------- interruptions

SIZE = 32 << 20


def large(where: Path) -> Path:
    """A base and two models of 64 MB each that take no room on disk: files of holes, all zero."""
    header: dict[str, Any] = {}
    for i in range(8):
        start_, stop = i * SIZE // 4, (i + 1) * SIZE // 4
        header[f"model.layers.{i}.mlp.up_proj.weight"] = {
            "dtype": "BF16", "shape": [SIZE // 8], "data_offsets": [start_, stop]
        }  # fmt: skip
    for name in ("base", "math", "code"):
        (where / name).mkdir()
        with (where / name / "model.safetensors").open("wb") as file:
            file.write(file_of(header))
            file.truncate(file.tell() + 2 * SIZE)
    write_recipe(where, {**RECIPE, "method": "task_arithmetic", "parameters": {}})
    return where


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_ends_a_merge_that_goes_on_later(tmp_path: Path, number: signal.Signals) -> None:
    """Exit code 3, one line, nothing published; the same command takes over what was finished."""
    large(tmp_path)
    flags = ("--threads", "1")
    before = signal.signal(number, signal.SIG_DFL)  # what a shell starts with & ignores SIGINT
    try:
        process = start("merge", "recipe.yaml", "-o", "out", "--json", *flags, cwd=tmp_path)
    finally:
        signal.signal(number, before)
    with process:
        journal = staging(tmp_path / "out") / "journal"
        while process.poll() is None and not (journal.exists() and journal.stat().st_size):
            time.sleep(0.001)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)

    assert process.returncode == 3, err
    assert json.loads(out) == {"error": "interrupted", "kind": "Interrupted"}
    assert err == "interrupted; run the same command again: it goes on from what is done\n"
    assert not (tmp_path / "out").exists()
    said = invoke("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--json")
    assert said.code == 0, said
    assert said.json["resumed"] > 0
    assert not staging(tmp_path / "out").exists()
    assert invoke("merge", tmp_path / "recipe.yaml", "-o", tmp_path / "whole").code == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_two_processes_on_one_output(tmp_path: Path) -> None:
    """The second is refused with exit code 2 and disturbs nothing."""
    large(tmp_path)
    with start("merge", "recipe.yaml", "-o", "out", "--threads", "1", cwd=tmp_path) as first:
        journal = staging(tmp_path / "out") / "journal"
        while first.poll() is None and not (journal.exists() and journal.stat().st_size):
            time.sleep(0.001)
        first.send_signal(signal.SIGSTOP)
        try:
            second = suture("merge", "recipe.yaml", "-o", "out", cwd=tmp_path)
        finally:
            first.send_signal(signal.SIGCONT)
        _, err = first.communicate(timeout=60)

    assert second.code == 2, second
    lines_of(second.err, "out: another process is writing it just now")
    assert first.returncode == 0, err
    assert (tmp_path / "out" / "suture.json").exists()


@pytest.mark.parametrize("command", [["inspect", "base", "--check"], ["diff", "base", "math"]])
def test_other_commands_can_be_interrupted_too(
    here: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is exit code 3 and one line, everywhere."""
    from suture.analysis import profile

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(here)
    monkeypatch.setattr(profile, "sweep", interrupted)
    said = invoke(*command)

    assert said.code == 3
    assert said.err.endswith(
        "interrupted; run the same command again: it goes on from what is done\n"
    )


def test_a_mistake_of_ours_is_not_hidden(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no error of the user's comes with its traceback, not as a message."""
    from suture.verbs.merge import run

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(run, "execute", broken)
    with pytest.raises(ZeroDivisionError):
        invoke("merge", here / "recipe.yaml", "-o", here / "out")


def test_threads_change_no_byte(here: Path) -> None:
    """One thread or eight: the same files."""
    for threads in (1, 8):
        said = invoke(
            "merge", here / "recipe.yaml", "-o", here / f"out{threads}", "--threads", threads
        )
        assert said.code == 0

    assert weights(here / "out1") == weights(here / "out8")


def test_a_mergekit_recipe_runs(here: Path) -> None:
    """The other language, the same command; what is accepted and does nothing is noted."""
    entries = [
        {"model": f"./{n}", "parameters": {"weight": 0.5, "density": 0.5}} for n in ("math", "code")
    ]
    recipe = {"merge_method": "ties", "base_model": "./base", "dtype": "bfloat16", "models": entries,
              "parameters": {"int8_mask": True}}  # fmt: skip
    write_recipe(here, recipe, "kit.yaml")
    said = invoke("merge", here / "kit.yaml", "-o", here / "out")

    assert said.code == 0, said
    lines_of(said.out, "note: int8_mask")
    assert {raw.dtype for raw in read_model(here / "out").values()} == {"BF16"}


def test_a_file_is_a_model_too(here: Path) -> None:
    """Base and models may be single files; what stands beside them is not carried over."""
    names = {"base": "./base/model.safetensors", "models": {"math": "./math/model.safetensors"}}
    write_recipe(here, {**RECIPE, **names})
    said = invoke("merge", here / "recipe.yaml", "-o", here / "out")

    assert said.code == 0
    assert sorted(p.name for p in (here / "out").iterdir()) == [
        "README.md",
        "model.safetensors",
        "suture.json",
    ]


def test_integers_are_copied(here: Path) -> None:
    """Buffers of every width come through byte by byte, and none is made a float."""
    odd = {"model.ids": Raw("I64", (2,), bytes(range(16))), "model.mask": Raw("BOOL", (3,), b"\1\0\1"),
           "model.u8": Raw("U8", (1,), b"\x07"), "model.big": packed([2**53 + 1], "I64")}  # fmt: skip
    for name in ("base", "math", "code"):
        save_model(here / name, read_model(here / name) | odd, config=CONFIG)
    write_recipe(here, {**RECIPE, "output": {"dtype": "float16"}})

    assert invoke("merge", here / "recipe.yaml", "-o", here / "out").code == 0
    out = read_model(here / "out")
    assert {n: out[n] for n in odd} == odd


def test_a_stage_that_is_not_counted_is_told_too(capsys: pytest.CaptureFixture[str]) -> None:
    """One line a stage without a terminal; nothing where there is nothing to read, or in JSON."""
    with Watch() as bars:
        for name, nbytes in (("look", 4), ("nothing", 0), ("think", UNCOUNTED)):
            assert bars.stage(name, nbytes) is None
    assert capsys.readouterr().err == "look: reading 4 B\nthink\n"
    with Watch(quiet=True) as bars:
        bars.stage("think", UNCOUNTED)
    assert capsys.readouterr().err == ""


def test_a_stage_that_is_not_counted_has_a_bar_until_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal: it ends where the next stage begins."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Watch() as bars:
        assert bars.stage("think", UNCOUNTED) is None
        tell = bars.stage("look", 4)
        assert tell is not None
        tell("a tensor", 4)
    shown = capsys.readouterr().err
    assert "think" in shown
    assert "think" not in shown[shown.rindex("look") :]
    assert shown.rindex("think") < shown.index("look")
