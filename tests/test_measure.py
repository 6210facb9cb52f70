"""Statistics: every kind is what a loop over rows with autograd gives, whatever the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import tiny_model
from suture.edits.stats import Stats
from suture.errors import CheckpointError, MismatchError, NonFiniteError, RecipeError
from suture.tensors.spec import TensorSpec
from suture.training.data import Dataset, tokenise
from suture.training.labelled import labels_of
from suture.training.loss import token_losses
from suture.training.measure import OBJECTIVES, data_hash, measure
from suture.training.models import Classifier, Encoder, Head, LanguageModel, parameters_of

GRADIENTS = ("fisher", "empirical_fisher", "abs_grad", "grad")
LABELS = ("colour", "sky")


def classifier(seed: int = 0) -> Classifier:
    encoder = tiny_model.encoder(seed)
    draw = torch.Generator().manual_seed(seed)
    head = Head(LABELS, torch.randn(2, encoder.dim, generator=draw), torch.zeros(2))
    return Classifier(encoder, head).eval()


def llama(seed: int = 0) -> LanguageModel:
    config = transformers.LlamaConfig(
        vocab_size=len(tiny_model.WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LanguageModel(transformers.LlamaForCausalLM(config).eval())


def dataset(n: int = 11, labelled: bool = True) -> Dataset:
    rows = tiny_model.rows(n)
    return tokenise(rows, tiny_model.tokenizer(), labels=LABELS if labelled else (), max_length=16)


def loop(model: nn.Module, data: Dataset, losses: Any, draws: Any) -> dict[str, Any]:
    """The slow twin: one row, one label, one call of autograd at a time, in float64 sums."""
    model.eval()
    parameters = parameters_of(model)
    for p in model.parameters():
        p.requires_grad_(True)
    sums = {f"{k}/{n}": np.zeros(p.shape) for k in GRADIENTS for n, p in parameters.items()}
    for batch in data.batches(1):
        found = torch.autograd.grad(
            losses(model, batch), list(parameters.values()), allow_unused=True
        )
        for n, g in zip(parameters, found, strict=True):
            if g is not None:
                g = g.double().numpy()
                sums[f"empirical_fisher/{n}"] += g**2
                sums[f"abs_grad/{n}"] += abs(g)
                sums[f"grad/{n}"] += g
        for loss, weight in draws(model, batch):
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for n, g in zip(parameters, found, strict=True):
                if g is not None:
                    sums[f"fisher/{n}"] += weight * g.double().numpy() ** 2
    return {k: v / len(data) for k, v in sums.items()}


def class_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch.input_ids, batch.attention_mask), batch.labels)


def every_class(model: nn.Module, batch: Any) -> Any:
    shares = model(batch.input_ids, batch.attention_mask).softmax(1)[0].tolist()
    for label, weight in enumerate(shares):
        logits = model(batch.input_ids, batch.attention_mask)
        yield F.cross_entropy(logits, torch.tensor([label])), weight


def text_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    logits = model(batch.input_ids, batch.attention_mask)
    return token_losses(logits, batch.input_ids, batch.attention_mask).sum() / (
        batch.attention_mask[:, 1:].sum().clamp(min=1)
    )


def one_draw(model: nn.Module, batch: Any) -> Any:
    logits = model(batch.input_ids, batch.attention_mask)[0, :-1]
    if len(logits):
        generator = torch.Generator().manual_seed(batch.rows[0] * 1009)
        drawn = torch.multinomial(logits.softmax(1).detach(), 1, generator=generator)[:, 0]
        yield F.cross_entropy(logits, drawn), 1.0


def assert_near(found: Stats, expected: dict[str, Any], kinds: tuple[str, ...]) -> None:
    """Equal to 1e-6 of the largest entry: some true gradients are 0 (biases of keys)."""
    for kind in kinds:
        mine = {k: v for k, v in expected.items() if k.startswith(f"{kind}/")}
        size = max(float(np.abs(values).max()) for values in mine.values())
        for key, values in mine.items():
            near = np.abs(found.tensors[key] - values) <= 1e-6 * size
            assert near.all(), (key, float(np.abs(found.tensors[key] - values).max()), size)


@pytest.mark.parametrize("batch", [1, 4, 11])
def test_a_classifier_is_measured_row_by_row(batch: int) -> None:
    """True and empirical Fisher, absolute and signed gradients are those of a loop over rows."""
    model, data = classifier(), dataset()

    found = measure(model, data, GRADIENTS, batch=batch)

    assert not found.facts["one_row_at_a_time"]
    assert_near(found, loop(model, data, class_loss, every_class), GRADIENTS)


@pytest.mark.parametrize("make", [tiny_model.language_model, llama])
def test_a_language_model_is_measured_row_by_row(make: Any) -> None:
    """The same for two causal architectures; tied embeddings are one parameter that is used twice."""
    model, data = make(), dataset(7, labelled=False)

    found = measure(model, data, GRADIENTS, objective=OBJECTIVES["causal"], batch=3)

    assert not found.facts["one_row_at_a_time"]
    assert_near(found, loop(model, data, text_loss, one_draw), GRADIENTS)


class Mixed(nn.Module):
    """A classifier with a parameter outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier()
        self.gain = nn.Parameter(torch.tensor([1.5, 0.5]))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(input_ids, attention_mask) * self.gain
        return out


def test_odd_models_go_one_row_at_a_time() -> None:
    """Where a parameter is used outside of a simple layer, autograd sees every row alone."""
    model, data = Mixed(), dataset(5)

    found = measure(model, data, GRADIENTS, batch=5)

    assert found.facts["one_row_at_a_time"]
    assert_near(found, loop(model, data, class_loss, every_class), GRADIENTS)


def test_inputs_are_those_of_real_tokens() -> None:
    """Norms and Gram matrices count every token once and no padding; q, k and v share one."""
    model, data = classifier(), dataset()
    seen: list[torch.Tensor] = []
    layer = model.encoder.backbone.encoder.layer[1].attention.self.query  # type: ignore[union-attr, index]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))  # type: ignore[union-attr, operator]
    for batch in data.batches(1):
        model(batch.input_ids, batch.attention_mask)
    hook.remove()
    x = torch.cat(seen).double().detach().numpy()

    found = measure(model, data, ["gram", "input_norm", "grad"], batch=4)

    at = "encoder.layer.1.attention.self."
    assert len(x) == found.facts["tokens"]
    for part in ("query", "key", "value"):
        name = f"{at}{part}.weight"
        assert found.key("gram", name) == f"gram/{at}query.weight"
        np.testing.assert_allclose(found.whole("gram", name), x.T @ x / len(x), atol=1e-6)
        norms = np.sqrt((x**2).sum(0))
        np.testing.assert_allclose(found.whole("input_norm", name), norms, rtol=1e-6)


def test_a_measured_model_is_left_as_it_was() -> None:
    """Weights, mode and wishes for gradients are the same afterwards."""
    model = classifier().train()
    model.encoder.backbone.embeddings.requires_grad_(False)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}

    measure(model, dataset(4), GRADIENTS)

    assert model.training
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0]), n
        assert (p.requires_grad, p.grad) == (before[n][1], None), n


def test_statistics_on_disk(tmp_path: Path) -> None:
    """What is saved comes back bit for bit, with its facts, and is read from any entry on."""
    data = dataset()
    found = measure(classifier(), data, ["grad", "gram"], facts={"model": "abc", "at": "base"})
    path = tmp_path / "some" / "stats.safetensors"

    found.save(path)
    back = Stats.load(path)

    assert back.facts == found.facts
    assert (back.facts["model"], back.facts["data"], back.facts["rows"]) == (
        "abc",
        data_hash(data),
        11,
    )
    assert back.kinds == ["grad", "gram"]
    assert back.names("gram") == found.names("gram")
    for key, values in found.tensors.items():
        kind, _, name = key.partition("/")
        assert np.array_equal(back.whole(kind, name), values)
        assert np.array_equal(back.read(kind, name, 3, 5), values.reshape(-1)[3:8])
    assert not list(path.parent.glob("*.partial"))


def test_wrong_measurements_are_refused() -> None:
    """No rows, no labels, no such kind, no such parameter, a loss that is no number: an error."""
    model = classifier()
    bare = tokenise(tiny_model.rows(4), tiny_model.tokenizer(), max_length=16)

    with pytest.raises(RecipeError, match="no rows"):
        measure(model, Dataset((), (), 0), ["grad"])
    with pytest.raises(RecipeError, match="4 of 4 rows have no label"):
        measure(model, bare, ["grad"])
    with pytest.raises(RecipeError, match="did you mean 'fisher'"):
        measure(model, dataset(), ["fischer"])
    with pytest.raises(MismatchError, match=r"no parameters nonesuch\.weight"):
        measure(model, dataset(), ["grad"], names=["nonesuch.weight"])
    with torch.no_grad():
        model.linear.weight[0, 0] = float("nan")
    for kinds in (["grad"], ["input_norm"]):
        with pytest.raises(NonFiniteError, match="loss of a row is nan"):
            measure(model, dataset(), kinds)


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    """Missing tensors, other shapes, missing kinds, files of something else."""
    found = measure(classifier(), dataset(), ["grad", "input_norm"])
    name = "encoder.layer.0.output.dense.weight"

    with pytest.raises(RecipeError, match="no 'fisher' statistics"):
        found.check(["fisher"], {})
    with pytest.raises(
        MismatchError, match="no grad of other: are these the statistics of another"
    ):
        found.check(["grad"], {"other": TensorSpec("F32", (2,))})
    with pytest.raises(MismatchError, match=r"the model's tensor \[16, 5\]"):
        found.check(["grad"], {name: TensorSpec("F32", (16, 5))})
    with pytest.raises(MismatchError, match="is for 32 inputs"):
        found.check(["input_norm"], {name: TensorSpec("F32", (16, 5))})
    with pytest.raises(MismatchError, match="no input_norm of any"):
        found.check(["input_norm"], {"other": TensorSpec("F32", (2, 2))})
    with pytest.raises(CheckpointError, match="not a file of statistics"):
        Stats.load(tiny_model.folder(tmp_path / "model") / "model.safetensors")


def test_names_of_files_find_their_parameters() -> None:
    """A checkpoint may have or lack the prefix of its family, and heads of ours are no parameters."""
    backbone = tiny_model.language_model().backbone
    names = [n.removeprefix("transformer.") for n, _ in backbone.named_parameters()]

    found = parameters_of(LanguageModel(backbone), names)

    assert list(found) == names
    assert set(parameters_of(classifier())) == set(
        parameters_of(Encoder(classifier().encoder.backbone))
    )
    assert labels_of(tiny_model.rows(4)) == LABELS


def test_the_same_statistics_are_the_same_bytes(tmp_path: Path) -> None:
    """However often they are saved: the order of the metadata is fixed; scalars and empty tensors
    survive."""
    tensors = {"grad/b": np.ones((2, 3)), "grad/a": np.float32(4), "grad/c": np.zeros((0, 2))}
    found = Stats(tensors, {"rows": 3, "data": "x"}, "here")
    for number in range(8):
        found.save(tmp_path / f"{number}.safetensors")
    saved = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(saved) == 1
    again = Stats.load(tmp_path / "0.safetensors")
    assert again.facts == found.facts
    assert all(np.array_equal(again.tensors[n], v) for n, v in tensors.items())


def test_only_the_answer_is_measured() -> None:
    """Where rows have a prompt, the loss is the mean over the answer's tokens; prompts count not."""
    model, plain = llama(), dataset(6, labelled=False)
    targets = tuple(tuple(int(i >= len(ids) // 2) for i in range(len(ids))) for ids in plain.ids)
    data = Dataset(plain.ids, plain.labels, plain.pad, targets)

    def answers(model: nn.Module, batch: Any) -> torch.Tensor:
        logits = model(batch.input_ids, batch.attention_mask)[0, :-1]
        asked = torch.tensor(targets[batch.rows[0]][1:], dtype=torch.bool)
        return F.cross_entropy(logits[asked], batch.input_ids[0, 1:][asked])

    found = measure(model, data, ("abs_grad", "fisher"), objective=OBJECTIVES["causal"], batch=4)
    single = measure(model, data, ("fisher",), objective=OBJECTIVES["causal"], batch=1)

    assert_near(found, loop(model, data, answers, lambda m, b: ()), ("abs_grad",))
    assert_near(found, dict(single.tensors), ("fisher",))
    assert data_hash(data) != data_hash(plain)


def test_the_largest_seed_draws_too() -> None:
    """Every seed that a recipe may name is one for the true Fisher of a language model."""
    model, data = llama(), dataset(2, labelled=False)

    one, other = (
        measure(model, data, ("fisher",), objective=OBJECTIVES["causal"], seed=seed)
        for seed in (0, 2**63 - 1)
    )

    key = next(iter(one.tensors))
    assert np.isfinite(other.tensors[key]).all()
    assert (one.tensors[key] != other.tensors[key]).any()
