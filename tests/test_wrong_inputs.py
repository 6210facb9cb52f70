"""Whatever is wrong with what a user gives is said at once, in words, before a tensor is read.

Each refusal: exit code 2, no traceback, the file and the tensor by name, the cause and what to do;
the inputs as they were, and nothing where the output would be.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from making import (
    CONFIG,
    RECIPE,
    Raw,
    Said,
    descriptors,
    family,
    invoke,
    lines_of,
    llama,
    packed,
    quick_disk,
    read_file,
    read_model,
    safetensors,
    save_model,
    staging,
    suture,
    tree,
    weights,
    write_recipe,
)
from suture.checkpoints.checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_disk(monkeypatch)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A base and two models near it."""
    return family(tmp_path, "math", "code", config=CONFIG)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any read of a tensor is a failure of the test."""

    def never(self: Checkpoint, *_: object) -> None:
        raise AssertionError(f"{self.label} was read")

    monkeypatch.setattr(Checkpoint, "read_at", never)


def refused(
    here: Path, *wanted: str, recipe: Any = RECIPE, out: object = None, flags: Any = ()
) -> Said:
    """Run a merge that must be refused for all these reasons, and leave everything as it was."""
    path = recipe if isinstance(recipe, Path) else write_recipe(here, recipe)
    before = tree(here)
    said = invoke("merge", path, "-o", here / "out" if out is None else out, *flags)

    assert said.code == 2, said
    assert said.out == ""
    assert [line[:7] for line in said.err.splitlines()].count("error: ") == 1
    assert "Traceback" not in said.err
    lines_of(said.err, *wanted)
    assert tree(here) == before
    assert descriptors(here) == []
    return said


def with_(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**RECIPE, **changes}.items() if v is not None}


# ------------------------------------------------------------------------------- recipes and flags


class Case(NamedTuple):
    recipe: Any
    wanted: tuple[str, ...]


RECIPES: dict[str, Case] = {
    "a misspelt parameter": Case(with_(parameters={"densty": 0.5}), ("'densty'", "did you mean 'density'?")),
    "a misspelt method": Case(
        with_(method="tiess"), ("method: no merge method 'tiess'; did you mean 'ties'?", "line ")
    ),
    **{
        f"a density of {d!r}": Case(with_(parameters={"density": d}), ("parameters.density", "(0, 1]", repr(d)))
        for d in (1.5, -1, "0,2", 0, float("nan"), True)
    },
    "no YAML": Case("base: [", ("recipe.yaml", "not valid YAML")),
    "a key twice": Case("base: a\nbase: b\n", ("recipe.yaml", "line 2", "'base' stands twice")),
    "an empty file": Case("", ("recipe.yaml", "mapping")),
    "a list": Case("- base\n", ("recipe.yaml", "mapping")),
    "no base": Case(with_(base=None), ("base", "name one")),
    "slerp of three": Case(
        with_(method="slerp", base=None, parameters={}, models=["./base", "./math", "./code"]),
        ("slerp takes 2, not 3",),
    ),
    "a wrong dtype": Case(with_(output={"dtype": "bfloat15"}), ("'bfloat15'", "did you mean 'bfloat16'?")),
    "a wrong shard size": Case(with_(output={"shard_size": "5 apples"}), ("'5 apples'", "5GB")),
    "a role that is none": Case(with_(space={"include": ["mpl.up"]}), ("space.include", "'mpl.up'", "'mlp.up'")),
    "a pattern that fits nothing": Case(
        with_(space={"exclude": ["*.layers.9.*"]}), ("space.exclude", "'*.layers.9.*'", "fits no tensor")
    ),
    "a parameter for no tensor": Case(
        with_(parameters={"density": {"*.ghost": 0.1}}), ("parameters.density", "'*.ghost'")
    ),
    "nothing to merge": Case(with_(space={"include": ["head"], "exclude": ["head"]}), ("no tensor is left",)),
    "a missing path": Case(
        with_(models={"math": "./maths", "code": "./code"}), ("./maths", "no such", "did you mean 'math'?")
    ),
    "a path that is nothing": Case(with_(models={"math": "", "code": "./code"}), ("models.math", "a path or hub id")),
    "mergekit's layers beyond the model": Case(
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": "./math", "layer_range": [0, 9]}]}]},
        ("slices[0].sources[0].layer_range", "has 2 layers", "[0, 2] are all"),
    ),
    "mergekit's words in a gradient": Case(
        {"merge_method": "linear", "models": [{"model": "./math", "parameters": {"weight": [0, "x"]}}]},
        ("models[0].parameters.weight[1]", "'x' is not a number"),
    ),
    "mergekit's della beyond 1": Case(
        {"merge_method": "della", "base_model": "./base",
         "models": [{"model": "./math", "parameters": {"weight": 1, "density": 0.9}}]},
        ("della: math", "density 0.9 with epsilon 0.15", "epsilon may be 0.1 at most"),
    ),
    "mergekit's LoRA that is not there": Case(
        {"merge_method": "linear", "models": [{"model": "./math+./lora", "parameters": {"weight": 1}}]},
        ("./lora", "no such file or folder"),
    ),
    "a model where an adapter should be": Case(
        with_(models={"math": {"path": "./math", "adapter": "./code"}}), ("./code", "not a LoRA adapter")
    ),
    "an unknown mergekit method": Case(
        {"merge_method": "slurp", "models": [{"model": "./math"}]}, ("'slurp'", "did you mean 'slerp'?")
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", RECIPES)
def test_a_wrong_recipe(here: Path, unread: None, what: str) -> None:
    """Everything a recipe can get wrong, through the command line: said, and nothing done."""
    refused(here, *RECIPES[what].wanted, str(here / "recipe.yaml"), recipe=RECIPES[what].recipe)


def test_five_mistakes_are_five_problems(here: Path, unread: None) -> None:
    """In the recipe, in a model, in the fit of two models and in the place of the output: at once."""
    shutil.rmtree(here / "code")
    tensors = llama(1)
    tensors["model.norm.weight"] = packed(np.zeros(17))
    save_model(here / "math", tensors)
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    recipe = with_(parameters={"density": 2}, output={"dtype": "bf61"})

    refused(here, "5 problems", "density", "bf61", "./code: no such file or folder", "model.norm.weight",
            "out: exists", recipe=recipe)  # fmt: skip


def test_json_errors_are_one_object(here: Path, unread: None) -> None:
    """With --json the message is data on standard output too."""
    write_recipe(here, with_(method="tiess"))
    said = invoke("merge", here / "recipe.yaml", "-o", here / "out", "--json")

    assert said.code == 2
    assert said.json["kind"] == "RecipeError"
    assert "'tiess'" in said.json["error"]
    assert "'tiess'" in said.err


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_a_recipe_that_is_no_file(here: Path, unread: None, kind: str) -> None:
    """Its path, and what is wrong with it."""
    path = here / "r.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(bytes(range(256)))

    refused(here, str(path), recipe=path)


@pytest.mark.parametrize("arguments", [(), ("merge",), ("merge", "r.yaml"), ("merg",), ("merge", "a", "b", "-o", "c"),
                                       ("merge", "r", "-o", "o", "--threads", "0"), ("merge", "r", "-o", "o", "--thread", "1"),
                                       ("inspect",), ("diff", "a")], ids=str)  # fmt: skip
def test_wrong_arguments(arguments: tuple[str, ...]) -> None:
    """The command line says how it is used; exit code 2."""
    said = invoke(*arguments)

    assert said.code == 2
    assert "Usage: suture" in said.err + said.out


# ------------------------------------------------------------------------------------------- models


def shard_three(here: Path, name: str) -> Path:
    tensors = read_model(here / name)
    shutil.rmtree(here / name)
    return save_model(here / name, tensors, shards=3, config=CONFIG)


def test_a_missing_shard(here: Path, unread: None) -> None:
    """The shard and how much was in it."""
    shard = shard_three(here, "math") / "model-00002-of-00003.safetensors"
    shard.unlink()

    refused(here, str(shard), "missing shard", "7 tensors", "fetch it again")


def test_a_truncated_shard(here: Path, unread: None) -> None:
    """The shard that is too short, not the one that is read first."""
    shard = shard_three(here, "code") / "model-00003-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)

    refused(here, str(shard), "cut short", "fetch the file again")


def test_mismatched_shapes(here: Path, unread: None) -> None:
    """Which model against which, the tensor, and both shapes; up to ten of them."""
    tensors = llama(1) | {"model.norm.weight": packed(np.zeros(8))}
    tensors["model.layers.1.self_attn.q_proj.weight"] = packed(np.zeros((16, 8)))
    save_model(here / "math", tensors, config=CONFIG)

    refused(here, "2 problems", "./math against ./base", "model.norm.weight is [8], not [16]",
            "model.layers.1.self_attn.q_proj.weight is [16, 8], not [16, 16]")  # fmt: skip


def test_different_vocabularies(here: Path, unread: None) -> None:
    """One cause, one message: not one for each tensor with a vocabulary axis."""
    save_model(here / "math", llama(1, vocabulary=26), config=CONFIG)
    said = refused(here, "./math against ./base", "vocabularies of 24 and 26 tokens", "tokenizer")

    assert "problems" not in said.err


def test_a_folder_of_pickles(here: Path, unread: None) -> None:
    """It is not opened, and the way to convert it is told."""
    shutil.rmtree(here / "math")
    (here / "math").mkdir()
    (here / "math" / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")

    refused(here, "./math", "pickle", "save_pretrained")
    assert not (here / "pwned").exists()


@pytest.mark.parametrize("dtype", ["I32", "U8"])
def test_integers_in_the_place_of_weights(here: Path, unread: None, dtype: str) -> None:
    """A quantised tensor under the name of a weight is no weight."""
    width = {"I32": 4, "U8": 1}[dtype]
    tensors = llama(1) | {"model.norm.weight": Raw(dtype, (16,), bytes(16 * width))}
    save_model(here / "math", tensors, config=CONFIG)

    refused(here, "./math against ./base", "model.norm.weight", dtype)


def test_tensors_that_one_model_lacks(here: Path, unread: None) -> None:
    """Named, with the policy that would take them from the base."""
    tensors = llama(1)
    del tensors["model.norm.weight"]
    save_model(here / "math", tensors, config=CONFIG)

    refused(here, "./math against ./base: lacks model.norm.weight", "policy: {missing: base}")


def test_tensors_that_only_one_model_has(here: Path, unread: None) -> None:
    """Named, with the policy that would leave them out."""
    save_model(here / "math", llama(1) | {"classifier.weight": packed([1.0])}, config=CONFIG)

    refused(here, "./math against ./base: has classifier.weight besides", "policy: {extra: drop}")


def test_policies_are_followed(here: Path) -> None:
    """With the policies, a missing tensor moves only by the other model, and an extra one is gone."""
    tensors = llama(1, llama(0)) | {"classifier.weight": packed([1.0])}
    del tensors["model.norm.weight"]
    save_model(here / "math", tensors, config=CONFIG)
    recipe = with_(
        method="task_arithmetic", parameters={}, policy={"missing": "base", "extra": "drop"}
    )
    write_recipe(here, recipe)
    said = invoke("merge", here / "recipe.yaml", "-o", here / "out")
    out, code = read_model(here / "out"), read_model(here / "code")

    assert said.code == 0, said
    assert "classifier.weight" not in out
    assert np.allclose(out["model.norm.weight"].values, code["model.norm.weight"].values, atol=1e-6)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "not stored"])
@pytest.mark.parametrize("tied", ["base", "model"])
def test_a_head_that_only_one_of_two_ties(here: Path, tied: str, stored: bool) -> None:
    """A tensor of its own here, a second name there: the file holds what its config says.

    The default space touches neither embedding nor head, so what the base ties stays tied.
    """
    which = "base" if tied == "base" else "math"
    tensors = read_model(here / which)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if not stored:
        del tensors["lm_head.weight"]
    shutil.rmtree(here / which)
    save_model(here / which, tensors, config={**CONFIG, "tie_word_embeddings": True})

    assert invoke("merge", write_recipe(here), "-o", here / "out").code == 0

    out = read_model(here / "out")
    config = json.loads((here / "out" / "config.json").read_text())
    assert ("lm_head.weight" in out) == (tied != "base")
    assert config.get("tie_word_embeddings", False) == (tied == "base")


def test_tied_tensors_that_differ(here: Path) -> None:
    """The configuration says they are one, the file says they are two: the model is named."""
    (here / "math" / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    (here / "base" / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    (here / "code" / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))

    for flags in ((), ("--dry-run",)):
        refused(
            here,
            "3 problems",
            "base: config.json ties lm_head.weight",
            "math: ",
            "code: ",
            flags=flags,
        )


def test_unequal_integers(here: Path) -> None:
    """Integers are not merged: they must agree, or the recipe says whose count."""
    for name, start in (("base", 0), ("math", 0), ("code", 1)):
        tensors = read_model(here / name)
        tensors["model.position_ids"] = packed(np.arange(start, start + 5), "I64")
        save_model(here / name, tensors, config=CONFIG)

    said = refused(here, "code against base", "model.position_ids", "policy: {buffers: base}")
    assert "math" not in said.err
    write_recipe(here, with_(policy={"buffers": "base"}))
    assert invoke("merge", here / "recipe.yaml", "-o", here / "out").code == 0
    assert read_model(here / "out")["model.position_ids"].values.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["merged", "copied"])
@pytest.mark.parametrize("who", ["base", "math"])
def test_weights_that_are_not_numbers(here: Path, value: float, place: str, who: str) -> None:
    """File, tensor and count are named; the flag goes on, and the rest is merged as ever."""
    if (place, who) == ("copied", "math"):
        pytest.skip("only the base's copy is written")
    name = "model.norm.weight" if place == "merged" else "model.embed_tokens.weight"
    tensors = read_model(here / who)
    values = tensors[name].values.copy()
    values.flat[[0, -1]] = value
    save_model(here / who, tensors | {name: packed(values)}, config=CONFIG)
    flags = ("--threads", "1")

    refused(
        here,
        str(here / who / "model.safetensors"),
        name,
        "2 NaN or infinite",
        "--allow-nonfinite",
        flags=flags,
    )
    write_recipe(here, with_(method="task_arithmetic", parameters={}))
    said = invoke("merge", here / "recipe.yaml", "-o", here / "out", "--allow-nonfinite")
    assert said.code == 0, said
    lines_of(said.out, "NaN and infinity are let through")
    out = read_model(here / "out")
    assert not np.isfinite(out[name].values.flat[[0, -1]]).any()
    assert np.isfinite(out[name].values.flat[1:-1]).all()


def test_not_a_number_in_a_buffer_is_none_of_our_business(here: Path) -> None:
    """Masks of minus infinity are stored in some old files; they are copied as they are."""
    for name in ("base", "math", "code"):
        tensors = read_model(here / name)
        tensors["model.layers.0.attn.masked_bias"] = packed([-np.inf])
        save_model(here / name, tensors, config=CONFIG)
    write_recipe(here)

    assert invoke("merge", here / "recipe.yaml", "-o", here / "out").code == 0


def test_values_that_do_not_fit_the_output(here: Path) -> None:
    """A result beyond the range of float16 is an error that says what to do, not infinity."""
    tensors = read_model(here / "math") | {"model.norm.weight": packed(np.full(16, 1e6))}
    save_model(here / "math", tensors, config=CONFIG)
    recipe = with_(method="task_arithmetic", parameters={}, output={"dtype": "float16"})

    refused(here, "model.norm.weight", "do not fit into float16", "wider", recipe=recipe)


def test_a_quantised_model(here: Path, unread: None) -> None:
    """Its numbers are not its weights."""
    config = {**CONFIG, "quantization_config": {"quant_method": "bitsandbytes"}}
    (here / "math" / "config.json").write_text(json.dumps(config))

    refused(here, "./math", "quantised", "dequantise")


def test_a_tokenizer_that_is_a_link_elsewhere(here: Path, unread: None) -> None:
    """Found before the merge, not after an hour: nothing outside of the folders is carried over."""
    (here / "secret.json").write_text("{}")
    (here / "base" / "tokenizer.json").symlink_to("../secret.json")

    refused(here, "tokenizer.json", "is a link to", "outside")


def test_a_card_that_is_a_link_elsewhere_is_not_read(here: Path) -> None:
    """The licence of a model is looked for in its own card only."""
    (here / "secret.md").write_text("---\nlicense: stolen\n---\n")
    (here / "base" / "README.md").symlink_to("../secret.md")
    write_recipe(here)

    assert invoke("merge", here / "recipe.yaml", "-o", here / "out").code == 0
    assert "stolen" not in (here / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "front", ["license: [", "[" * 5000, "date: 2024-13-45", "license: 5", "&a [*a]", "- x", ""]
)
def test_a_broken_card_does_no_harm(here: Path, front: str) -> None:
    """A card that cannot be read has no licence; the merge goes on."""
    (here / "base" / "README.md").write_text(f"---\n{front}\n---\n# x\n")
    write_recipe(here)

    assert invoke("merge", here / "recipe.yaml", "-o", here / "out").code == 0


def test_an_input_that_changes_during_the_merge(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the old and half of the new model is no model: nothing is published."""
    from suture.merges import apply

    real = apply._outcome

    def later(*arguments: Any) -> Any:
        path = here / "math" / "model.safetensors"
        os.utime(path, ns=(1, 1))
        return real(*arguments)

    monkeypatch.setattr(apply, "_outcome", later)
    write_recipe(here)
    said = invoke("merge", here / "recipe.yaml", "-o", here / "out")

    assert said.code == 2
    lines_of(said.err, str(here / "math" / "model.safetensors"), "was changed while it was read")
    assert not (here / "out").exists()
    monkeypatch.undo()
    again = invoke("merge", here / "recipe.yaml", "-o", here / "out", "--json")
    assert again.code == 0
    assert again.json["resumed"] == 0


# ------------------------------------------------------------------------------- the place to write


@pytest.mark.parametrize(
    ("out", "what"),
    [("base", "holds"), ("math", "holds"), ("math/inside", "lies in"), ("math/in/side", "lies in"),
     (".", "holds"), ("base/../code", "holds")],
)  # fmt: skip
def test_an_output_that_is_an_input(here: Path, unread: None, out: str, what: str) -> None:
    """Equal to an input, inside it or around it: refused, even with --overwrite."""
    (here / "suture.json").write_text("{}")  # as if the folder around them had been written by us
    for flags in ((), ("--overwrite",)):
        refused(here, f"{what} the input", "write somewhere else", out=here / out, flags=flags)


def test_an_output_that_is_an_input_by_a_link(here: Path, unread: None) -> None:
    """Links are followed before the two are compared."""
    (here / "link").symlink_to("math")

    refused(here, "holds the input 'math'", out=here / "link")
    refused(here, "lies in the input 'math'", out=here / "link" / "sub")


def test_an_output_around_a_file(here: Path, unread: None) -> None:
    """A model that is a single file makes its folder an input too."""
    recipe = with_(models={"math": "./math/model.safetensors"})

    refused(here, "holds the input 'math'", recipe=recipe, out=here / "math")


def test_an_input_in_the_place_where_the_output_is_prepared(here: Path, unread: None) -> None:
    """The hidden folder is emptied when a merge begins: it must hold no input."""
    shutil.move(here / "math", staging(here / "out") / "model")
    recipe = with_(models={"math": "./.out.suture/model", "code": "./code"})

    refused(here, "holds the input 'math'", recipe=recipe)


def test_an_output_that_exists(here: Path, unread: None) -> None:
    """A folder with something in it is not touched without the flag; one that is not ours never,
    and then the flag is not recommended."""
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("mine")

    for flags in ((), ("--overwrite",)):
        said = refused(here, "out: exists, and was not written by suture", "remove it yourself",
                       flags=flags)  # fmt: skip
        assert "add --overwrite" not in said.err
    (here / "out" / "suture.json").write_text("{}")
    refused(here, "out: exists; name another folder, or add --overwrite")


def test_an_output_with_the_name_of_a_key(
    here: Path, unread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A problem of the output is said of no line of the recipe, even where a key has its name."""
    monkeypatch.chdir(here)
    (here / "models").mkdir()
    (here / "models" / "notes").write_text("mine")

    said = refused(here, "models: exists", out="models")

    assert "line" not in said.err


def test_a_recipe_in_the_output(here: Path, unread: None) -> None:
    """A recipe that the replaced folder would take with it is refused, by its name."""
    (here / "out").mkdir()
    (here / "out" / "suture.json").write_text("{}")
    models = {name: str(here / name) for name in ("math", "code")}
    recipe = write_recipe(here / "out", with_(base=str(here / "base"), models=models))

    refused(here, "would remove the recipe", "recipe.yaml", recipe=recipe, flags=("--overwrite",))


def test_a_file_in_the_way(here: Path, unread: None) -> None:
    """Not replaced either, nor written under."""
    (here / "out").write_text("mine")

    for flags in ((), ("--overwrite",)):
        refused(here, "out: is a file", flags=flags)
        refused(here, "cannot write", out=here / "out" / "sub", flags=flags)


@pytest.mark.parametrize("out", ["/proc/out", "/proc/self/out", "/dev/null/out", "/sys/out"])
def test_a_place_that_takes_no_files(here: Path, out: str) -> None:
    """The place and the reason, whether it is seen beforehand or when the first folder is made."""
    if not Path(out).parent.exists():
        pytest.skip("no such file system here")

    refused(here, out.rpartition("/")[0], out=out)


def test_a_folder_without_permission(
    here: Path, unread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the system says of permissions is asked before the merge, not after it."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, *m, **k: Path(p) != here and real(p, *m, **k))

    refused(here, "out: cannot write in", str(here))


def test_a_read_only_file_system(here: Path, unread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses even the superuser, whom permissions do not bind."""

    class ReadOnly:
        f_flag = os.ST_RDONLY

    monkeypatch.setattr(os, "statvfs", lambda *_: ReadOnly)

    refused(here, "out: cannot write in", str(here))


@pytest.mark.parametrize("name", ["x" * 256, "x" * 250, "loop", "loop/sub"])
def test_a_name_that_no_folder_can_have(here: Path, name: str) -> None:
    """Too long for the file system, or a link to itself."""
    (here / "loop").symlink_to("loop")

    refused(here, "error: ", out=here / name)


def test_a_disk_that_is_full(here: Path, unread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much is needed and how much is free, before anything is written."""
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 20_000, 20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    refused(here, "out: needs 23.9 kB of disk, 20 kB are free")


def test_the_disk_may_fill_up_during_the_merge(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and the reason; what was done is kept, and with space the same command finishes."""
    from suture.checkpoints import writer

    real, calls = writer._pwrite, []

    def full(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) > 5:
            raise OSError(28, os.strerror(28))
        return real(*arguments)

    write_recipe(here)
    monkeypatch.setattr(writer, "_pwrite", full)
    said = invoke("merge", here / "recipe.yaml", "-o", here / "out")
    monkeypatch.undo()

    assert said.code == 2
    lines_of(said.err, "model.safetensors", "No space left on device", "the same command")
    assert not (here / "out").exists()
    assert invoke("merge", here / "recipe.yaml", "-o", here / "out").code == 0


def test_something_appears_in_the_place_of_the_output(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that was not there when the merge began is left alone, with and without --overwrite."""
    from suture.verbs.merge import run

    real = run.add_files

    def meanwhile(*arguments: Any) -> None:
        real(*arguments)
        (here / "out").mkdir(exist_ok=True)
        (here / "out" / "thesis.tex").write_text("mine")

    monkeypatch.setattr(run, "add_files", meanwhile)
    write_recipe(here)
    for flags in ((), ("--overwrite",)):
        shutil.rmtree(here / "out", ignore_errors=True)
        said = invoke("merge", here / "recipe.yaml", "-o", here / "out", *flags)
        assert said.code == 2
        assert "Traceback" not in said.err
        lines_of(said.err, str(here / "out"))
        assert [p.name for p in (here / "out").iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_a_good_place(here: Path) -> None:
    """Made beforehand, by hand or by a scheduler."""
    (here / "out").mkdir()
    write_recipe(here)

    assert invoke("merge", here / "recipe.yaml", "-o", here / "out").code == 0
    assert (here / "out" / "suture.json").exists()


def test_a_place_far_down_is_made(here: Path) -> None:
    """Missing folders above the output are made with it."""
    write_recipe(here)

    assert invoke("merge", here / "recipe.yaml", "-o", here / "a" / "b" / "out").code == 0
    assert (here / "a" / "b" / "out" / "suture.json").exists()


# ----------------------------------------------------------------------- inspect, diff and the process


@pytest.mark.parametrize("command", [("inspect",), ("diff",)])
def test_other_commands_refuse_alike(here: Path, command: tuple[str, ...]) -> None:
    """A file that is cut short is the same message everywhere."""
    path = here / "math" / "model.safetensors"
    os.truncate(path, 5000)
    models = (here / "math",) if command == ("inspect",) else (here / "base", here / "math")
    said = invoke(*command, *models)

    assert said.code == 2
    lines_of(said.err, str(path), "cut short")


def test_a_difference_of_unlike_models(here: Path) -> None:
    """What differs is named, for diff as for merge."""
    save_model(here / "math", llama(1, layers=1))
    said = invoke("diff", here / "base", here / "math")

    assert said.code == 2
    lines_of(said.err, "lacks", "model.layers.1.")


@pytest.mark.parametrize(
    "make",
    [lambda here: write_recipe(here, with_(parameters={"densty": 0.5})),
     lambda here: os.truncate(here / "math" / "model.safetensors", 5000),
     lambda here: save_model(here / "code", read_model(here / "code") | {
         "model.norm.weight": packed(np.full(16, np.nan))})],
    ids=["recipe", "file", "values"],
)  # fmt: skip
def test_a_real_process_says_it_too(here: Path, make: Callable[[Path], object]) -> None:
    """Outside of this process: exit code 2, the message on standard error, no traceback, no warning."""
    write_recipe(here)
    make(here)
    said = suture("merge", "recipe.yaml", "-o", "out", cwd=here)

    assert said.code == 2, said
    assert said.out == ""
    assert "Traceback" not in said.err
    assert "Warning" not in said.err
    assert "error: " in said.err
    assert not (here / "out").exists()
    assert not staging(here / "out").exists()


def test_names_that_are_no_text(here: Path) -> None:
    """A path of bytes that are no UTF-8 is told of, on both streams, without a crash."""
    said = suture("inspect", os.fsdecode(b"nope-\xff"), "--json", cwd=here)

    assert said.code == 2, said
    assert "nope-" in said.json["error"]


def test_tensors_are_told_apart_from_their_names(here: Path) -> None:
    """Any printable name of a tensor, also one that looks like a path or a flag, is merged and written."""
    odd = [
        "../../x",
        "/etc/x",
        "--json",
        "a b",
        "é",
        "\u202e",
        "🙂",
        "x" * 5000,
        "[0].*?",
        "{y!r}",
        "%s",
    ]
    for number, name in enumerate(("base", "math", "code")):
        tensors = {f"{n}.weight": packed([1.0 + number, 2.0]) for n in odd}
        save_model(here / name, tensors, config=CONFIG)
    write_recipe(here)
    said = invoke("merge", here / "recipe.yaml", "-o", here / "out")

    assert said.code == 0, said
    assert sorted(read_model(here / "out")) == sorted(f"{n}.weight" for n in odd)
    assert weights(here / "out")
    assert safetensors(read_file(here / "out" / "model.safetensors"))
