"""Sensitivity and masks in rounds; packed projections."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny_model
from suture.errors import NonFiniteError, RecipeError
from suture.training import calibrate as module
from suture.training.calibrate import (
    Calibration,
    calibrate,
    prunable,
    sensitivity,
    smallest,
    structure,
    upper,
)
from suture.training.data import Dataset, tokenise
from suture.training.labelled import labels_of
from suture.training.models import Classifier, Head, LanguageModel
from suture.training.packed import ParameterPlace, unpack


def data() -> Dataset:
    rows = tiny_model.rows(24)
    return tokenise(rows, tiny_model.tokenizer(), labels=labels_of(rows), max_length=8)


def classifier() -> Classifier:
    torch.manual_seed(3)
    return Classifier(
        tiny_model.encoder(), Head(("colour", "sky"), torch.randn(2, 16), torch.zeros(2))
    )


def test_what_is_prunable() -> None:
    """Linear and norms with their biases; no embedding, head or pooler, and no bias of a key."""
    names = prunable(classifier())
    assert "encoder.backbone.embeddings.LayerNorm.weight" in names
    assert "encoder.backbone.encoder.layer.0.attention.self.query.bias" in names
    assert len([n for n in names if ".layer.1." in n]) == 15
    assert not [
        n
        for n in names
        if any(w in n for w in ("word_", "position", "pooler", "linear", "key.bias"))
    ]
    assert {n for n in names if ".layer.1." in n} == set(prunable(classifier(), blocks=1))
    with pytest.raises(RecipeError, match="has 2 blocks"):
        prunable(classifier(), blocks=3)


def test_the_norm_above_the_blocks_belongs_to_them() -> None:
    """In the names of Llama, GPT-2, BERT, OPT, ViT and CLIP; norms below the blocks do not."""
    above = {
        "model.norm.weight": ("model.layers.0.w", "model.layers.1.w"),
        "transformer.ln_f.bias": ("transformer.h.0.w", "transformer.h.1.w"),
        "model.decoder.final_layer_norm.weight": ("decoder.layers.0.w", "decoder.layers.1.w"),
        "vit.layernorm.weight": ("vit.layers.0.w", "vit.layers.1.w"),
        "vision_model.post_layernorm.weight": ("layers.0.w", "layers.1.w"),
    }
    below = [
        "embeddings.LayerNorm.weight", "vision_model.pre_layrnorm.weight", "wte.weight",
        "word_embeddings_layernorm.weight", "lm_head.weight",
    ]  # fmt: skip
    for norm, (first, last) in above.items():
        assert upper([*below, first, norm, last], 1) == [norm, last]
        assert upper([*below, first, norm, last], 0) == [*below, first, norm, last]
    with pytest.raises(RecipeError, match="has 2 blocks, not 3"):
        upper(["layers.0.w", "layers.1.w"], 3)


@pytest.mark.parametrize("score", ["fisher", "logit"])
def test_sensitivity_is_a_loop_over_samples_and_their_drawn_labels(score: str) -> None:
    """Squared gradients of what the model says of labels it drew itself, one backward a sample."""
    model, rows = classifier().eval(), data()
    names = prunable(model)
    found = sensitivity(model, rows, names, Calibration(score=score, draws=2), seed=7, batch=5)

    known = dict(model.named_parameters())
    sums = {n: torch.zeros_like(known[n]) for n in names}
    dice = torch.Generator().manual_seed(7)
    for _ in range(2):
        for batch in rows.batches(5):
            odds = model(batch.input_ids, batch.attention_mask).softmax(-1)
            drawn = torch.multinomial(odds, 1, generator=dice)[:, 0]
            for i, label in enumerate(drawn.tolist()):
                logits = model(batch.input_ids[i : i + 1], batch.attention_mask[i : i + 1])[0]
                value = (logits.log_softmax(-1) if score == "fisher" else logits)[label]
                for n, g in zip(
                    names, torch.autograd.grad(value, [known[n] for n in names]), strict=True
                ):
                    sums[n] += g.square()
    for name in names:
        torch.testing.assert_close(
            found[name], sums[name], rtol=1e-4, atol=1e-6 * float(sums[name].max())
        )


def test_a_language_model_draws_a_token_for_every_target() -> None:
    """Only places with a target count; a row whose targets are taken away adds nothing."""
    model, rows = LanguageModel(tiny_model.language_model().backbone).eval(), data()
    names = prunable(model)
    assert names
    assert not [n for n in names if "lm_head" in n or "wte" in n]
    nothing = Dataset(
        rows.ids, rows.labels, rows.pad, tuple(tuple(0 for _ in ids) for ids in rows.ids)
    )
    assert all(
        float(s.max()) == 0 for s in sensitivity(model, nothing, names, Calibration()).values()
    )
    assert all(
        float(s.max()) > 0
        for n, s in sensitivity(model, rows, names, Calibration()).items()
        if "c_fc" in n
    )


@given(st.integers(0, 10**6), st.integers(1, 60))
def test_the_smallest_are_those_of_a_sort(seed: int, count: int) -> None:
    """Exactly so many, ties by name and position, nothing that is not alive."""
    torch.manual_seed(seed)
    scores = {
        "b": torch.randint(0, 9, (6, 7)) * 0.5,
        "a": torch.rand(40) * torch.randint(0, 2, (40,)),
    }
    alive = {n: torch.rand(s.shape) < 0.9 for n, s in scores.items()}
    count = min(count, sum(int(a.sum()) for a in alive.values()))
    found = smallest(scores, alive, count)
    order = sorted(
        (float(s), n, i)
        for n in scores
        for i, s in enumerate(scores[n].flatten())
        if alive[n].flatten()[i]
    )
    expected = {(n, i) for _, n, i in order[:count]}
    assert {(n, int(i)) for n, f in found.items() for i in f.flatten().nonzero()} == expected


def test_the_budget_is_exact_and_the_base_has_its_bits_back() -> None:
    """floor(density * n) entries, whatever the rounds and the structure; the model is untouched."""
    model, rows = classifier(), data()
    before = {n: p.clone() for n, p in model.named_parameters()}
    names = prunable(model)
    total = sum(before[n].numel() for n in names)
    for rounds, kind, density in itertools.product((1, 4), ("entry", "row"), (0.1, 0.37)):
        masks = calibrate(model, rows, names, Calibration(density, rounds, structure=kind))
        assert sum(int(m.sum()) for m in masks.values()) == int(density * total)
        assert sum(structure(masks).values()) == pytest.approx(1)
        if kind == "row":
            full = [
                s
                for m in masks.values()
                for s in m.float().reshape(len(m), -1).mean(1).tolist()
                if s
            ]
            assert sum(s < 1 for s in full) <= 1
        else:
            assert all(not m.any() or m.float().mean() >= 0.01 for m in masks.values())
    assert all(
        torch.equal(p, before[n]) and p.requires_grad == (not n.startswith("linear"))
        for n, p in model.named_parameters()
    )
    with pytest.raises(RecipeError, match="leaves nothing"):
        calibrate(model, rows, names, Calibration(density=1e-6))


def test_rounds_never_take_an_entry_back_and_damp_what_they_reject(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The network of a round is the base with rejected entries times the damping."""
    model, rows = classifier(), data()
    names = prunable(model)
    base = {n: p.clone() for n, p in model.named_parameters()}
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    real = module.smallest

    def watched(
        scores: dict[str, Tensor], alive: dict[str, Tensor], count: int
    ) -> dict[str, Tensor]:
        seen.append(({n: p.detach().clone() for n, p in model.named_parameters()}, alive))
        return real(scores, alive, count)

    monkeypatch.setattr(module, "smallest", watched)
    last = calibrate(model, rows, names, Calibration(0.2, 3, 0.1, least=0.0))
    for (_, before), (network, alive) in itertools.pairwise(seen):
        for name in names:
            assert not (alive[name] & ~before[name]).any()
            assert torch.equal(
                network[name], torch.where(alive[name], base[name], 0.1 * base[name])
            )
    assert all(not (last[n] & ~seen[-1][1][n]).any() for n in names)


def test_a_model_that_overflows_is_told() -> None:
    """NaN sensitivities would rank as anything."""
    model = classifier()
    with torch.no_grad():
        model.linear.weight.fill_(float("inf"))
    with pytest.raises((NonFiniteError, RuntimeError)):
        sensitivity(model, data(), prunable(model), Calibration())


def packed_models() -> dict[str, nn.Module]:
    gpt2 = transformers.GPT2Config(
        vocab_size=14,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    phi = transformers.Phi3Config(vocab_size=14, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    return {
        "gpt2": transformers.GPT2LMHeadModel(gpt2).eval(),
        "phi3": transformers.Phi3ForCausalLM(phi).eval(),
    }


@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
def test_packed_projections_come_apart_and_together_bit_for_bit(kind: str) -> None:
    """Same outputs, and the three parts fill exactly the packed tensor they came from."""
    model = packed_models()[kind]
    ids = torch.randint(1, 14, (3, 9))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        places = unpack(model)
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len({p.name for p in places.values()}) == (4 if kind == "gpt2" else 2)
    whole = {p.name: torch.full_like(before[p.name], float("nan")) for p in places.values()}
    known = dict(model.named_parameters())
    for name, place in places.items():
        place.of(whole[place.name]).copy_(known[name].detach())
    assert all(torch.equal(whole[n], before[n]) for n in whole)
    assert not [n for n in prunable(LanguageModel(model)) if n.endswith("k_proj.bias")]
    assert ParameterPlace("x").of(ids) is ids
