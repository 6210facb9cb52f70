"""What a tensor is for: its layer number and its role, read from its name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from suture.errors import Problems, RecipeError, did_you_mean
from suture.tensors.spec import DTYPES, TensorSpec, any_match


class Role(NamedTuple):
    """Where a tensor stands in its model."""

    kind: str
    """One of ``ROLES``."""
    layer: int | None
    """Number of the transformer block, counted as the names count; ``None`` outside of blocks."""


ROLES = {
    "embedding": "token embeddings",
    "position": "position, segment and class-token embeddings",
    "patch": "the convolution or projection that turns an image into patches",
    "norm": "weights and biases of LayerNorm, RMSNorm, BatchNorm",
    "q": "query projection",
    "k": "key projection",
    "v": "value projection",
    "qkv": "query, key and value in one tensor",
    "o": "output projection of attention",
    "mlp.up": "first (or up) projection of the feed-forward part",
    "mlp.gate": "gate projection of the feed-forward part",
    "mlp.gate_up": "gate and up projection in one tensor",
    "mlp.down": "last (or down) projection of the feed-forward part",
    "router": "choice of experts in a mixture of experts",
    "scale": "per-channel scale of a residual branch",
    "bias": "bias of any projection",
    "pooler": "projection of the first token",
    "head": "output head: language model, masked language model or classifier",
    "buffer": "not learned: positions, masks, running statistics, any integer or boolean tensor",
    "other": "everything that no pattern names",
}

# One table a family: (pattern of the name, kind). The first match of a table counts, and the tables
# are tried in this order; a dot stands for itself, `^|.` is put before each pattern.
_BUFFERS = (
    (r"position_ids$", "buffer"),
    (r"(rotary_emb|rotary_pos_emb)\.\w*inv_freq$|inv_freq$", "buffer"),
    (r"running_(mean|var)$|num_batches_tracked$", "buffer"),
    (r"attn\.masked_bias$|attention\.masked_bias$", "buffer"),
)
_LLAMA = (  # Llama, Mistral, Mixtral, Qwen, Gemma, Phi, SmolLM, OLMo, DeepSeek
    (r"embed_tokens\.weight$", "embedding"),
    (r"(lm_head|score|embed_out)\.(weight|bias)$", "head"),
    (r"self_attn\.(q|k)_norm\.\w+$", "norm"),
    (r"self_attn\.q(_a|_b)?_proj\.weight$", "q"),
    (r"self_attn\.k_proj\.weight$", "k"),
    (r"self_attn\.v_proj\.weight$", "v"),
    (r"self_attn\.(qkv|kv_[ab])_proj(_with_mqa)?\.weight$", "qkv"),
    (r"self_attn\.(o_proj|out_proj|dense)\.weight$", "o"),
    (r"(mlp|block_sparse_moe)\.(gate|shared_expert_gate)\.\w+$", "router"),
    (r"(mlp|feed_forward|ffn|block_sparse_moe)\.router(\.layer)?\.\w+$", "router"),
    (r"e_score_correction_bias$", "router"),  # DeepSeek-V3 and its kin: no gradient, but it chooses
    (r"block_sparse_moe\.input_linear\.weight$", "mlp.gate_up"),
    (r"block_sparse_moe\.output_linear\.weight$", "mlp.down"),
    (r"(gate_up_proj)(\.weight)?$", "mlp.gate_up"),
    (r"(gate_proj|experts\.\d+\.w1)\.weight$", "mlp.gate"),
    (r"(up_proj|fc1|experts\.\d+\.w3)\.weight$", "mlp.up"),
    (r"(down_proj|fc2|experts\.\d+\.w2)(\.weight)?$", "mlp.down"),
)
_GPT2 = (
    (r"wte\.weight$", "embedding"),
    (r"wpe\.weight$", "position"),
    (r"attn\.c_attn\.weight$", "qkv"),
    (r"attn\.c_proj\.weight$", "o"),
    (r"mlp\.c_fc\.weight$", "mlp.up"),
    (r"mlp\.c_proj\.weight$", "mlp.down"),
    (r"ln_(\d|f)\.\w+$", "norm"),
    (r"h\.\d+\.attn\.bias$", "buffer"),  # the causal mask that old GPT-2 files carry
)
_NEOX = (  # GPT-NeoX, Pythia, BLOOM, Falcon
    (r"(self_)?attention\.query_key_value\.weight$", "qkv"),
    (r"(self_)?attention\.dense\.weight$", "o"),
    (r"mlp\.dense_h_to_4h\.weight$", "mlp.up"),
    (r"mlp\.dense_4h_to_h\.weight$", "mlp.down"),
    (r"layers\.\d+\.attention\.bias$", "buffer"),  # the causal mask of old files
)
_VISION = (  # ViT, CLIP, DINOv2; before BERT, whose names they share
    (r"patch_embeddings\.projection\.\w+$|patch_embedding(\.linear)?\.\w+$", "patch"),
    (r"patch_embed\.proj\.\w+$|patch_conv\.\w+$", "patch"),
    (r"(cls_token|mask_token|distillation_token|class_embedding|register_tokens)$", "position"),
    (r"(position_embeddings?|pos_embed)(\.weight)?$|positional_embedding\w*$", "position"),
    (r"pos_conv_embed(\.\w+)*$", "position"),  # Wav2Vec2
    (r"(token_embedding)\.weight$", "embedding"),
    (r"(layer_scale\d?\.lambda1|lambda_[12]|ls[12]\.gamma)$", "scale"),
    (r"norm[12]\.\w+$|layernorm_(before|after)\.\w+$|layer_norm[12]\.\w+$|layrnorm\.\w+$", "norm"),
    (r"attn\.qkv\.weight$|in_proj_weight$", "qkv"),
    (r"attn\.proj\.weight$|attn\.out_proj\.weight$", "o"),
    (r"mlp\.linear_fc1\.weight$", "mlp.up"),  # Qwen3-VL
    (r"mlp\.linear_fc2\.weight$", "mlp.down"),
    (r"in_proj_bias$", "bias"),
    (r"(visual_projection|text_projection)(\.weight)?$|logit_scale$", "head"),
)  # fmt: skip
_BERT = (  # BERT, RoBERTa, DistilBERT, MiniLM, ViT (encoder.layer.N....)
    (r"word_embeddings\.weight$", "embedding"),
    (r"(position|token_type|rel)_embeddings\.weight$|embed_positions\.weight$", "position"),
    (r"(cls|lm_head|(\w+_)?classifier|vocab_\w+|qa_outputs)(\.\w+)*$", "head"),
    (r"(?<!\.)(predictions(\.\w+)*|proj_out\.weight|final_logits_bias)$", "head"),
    (r"pooler(\.\w+)*\.(weight|bias)$", "pooler"),
    (r"attention(\.self|\.attention)?\.(query|q_lin|q_proj|query_proj)\.weight$", "q"),
    (r"attention(\.self|\.attention)?\.(key|k_lin|k_proj|key_proj)\.weight$", "k"),
    (r"attention(\.self|\.attention)?\.(value|v_lin|v_proj|value_proj)\.weight$", "v"),
    (r"attention\.(output\.dense|out_lin|o_proj)\.weight$", "o"),
    (r"(intermediate\.dense|ffn\.lin1|mlp\.fc1|albert_layers\.\d+\.ffn)\.weight$", "mlp.up"),
    (r"(output\.dense|ffn\.lin2|mlp\.fc2|ffn_output)\.weight$", "mlp.down"),
    (
        r"embedding_hidden_mapping_in\.weight$",
        "other",
    ),  # ALBERT: from the width of words to its own
)
_T5 = (
    (r"shared\.weight$", "embedding"),
    (r"relative_attention_bias\.weight$", "position"),
    (r"(SelfAttention|EncDecAttention)\.q\.weight$", "q"),
    (r"(SelfAttention|EncDecAttention)\.k\.weight$", "k"),
    (r"(SelfAttention|EncDecAttention)\.v\.weight$", "v"),
    (r"(SelfAttention|EncDecAttention)\.o\.weight$", "o"),
    (r"DenseReluDense\.wi_0\.weight$", "mlp.gate"),
    (r"DenseReluDense\.wi(_1)?\.weight$", "mlp.up"),
    (r"DenseReluDense\.wo\.weight$", "mlp.down"),
)
_ANY = (
    (r"\w*(norm|Norm|ln)\w*(\.\w+)?\.(weight|bias|gamma|beta)$|\w*(norm|Norm)\d*$", "norm"),
    (r"\w*embed", "embedding"),
    (r"(\w+_)?heads?(\.\w+)*$", "head"),
    (r"(q_proj|query|to_q|wq)\.weight$", "q"),
    (r"(k_proj|key|to_k|wk)\.weight$", "k"),
    (r"(v_proj|value|to_v|wv)\.weight$", "v"),
    (r"(o_proj|out_proj|to_out\.\d|wo)\.weight$", "o"),
    (r"[\w.]*bias$", "bias"),
)
FAMILIES: dict[str, tuple[tuple[str, str], ...]] = {
    "buffers": _BUFFERS,
    "llama": _LLAMA,
    "gpt2": _GPT2,
    "neox": _NEOX,
    "vision": _VISION,
    "bert": _BERT,
    "t5": _T5,
    "any": _ANY,
}

_TABLE = [(re.compile(rf"(?:^|\.){p}"), kind) for table in FAMILIES.values() for p, kind in table]
_SOME = re.compile("|".join(pattern.pattern for pattern, _ in _TABLE))
"""Fits where any pattern does: most names without a role are told in one look."""
_BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|resblocks)\.(\d+)\.")


NAME_LIMIT = 1000
"""Longer names have no role: some patterns would take long to tell."""


@lru_cache(maxsize=1 << 18)
def role_of(name: str) -> Role:
    """The role of the tensor called ``name``; never fails, unknown names are ``other``.

    Examples:
        >>> import suture
        >>> suture.role_of("model.layers.3.self_attn.q_proj.weight")
        Role(kind='q', layer=3)
    """
    if len(name) > NAME_LIMIT:
        return Role("other", None)
    found = _BLOCK.search(name)
    return Role(_kind(_NUMBER.sub("0", name)), int(found[1]) if found else None)


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of a block or an expert; no role depends on it, so all are told alike."""


@lru_cache(maxsize=1 << 16)
def _kind(name: str) -> str:
    if not _SOME.search(name):
        return "other"
    return next(kind for pattern, kind in _TABLE if pattern.search(name))


def layer_parts(name: str) -> tuple[str, int, str] | None:
    """What stands before the number of a tensor's layer, the number, and what stands after it."""
    found = _BLOCK.search(name) if len(name) <= NAME_LIMIT else None
    return (name[: found.start(1)], int(found[1]), name[found.end(1) :]) if found else None


_OF_TOKENS = re.compile(
    r"(?:^|\.)(lm_head(\.decoder)?(\.weight|\.bias)|(embed_out|output|proj_out)\.(weight|bias)"
    r"|(cls\.)?predictions(\.decoder\.weight|\.decoder\.bias|\.bias)|vocab_projector\.(weight|bias)"
    r"|generator_lm_head\.(weight|bias)|final_logits_bias)$"
)
"""Heads with a row for every token; those of classifiers have one for every class."""


def has_vocabulary(name: str) -> bool:
    """Whether a tensor of this name has, or may have, a row for every token."""
    return role_of(name).kind == "embedding" or _OF_TOKENS.search(name) is not None


def layer_key(name: str) -> str:
    """The block a tensor belongs to, as the prefix of its name; its role outside of blocks.

    Encoder and decoder of one model number their blocks alike; the prefix keeps them apart.
    """
    found = _BLOCK.search(name)
    return name[: found.end() - 1] if found else f"({role_of(name).kind})"


class ParamSpace(NamedTuple):
    """Which tensors an edit may touch (spec of Localize-and-Stitch, section 0.3).

    ``include`` and ``exclude`` hold roles or name globs; a tensor is edited when it is floating,
    no buffer, fits ``include`` (empty: everything) and does not fit ``exclude``.

    Examples:
        >>> import numpy as np, suture
        >>> names = ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "norm.weight")
        >>> model = suture.open({name: np.zeros((2, 2)) for name in names})
        >>> suture.ParamSpace().names(model.specs)
        ['layers.0.self_attn.q_proj.weight', 'norm.weight']
        >>> suture.ParamSpace(include=("q",)).names(model.specs)
        ['layers.0.self_attn.q_proj.weight']
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ("embedding", "head")

    def holds(self, name: str, spec: TensorSpec) -> bool:
        """Whether an edit may touch this tensor."""
        kind = role_of(name).kind
        if not DTYPES[spec.dtype].computable or kind == "buffer":
            return False
        if self.include and not _fits(name, kind, self.include):
            return False
        return not _fits(name, kind, self.exclude)

    def names(self, specs: Mapping[str, TensorSpec]) -> list[str]:
        """The editable names in canonical order: sorted, whatever the order of the files."""
        return sorted(name for name, spec in specs.items() if self.holds(name, spec))


DEFAULT_SPACE = ParamSpace()
"""Every floating tensor but token embeddings, output heads and buffers."""

EVERYTHING = ParamSpace((), ())
"""Every floating tensor that is no buffer, embeddings and heads included."""


def _fits(name: str, kind: str, words: Collection[str]) -> bool:
    if kind in words or name in words:
        return True
    return any_match(name, (w for w in words if w not in ROLES))


def selects(word: str, name: str) -> bool:
    """Whether a role, a name pattern or a name speaks of the tensor called ``name``."""
    return _fits(name, role_of(name).kind, (word,))


def check_selectors(words: Iterable[str], names: Collection[str], where: str) -> None:
    """Refuse a word that is neither a role nor a glob that fits some name.

    Raises:
        RecipeError: a misspelt role, or a pattern that fits no tensor.
    """
    for word in words:
        if word in ROLES or word in names or any(any_match(name, (word,)) for name in names):
            continue
        hint = did_you_mean(word, list(ROLES))
        raise RecipeError(f"{where}: {word!r} is no role and fits no tensor name; {hint}")


def names_in(
    space: ParamSpace, specs: Mapping[str, TensorSpec], purpose: str, problems: Problems
) -> tuple[str, ...]:
    """The editable names of a recipe's ``space``; words that fit nothing are noted, and no name.

    ``purpose`` is what a tensor would be left for, as the message says it.
    """
    for key in ("include", "exclude"):
        with problems.collecting():
            check_selectors(getattr(space, key), specs, f"space.{key}")
    names = tuple(space.names(specs))
    if not names:
        problems.add(RecipeError, f"space: no tensor is left to {purpose}")
    return names


_TIES = (
    ("lm_head.weight", ("model.embed_tokens.weight", "transformer.wte.weight", "wte.weight",
                        "shared.weight", "model.shared.weight",
                        "model.language_model.embed_tokens.weight",
                        "language_model.model.embed_tokens.weight",
                        "model.text_model.embed_tokens.weight",
                        "model.decoder.embed_tokens.weight",
                        "roberta.embeddings.word_embeddings.weight",
                        "transformer.word_embeddings.weight", "word_embeddings.weight")),
    ("language_model.lm_head.weight", ("language_model.model.embed_tokens.weight",)),
    ("proj_out.weight", ("model.decoder.embed_tokens.weight",)),
    ("embed_out.weight", ("gpt_neox.embed_in.weight",)),
    ("vocab_projector.weight", ("distilbert.embeddings.word_embeddings.weight",)),
    ("predictions.decoder.weight", ("albert.embeddings.word_embeddings.weight",)),
    ("predictions.decoder.bias", ("predictions.bias",)),
    ("cls.predictions.decoder.bias", ("cls.predictions.bias",)),
    ("lm_head.decoder.bias", ("lm_head.bias",)),
    ("encoder.embed_tokens.weight", ("shared.weight",)),
    ("decoder.embed_tokens.weight", ("shared.weight",)),
    ("model.encoder.embed_tokens.weight", ("model.shared.weight",)),
    ("model.decoder.embed_tokens.weight", ("model.shared.weight",)),
    ("cls.predictions.decoder.weight", ("bert.embeddings.word_embeddings.weight",)),
    ("lm_head.decoder.weight", ("roberta.embeddings.word_embeddings.weight",)),
)  # fmt: skip


def tied_to(names: Collection[str]) -> dict[str, str]:
    """Which of these names is another one's second name in a model that ties its embeddings."""
    return {
        copy: next(o for o in originals if o in names)
        for copy, originals in _TIES
        if copy in names and any(o in names for o in originals)
    }
