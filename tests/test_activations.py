"""Kept activations: the same losses and weights as without, bit for bit; bounds, keys, damage."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn

import refusing
import suture
import tiny_model
from suture.edits.mask import Mask
from suture.errors import RecipeError
from suture.runs.progress import Progress
from suture.schema.tuning import TuneSettings
from suture.training import kept as module
from suture.training.calibrate import upper
from suture.training.data import Batch, Dataset, collate
from suture.training.kept import KeptStates, keep, positions
from suture.training.load import load_tuned
from suture.training.loop import groups_of, tune
from suture.training.loss import LossStep, next_token
from suture.training.models import Classifier, Encoder, Head, ImageEncoder, LanguageModel
from suture.training.split import SplitModel, split_of
from suture.verbs.finetune import VERB as finetune
from suture.verbs.finetune import metrics
from suture.verbs.finetune.plan import make_plan as plan_finetune
from suture.verbs.realign import VERB as realign

WORDS = len(tiny_model.WORDS)
SHAPE = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(kind: str, **more: Any) -> nn.Module:
    """A random model of three blocks in training mode, with dropout where its kind has some."""
    torch.manual_seed(0)
    t: Any = transformers
    gpt2 = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
    image = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
             "image_size": 8, "patch_size": 4}  # fmt: skip
    shape = {**SHAPE, **more}
    kinds: dict[str, Any] = {
        "llama": lambda: LanguageModel(t.LlamaForCausalLM(t.LlamaConfig(
            num_key_value_heads=1, tie_word_embeddings=True, **shape))),
        "gemma3": lambda: LanguageModel(t.Gemma3ForCausalLM(t.Gemma3TextConfig(
            num_key_value_heads=1, head_dim=8, **shape))),
        "gpt2": lambda: LanguageModel(t.GPT2LMHeadModel(t.GPT2Config(
            bos_token_id=0, eos_token_id=0, **gpt2, **more))),
        "opt": lambda: LanguageModel(t.OPTForCausalLM(t.OPTConfig(
            ffn_dim=32, word_embed_proj_dim=16, **{k: v for k, v in shape.items()
                                                   if k != "intermediate_size"}))),
        "bloom": lambda: LanguageModel(t.BloomForCausalLM(t.BloomConfig(
            vocab_size=WORDS, hidden_size=16, n_layer=3, n_head=2))),
        "bert": lambda: headed(Encoder(t.BertModel(t.BertConfig(**shape)))),
        "mpnet": lambda: headed(Encoder(t.MPNetModel(t.MPNetConfig(**shape)))),
        "vit": lambda: headed(ImageEncoder(t.ViTModel(t.ViTConfig(
            intermediate_size=32, **image)))),
    }  # fmt: skip
    model: nn.Module = kinds[kind]()
    return model.train()


def headed(encoder: Encoder) -> Classifier:
    return Classifier(encoder, Head(("colour", "sky"), torch.randn(2, 16), torch.zeros(2)))


KINDS = ("llama", "gemma3", "gpt2", "opt", "bloom", "bert", "mpnet", "vit")


def texts(count: int = 20) -> Dataset:
    """Rows of 3 to 9 tokens; the last half of each are targets."""
    dice = np.random.default_rng(0)
    ids = [tuple(dice.integers(2, WORDS, 3 + i % 7).tolist()) for i in range(count)]
    marks = tuple(tuple(int(at >= len(row) // 2) for at in range(len(row))) for row in ids)
    return Dataset(tuple(ids), tuple(i % 2 for i in range(count)), 0, marks)


def example(kind: str) -> Batch:
    if kind == "vit":
        pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return Batch(pixels, torch.ones(3, 1, dtype=torch.int64), torch.zeros(3), (0, 1, 2))
    return collate(texts(), [0, 1, 3])


def top(model: nn.Module, blocks: int) -> list[nn.Parameter]:
    """Let the last blocks and the norm above ask for gradients, nothing else."""
    names = upper([n for n, _ in model.named_parameters() if "linear." not in n], blocks)
    model.requires_grad_(False)
    return [model.get_parameter(n).requires_grad_() for n in names]


def cut(kind: str, blocks: int = 1) -> SplitModel:
    model = made(kind)
    split = split_of(model, top(model, blocks), example(kind))
    assert split is not None
    return split


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_cut_gives_the_same_bits(kind: str) -> None:
    """Of all kinds of models, with padding; the block below the cut is not run; afterwards the
    model is whole again."""
    split = cut(kind)
    assert (split.at, len(split.blocks)) == (2, 3)
    model, batch = split.model.eval(), example(kind)
    whole = model(batch.input_ids, batch.attention_mask)
    states = split.lower(batch)
    assert not states.requires_grad
    runs: list[int] = []
    first = next(m for m in split.blocks[1].modules() if isinstance(m, nn.LayerNorm | nn.Linear))
    handle = first.register_forward_hook(lambda *_: runs.append(1))
    with split.fed(states):
        assert torch.equal(model(batch.input_ids, batch.attention_mask), whole)
    assert not runs
    assert torch.equal(model(batch.input_ids, batch.attention_mask), whole)
    assert runs
    handle.remove()
    with split.fed(states + 1):
        assert not torch.equal(model(batch.input_ids, batch.attention_mask), whole)
    assert split.proven(batch)


def test_a_cut_has_to_be_under_everything_that_changes() -> None:
    """No cut where the first block changes, an embedding (or a read-out that is tied to it), what
    runs before the blocks, or nothing that is known."""
    model, batch = made("llama"), example("llama")
    assert split_of(model, top(model, 3), batch) is None
    last = top(model, 1)
    assert split_of(model, [*last, model.get_parameter("backbone.lm_head.weight")], batch) is None
    assert split_of(model, [model.get_parameter("backbone.model.norm.weight")], batch) is None
    bert, rows = made("bert"), example("bert")
    norm = bert.get_parameter("encoder.backbone.embeddings.LayerNorm.weight")
    assert split_of(bert, [*top(bert, 1), norm], rows) is None
    head = bert.get_parameter("linear.weight")
    assert split_of(bert, [*top(bert, 1), head], rows) is not None
    opt = made("opt", layerdrop=0.1)
    assert split_of(opt, top(opt, 1), example("opt")) is None


def test_a_model_that_does_not_give_the_same_bits_is_asked_as_a_whole() -> None:
    """A block that hands on something beside its states: it is told, and nothing is kept."""
    model = made("llama")
    blocks = model.get_submodule("backbone.model.layers")
    carried: list[torch.Tensor] = []
    blocks[1].register_forward_hook(lambda _, __, out: carried.append(out * 0.1))  # type: ignore[index]
    blocks[2].register_forward_hook(lambda _, __, out: out + carried.pop() if carried else out)  # type: ignore[index]
    said: list[str] = []
    found = keep(model, top(model, 1), example("llama"), (3, 9), TuneSettings(), say=said.append)
    assert found is not None
    assert found.where == "recompute"
    assert "do not give the same bits" in said[0]


# -- training --------------------------------------------------------------------------------------


def trained(
    kind: str, activations: str, tmp: Path, **more: Any
) -> tuple[tuple[float, ...], dict[str, torch.Tensor], KeptStates]:
    model, data = made(kind), texts()
    changing = top(model, 1)
    settings = TuneSettings(epochs=3, batch=4, lr=1e-2, activations=activations, **more)
    loss = next_token if isinstance(model, LanguageModel) else None
    mover = LossStep(model) if loss is None else LossStep(model, loss)
    lengths = [len(row) for row in data.ids]
    groups = groups_of(lengths, settings)
    found = keep(model, changing, collate(data, groups[-1]), (20, positions(lengths, groups)),
                 settings, folder=tmp / activations)  # fmt: skip
    assert found is not None
    assert found.where == activations
    result = tune(model, data, settings, mover=mover, kept=found)
    return result.losses, {n: p.detach().clone() for n, p in model.named_parameters()}, found


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_training_with_kept_activations_is_training_without(
    kind: str, precision: str, tmp_path: Path
) -> None:
    """Losses and weights, bit for bit, with dropout above the cut: in memory, on disk, computed
    anew. What is kept is computed once for a batch."""
    AcceleratorState._reset_state(True)  # fixed for the life of a process otherwise
    without = trained(kind, "recompute", tmp_path, precision=precision)
    assert len(without[0]) == 15
    assert without[0][-1] != without[0][0]
    for where in ("memory", "disk"):
        losses, weights, found = trained(kind, where, tmp_path, precision=precision)
        assert losses == without[0]
        assert all(torch.equal(weights[n], w) for n, w in without[1].items())
        assert found.made == 5
        assert found.taken > 0
        found.drop()
        assert found.taken == 0
    assert not list(tmp_path.iterdir())
    AcceleratorState._reset_state(True)


def test_rows_stand_together_in_every_epoch() -> None:
    """By length, all of them once; the order of batches is new in every epoch."""
    from suture.training.loop import _order

    lengths, settings = [3, 9, 4, 8, 3, 9, 2], TuneSettings(batch=2)
    orders = [_order(lengths, settings, epoch, True) for epoch in range(6)]
    groups = {tuple(rows) for rows in orders[0]}
    assert all({tuple(rows) for rows in order} == groups for order in orders)
    assert len({str(order) for order in orders}) > 1
    assert sorted(row for rows in groups for row in rows) == list(range(7))
    longest = sorted((max(lengths[r] for r in rows), min(lengths[r] for r in rows))
                     for rows in groups)  # fmt: skip
    assert all(a[0] <= b[1] for a, b in itertools.pairwise(longest))
    assert groups_of([5] * 64, settings) != groups_of([5] * 64, TuneSettings(batch=2, seed=1))


# -- bounds ----------------------------------------------------------------------------------------


def kept_for(
    split: SplitModel, bounds: TuneSettings, folder: Path | None, said: list[str]
) -> KeptStates:
    model = split.model
    changing = [p for p in model.parameters() if p.requires_grad]
    found = keep(model, changing, collate(texts(), [0, 7]), (1000, 5000), bounds, folder=folder,
                 say=said.append)  # fmt: skip
    assert found is not None
    return found


def test_what_is_kept_is_told_before_and_bounded(tmp_path: Path) -> None:
    """5000 positions of 16 numbers are 320 kB: in memory where that fits, else on disk, else
    nowhere; a recipe that says where hears what to say instead, and that works."""
    split = cut("llama")
    small = 100_000 / module.GIB
    told: list[str] = []
    for bounds, folder, where, words in (
        ({}, tmp_path, "memory", "1,000 rows, 320"),
        ({"activations_memory": small}, tmp_path, "disk", str(tmp_path)),
        ({"activations_memory": small}, None, "recompute", "activations_memory"),
        ({"activations_memory": small, "activations_disk": small}, tmp_path, "recompute", "320"),
        ({"activations": "disk"}, tmp_path, "disk", "until the run is done"),
    ):
        found = kept_for(split, TuneSettings(**bounds), folder, told)  # type: ignore[arg-type]
        assert found.where == where
        assert words in told[-1]
        assert "the lower 2 of 3 blocks" in told[-1]
    for key in ("memory", "disk"):
        bounds = {"activations": key, f"activations_{key}": small}
        with pytest.raises(RecipeError, match="take 320") as caught:
            kept_for(split, TuneSettings(**bounds), tmp_path, told)  # type: ignore[arg-type]
        advice = float(str(caught.value).rsplit("raise that to ", 1)[1].split(",")[0])
        kept_for(split, TuneSettings(**{**bounds, f"activations_{key}": advice}), tmp_path, told)  # type: ignore[arg-type]
        kept_for(split, TuneSettings(**{**bounds, "activations": "auto"}), tmp_path, told)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="activations is one of auto, memory, disk, recompute"):
        TuneSettings(activations="ram")


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_the_bound_is_never_passed(where: str, tmp_path: Path) -> None:
    """Whatever was estimated: what would pass it is computed anew each time."""
    split = cut("llama")
    one = collate(texts(), [0, 7])
    size = split.lower(one).nbytes
    found = KeptStates(split, where, 2.5 * size, tmp_path / "a")
    for _ in range(2):
        for rows in ([0, 7], [7, 14], [14, 0]):
            batch = collate(texts(), rows)
            assert torch.equal(found.states(batch), split.lower(batch))
    assert (found.taken, found.made) == (2 * size, 4)
    if where == "disk":
        files = list((tmp_path / "a").iterdir())
        assert len(files) == 2
        assert sum(f.stat().st_size for f in files) < 2 * size + 1000


# -- nothing stale, nothing damaged ----------------------------------------------------------------


def store(folder: Path, blocks: int = 1, **more: Any) -> KeptStates:
    """A store on disk of a fresh model, as another process would open it."""
    model = made("llama", **more)
    split = split_of(model, top(model, blocks), example("llama"))
    assert split is not None
    return KeptStates(split, "disk", module.GIB, folder)


def fresh(found: KeptStates, asked: Batch | None = None) -> bool:
    """Whether states were made rather than found; they are right in either case."""
    batch = example("llama") if asked is None else asked
    assert torch.equal(found.states(batch), found.split.lower(batch))
    return found.made == 1


def test_every_part_of_a_batch_is_in_the_key(tmp_path: Path) -> None:
    """Another token, more padding, another mask: new states. The same again: none."""
    batch = example("llama")
    assert fresh(store(tmp_path))
    ids, mask = batch.input_ids.clone(), batch.attention_mask.clone()
    ids[0, 0] += 1
    mask[0, 1] = 0
    wide = collate(texts(), [0, 1, 3, 6])
    for other in (
        batch._replace(input_ids=ids),
        batch._replace(attention_mask=mask),
        batch._replace(input_ids=wide.input_ids[:3], attention_mask=wide.attention_mask[:3]),
    ):
        assert fresh(store(tmp_path), other)
        assert not fresh(store(tmp_path), other)
    assert not fresh(store(tmp_path))


@pytest.mark.parametrize("what", [
    "depth", "epsilon", "rope", "matrix", "embedding", "norm", "dtype", "precision", "threads",
    "suture", "torch", "transformers", "form", "device",
])  # fmt: skip
def test_every_part_of_the_ground_is_in_the_key(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depth, configuration, weights under the cut, dtype, precision, threads, versions, device:
    each makes new states, and the old ones are found again where nothing differs."""
    assert fresh(store(tmp_path))
    more: dict[str, Any] = {
        "depth": {"blocks": 2}, "epsilon": {"rms_norm_eps": 1e-3},
        "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    }.get(what, {})  # fmt: skip
    found = store(tmp_path, **more)
    weight = {
        "matrix": "layers.0.mlp.up_proj.weight", "embedding": "embed_tokens.weight",
        "norm": "layers.1.input_layernorm.weight",
    }.get(what)  # fmt: skip
    if weight:
        with torch.no_grad():
            found.split.model.get_parameter(f"backbone.model.{weight}").view(-1)[40 % 16] += 1
    patches: dict[str, tuple[Any, str, Any]] = {
        "suture": (module, "__version__", "0"), "torch": (torch, "__version__", "0"),
        "transformers": (module, "version", lambda _: "0"), "form": (module, "FORM", 0),
        "device": (module, "_kind", lambda _: "abacus"),
        "threads": (torch, "get_num_threads", lambda: 77),
    }  # fmt: skip
    if what in patches:
        monkeypatch.setattr(*patches[what])
    if what == "dtype":
        found.split.model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "precision"):
        assert fresh(found)
    monkeypatch.undo()
    assert not fresh(store(tmp_path))


def test_weights_that_are_written_to_are_noticed_in_memory_too() -> None:
    """A change under the cut, after states were made, makes new ones."""
    split, batch = cut("llama"), example("llama")
    found = KeptStates(split, "memory", module.GIB)
    before = found.states(batch)
    assert torch.equal(found.states(batch), before)
    assert found.made == 1
    with torch.no_grad():
        split.model.get_parameter("backbone.model.layers.0.mlp.up_proj.weight").mul_(2)
    assert not torch.equal(found.states(batch), before)
    assert torch.equal(found.states(batch), split.lower(batch))
    assert found.made == 2


@pytest.mark.parametrize("damage", ["bit", "short", "empty", "other"])
def test_a_damaged_file_is_not_used(damage: str, tmp_path: Path) -> None:
    """A flipped bit anywhere, a file cut short, an empty one, the file of another batch under this
    name: the states are made anew, and the file is right again."""
    split, batch = cut("llama"), example("llama")
    right = split.lower(batch)
    KeptStates(split, "disk", module.GIB, tmp_path).states(batch)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    spoilt: list[bytes] = []
    if damage == "bit":
        for at in (0, 31, 40, len(whole) // 2, len(whole) - 1):
            spoilt.append(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif damage == "other":
        KeptStates(split, "disk", module.GIB, tmp_path / "b").states(collate(texts(), [0, 1, 2]))
        spoilt = [next((tmp_path / "b").iterdir()).read_bytes()]
    else:
        spoilt = [whole[:-1] if damage == "short" else b""]
    for data in spoilt:
        path.write_bytes(data)
        found = KeptStates(split, "disk", module.GIB, tmp_path)
        assert torch.equal(found.states(batch), right)
        assert found.made == 1
        assert path.read_bytes() == whole


# -- interrupted, from recipes ---------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_interrupted_training_ends_the_same(where: str, tmp_path: Path) -> None:
    """Stopped after 8 of 15 steps: the same losses and weights; states on disk are found again."""

    class Stopped(Exception):
        pass

    def run(stop: int, folder: Path) -> tuple[Any, dict[str, torch.Tensor], int]:
        model, data = made("bert"), texts()
        settings = TuneSettings(epochs=3, batch=4, lr=1e-2, save_every=2, activations=where)
        found = keep(model, top(model, 1), collate(data, [0]), (20, 200), settings,
                     folder=folder / "states")  # fmt: skip
        assert found is not None

        def tell(at: Any) -> None:
            if at.step == stop:
                raise Stopped

        result = tune(model, data, settings, progress=tell, kept=found,
                      checkpoint=folder / "train.safetensors")  # fmt: skip
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        return result.losses, weights, found.made

    losses, weights, count = run(0, tmp_path / "whole")
    assert count == 5
    with pytest.raises(Stopped):
        run(8, tmp_path / "cut")
    again, others, left = run(0, tmp_path / "cut")
    assert again == losses
    assert all(torch.equal(others[n], w) for n, w in weights.items())
    assert left == (5 if where == "memory" else 0)


@pytest.mark.parametrize("name", ["full", "talos", "masked", "lora", "linearized", "lora-dropout"])
def test_every_strategy_gives_the_same_bytes_whatever_is_kept(name: str, tmp_path: Path) -> None:
    """In memory, on disk, and computed anew: losses, looks before and after, and the folder."""
    tiny_model.folder(tmp_path / "base")
    lines = [json.dumps({"text": r.text, "label": r.label}) for r in tiny_model.rows()]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    parameters: dict[str, Any] = {"blocks": 1}
    strategy = name.removesuffix("-dropout")
    if name == "talos":
        parameters |= {"density": 0.5, "rows": 12}
    elif name == "masked":
        base = suture.open(tmp_path / "base")
        bits = {n: np.full(s.shape, "layer.1.attention" in n) for n, s in base.specs.items()}
        Mask.of(bits, {}).save(tmp_path / "mask.safetensors")
        parameters = {"mask": str(tmp_path / "mask.safetensors")}
    elif name == "lora-dropout":
        parameters["dropout"] = 0.3
    found = {}
    for where in ("recompute", "memory", "disk"):
        told: list[str] = []
        what = {
            "base": str(tmp_path / "base"), "strategy": strategy, "parameters": parameters,
            "data": {"train": str(tmp_path / "rows.jsonl"), "validation": 0.3},
            "head": "learned" if name == "full" else "probe",
            "training": {"epochs": 3, "batch": 8, "lr": 1e-2, "activations": where},
        }  # fmt: skip
        found[where] = finetune(what, tmp_path / where, progress=Progress(say=told.append))
        assert any("the lower 1 of 2 blocks" in line for line in told) == (where != "recompute")
    first = found["recompute"]
    assert first.losses[0] != first.losses[-1]
    for report in found.values():
        assert report.fingerprint == first.fingerprint
        assert report.losses == first.losses
        assert (report.base_metric, report.metric) == (first.base_metric, first.metric)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_no_row_is_asked_twice_of_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base once and each epoch once; the last of them is what is reported."""
    tiny_model.folder(tmp_path / "base")
    lines = [json.dumps({"text": r.text, "label": r.label}) for r in tiny_model.rows()]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    asked: list[Any] = []
    ask = metrics.EVALS["accuracy"]

    def counted(model: Any, batches: Any, *, device: str) -> Any:
        asked.append(ask(model, batches, device=device))
        return asked[-1]

    monkeypatch.setattr(metrics, "EVALS", {"accuracy": counted})
    what = {
        "base": str(tmp_path / "base"), "strategy": "full", "parameters": {"blocks": 1},
        "data": {"train": str(tmp_path / "rows.jsonl"), "validation": 0.3},
        "training": {"epochs": 3, "batch": 8, "lr": 1e-2},
    }  # fmt: skip
    report = finetune(what, tmp_path / "out")
    assert len(asked) == 4
    assert report.metric == asked[-1][0]
    plan = plan_finetune(what, tmp_path / "x")
    model = load_tuned(tmp_path / "out")
    assert ask(model, plan.rows.validation.batches(8))[0] == report.metric
    best = {**what, "training": {**what["training"], "patience": 3}}  # type: ignore[dict-item]
    report = finetune(best, tmp_path / "best")
    assert report.metric == ask(load_tuned(tmp_path / "best"), plan.rows.validation.batches(8))[0]


@pytest.mark.parametrize("method", ["somf", "random"])
def test_realignment_of_upper_blocks_is_the_same_whatever_is_kept(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that differ in the last block only: the same losses, scores and bytes in memory, on
    disk and computed anew."""
    shop = refusing.family(tmp_path / "shop")
    aligned = load_file(shop / "aligned" / "model.safetensors")
    tuned = load_file(shop / "tuned" / "model.safetensors")
    upper_only = {n: t if ".layers.1." in n else aligned[n] for n, t in tuned.items()}
    save_file(upper_only, shop / "tuned" / "model.safetensors", {"format": "pt"})
    found = {}
    for where in ("recompute", "memory", "disk"):
        monkeypatch.setenv("SUTURE_CACHE", str(tmp_path / f"cache-{where}"))
        told: list[str] = []
        what = {
            "method": method, "aligned": str(shop / "aligned"),
            "models": {"tuned": str(shop / "tuned")},
            "data": {"train": str(shop / "pairs.jsonl"), "validation": 0.3},
            "utility": {"rows": str(shop / "utility.jsonl")},
            "training": {"epochs": 2, "batch": 8, "lr": 0.1, "activations": where},
        }  # fmt: skip
        if method == "random":
            what["training"] = {"batch": 8, "activations": where}
        report = realign(what, tmp_path / where, progress=Progress(say=told.append))
        assert any("the lower 1 of 2 blocks" in line for line in told) == (where != "recompute")
        found[where] = (report.fingerprint, report.scores, report.losses, report.curve)
    assert found["memory"] == found["recompute"]
    assert found["disk"] == found["recompute"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
