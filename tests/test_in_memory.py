"""Models in memory are models: the same bytes as through folders, nothing copied, nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import suture
import tiny_model
import toy
from suture.checkpoints.writer import Writer
from suture.errors import CheckpointError, MismatchError, NonFiniteError, OutputError, RecipeError
from suture.merges.apply import checkpoint_fingerprint
from suture.training.data import tokenise
from suture.training.labelled import LabelledText
from suture.training.load import load_tuned
from suture.training.models import LanguageModel, save_head, save_model

NAME = "layers.0.mlp.weight"


def weights(folder: Path) -> dict[str, bytes]:
    """Every file of weights of a folder, byte for byte."""
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def moved(model: nn.Module, seed: int, step: float = 0.05) -> nn.Module:
    """The model after a little training: every parameter moves, ties stay."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (step * torch.randn(parameter.shape, generator=draw)).to(parameter.dtype)
    return model


def gpt(seed: int = 0, step: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    """A GPT-2 of one layer whose head is its embedding."""
    return moved(tiny_model.language_model(0).backbone.to(dtype), seed, step)


# -- the same bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", toy.FLAVOURS)
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}), ("task_arithmetic", {"scale": 0.7}), ("ties", {"density": 0.3}),
        ("dare_ties", {"density": 0.5, "seed": 3}), ("stitch", {"density": 0.2}),
        ("breadcrumbs", {}), ("slerp", {"t": 0.4}), ("model_stock", {}),
    ],
)  # fmt: skip
def test_a_merge_of_tensors_has_the_bytes_of_the_merge_of_folders(
    tmp_path: Path, flavour: str, method: str, parameters: dict[str, Any]
) -> None:
    """Every dtype, buffers, a scalar, an empty tensor; whole, by tensor, and saved."""
    base = toy.base_tensors(flavour)
    models = {"ada": toy.tuned(base, 1), "bob": toy.tuned(base, 2)}
    paths = {n: toy.folder(tmp_path / n, t) for n, t in {"base": base, **models}.items()}
    based = suture.METHODS[method].needs_base or suture.METHODS[method].optional_base
    folders = suture.merge(
        paths["base"] if based else None, {n: paths[n] for n in models}, method, **parameters
    )
    held = suture.merge(base if based else None, models, method, **parameters)

    suture.save(folders, tmp_path / "out")
    suture.save(held, tmp_path / "held")

    assert weights(tmp_path / "held") == weights(tmp_path / "out")
    wanted = toy.read(tmp_path / "out")
    for found in (held.state_dict(), {name: held.tensor(name) for name in held.names}):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert toy.raw_bytes(found[name]) == toy.raw_bytes(tensor)
    shown = suture.open(tmp_path / "out")
    assert all(np.array_equal(value, shown[name]) for name, value in held.numpy().items())
    assert np.array_equal(held[held.names[0]], shown[held.names[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_of_networks_has_the_bytes_of_the_merge_of_folders(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Tied embeddings once, configuration and all; and a network that takes it computes the same."""
    networks = {"base": gpt(dtype=dtype), "ada": gpt(1, 0.05, dtype), "bob": gpt(2, 0.05, dtype)}
    for name, network in networks.items():
        save_model(LanguageModel(network), tiny_model.tokenizer(), tmp_path / name)
    paths = {n: tmp_path / n for n in ("ada", "bob")}
    everything = suture.ParamSpace((), ())
    suture.save(
        suture.merge(tmp_path / "base", paths, "ties", density=0.4, space=everything),
        tmp_path / "out",
    )
    merged = suture.merge(
        networks["base"], {n: networks[n] for n in paths}, "ties", density=0.4, space=everything
    )

    suture.save(merged, tmp_path / "held")
    assert weights(tmp_path / "held") == weights(tmp_path / "out")
    config, other = (
        json.loads((tmp_path / n / "config.json").read_text()) for n in ("held", "out")
    )
    assert config == other

    network = gpt(9, 0.5, dtype)
    assert merged.load_into(network) is network
    ids = torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        wanted = load_tuned(tmp_path / "out", dtype=dtype)(ids, torch.ones_like(ids))
        assert torch.equal(network(ids).logits, wanted)
    assert network.lm_head.weight is network.transformer.wte.weight


def test_a_tied_tensor_is_held_once_and_given_back_under_both_names() -> None:
    """In a module, in its state dict, in arrays that are the same; two equal copies are two."""
    network = gpt()
    for model in (suture.open(network), suture.open(network.state_dict())):
        assert model.aliases == {"lm_head.weight": "transformer.wte.weight"}
        assert "lm_head.weight" not in model
    found = suture.merge(None, [network], "passthrough").state_dict()
    assert found["lm_head.weight"] is found["transformer.wte.weight"]
    assert found.keys() == network.state_dict().keys()

    table = np.ones((3, 2), np.float32)
    model = suture.open({"model.embed_tokens.weight": table, "lm_head.weight": table})
    assert list(model) == ["model.embed_tokens.weight"]
    assert "the same tensor under a second name" in model.notes[0]
    apart = suture.open({"model.embed_tokens.weight": table, "lm_head.weight": table.copy()})
    assert len(apart) == 2
    one, two = (
        {"model.embed_tokens.weight": table, "lm_head.weight": x} for x in (table, table + 1)
    )
    tied = {"tie_word_embeddings": True}
    said = [
        suture.open(t, config=tied) for t in (one, two, {**one, "lm_head.weight": table.copy()})
    ]
    assert [model.untied() for model in said] == [[], ["lm_head.weight"], []]
    with pytest.raises(
        MismatchError, match="ties lm_head.weight to model.embed_tokens.weight, but"
    ):
        suture.merge(None, [said[1]], "passthrough", space=suture.ParamSpace((), ())).numpy()


# -- nothing copied, nothing written ---------------------------------------------------------------


def test_nothing_is_copied_until_it_is_read() -> None:
    """The bytes are those of the tensors, so that later changes are seen; a given tensor is not theirs."""
    array, tensor = np.zeros((2, 3), np.float32), torch.zeros(4, dtype=torch.bfloat16)
    model = suture.open({"a": array, "b": tensor})
    assert np.shares_memory(model.whole("a"), array)
    assert model.whole("b").ctypes.data == tensor.data_ptr()
    array[0, 0], tensor[1] = 5, 6
    assert model["a"][0, 0] == 5
    assert model["b"].tolist() == [0, 6, 0, 0]
    model.tensor("a").zero_()
    model.tensor("b").zero_()
    assert (array[0, 0], tensor[1]) == (5, 6)
    network = gpt()
    weight = network.transformer.h[0].mlp.c_fc.weight
    assert (
        suture.open(network).whole("transformer.h.0.mlp.c_fc.weight").ctypes.data
        == weight.data_ptr()
    )


_WRITING: list[str] | None = None


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _WRITING is None:
        return
    writes = event == "open" and (
        any(c in str(args[1] or "") for c in "wax+")
        or bool(args[2] & 3 and isinstance(args[2], int))
    )
    if writes or event in (
        "os.mkdir",
        "os.rename",
        "os.truncate",
        "shutil.copyfile",
        "tempfile.mkstemp",
    ):
        _WRITING.append(f"{event} {args}")


sys.addaudithook(_watch)  # cannot be taken back: it watches only while there is a list


@contextmanager
def watched() -> Iterator[list[str]]:
    """Every file that is opened for writing, every folder that is made, meanwhile."""
    global _WRITING
    _WRITING = found = []
    try:
        yield found
    finally:
        _WRITING = None


def test_a_merge_of_two_networks_never_touches_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened, planned, merged, taken out, put into a network: no file is opened for writing."""
    suture.merge(gpt(), [gpt(1, 0.1)], "ties", density=0.5).state_dict()  # loops are compiled once
    place = tmp_path / "here"
    place.mkdir(mode=0o555)
    monkeypatch.chdir(place)
    with watched() as writing:
        (tmp_path / "seen").write_text("")
    assert len(writing) == 1  # the watch itself works
    with watched() as writing:
        merged = suture.merge(gpt(), {"a": gpt(1, 0.1), "b": gpt(2, 0.1)}, "ties", density=0.5)
        merged.state_dict()
        merged.numpy()
        merged.tensor(merged.names[0])
        merged.load_into(gpt(3))
        vector = suture.open(gpt(1, 0.1)) - suture.open(gpt())
        suture.localize(vector, density=0.1)
        suture.diff(gpt(), gpt(1, 0.1))
        suture.inspect(gpt(), check=True, tensors=True)
    assert writing == []
    assert list(place.iterdir()) == []


def test_arrays_need_no_torch() -> None:
    """A mapping of numpy arrays is opened, merged and looked at without it."""
    code = """
import json, sys
import numpy as np, suture
base, tuned = ({"layers.0.mlp.weight": np.full((2, 2), v, np.float32)} for v in (0, 1))
merged = suture.merge(base, {"a": tuned}, "ties", density=0.5)
merged.numpy(), merged.names, repr(merged)
suture.diff(base, tuned)
suture.localize(suture.open(tuned) - suture.open(base), density=0.5)
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "safetensors"} & set(json.loads(done.stdout))


def test_what_an_interrupted_run_left_is_not_taken_for_other_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors in memory may change between two calls: the second begins anew."""
    base, tuned = {NAME: np.zeros(64, np.float32)}, {NAME: np.ones(64, np.float32)}
    merged = suture.merge(base, {"a": tuned})

    def killed(self: Writer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            suture.save(merged, tmp_path / "out")
    tuned[NAME][:] = 2
    report = suture.save(merged, tmp_path / "out")
    assert report.resumed == 0
    assert suture.open(tmp_path / "out")[NAME].tolist() == [2.0] * 64


# -- what is a model -------------------------------------------------------------------------------


def test_every_layout_and_dtype_is_read_as_it_is() -> None:
    """Strides, byte order, scalars, nothing, booleans, eight bits, complex: the values, in order."""
    rows = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    tensors: dict[str, Any] = {
        "turned": rows.T, "stepped": np.arange(10, dtype=np.int32)[::3],
        "big": np.arange(4, dtype=">f4"), "one": torch.tensor(1.5), "none": np.zeros((0, 4)),
        "flags": torch.tensor([True, False]), "wide": np.array([1 + 2j], np.complex64),
        "wide2": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "eight": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn), "u16": np.array([7], np.uint16),
    }  # fmt: skip
    model = suture.open(tensors)
    for name, value in tensors.items():
        wanted = value if isinstance(value, torch.Tensor) else torch.from_numpy(
            np.ascontiguousarray(value.astype(value.dtype.newbyteorder("=")))
        )  # fmt: skip
        found = model.tensor(name)
        assert found.dtype == wanted.dtype, name
        assert toy.raw_bytes(found) == toy.raw_bytes(wanted.resolve_conj().contiguous()), name
    out = np.zeros(8, np.uint8)
    model.read_into("turned", 4, out)  # from the middle
    assert out.view(np.float16).tolist() == rows.T.reshape(-1)[4:8].tolist()


def test_what_is_no_model_is_refused_with_all_that_is_wrong() -> None:
    """Every tensor at once, by name; other things with what they could be."""
    with pytest.raises(CheckpointError) as caught:
        suture.open({"a": [1.0], "b": torch.zeros(2, device="meta"), "c": np.zeros(2, np.complex128),
                     3: np.zeros(1), "d": torch.eye(2).to_sparse()}, label="mine")  # fmt: skip
    for text in ("mine: a: a torch tensor or a numpy array, not list", "b: is on the device 'meta'",
                 "c: the dtype complex128 cannot be stored", "3 is no name",
                 "d: is torch.sparse_coo; make it dense"):  # fmt: skip
        assert text in str(caught.value)
    with pytest.raises(CheckpointError, match="holds no tensor"):
        suture.open({})
    with pytest.raises(RecipeError, match=r"3 \(int\) is no model; a model is a path"):
        suture.open(3)
    vector = suture.open({NAME: np.ones(2)}) - suture.open({NAME: np.zeros(2)})
    with pytest.raises(RecipeError, match="a task vector, a difference of two models, is no model"):
        suture.open(vector)
    adapted = nn.ModuleDict({"lora_A": nn.Linear(2, 2)})
    adapted = nn.ModuleDict({"layer": adapted})
    with pytest.raises(CheckpointError, match=r"has adapters on it .* call `merge_and_unload\(\)`"):
        suture.open(adapted)
    with pytest.raises(CheckpointError, match="bytes|smaller"):
        shrinking = {NAME: torch.ones(4)}
        model = suture.open(shrinking)
        shrinking[NAME].resize_(1)
        _ = model[NAME]


def test_a_model_in_memory_is_one_for_every_function(tmp_path: Path) -> None:
    """Algebra, diff, inspect, patch, extraction, masks: as from folders."""
    base, tuned = toy.base_tensors("bf16"), toy.tuned(toy.base_tensors("bf16"), 1)
    paths = [toy.folder(tmp_path / n, t) for n, t in (("base", base), ("tuned", tuned))]
    (one, two), (start, end) = map(suture.open, paths), map(suture.open, (base, tuned))
    assert checkpoint_fingerprint(start) == checkpoint_fingerprint(one)
    assert (end - start).norm() == (two - one).norm()
    assert suture.localize(end - start, density=0.1) == suture.localize(two - one, density=0.1)
    assert suture.diff(base, tuned)["total"] == suture.diff(*paths)["total"]
    for key in ("dtypes", "roles", "bytes", "integrity"):
        assert suture.inspect(base, check=True)[key] == suture.inspect(paths[0], check=True)[key]
    suture.patch_make(base, tuned, tmp_path / "m.patch.safetensors")
    suture.patch_make(*paths, tmp_path / "f.patch.safetensors")
    suture.patch_apply(base, tmp_path / "m.patch.safetensors", tmp_path / "patched")
    patched = suture.open(tmp_path / "patched")
    assert patched.specs.keys() == tuned.keys()
    assert all(toy.raw_bytes(patched.tensor(n)) == toy.raw_bytes(t) for n, t in tuned.items())
    assert weights(tmp_path / "patched").keys() == {"model.safetensors", "undo.patch.safetensors"}
    vector = 0.5 * (end - start)
    added = suture.merge(None, vector).numpy()
    assert np.allclose(added[toy.SCALAR], (start[toy.SCALAR] + vector[toy.SCALAR]), rtol=1e-2)
    again = suture.open(suture.merge(base, [tuned], "task_arithmetic"), label="again")
    assert repr(again).startswith("Checkpoint('again': ")


@pytest.mark.parametrize("method", ["stitch", "fisher_merging", "led"])
def test_masks_and_statistics_in_memory_are_those_of_their_files(
    tmp_path: Path, method: str
) -> None:
    """By model, or one for each in a list; the same bytes; the record names what they are."""
    base = toy.base_tensors("f32")
    models = {"ada": toy.tuned(base, 1), "bob": toy.tuned(base, 2)}
    paths = {n: toy.folder(tmp_path / n, t) for n, t in {"base": base, **models}.items()}
    files: dict[str, dict[str, Path]] = {}
    for which in suture.METHODS.own[method].example.files:
        files[which] = {n: toy.invented_stats(paths[n], which) for n in models}
    values: dict[str, Any] = {
        k: {n: suture.Stats({t: np.array(v) for t, v in suture.Stats.load(p).tensors.items()},
                            suture.Stats.load(p).facts, "measured") for n, p in own.items()}
        for k, own in files.items()
    }  # fmt: skip
    if method == "stitch":
        vectors = {n: (suture.open(m) - suture.open(base)).select(exclude=("embedding", "head"))
                   for n, m in models.items()}  # fmt: skip
        values["masks"] = {n: suture.localize(v, density=0.2) for n, v in vectors.items()}
        files["masks"] = {n: tmp_path / f"{n}.mask.safetensors" for n in models}
        for name, path in files["masks"].items():
            values["masks"][name].save(path)

    suture.save(
        suture.merge(paths["base"], {n: paths[n] for n in models}, method, **files), tmp_path / "f"
    )
    suture.save(suture.merge(base, models, method, **values), tmp_path / "m")
    assert weights(tmp_path / "m") == weights(tmp_path / "f")
    listed = {k: list(v.values()) for k, v in values.items()}
    by_list = suture.merge(base, list(models.values()), method, **listed)
    suture.save(by_list, tmp_path / "l")
    assert weights(tmp_path / "l") == weights(tmp_path / "f")

    with pytest.raises(CheckpointError) as caught:
        suture.merge_recipe(tmp_path / "m" / "suture.json", tmp_path / "again")
    assert "memory:base: lay in memory when this was written" in str(caught.value)
    if method == "stitch":
        with pytest.raises(RecipeError, match="masks: one for each of 2 models, not 1"):
            suture.merge(base, list(models.values()), "stitch", masks=listed["masks"][:1])


def test_a_protected_mask_may_be_in_memory(tmp_path: Path) -> None:
    """As its file."""
    base = toy.base_tensors("f32")
    models = {"ada": toy.tuned(base, 1), "bob": toy.tuned(base, 2)}
    vector = (suture.open(models["ada"]) - suture.open(base)).select(exclude=("embedding", "head"))
    mask = suture.localize(vector, density=0.1)
    mask.save(tmp_path / "mask.safetensors")
    found = [
        suture.merge(base, models, "linear", protect={"model": "ada", "mask": given}).state_dict()
        for given in (mask, str(tmp_path / "mask.safetensors"))
    ]
    assert all(toy.raw_bytes(t) == toy.raw_bytes(found[1][n]) for n, t in found[0].items())
    plain = suture.merge(base, models, "linear").state_dict()
    assert any(toy.raw_bytes(t) != toy.raw_bytes(plain[n]) for n, t in found[0].items())


def test_a_model_is_saved_as_it_is(tmp_path: Path) -> None:
    """Bit for bit, whatever its dtypes, with NaN where it is allowed; embeddings alone, too."""
    for flavour in toy.FLAVOURS:
        tensors = toy.base_tensors(flavour)
        suture.save(tensors, tmp_path / flavour)
        found = toy.read(tmp_path / flavour)
        assert found.keys() == tensors.keys()
        assert all(toy.raw_bytes(found[n]) == toy.raw_bytes(t) for n, t in tensors.items())
    wild = torch.tensor([0x7FC1, 0x3F80], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for name, value in (
        (NAME, wild),
        ("embed_tokens.weight", torch.ones(2, 3)),
        ("n", torch.arange(3)),
    ):
        suture.save({name: value}, tmp_path / name, allow_nonfinite=True)
        assert toy.raw_bytes(toy.read(tmp_path / name)[name]) == toy.raw_bytes(value)


# -- into networks ---------------------------------------------------------------------------------


def test_a_network_takes_only_what_fits_it() -> None:
    """Every name and shape that does not fit, at once, and nothing was copied."""

    class Net(nn.Module):
        def __init__(self, width: int, more: bool = False) -> None:
            super().__init__()
            self.mlp = nn.Linear(2, width)
            self.register_buffer("seen", torch.zeros(1))
            if more:
                self.norm = nn.LayerNorm(2)

    merged = suture.merge(Net(3), {"a": Net(3)})
    kept = Net(3)
    assert merged.load_into(kept.to(torch.float64)).mlp.weight.dtype == torch.float64
    other = Net(4, more=True)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(MismatchError) as caught:
        merged.load_into(other)
    for text in (
        "lacks norm.bias, norm.weight",
        "mlp.bias is [3], not [4]",
        "mlp.weight is [3, 2], not [4, 2]",
    ):
        assert text in str(caught.value)
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())
    with pytest.raises(MismatchError, match="has no place for mlp.bias, mlp.weight, seen"):
        merged.load_into(nn.LayerNorm(2))


def test_networks_of_ours_are_looked_through() -> None:
    """The wrapper of a language model; a classifier without its head."""
    model = tiny_model.language_model()
    assert list(suture.open(model)) == list(suture.open(model.backbone))
    assert suture.open(model).label == "GPT2LMHeadModel"
    assert "head" not in " ".join(suture.open(tiny_model.encoder()))


# -- asked without a folder ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two language models, an encoder with a head, rows."""
    where = tmp_path_factory.mktemp("shop")
    for seed, name in enumerate(("base", "edit")):
        save_model(LanguageModel(gpt(seed, 0.2 * seed)), tiny_model.tokenizer(), where / name)
    rows = [{"text": row.text, "label": row.label} for row in tiny_model.rows(12)]
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return where


def test_merges_and_networks_are_asked_in_memory(shop: Path, tmp_path: Path) -> None:
    """The same numbers as through folders, by the names that were given."""
    made = {
        "name": "tiny",
        "evaluations": {"words": {"kind": "loss", "data": str(shop / "rows.jsonl")}},
    }
    base, edit = (load_tuned(shop / name) for name in ("base", "edit"))
    merged = suture.merge(base, {"edit": edit}, weight=0.5)
    suture.save(suture.merge(shop / "base", {"edit": shop / "edit"}, weight=0.5), tmp_path / "m")

    held = suture.evaluate({"base": base, "m": merged}, made, tokenizer=tiny_model.tokenizer())
    files = suture.evaluate([shop / "base", tmp_path / "m"], made)
    for one, other in zip(held, files, strict=True):
        assert one.fingerprint == other.fingerprint
        assert one.evaluations["words"].metrics == other.evaluations["words"].metrics
    assert [r.model for r in held] == ["base", "m"]
    # a network that was loaded from a folder has its tokenizer there; so has a merge of folders
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(shop / "edit")
    (found,) = suture.evaluate(loaded, made)
    assert found.model == "GPT2LMHeadModel"
    (found,) = suture.evaluate(
        suture.merge(shop / "base", {"edit": shop / "edit"}, weight=0.5), made, tmp_path / "results"
    )
    assert found.evaluations["words"].metrics == files[1].evaluations["words"].metrics
    assert [p.name for p in (tmp_path / "results").iterdir()] == [
        "task_arithmetic-of-edit.tiny.json"
    ]
    compared = suture.compare(held[0], edits=held[1], gate=["words.loss <= 5.0"])
    assert compared.held
    with pytest.raises(RecipeError, match="GPT2LMHeadModel: has no tokenizer; give `tokenizer=`"):
        suture.evaluate(gpt(), made)
    with pytest.raises(RecipeError, match="tensors: has no configuration; open it with"):
        suture.evaluate(gpt().state_dict(), made)


# -- as in a notebook ------------------------------------------------------------------------------


def test_a_notebook_gets_answers_and_not_tracebacks(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths for models, lists, strings for files; what is saved twice, and what cannot be saved."""
    monkeypatch.chdir(shop)
    assert (
        suture.merge("base", ["edit"]).names == suture.merge("base", {"edit": Path("edit")}).names
    )
    assert repr(suture.merge("base", {"n": "edit"})) == "Merged(task_arithmetic: n on a base)"
    assert isinstance(suture.finetune.load_tuned("base"), nn.Module)
    assert isinstance(suture.load_tuned("base"), nn.Module)
    recipe = {"method": "linear", "models": {"edit": "edit"}}
    (tmp_path / "avg.yaml").write_text(
        json.dumps({**recipe, "models": {"edit": str(shop / "edit")}})
    )
    suture.run_recipe(str(tmp_path / "avg.yaml"), str(tmp_path / "one"))
    suture.run_recipe(recipe, str(tmp_path / "two"))
    merged = suture.merge("base", {"n": "edit"})
    out = str(tmp_path / "nb")
    suture.save(merged, out)
    with pytest.raises(OutputError) as caught:
        suture.save(merged, out)
    assert str(caught.value) == f"{out}: exists; name another folder, or add overwrite=True"
    suture.save(merged, out, overwrite=True)  # as it says
    news, base = suture.open("edit"), suture.open("base")
    with pytest.raises(
        RecipeError, match=r"save\(merge\(None, vector\), out\)`.*`patch_make.*`extract_lora"
    ):
        suture.save(news - base, tmp_path / "no")
    suture.save(suture.merge(None, news - base), tmp_path / "added")  # as it says
    suture.patch_make(base, news, tmp_path / "d.patch.safetensors")
    mask = suture.localize(news - base, density=0.01)
    assert repr(mask).startswith("Mask(")
    assert len(repr(mask)) < 80
    everything = suture.ParamSpace((), ())
    assert suture.merge("base", {"n": "edit"}, "stitch", masks={"n": mask}, space=everything).names
    with pytest.raises(RecipeError, match=r"this is one model: write \{name: model\}"):
        suture.merge("base", gpt().state_dict())
    with pytest.raises(RecipeError, match="a mask is one file: write `mask.save"):
        suture.save(mask, tmp_path / "no")  # type: ignore[arg-type]


def test_advice_about_bad_numbers_can_be_followed(tmp_path: Path) -> None:
    """The message names the keyword, and the keyword is there wherever numbers are read."""
    base, tuned = {NAME: np.zeros(3, np.float32)}, {NAME: np.array([1, np.nan, 2], np.float32)}
    merged = suture.merge(base, {"a": tuned})
    for read in (merged.numpy, merged.state_dict, merged.checkpoint, lambda: merged.tensor(NAME),
                 lambda: suture.save(merged, tmp_path / "out")):  # fmt: skip
        with pytest.raises(NonFiniteError, match=r"memory:a: .*go on with allow_nonfinite=True"):
            read()
    assert np.isnan(merged.numpy(allow_nonfinite=True)[NAME][1])
    assert torch.isnan(merged.tensor(NAME, allow_nonfinite=True)[1])
    suture.save(merged, tmp_path / "out", allow_nonfinite=True)
    with pytest.raises(NonFiniteError) as told:
        merged.numpy()
    assert "`suture.inspect(MODEL, check=True)`" in str(told.value)
    assert suture.inspect(tuned, check=True)["integrity"]["nonfinite"] == {NAME: 1}


def test_a_classifier_in_memory_keeps_its_head(shop: Path, tmp_path: Path) -> None:
    """It is asked with it, as its folder is."""
    from suture.training.models import Classifier, Head

    head = Head(("colour", "sky"), torch.randn(2, 16, generator=torch.Generator().manual_seed(0)),
                torch.zeros(2))  # fmt: skip
    model = Classifier(tiny_model.encoder(), head).eval()
    save_model(model.encoder, tiny_model.tokenizer(), tmp_path / "c")
    save_head(head, tmp_path / "c" / "head.safetensors")
    made = {
        "name": "t",
        "evaluations": {"topics": {"kind": "accuracy", "data": str(shop / "rows.jsonl")}},
    }
    (one,) = suture.evaluate(model, made, tokenizer=str(tmp_path / "c"))
    (other,) = suture.evaluate(tmp_path / "c", made)
    assert one.evaluations["topics"].metrics == other.evaluations["topics"].metrics


def test_what_was_measured_in_memory_goes_into_a_merge() -> None:
    """From rows to statistics to a merge, without a file."""
    base, model, other = (moved(tiny_model.encoder(), seed) for seed in range(3))
    from suture.training.models import Classifier, Head

    head = Head(("colour", "sky"), torch.eye(2, 16), torch.zeros(2))
    rows = [LabelledText(r.text, r.label) for r in tiny_model.rows(6)]
    data = tokenise(rows, tiny_model.tokenizer(), labels=head.labels, max_length=16)
    space = suture.ParamSpace(("encoder.layer.*",), ())
    stats = [suture.measure(Classifier(m, head), data, ["fisher"]) for m in (model, other)]
    merged = suture.merge(base, [model, other], "fisher_merging", stats=stats, space=space)
    assert merged.load_into(tiny_model.encoder(5)) is not None
