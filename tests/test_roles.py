"""Roles and layers of the names that real models have; unknown names are never an error."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import toy
from suture import ParamSpace, RecipeError, role_of
from suture.tensors.roles import EVERYTHING, ROLES, check_selectors, layer_key, tied_to
from suture.tensors.spec import TensorSpec, readable


class Family(NamedTuple):
    """Names of one architecture; ``.w``, ``.b`` and ``.wb`` stand for weight, bias and both."""

    outside: Mapping[str, str]
    """Names outside of blocks, by role."""
    inside: Mapping[str, Mapping[str, str]]
    """Names in a block, by role, after the name of the block with N for its number."""


ATTENTION = {
    "q": "self_attn.q_proj.w", "k": "self_attn.k_proj.w", "v": "self_attn.v_proj.w",
}  # fmt: skip
BIASED = {
    **ATTENTION, "o": "self_attn.out_proj.w",
    "bias": "self_attn.q_proj.b self_attn.k_proj.b self_attn.v_proj.b self_attn.out_proj.b",
}  # fmt: skip
GATED = {"mlp.gate": "mlp.gate_proj.w", "mlp.up": "mlp.up_proj.w", "mlp.down": "mlp.down_proj.w"}
LLAMA = {
    **ATTENTION, "o": "self_attn.o_proj.w", **GATED,
    "norm": "input_layernorm.w post_attention_layernorm.w",
}  # fmt: skip
ENDS = {"embedding": "model.embed_tokens.w", "norm": "model.norm.w", "head": "lm_head.w"}
NEOX = {
    "qkv": "attention.query_key_value.w", "o": "attention.dense.w", "mlp.up": "mlp.dense_h_to_4h.w",
    "mlp.down": "mlp.dense_4h_to_h.w", "bias": "attention.dense.b mlp.dense_4h_to_h.b",
    "norm": "input_layernorm.wb post_attention_layernorm.wb", "buffer": "attention.bias",
}  # fmt: skip
BERT = {
    "q": "attention.self.query.w", "k": "attention.self.key.w", "v": "attention.self.value.w",
    "o": "attention.output.dense.w", "mlp.up": "intermediate.dense.w", "mlp.down": "output.dense.w",
    "norm": "attention.output.LayerNorm.wb output.LayerNorm.wb",
    "bias": "attention.self.query.b attention.output.dense.b intermediate.dense.b output.dense.b",
}  # fmt: skip
EMBEDDINGS = {
    "embedding": "X.embeddings.word_embeddings.w", "norm": "X.embeddings.LayerNorm.wb",
    "position": "X.embeddings.position_embeddings.w X.embeddings.token_type_embeddings.w",
}  # fmt: skip
CROSS = {
    key: " ".join([names, names.replace("self_attn", "encoder_attn")])
    for key, names in BIASED.items()
}
BART = {
    "norm": "self_attn_layer_norm.wb final_layer_norm.wb", "mlp.up": "fc1.w", "mlp.down": "fc2.w",
}  # fmt: skip
CLIP = {
    **BIASED,
    "norm": "layer_norm1.wb layer_norm2.wb",
    "mlp.up": "mlp.fc1.w",
    "mlp.down": "mlp.fc2.w",
}
SELF = {f: f"layer.0.SelfAttention.{f}.w" for f in "qkvo"}
VIT = {
    "norm": "layernorm_before.wb layernorm_after.wb", "mlp.up": "mlp.fc1.w",
    "mlp.down": "mlp.fc2.w",
    "q": "attention.q_proj.w", "k": "attention.k_proj.w", "v": "attention.v_proj.w",
    "o": "attention.o_proj.w", "bias": "attention.q_proj.b attention.o_proj.b mlp.fc1.b mlp.fc2.b",
}  # fmt: skip
VIT_FILES = {
    "norm": "layernorm_before.wb layernorm_after.wb", "mlp.up": "intermediate.dense.w",
    "mlp.down": "output.dense.w", "q": "attention.attention.query.w",
    "k": "attention.attention.key.w",
    "v": "attention.attention.value.w", "o": "attention.output.dense.w",
    "bias": "attention.attention.query.b attention.output.dense.b output.dense.b",
}  # fmt: skip
VIT_ENDS = {
    "position": "X.embeddings.cls_token X.embeddings.position_embeddings",
    "patch": "X.embeddings.patch_embeddings.projection.wb",
    "norm": "X.layernorm.wb", "head": "classifier.wb",
}  # fmt: skip
TIMM = {
    "norm": "norm1.wb norm2.wb", "qkv": "attn.qkv.w", "o": "attn.proj.w", "mlp.up": "mlp.fc1.w",
    "mlp.down": "mlp.fc2.w", "bias": "attn.qkv.b attn.proj.b mlp.fc1.b mlp.fc2.b",
}  # fmt: skip


def called(name: str, ends: Mapping[str, str]) -> dict[str, str]:
    """The names outside of blocks of a model that is called so."""
    return {role: names.replace("X.", f"{name}.") for role, names in ends.items()}


FAMILIES = {
    "Llama, Mistral": Family(ENDS, {"model.layers.N.": LLAMA}),
    "Qwen2": Family(ENDS, {"model.layers.N.": {
        **LLAMA, "bias": "self_attn.q_proj.b self_attn.k_proj.b self_attn.v_proj.b"}}),
    "Qwen3": Family(ENDS, {"model.layers.N.": {
        **LLAMA, "norm": "input_layernorm.w self_attn.q_norm.w self_attn.k_norm.w"}}),
    "Qwen2-MoE": Family(ENDS, {"model.layers.N.": {
        **ATTENTION, "router": "mlp.gate.w mlp.shared_expert_gate.w",
        "mlp.gate": "mlp.experts.7.gate_proj.w mlp.shared_expert.gate_proj.w",
        "mlp.up": "mlp.experts.7.up_proj.w mlp.shared_expert.up_proj.w",
        "mlp.down": "mlp.experts.7.down_proj.w mlp.shared_expert.down_proj.w"}}),
    "Gemma": Family(ENDS, {"model.layers.N.": {
        **LLAMA, "norm": "pre_feedforward_layernorm.w post_feedforward_layernorm.w"}}),
    "DeepSeek-V3": Family(ENDS, {"model.layers.N.": {
        "router": "mlp.gate.w mlp.gate.e_score_correction_bias",
        "mlp.up": "mlp.experts.255.up_proj.w mlp.shared_experts.up_proj.w",
        "mlp.down": "mlp.experts.255.down_proj.w mlp.shared_experts.down_proj.w",
        "embedding": "embed_tokens.w", "norm": "enorm.w hnorm.w shared_head.norm.w",
        "head": "shared_head.head.w", "other": "eh_proj.w"}}),
    "gpt-oss": Family(ENDS, {"model.layers.N.": {
        **LLAMA, "router": "mlp.router.wb", "other": "self_attn.sinks",
        "mlp.gate_up": "mlp.experts.gate_up_proj", "mlp.down": "mlp.experts.down_proj",
        "mlp.gate": "", "mlp.up": "",
        "bias": "mlp.experts.gate_up_proj_bias mlp.experts.down_proj_bias"}}),
    "Llama 4": Family({"embedding": "language_model.model.embed_tokens.w",
                       "head": "language_model.lm_head.w"}, {"language_model.model.layers.N.": {
        **ATTENTION, "router": "feed_forward.router.w",
        "mlp.gate_up": "feed_forward.experts.gate_up_proj",
        "mlp.gate": "feed_forward.shared_expert.gate_proj.w",
        "mlp.down": "feed_forward.experts.down_proj feed_forward.shared_expert.down_proj.w"}}),
    "Granite-MoE": Family(ENDS, {"model.layers.N.": {
        "router": "block_sparse_moe.router.layer.w", "mlp.gate_up": "block_sparse_moe.input_linear.w",
        "mlp.down": "block_sparse_moe.output_linear.w"}}),
    "MiniMax": Family(ENDS, {"model.layers.N.": {
        "router": "block_sparse_moe.gate.w block_sparse_moe.e_score_correction_bias"}}),
    "Qwen-VL": Family({
        "patch": "model.visual.patch_embed.proj.wb", "position": "model.visual.pos_embed.w",
        "norm": "model.visual.merger.norm.wb visual.merger.ln_q.w",
        "other": "visual.merger.mlp.0.w model.visual.merger.linear_fc1.w"}, {
        "model.visual.blocks.N.": {
            "qkv": "attn.qkv.w", "o": "attn.proj.w", "norm": "norm1.wb norm2.wb",
            "mlp.up": "mlp.linear_fc1.w", "mlp.down": "mlp.linear_fc2.w"}}),
    "LLaVA, Pixtral": Family({
        "patch": "vision_tower.patch_conv.w vision_tower.vision_model.embeddings.patch_embedding.wb",
        "norm": "vision_tower.ln_pre.w multi_modal_projector.norm.w",
        "other": "multi_modal_projector.linear_1.w image_newline"}, {
        "vision_tower.vision_model.encoder.layers.N.": CLIP,
        "vision_tower.transformer.layers.N.": {
            "q": "attention.q_proj.w", "o": "attention.o_proj.w", "norm": "attention_norm.w",
            "mlp.gate": "feed_forward.gate_proj.w"}}),
    "Wav2Vec2": Family({"position": "wav2vec2.encoder.pos_conv_embed.conv.weight_g",
                        "other": "wav2vec2.feature_extractor.conv_layers.0.conv.w"},
                       {"wav2vec2.encoder.layers.N.": {
                           "q": "attention.q_proj.w", "o": "attention.out_proj.w"}}),
    "Mixtral": Family(ENDS, {"model.layers.N.": {
        **ATTENTION, "router": "block_sparse_moe.gate.w",
        "mlp.gate": "block_sparse_moe.experts.3.w1.w", "mlp.up": "block_sparse_moe.experts.3.w3.w",
        "mlp.down": "block_sparse_moe.experts.3.w2.w"}}),
    "fused experts": Family(ENDS, {"model.layers.N.": {
        "router": "mlp.gate.w", "mlp.gate_up": "mlp.experts.gate_up_proj",
        "mlp.down": "mlp.experts.down_proj"}}),
    "DeepSeek": Family(ENDS, {"model.layers.N.": {
        "q": "self_attn.q_a_proj.w self_attn.q_b_proj.w",
        "qkv": "self_attn.kv_a_proj_with_mqa.w self_attn.kv_b_proj.w",
        "norm": "self_attn.q_a_layernorm.w self_attn.kv_a_layernorm.w", "router": "mlp.gate.w",
        "mlp.gate": "mlp.experts.0.gate_proj.w mlp.shared_experts.gate_proj.w"}}),
    "Phi-3": Family(ENDS, {"model.layers.N.": {
        "qkv": "self_attn.qkv_proj.w", "o": "self_attn.o_proj.w",
        "mlp.gate_up": "mlp.gate_up_proj.w", "mlp.down": "mlp.down_proj.w"}}),
    "Phi": Family({**ENDS, "norm": "model.final_layernorm.wb", "head": "lm_head.wb"}, {
        "model.layers.N.": {**ATTENTION, "o": "self_attn.dense.w", "mlp.up": "mlp.fc1.w",
                            "mlp.down": "mlp.fc2.w", "bias": "self_attn.dense.b mlp.fc1.b"}}),
    "GPT-NeoX": Family({"embedding": "gpt_neox.embed_in.w", "head": "embed_out.w",
                        "norm": "gpt_neox.final_layer_norm.wb"}, {"gpt_neox.layers.N.": NEOX}),
    "Falcon": Family({"embedding": "transformer.word_embeddings.w"}, {
        "transformer.h.N.": {"qkv": "self_attention.query_key_value.w",
                             "o": "self_attention.dense.w",
                             "mlp.up": "mlp.dense_h_to_4h.w", "mlp.down": "mlp.dense_4h_to_h.w"}}),
    "GPT-2": Family({"embedding": "transformer.wte.w", "position": "transformer.wpe.w",
                     "norm": "transformer.ln_f.wb", "head": "lm_head.w"}, {
        "transformer.h.N.": {
            "norm": "ln_1.wb ln_2.wb", "qkv": "attn.c_attn.w", "o": "attn.c_proj.w",
            "mlp.up": "mlp.c_fc.w", "mlp.down": "mlp.c_proj.w",
            "bias": "attn.c_attn.b mlp.c_proj.b",
            "buffer": "attn.bias attn.masked_bias"}}),
    "GPT-2 without its prefix": Family({"embedding": "wte.w", "position": "wpe.w"}, {
        "h.N.": {"qkv": "attn.c_attn.w", "o": "attn.c_proj.w", "buffer": "attn.bias"}}),
    "OPT": Family({"embedding": "model.decoder.embed_tokens.w", "head": "lm_head.w",
                   "position": "model.decoder.embed_positions.w",
                   "norm": "model.decoder.final_layer_norm.wb"},
                  {"model.decoder.layers.N.": {**BIASED, **BART}}),
    "BERT": Family({**called("bert", EMBEDDINGS), "pooler": "bert.pooler.dense.wb", "head":
                    "cls.predictions.bias cls.predictions.transform.dense.wb classifier.wb "
                    "cls.predictions.transform.LayerNorm.wb cls.predictions.decoder.wb "
                    "cls.seq_relationship.wb qa_outputs.wb",
                    "buffer": "bert.embeddings.position_ids"}, {"bert.encoder.layer.N.": BERT}),
    "sentence encoder": Family({"embedding": "embeddings.word_embeddings.w",
                                "pooler": "pooler.dense.wb",
                                "buffer": "embeddings.position_ids"}, {"encoder.layer.N.": BERT}),
    "RoBERTa": Family({**called("roberta", EMBEDDINGS), "head":
                       "lm_head.bias lm_head.dense.wb lm_head.layer_norm.wb lm_head.decoder.wb "
                       "classifier.dense.wb classifier.out_proj.wb"},
                      {"roberta.encoder.layer.N.": BERT}),
    "DistilBERT": Family({**called("distilbert", EMBEDDINGS), "head":
                          "pre_classifier.wb classifier.wb vocab_transform.wb vocab_layer_norm.wb "
                          "vocab_projector.wb qa_outputs.wb"}, {"distilbert.transformer.layer.N.": {
        "q": "attention.q_lin.w", "k": "attention.k_lin.w", "v": "attention.v_lin.w",
        "o": "attention.out_lin.w", "mlp.up": "ffn.lin1.w", "mlp.down": "ffn.lin2.w",
        "norm": "sa_layer_norm.wb output_layer_norm.wb", "bias": "attention.q_lin.b ffn.lin2.b"}}),
    "DeBERTa": Family({**called("deberta", EMBEDDINGS), "pooler": "pooler.dense.wb",
                       "position": "deberta.encoder.rel_embeddings.w", "head": "classifier.wb"}, {
        "deberta.encoder.layer.N.": {
            **BERT, "q": "attention.self.query_proj.w", "k": "attention.self.key_proj.w",
            "v": "attention.self.value_proj.w", "bias": "attention.self.query_proj.b"}}),
    "ALBERT": Family({**called("albert", EMBEDDINGS), "head":
                      "predictions.bias predictions.dense.wb predictions.decoder.wb",
                      "pooler": "albert.pooler.wb",
                      "other": "albert.encoder.embedding_hidden_mapping_in.w",
                      "mlp.up": "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.w",
                      "mlp.down": "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.w"},
                     {}),
    "T5": Family({"embedding": "shared.w encoder.embed_tokens.w decoder.embed_tokens.w",
                  "norm": "encoder.final_layer_norm.w decoder.final_layer_norm.w",
                  "head": "lm_head.w"}, {
        "encoder.block.N.": {
            **SELF, "norm": "layer.0.layer_norm.w layer.1.layer_norm.w",
            "position": "layer.0.SelfAttention.relative_attention_bias.w",
            "mlp.up": "layer.1.DenseReluDense.wi.w layer.1.DenseReluDense.wi_1.w",
            "mlp.gate": "layer.1.DenseReluDense.wi_0.w", "mlp.down": "layer.1.DenseReluDense.wo.w"},
        "decoder.block.N.": {
            **{f: f"{n} layer.1.EncDecAttention.{f}.w" for f, n in SELF.items()},
            "mlp.down": "layer.2.DenseReluDense.wo.w"}}),
    "BART": Family({"embedding": "model.shared.w model.encoder.embed_tokens.w",
                    "position": "model.encoder.embed_positions.w model.decoder.embed_positions.w",
                    "norm": "model.encoder.layernorm_embedding.wb",
                    "head": "lm_head.w final_logits_bias"}, {
        "model.encoder.layers.N.": {**BIASED, **BART},
        "model.decoder.layers.N.": {**CROSS, **BART}}),
    "Whisper": Family({"embedding": "model.decoder.embed_tokens.w", "head": "proj_out.w",
                       "position": "model.encoder.embed_positions.w",
                       "other": "model.encoder.conv1.w model.encoder.conv2.w"}, {
        "model.encoder.layers.N.": {**BIASED, **BART},
        "model.decoder.layers.N.": {**CROSS, **BART}}),
    "ViT": Family(called("vit", VIT_ENDS), {
        "vit.layers.N.": VIT, "vit.encoder.layer.N.": VIT_FILES}),
    "DeiT": Family({"position": "deit.embeddings.distillation_token",
                    "head": "cls_classifier.wb distillation_classifier.wb"},
                   {"deit.layers.N.": VIT}),
    "DINOv2": Family({**called("dinov2", VIT_ENDS), "position":
                      "dinov2.embeddings.mask_token dinov2.embeddings.register_tokens"}, {
        "dinov2.encoder.layer.N.": {
            **VIT, "norm": "norm1.wb norm2.wb",
            "scale": "layer_scale1.lambda1 layer_scale2.lambda1"}}),
    "DINOv2 of torch.hub": Family({"position": "pos_embed cls_token mask_token register_tokens",
                                   "patch": "patch_embed.proj.wb", "norm": "norm.wb"}, {
        "blocks.N.": {**TIMM, "scale": "ls1.gamma ls2.gamma"}}),
    "timm": Family({"position": "pos_embed cls_token", "patch": "patch_embed.proj.wb",
                    "norm": "norm.wb fc_norm.wb", "head": "head.wb"}, {"blocks.N.": TIMM}),
    "CLIP": Family({
        "head": "logit_scale visual_projection.w text_projection.w",
        "embedding": "text_model.embeddings.token_embedding.w",
        "position": "text_model.embeddings.position_embedding.w "
                    "vision_model.embeddings.class_embedding "
                    "vision_model.embeddings.position_embedding.w",
        "norm": "text_model.final_layer_norm.wb vision_model.pre_layrnorm.wb "
                "vision_model.post_layernorm.wb",
        "patch": "vision_model.embeddings.patch_embedding.w",
        "buffer": "text_model.embeddings.position_ids vision_model.embeddings.position_ids"}, {
        "text_model.encoder.layers.N.": CLIP, "vision_model.encoder.layers.N.": CLIP}),
    "OpenCLIP": Family({"position": "visual.positional_embedding visual.class_embedding",
                        "embedding": "token_embedding.w", "head": "logit_scale text_projection",
                        "norm": "visual.ln_post.wb ln_final.wb"}, {
        "visual.transformer.resblocks.N.": {
            "qkv": "attn.in_proj_weight", "o": "attn.out_proj.w", "norm": "ln_1.wb ln_2.wb",
            "mlp.up": "mlp.c_fc.w", "mlp.down": "mlp.c_proj.w", "bias": "attn.in_proj_bias"}}),
    "torch.nn": Family({}, {"decoder.layers.N.": {
        "qkv": "multihead_attn.in_proj_weight", "o": "multihead_attn.out_proj.w",
        "bias": "multihead_attn.out_proj.b multihead_attn.in_proj_bias", "norm": "norm3.wb"}}),
    "reward models": Family({
        "head": "score.w v_head.summary.wb classification_head.out_proj.wb"}, {}),
    "vision-language": Family({"embedding": "model.language_model.embed_tokens.w"}, {
        "model.language_model.layers.N.": LLAMA}),
}  # fmt: skip


def expanded(names: str) -> Iterator[str]:
    """The names of a table, written out."""
    for name in names.split():
        stem, _, last = name.rpartition(".")
        for letter, word in (("w", "weight"), ("b", "bias")):
            if last in (letter, "wb"):
                yield f"{stem}.{word}"
        if last not in ("w", "b", "wb"):
            yield name


def all_names(family: Family) -> Iterator[tuple[str, str, int | None]]:
    """Name, role and layer of everything that a family lists."""
    for kind, names in family.outside.items():
        for name in expanded(names):
            yield name, kind, None
    for prefix, table in family.inside.items():
        for layer in (0, 7, 31):
            for kind, names in table.items():
                for name in expanded(names):
                    yield prefix.replace("N", str(layer)) + name, kind, layer


@pytest.mark.parametrize("family", list(FAMILIES))
def test_names_have_their_roles_and_layers(family: str) -> None:
    """Every tensor of the family has the role that it plays and the number of its block."""
    for name, kind, layer in all_names(FAMILIES[family]):
        assert role_of(name) == (kind, layer), name


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("prefix", ["module.", "model.", "base_model.model."])
def test_a_wrapper_changes_no_role(family: str, prefix: str) -> None:
    """Names under the prefix of a wrapper keep role and layer."""
    for name, kind, layer in all_names(FAMILIES[family]):
        if name in ("proj_out.weight", "final_logits_bias") or name.startswith("predictions."):
            continue  # heads only at the top: others use these words inside of blocks
        assert role_of(prefix + name) == (kind, layer), name


def test_encoder_and_decoder_are_different_layers() -> None:
    """Blocks that are numbered alike compete as layers of their own; the rest by role."""
    names = [
        "encoder.block.1.layer.0.layer_norm.weight",
        "decoder.block.1.layer.0.layer_norm.weight",
    ]

    assert [layer_key(n) for n in names] == ["encoder.block.1", "decoder.block.1"]
    assert layer_key("model.layers.10.mlp.up_proj.weight") == "model.layers.10"
    assert layer_key("model.norm.weight") == "(norm)"


def test_the_default_space_leaves_words_and_heads_alone() -> None:
    """Token embeddings, output heads and buffers are not merged unless asked for; all else is."""
    floating = TensorSpec("F32", (2, 2))
    for family in FAMILIES.values():
        for name, kind, _ in all_names(family):
            wanted = kind not in ("embedding", "head", "buffer")
            assert ParamSpace().holds(name, floating) == wanted, name
            assert EVERYTHING.holds(name, floating) == (kind != "buffer"), name
            assert not EVERYTHING.holds(name, TensorSpec("I64", (2,)))


@pytest.mark.parametrize(
    "dtype", ["I64", "I32", "I16", "I8", "U8", "U16", "BOOL", "C64", "F8_E4M3", "F8_E5M2"]
)
def test_what_cannot_be_computed_with_is_never_in_a_space(dtype: str) -> None:
    """Whatever a recipe includes: integers, booleans, complex and 8-bit floats stay out."""
    assert not ParamSpace(("*",), ()).holds("w", TensorSpec(dtype, (1,)))


def test_names_come_sorted() -> None:
    """The canonical order is that of names, whatever the order of the file."""
    base = toy.base_tensors()
    specs = {n: TensorSpec(toy.NAMES[t.dtype], tuple(t.shape)) for n, t in base.items()}

    names = ParamSpace().names(dict(reversed(specs.items())))

    assert names == sorted(names) == ParamSpace().names(specs)
    assert not {toy.EMBEDDING, toy.HEAD, *toy.BUFFERS} & set(names)
    assert {toy.ZERO, toy.SCALAR, toy.EMPTY} <= set(names)


@given(st.text())
def test_unknown_names_never_fail(name: str) -> None:
    """Any text has a role of the table and a layer key."""
    role = role_of(name)

    assert role.kind in ROLES
    assert role.layer is None or role.layer >= 0
    assert isinstance(layer_key(name), str)


WORDS = ["model", "layers", "0", "12", "head", "norm", "embed", "attn", "weight", "bias", "x", "h",
         "cls", "pooler", "mlp", "layer_norm", "q_proj", "", "é", "-"]  # fmt: skip


@given(st.lists(st.sampled_from(WORDS), max_size=12).map(".".join))
def test_names_of_known_words_never_fail(name: str) -> None:
    """Known words in any order have a role, too."""
    assert role_of(name).kind in ROLES


@pytest.mark.parametrize(
    "unit", [".embed", ".head", "norm.", ".cls.a", "layers.1.", "ln", ".pooler", "a."]
)
def test_no_name_is_slow(unit: str) -> None:
    """A hostile name of a megabyte takes no time: no pattern is worse than linear on it."""
    begun = time.process_time()

    role_of(unit * 100 + "-")
    role_of(unit * (1_000_000 // len(unit)) + "-")

    assert time.process_time() - begun < 2  # seconds; it takes milliseconds, a cubic pattern hours


def test_selectors_are_roles_patterns_or_names() -> None:
    """A word that fits nothing is refused, with the nearest role."""
    names = ["model.layers.0.mlp.up_proj.weight", "blocks[0].w"]

    check_selectors(["norm", "*.mlp.*", "blocks[0].w"], names, "space.include")
    with pytest.raises(RecipeError, match=r"space\.include: 'nrom' .* did you mean 'norm'"):
        check_selectors(["nrom"], names, "space.include")


@pytest.mark.parametrize(
    ("copy", "original"),
    [
        ("lm_head.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "transformer.wte.weight"),
        ("lm_head.weight", "shared.weight"),
        ("decoder.embed_tokens.weight", "shared.weight"),
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        ("lm_head.weight", "model.shared.weight"),
        ("lm_head.weight", "model.language_model.embed_tokens.weight"),
        ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
        ("proj_out.weight", "model.decoder.embed_tokens.weight"),
        ("embed_out.weight", "gpt_neox.embed_in.weight"),
        ("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
        ("predictions.decoder.weight", "albert.embeddings.word_embeddings.weight"),
        ("predictions.decoder.bias", "predictions.bias"),
    ],
)
def test_second_names_of_tied_tensors(copy: str, original: str) -> None:
    """The output head is a second name of the embedding, and only where both are there."""
    assert tied_to([copy, original, "other"]) == {copy: original}
    assert tied_to([copy]) == tied_to([original]) == {}


def test_every_tensor_of_a_large_mixture_of_experts_is_told() -> None:
    """61 layers of 256 experts, 45,000 names: no block tensor is without a role, in a few seconds."""
    begun = time.process_time()
    parts = [f"mlp.experts.{e}.{p}_proj.weight" for e in range(256) for p in ("gate", "up", "down")]
    parts += ["mlp.gate.weight", "mlp.gate.e_score_correction_bias", "self_attn.o_proj.weight"]
    names = [f"model.layers.{n}.{part}" for n in range(61) for part in parts]
    kinds = {role_of(name).kind for name in names}

    assert len(names) > 45_000
    assert kinds == {"mlp.gate", "mlp.up", "mlp.down", "router", "o"}
    assert time.process_time() - begun < 10  # seconds; it takes one


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1530, "1.53 kB"), (999_499, "999 kB"),
        (999_600, "1 MB"), (1_530_000_000, "1.53 GB"), (999.9e15, "1 EB"), (5e18, "5 EB"),
    ],
)  # fmt: skip
def test_sizes_are_readable(nbytes: float, text: str) -> None:
    """Three digits and a unit; what rounds to a thousand of one unit is one of the next."""
    assert readable(nbytes) == text
