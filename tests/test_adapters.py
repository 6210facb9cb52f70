"""Adapters on a base are the model that PEFT makes of them, read without a copy; wrong ones are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="PEFT is not installed")

import torch
import transformers
from safetensors.torch import load_file

import adapting
import suture
import toy
from making import invoke, lines_of
from suture.checkpoints.adapters import Adapted
from suture.checkpoints.open import open_model
from suture.errors import MismatchError, NonFiniteError, SutureError
from suture.merges.apply import checkpoint_fingerprint
from suture.runs.place import MergeOptions as Options
from suture.stream.sweep import DELTA, Block, Sources
from suture.verbs.merge import VERB as merge
from suture.verbs.merge.plan import make_plan


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of all kinds, and a plain adapter of the first."""
    place = tmp_path_factory.mktemp("adapters")
    adapting.llama(place / "llama")
    adapting.llama(place / "tied", tied=True)
    adapting.llama(place / "bf16", dtype="bfloat16")
    adapting.qwen(place / "qwen")
    adapting.gpt2(place / "gpt2")
    adapting.adapter(place / "llama", place / "ada", 1)
    adapting.adapter(place / "llama", place / "bob", 2, r=8, target_modules=["q_proj", "k_proj"])
    return place


CONV = ["c_attn", "c_proj", "c_fc"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rank-stabilised": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3},
                           "alpha_pattern": {"v_proj": 9}}),
    "a bfloat16 base": ("bf16", {}),
    "DoRA": ("llama", {"use_dora": True}),
    "DoRA on bfloat16": ("bf16", {"use_dora": True}),
    "modules to save": ("llama", {"modules_to_save": ["lm_head", "input_layernorm"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "DoRA on embeddings": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "a head": ("llama", {"target_modules": ["lm_head"]}),
    "one layer": ("llama", {"layers_to_transform": [1]}),
    "a pattern of targets": ("llama", {"target_modules": r".*\.(q|k)_proj"}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "a bias of the factors": ("qwen", {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]}),
    "all biases": ("qwen", {"bias": "all"}),
    "biases of the targets": ("qwen", {"bias": "lora_only"}),
    "Conv1D": ("gpt2", {"target_modules": CONV, "fan_in_fan_out": True}),
    "DoRA on Conv1D": ("gpt2", {"target_modules": CONV, "fan_in_fan_out": True, "use_dora": True}),
    "GPT-2's embeddings": ("gpt2", {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "another start": ("llama", {"init_lora_weights": "gaussian"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_are_those_that_peft_merges(kind: str, where: Path, tmp_path: Path) -> None:
    """Every option of LoRA that a merge can express: PEFT's merge_and_unload, tensor by tensor."""
    base, options = KINDS[kind]
    folder = adapting.adapter(where / base, tmp_path / "it", **options)

    found = suture.open(f"{where / base}+{folder}")
    expected = adapting.merged_by_peft(where / base, folder)
    start = suture.open(where / base)

    assert set(found) == set(expected)
    changed = [n for n in found if (found[n] != start[n]).any()]
    assert changed, "the adapter did nothing"
    for name, tensor in expected.items():
        spec = found.specs[name]
        assert spec.shape == tuple(tensor.shape)
        narrow = tensor.dtype == torch.bfloat16
        # PEFT rounds a bfloat16 model's delta and its sum; half a step each.
        scale = float(tensor.float().abs().max()) if narrow else 1.0
        most = scale * 2.0**-7 if narrow else 1e-7
        assert np.abs(found[name] - tensor.float().numpy()).max() <= most, name
        if name not in changed:
            assert spec == start.specs[name], "an untouched tensor keeps its dtype"
            assert toy.raw_bytes(found.tensor(name)) == toy.raw_bytes(start.tensor(name))


@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["embed_tokens", "q_proj"]}, False),
        ({"target_modules": ["embed_tokens", "lm_head"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
    ],
)
def test_a_tied_model_answers_as_with_the_adapter(
    options: dict[str, Any], tied: bool, where: Path, tmp_path: Path
) -> None:
    """On tied embeddings the adapted model gives the logits of the adapter at work.

    PEFT's own merge does not: it adds the change to the one tensor that both share.
    """
    base = where / "tied"
    folder = adapting.adapter(base, tmp_path / "it", **options)
    tokens = torch.arange(20)[None]
    expected = adapting.working(base, folder)(tokens).logits

    found = suture.open(f"{base}+{folder}")

    config = transformers.LlamaConfig.from_pretrained(base)
    config.tie_word_embeddings = found.config["tie_word_embeddings"]
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({n: torch.from_numpy(found[n]) for n in found}, strict=False)
    model.tie_weights()
    assert found.config["tie_word_embeddings"] is tied
    assert (model(tokens).logits - expected).abs().max() < 1e-5


def test_a_model_tied_by_default_is_untied_too(tmp_path: Path) -> None:
    """A config that says nothing of ties means them for GPT-2: its head keeps the old values."""
    torch.manual_seed(6)
    config = transformers.GPT2Config(vocab_size=41, n_embd=24, n_layer=1, n_head=4, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    written = json.loads((tmp_path / "base" / "config.json").read_text())
    written.pop("tie_word_embeddings", None)
    (tmp_path / "base" / "config.json").write_text(json.dumps(written))
    folder = adapting.adapter(tmp_path / "base", tmp_path / "it", target_modules=["wte"])
    base = suture.open(tmp_path / "base")

    found = suture.open(f"{tmp_path / 'base'}+{folder}")

    assert found.config["tie_word_embeddings"] is False
    assert (found["lm_head.weight"] == base["transformer.wte.weight"]).all()
    assert (found["transformer.wte.weight"] != base["transformer.wte.weight"]).any()


def test_bytes_do_not_depend_on_where_reading_starts(where: Path, tmp_path: Path) -> None:
    """Any stretch of a computed tensor has the bytes it has in the whole one, for DoRA as well."""
    draw = np.random.default_rng(0)
    dora = adapting.adapter(where / "gpt2", tmp_path / "dora", r=5, target_modules=CONV,
                            fan_in_fan_out=True, use_dora=True)  # fmt: skip
    for model in (f"{where / 'llama'}+{where / 'ada'}+{where / 'bob'}", f"{where / 'gpt2'}+{dora}"):
        whole = suture.open(model)
        for name, spec in whole.specs.items():
            raw = toy.raw_bytes(whole.tensor(name))
            fresh = suture.open(model)
            for _ in range(20):
                start, stop = sorted(draw.integers(0, spec.numel + 1, 2))
                part = np.empty((stop - start) * 4, np.uint8)
                fresh.read_into(name, int(start), part)
                assert part.tobytes() == raw[start * 4 : stop * 4], (name, start, stop)


def test_fingerprints_do_not_depend_on_blocks(where: Path) -> None:
    """The same fingerprint each time it is opened."""
    name = f"{where / 'llama'}+{where / 'ada'}"
    assert checkpoint_fingerprint(suture.open(name)) == checkpoint_fingerprint(suture.open(name))


def test_a_large_tensor_is_the_plain_product(tmp_path: Path) -> None:
    """More than a span, rows that spans cut, a rank that is no multiple of four: W + s B A in float64."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(700, 601, generator=draw)
    name = "model.layers.0.self_attn.q_proj"
    toy.folder(tmp_path / "base", {f"{name}.weight": weight})
    a, b = torch.randn(7, 601, generator=draw), torch.randn(700, 7, generator=draw)
    folder = written(tmp_path / "it", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, r=7)

    found = suture.open(f"{tmp_path / 'base'}+{folder}")[f"{name}.weight"]

    expected = weight.double() + 6 / 7 * (b.double() @ a.double())
    assert np.abs(found - expected.numpy()).max() < 2e-5


def written(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter's folder, byte by byte."""
    from safetensors.torch import save_file

    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    return folder


# -- merging ---------------------------------------------------------------------------------------


def test_task_arithmetic_of_adapters_is_the_sum_of_their_products(
    where: Path, tmp_path: Path
) -> None:
    """Merging N adapters is W + sum w_i s_i B_i A_i, computed here in float64 from the files."""
    recipe = {
        "base": str(where / "llama"),
        "models": {"ada": {"path": str(where / "ada"), "weight": 0.7},
                   "bob": {"path": str(where / "llama"), "adapter": str(where / "bob"), "weight": -1.3}},
        "method": "task_arithmetic",
        "space": {"exclude": []},
    }  # fmt: skip
    tensors, report = toy.run(tmp_path / "out", recipe)

    expected = {n: t.double() for n, t in toy.read(where / "llama").items()}
    for adapter, weight, scale in (("ada", 0.7, 6 / 4), ("bob", -1.3, 6 / 8)):
        factors = load_file(where / adapter / "adapter_model.safetensors")
        for key in factors:
            if key.endswith("lora_A.weight"):
                name = key.removeprefix("base_model.model.").replace(".lora_A", "")
                b = factors[key.replace("lora_A", "lora_B")].double()
                expected[name] += weight * scale * b @ factors[key].double()
    for name, tensor in expected.items():
        assert (tensors[name].double() - tensor).abs().max() < 3e-7, name
    assert report.notes == ()


def test_an_adapter_and_a_whole_model_are_merged_alike(where: Path, tmp_path: Path) -> None:
    """TIES of base+adapter is TIES of the folder that holds the same tensors."""
    name = f"{where / 'llama'}+{where / 'ada'}"
    view = suture.open(name)
    toy.folder(tmp_path / "whole", {n: view.tensor(n) for n in view})
    results = []
    for number, model in enumerate((name, str(tmp_path / "whole"))):
        recipe = {"base": str(where / "llama"), "method": "ties", "parameters": {"density": 0.3},
                  "models": {"m": model, "b": str(where / "bob")}}  # fmt: skip
        results.append(toy.run(tmp_path / f"out{number}", recipe)[0])

    assert toy.same_bytes(*results) == []


@pytest.mark.parametrize("options", [{"threads": 3}, {"block": 8}])
def test_threads_and_blocks_change_nothing(
    where: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """The merge of adapters has the same bytes, however it is run."""
    recipe = {"base": str(where / "llama"), "method": "ties", "parameters": {"density": 0.3},
              "models": [str(where / "ada"), str(where / "bob")]}  # fmt: skip
    one, _ = toy.run(tmp_path / "one", recipe)
    other, _ = toy.run(tmp_path / "other", recipe, **options)

    assert toy.same_bytes(one, other) == []


def test_provenance_names_base_and_adapters_and_repeats_the_merge(
    where: Path, tmp_path: Path
) -> None:
    """suture.json says what each model is made of, and is a recipe with the same bytes."""
    recipe = {"base": str(where / "llama"), "method": "linear",
              "models": {"both": f"{where / 'llama'}+{where / 'ada'}+{where / 'bob'}",
                         "one": {"path": str(where / "llama"), "adapter": str(where / "ada")}}}  # fmt: skip
    one, _ = toy.run(tmp_path / "out", recipe)
    record = json.loads((tmp_path / "out" / "suture.json").read_text())

    made = record["inputs"]["both"]["made_of"]
    assert (tmp_path / "out" / made["base"]).resolve() == where / "llama"
    assert [(tmp_path / "out" / a["path"]).resolve().name for a in made["adapters"]] == [
        "ada",
        "bob",
    ]
    assert len({a["fingerprint"] for a in made["adapters"]}) == 2
    merge(tmp_path / "out" / "suture.json", tmp_path / "again")
    assert toy.same_bytes(one, toy.read(tmp_path / "again")) == []


def test_a_changed_adapter_is_another_model(where: Path, tmp_path: Path) -> None:
    """The provenance of a merge refuses an adapter that was trained on since."""
    folder = adapting.adapter(where / "llama", tmp_path / "it", 5)
    merge({"method": "linear", "base": str(where / "llama"), "models": {"it": str(folder)}},
          tmp_path / "out")  # fmt: skip
    adapting.edited(folder, layers__0__self_attn__q_proj__lora_B=lambda t: t * 1.01)

    with pytest.raises(MismatchError, match="not the model that was merged then"):
        merge(tmp_path / "out" / "suture.json", tmp_path / "again")


def test_inspect_and_diff_take_adapters(where: Path) -> None:
    """The commands name models as recipes do."""
    name = f"{where / 'llama'}+{where / 'ada'}"
    seen = invoke("inspect", name, "--check", "--json").json
    profile = invoke("diff", where / "llama", name, "--json").json

    assert seen["integrity"]["ok"]
    assert seen["tensors"] == len(suture.open(where / "llama"))
    assert profile["roles"]["q"]["norm"] > 0
    assert profile["roles"]["norm"]["norm"] == 0


def test_a_plus_in_a_folder_s_name_is_part_of_it(where: Path, tmp_path: Path) -> None:
    """A name is cut at a + only where no file has that name."""
    (tmp_path / "a+b").symlink_to(where / "llama")
    (tmp_path / "c+d").symlink_to(where / "ada")

    assert not isinstance(suture.open(tmp_path / "a+b"), Adapted)
    assert isinstance(suture.open(f"{tmp_path / 'a+b'}+{tmp_path / 'c+d'}"), Adapted)


def test_names_that_begin_otherwise_are_found(where: Path, tmp_path: Path) -> None:
    """Files of the bare model, without `transformer.`, take an adapter of the whole one; and back."""
    tensors = toy.read(where / "llama")
    bare = {n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"}
    toy.folder(tmp_path / "bare", bare)
    wide = {n.replace("model.", "model.language_model.", 1): t for n, t in tensors.items()}
    toy.folder(tmp_path / "wide", wide)
    expected = suture.open(f"{where / 'llama'}+{where / 'ada'}")
    for folder, front in (("bare", ""), ("wide", "model.language_model.")):
        found = suture.open(f"{tmp_path / folder}+{where / 'ada'}")
        name = "layers.1.mlp.up_proj.weight"
        assert (found[front + name] == expected[f"model.{name}"]).all()


def test_another_base_by_name_is_told(where: Path, tmp_path: Path) -> None:
    """Where names and shapes fit, a base that the adapter does not name is a note, not an error."""
    recipe = {"base": str(where / "bf16"), "method": "linear", "models": {"it": str(where / "ada")}}
    plan = make_plan(recipe, None, Options())

    assert len(plan.notes) == 1
    lines_of(plan.notes[0], "says it was trained on", "llama", "put on", "bf16")


def test_an_adapted_model_is_not_copied(where: Path) -> None:
    """Opening reads headers, and reading one row computes one row."""
    found = suture.open(f"{where / 'llama'}+{where / 'ada'}")
    lens = found.lenses["model.layers.0.self_attn.q_proj.weight"]
    raw = np.empty(24 * 4, np.uint8)
    lens.read(24, raw)

    block = Block(Sources((found,), suture.open(where / "llama"), DELTA), 8)
    block.load("model.layers.0.self_attn.q_proj.weight", 24, 8)
    delta = found["model.layers.0.self_attn.q_proj.weight"] - suture.open(where / "llama")[
        "model.layers.0.self_attn.q_proj.weight"]  # fmt: skip
    assert np.abs(block.rows[0, :8] - delta.ravel()[24:32]).max() < 1e-7


# -- what is wrong ---------------------------------------------------------------------------------


def refused(text: str, **how: Any) -> str:
    with pytest.raises(SutureError) as caught:
        open_model(text, **how)
    return str(caught.value)


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "rank zero": ({"r": 0}, ("r, the rank", "not 0")),
    "no rank": ({"r": ...}, ("r, the rank", "not None")),
    "no alpha": ({"lora_alpha": ...}, ("lora_alpha", "not None")),
    "an alpha that is text": ({"lora_alpha": "16"}, ("lora_alpha", "'16'")),
    "LoHa": ({"peft_type": "LOHA"}, ("LoHa adapters are not read", "merge_and_unload")),
    "IA3": ({"peft_type": "IA3"}, ("IA3 adapters are not read", "merge_and_unload")),
    "a prompt": ({"peft_type": "PROMPT_TUNING"}, ("learns a prompt",)),
    "an unknown kind": ({"peft_type": "NONESUCH"}, ("'NONESUCH' is not known", "LORA")),
    "no kind": ({"peft_type": ...}, ("no peft_type",)),
    "another rank": ({"r": 8}, ("has the rank 4", "says 8")),
    "another rank by pattern": ({"rank_pattern": {"q_proj": 3}}, ("q_proj", "has the rank 4", "says 3")),
    "a rank pattern of text": ({"rank_pattern": {"q_proj": "3"}}, ("rank_pattern", "'3'")),
    "a pattern that is none": ({"alpha_pattern": {"q_proj(": 3}}, ("alpha_pattern", "is no pattern")),
    "a pattern without end": ({"target_modules": "((.*)*)*q_proj"}, ("may take for ever",)),
    "other targets": ({"target_modules": ["q_proj"]}, ("holds factors for", "do not name")),
    "other layers": ({"layers_to_transform": [0]}, ("layers.1", "do not name")),
    "DoRA without magnitudes": ({"use_dora": True}, ("no magnitude vector",)),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, ("changes the base's weights", "path_initial_model")),
    "activated": ({"alora_invocation_tokens": [1]}, ("activated LoRA",)),
    "parameters": ({"target_parameters": ["experts.up"]}, ("target_parameters", "merge_and_unload")),
    "tokens": ({"trainable_token_indices": [3]}, ("trainable tokens", "merge_and_unload")),
    "a bias of another kind": ({"bias": "some"}, ("bias: none, all or lora_only", "'some'")),
    "several": ({"r": 0, "lora_alpha": ..., "bias": 3}, ("3 problems", "r, the rank", "lora_alpha", "bias")),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_a_wrong_configuration(what: str, where: Path, tmp_path: Path) -> None:
    """What PEFT would take in silence, or fail on later, is named when the adapter is opened."""
    change, wanted = CONFIGS[what]
    folder = adapting.adapter(where / "llama", tmp_path / "it", 1)
    adapting.edited(folder, change)

    lines_of(refused(f"{where / 'llama'}+{folder}"), str(folder), *wanted)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


FILES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no A": (lambda f: adapting.edited(f, drop=("layers.0.self_attn.q_proj.lora_A",)),
             ("layers.0.self_attn.q_proj", "has B but no A")),
    "no B": (lambda f: adapting.edited(f, drop=("layers.0.self_attn.q_proj.lora_B",)),
             ("layers.0.self_attn.q_proj", "has A but no B")),
    "ranks that differ": (
        lambda f: adapting.edited(f, layers__0__self_attn__q_proj__lora_A=lambda t: t[:3]),
        ("layers.0.self_attn.q_proj", "A has the rank 3, but B has 4")),
    "a part of a sharded training": (
        lambda f: adapting.edited(f, layers__0__self_attn__q_proj__lora_A=lambda t: t.reshape(-1)),
        ("sharded training",)),
    "an unknown part": (
        lambda f: adapting.edited(f, layers__0__self_attn__q_proj__lora_A=lambda t: t.long()),
        ("cannot be computed with", "I64")),
    "a file cut short": (lambda f: half(f / "adapter_model.safetensors"), ("cut short",)),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), ("no adapter_model.safetensors",)),
    "a pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
                 ("adapter_model.bin", "pickle", "save_pretrained")),
    "a configuration that is no JSON": (
        lambda f: (f / "adapter_config.json").write_text("{r: 4}"), ("adapter_config.json", "not valid JSON")),
    "a configuration that is a list": (
        lambda f: (f / "adapter_config.json").write_text("[]"), ("adapter_config.json", "not a JSON object")),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_wrong_file(what: str, where: Path, tmp_path: Path) -> None:
    """A damaged adapter is refused with the file and the tensor."""
    change, wanted = FILES[what]
    folder = adapting.adapter(where / "llama", tmp_path / "it", 1)
    change(folder)

    lines_of(refused(f"{where / 'llama'}+{folder}"), *wanted)


def test_an_adapter_of_another_base(where: Path, tmp_path: Path) -> None:
    """Every module that the base lacks and every shape that differs, at once, with the base it names."""
    other = transformers.LlamaConfig(
        vocab_size=41, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    folder = adapting.adapter(tmp_path / "other", tmp_path / "it", 1)

    text = refused(f"{where / 'llama'}+{folder}")

    lines_of(text, "11 problems", "model.layers.2", "which the base lacks", "its factors make [32, 32]",
             "the base's weight is [24, 24]", f"trained on {tmp_path / 'other'}")  # fmt: skip


def test_an_adapter_of_another_family(where: Path) -> None:
    """No name fits: the modules are listed, not a traceback."""
    lines_of(refused(f"{where / 'gpt2'}+{where / 'ada'}"), "does not fit", "which the base lacks")


def test_an_adapter_without_a_base(where: Path) -> None:
    """An adapter alone is no model; the message says how to name it."""
    lines_of(
        refused(str(where / "ada")), "a LoRA adapter, not a whole model", f"BASE+{where / 'ada'}"
    )


def test_a_model_is_no_adapter(where: Path) -> None:
    """What stands after the + must be an adapter."""
    lines_of(
        refused(f"{where / 'llama'}+{where / 'qwen'}"), str(where / "qwen"), "not a LoRA adapter"
    )


def test_dora_on_top_of_lora_is_refused(where: Path, tmp_path: Path) -> None:
    """A norm of what: of the base, or of the base with the first adapter? Refused by name."""
    dora = adapting.adapter(where / "llama", tmp_path / "dora", use_dora=True)

    lines_of(refused(f"{where / 'llama'}+{where / 'ada'}+{dora}"), "DoRA on top of another adapter")
    assert len(suture.open(f"{where / 'llama'}+{dora}+{where / 'ada'}")) == 21


def test_nan_in_a_factor_is_named(where: Path, tmp_path: Path) -> None:
    """Not the base's file is at fault but the adapter's, with tensor and count, before the merge begins."""
    folder = adapting.adapter(where / "llama", tmp_path / "it", 1)
    adapting.edited(
        folder,
        layers__1__mlp__up_proj__lora_A=lambda t: t.index_fill(1, torch.tensor([3]), torch.nan),
    )
    recipe = {"base": str(where / "llama"), "method": "linear", "models": {"it": str(folder)}}

    with pytest.raises(NonFiniteError) as caught:
        merge(recipe, tmp_path / "out")
    lines_of(str(caught.value), "adapter_model.safetensors", "layers.1.mlp.up_proj.lora_A", "4 NaN",
             "--allow-nonfinite")  # fmt: skip
    assert not (tmp_path / "out").exists()
    merge(recipe, tmp_path / "out", allow_nonfinite=True)


def test_two_adapters_of_different_bases_are_two_problems(where: Path, tmp_path: Path) -> None:
    """One that fits and one that does not: told before anything is read, for the one that does not."""
    wrong = adapting.adapter(
        where / "gpt2", tmp_path / "wrong", target_modules=CONV, fan_in_fan_out=True
    )
    recipe = {"base": str(where / "llama"), "method": "ties",
              "models": {"ada": str(where / "ada"), "wrong": str(wrong), "gone": "./gone"}}  # fmt: skip

    with pytest.raises(SutureError) as caught:
        make_plan(recipe, tmp_path / "out", Options())
    lines_of(str(caught.value), "2 problems", f"{wrong} does not fit", "./gone: no such file")


def test_a_model_entry_s_adapter_is_a_path(where: Path) -> None:
    """`adapter` is a path or a list of them."""
    recipe = {"base": str(where / "llama"), "method": "linear",
              "models": {"m": {"path": str(where / "llama"), "adapter": 3}}}  # fmt: skip
    with pytest.raises(suture.RecipeError, match=r"models\.m\.adapter: a path, or a list"):
        make_plan(recipe, None, Options())


def test_resuming_notices_another_adapter(where: Path, tmp_path: Path) -> None:
    """The staging folder of a merge belongs to these factors: its key changes with them."""
    folder = adapting.adapter(where / "llama", tmp_path / "it", 1)
    name = f"{where / 'llama'}+{folder}"
    before = suture.open(name).identity
    adapting.edited(folder, {"lora_alpha": 7})

    assert suture.open(name).identity != before


@pytest.mark.oracle
def test_the_tensors_are_those_that_mergekit_merges(where: Path, tmp_path: Path) -> None:
    """A recipe of mergekit with base+lora models gives mergekit's tensors within one bfloat16 step."""
    pytest.importorskip("mergekit", reason="mergekit is not installed")
    recipes = {
        method: {
            "merge_method": method, "base_model": str(where / "llama"), "dtype": "float32",
            "out_dtype": "bfloat16",
            "models": [
                {"model": f"{where / 'llama'}+{where / 'ada'}", "parameters": {"weight": 0.7, **more}},
                {"model": {"model": {"path": str(where / "llama")}, "lora": {"path": str(where / "bob")}},
                 "parameters": {"weight": 0.6, **more}},
            ],
        }
        for method, more in (("task_arithmetic", {}), ("ties", {"density": 0.4}), ("linear", {}))
    }  # fmt: skip
    recipes["linear"].pop("base_model")
    code = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for recipe, out, cache in json.load(sys.stdin):
    run_merge(MergeConfiguration.model_validate(recipe), out,
              MergeOptions(quiet=True, copy_tokenizer=False, lora_merge_cache=cache))
"""
    jobs = [(r, str(tmp_path / "theirs" / m), str(tmp_path / "cache")) for m, r in recipes.items()]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], input=json.dumps(jobs), text=True,
        capture_output=True, timeout=300, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

    for method, recipe in recipes.items():
        ours, _ = toy.run(tmp_path / "ours" / method, recipe)
        theirs = toy.read(tmp_path / "theirs" / method)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            steps = toy.steps_apart(ours[name], tensor)
            # Where weight and delta cancel, float32 leaves both a dust of many tiny steps; a TIES
            # threshold may fall between two entries that float32 tells apart in one order of sums only.
            near = (ours[name].float() - tensor.float()).abs().reshape(-1).numpy() < 1e-7
            assert (np.where(near, 0, steps) > 1).sum() <= 1, (method, name, steps.max())
            assert (steps > 0).mean() < 0.01, (method, name)
