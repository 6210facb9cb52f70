"""The laws of merge methods: whoever adds a line to ``METHODS`` gets these tests for nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import toy
from suture import METHODS
from suture.roles import role_of
from suture.run import MergeReport
from toy import Tensors

Merged = Callable[..., Tensors]


class Neutral(NamedTuple):
    """Parameters with which a method gives one model back unchanged, and how it is asked."""

    parameters: Mapping[str, Any] = {}
    times: int = 1
    """How often the model is given: a method for two models gets it twice."""


NEUTRAL: dict[str, Neutral] = {
    "linear": Neutral(),
    "task_arithmetic": Neutral(),
    "ties": Neutral({"density": 1.0}),
    "dare_linear": Neutral({"density": 1.0}),
    "dare_ties": Neutral({"density": 1.0}),
    "consensus": Neutral({"min_tasks": 1}),
    "stitch": Neutral({"density": 1.0}),
    "slerp": Neutral(times=2),
    "nuslerp": Neutral(times=2),
    "multislerp": Neutral(),
    "karcher": Neutral(),
    "nearswap": Neutral({"t": 100.0}),
    "arcee_fusion": Neutral({"spread": -1e9}),
    "passthrough": Neutral({"scale": 1.0}),
    "breadcrumbs": Neutral({"density": 1.0}),
    "breadcrumbs_ties": Neutral({"density": 1.0}),
    "della": Neutral({"density": 1.0}),
    "della_linear": Neutral({"density": 1.0}),
    "sce": Neutral({"density": 1.0}),
    "ram": Neutral({"epsilon": 0.0}),
    "ramplus_tl": Neutral({"epsilon": 0.0}),
    "model_stock": Neutral(times=2),
    "tsv_merge": Neutral(),
    "iso_c": Neutral({"isotropy": 0.0}),
    "iso_cts": Neutral({"isotropy": 0.0, "common": 1.0}),
    "fisher_merging": Neutral(),
    "regmean": Neutral(),
    "led": Neutral({"density": 1.0, "elect": "either"}),
}
AVERAGING = {
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "fisher_merging", "regmean",
}  # fmt: skip
"""Methods that average vectors, so that an entry only one model changed is watered down."""
MIXING = {"tsv_merge", "iso_c", "iso_cts", "sce", "arcee_fusion", "nearswap", "passthrough", "led"}
"""Methods in which entries of a tensor decide about each other, or that take only one model."""
LIVELY: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.3},
    "stitch": {"density": 0.3},
    "dare_linear": {"density": 0.4},
    "dare_ties": {"density": 0.4},
    "breadcrumbs": {"density": 0.4, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.4, "gamma": 0.1},
    "della": {"density": 0.4, "epsilon": 0.2},
    "della_linear": {"density": 0.4, "epsilon": 0.2},
    "sce": {"density": 0.4},
    "ram": {"epsilon": 0.03},
    "ramplus_tl": {"epsilon": 0.03, "gain": 2.0, "most": 2.0},
    "nearswap": {"t": 0.03},
    "arcee_fusion": {"spread": 0.1},
    "passthrough": {"scale": 0.9},
}
"""Parameters with which a method has something to do; the defaults for the others."""
VARIANTS = [
    *((name, LIVELY.get(name, {})) for name in sorted(METHODS)),
    ("ties", {"density": 0.3, "scope": "tensor", "zero_sign": "majority", "aggregate": "max"}),
    ("ties", {"density": 0.3, "scope": "layer", "elect": "count", "rounding": "floor"}),
    ("stitch", {"density": 0.3, "scope": "tensor"}),
    ("dare_linear", {"density": 0.4, "rescale": "l1"}),
    ("dare_ties", {"density": 0.4, "rescale": "l1"}),
    ("ties", {"density": 0.3, "scope": "tensor", "rescale": "l1", "zero_sign": "majority"}),
    ("ties", {"density": 0.3, "votes": "equal", "aggregate": "weighted_mean"}),
    ("breadcrumbs", {"density": 0.4, "scope": "global", "rescale": "l1"}),
    ("breadcrumbs_ties", {"density": 0.4, "rounding": "floor", "votes": "equal"}),
    ("della", {"density": 0.6, "epsilon": 0.2, "rescale": "l1"}),
    ("della_linear", {"density": 0.6, "rescale": "none", "seed": 3}),
    ("sce", {"density": 0.3, "counted": "nonzero", "rounding": "floor"}),
    ("sce", {"density": 1.0}),
    ("model_stock", {"over": "row", "clamp": False}),
    ("nuslerp", {"over": "row"}),
    ("nuslerp", {"over": "column"}),
    ("fisher_merging", {"normalize": True}),
    ("led", {"density": 0.6, "elect": "expert", "disjoint": "priority"}),
    ("led", {"density": 0.6, "rule": "random"}),
    ("led", {"density": 0.6, "rule": "magnitude", "scope": "global"}),
]
each_variant = pytest.mark.parametrize(
    ("method", "parameters"),
    VARIANTS,
    ids=["-".join([m, *(str(v) for v in p.values())]) for m, p in VARIANTS],
)
each_method = pytest.mark.parametrize("method", sorted(METHODS))


def models_for(method: str, family: Any, names: Sequence[str] = ("ada", "bob", "cyd")) -> Any:
    """As many models as the method takes."""
    return family.some(*names[: METHODS[method].most])


def base_for(method: str, family: Any) -> Path | None:
    return family.base_path if METHODS[method].needs_base else None


def follow(
    method: str, family: Any, merged: Merged, parameters: Mapping[str, Any], **more: Any
) -> Tensors:
    return merged(
        method, models_for(method, family), base_for(method, family), **parameters, **more
    )


def test_every_method_has_a_neutral_example() -> None:
    """A line in the table without an example for the laws is not finished."""
    assert NEUTRAL.keys() == METHODS.keys()


@pytest.mark.parametrize("flavour", toy.FLAVOURS)
@each_method
def test_one_model_alone_comes_back(method: str, flavour: str, family: Any, merged: Merged) -> None:
    """With neutral parameters the only model comes back, to float32 or one step of 16 bits."""
    models = family(flavour)
    neutral = NEUTRAL[method]
    copies = {f"{i}": models.paths["bob"] for i in range(neutral.times)}

    out = merged(method, copies, base_for(method, models), **neutral.parameters)

    for name in models.names:
        expected = models.models["bob"][name]
        if expected.dtype in (torch.bfloat16, torch.float16):
            near = (out[name].float() - expected.float()).abs().flatten().numpy() < 1e-6
            assert ((toy.steps_apart(out[name], expected) <= 1) | near).all()
        else:
            torch.testing.assert_close(out[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flavour", toy.FLAVOURS)
@each_variant
def test_zero_vectors_give_the_base(
    method: str, parameters: Any, flavour: str, family: Any, merged: Merged
) -> None:
    """Where no model differs from the base, the base comes back bit for bit."""
    models = family(flavour)
    copies = dict.fromkeys(("a", "b")[: METHODS[method].most], models.base_path)
    if method == "passthrough":
        parameters = {}

    out = merged(method, copies, base_for(method, models), **parameters)

    if METHODS[method].needs_base:
        assert toy.same_bytes(out, models.base) == []
    else:
        for name, tensor in models.base.items():
            torch.testing.assert_close(out[name], tensor, rtol=1e-6, atol=1e-6)


@each_method
def test_negative_zeros_stay(method: str, tmp_path: Path, merged: Merged) -> None:
    """An entry that no model changes keeps its sign even when it is a zero."""
    base = {"w": torch.tensor([-0.0, 0.0, 1.0, -1.0])}
    place = toy.folder(tmp_path / "base", base)
    needs = METHODS[method].needs_base

    copies = dict.fromkeys(("a", "b")[: METHODS[method].most], place)

    out = merged(method, copies, place if needs else None)

    if needs:
        assert toy.same_bytes(out, base) == []


@each_variant
def test_names_shapes_and_dtypes_are_kept(
    method: str, parameters: Any, family: Any, merged: Merged
) -> None:
    """The output has the tensors of the reference: each with its name, shape and dtype."""
    models = family("mixed")

    out = follow(method, models, merged, parameters)

    assert {n: (t.shape, t.dtype) for n, t in out.items()} == {
        n: (t.shape, t.dtype) for n, t in models.base.items()
    }


@each_variant
def test_inputs_are_left_alone(method: str, parameters: Any, family: Any, merged: Merged) -> None:
    """Not a byte of an input changes, and no file appears beside it."""
    models = family("bf16")
    places = (models.base_path, *models.paths.values())
    before = toy.files_digest(*places)

    follow(method, models, merged, parameters)

    assert toy.files_digest(*places) == before


@each_variant
def test_the_order_of_models_does_not_matter(
    method: str, parameters: Any, family: Any, merged: Merged
) -> None:
    """However a recipe lists its models, the bytes are the same; unless the method is ordered."""
    models = family("f32")
    paths = models_for(method, models)
    base = base_for(method, models)
    outs = [
        merged(method, dict(order), base, **parameters)
        for order in itertools.islice(itertools.permutations(paths.items()), 0, None, 2)
    ] + [merged(method, dict(reversed(paths.items())), base, **parameters)]

    # Without a base, what is not merged comes from the model that is listed first.
    copied = {"embedding", "head", "buffer"} if base is None else set()
    differ = {n for other in outs[1:] for n in toy.same_bytes(outs[0], other)}
    same = not {n for n in differ if role_of(n).kind not in copied}

    if METHODS[method].ordered:
        swapped = {**parameters, "t": 1 - parameters.get("t", 0.3)}
        one = merged(method, paths, base, **{**parameters, "t": 0.3})
        other = merged(method, dict(reversed(paths.items())), base, **swapped)
        for name in models.names:  # the other way round, from the other end
            torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6)
    else:
        assert same


@each_variant
def test_shards_and_key_order_of_inputs_do_not_matter(
    method: str, parameters: Any, family: Any, tmp_path: Path, merged: Merged
) -> None:
    """One file, four shards, or one file with its tensors backwards: the same bytes."""
    models = family("bf16", grid=True)
    outs = [follow(method, models, merged, parameters)]
    for layout in ("shards", "backwards"):
        paths = {}
        for name, tensors in {"base": models.base, **models.models}.items():
            place = tmp_path / layout / name
            if layout == "shards":
                paths[name] = toy.folder(place, tensors, shards=4)
                continue
            place.mkdir(parents=True)
            paths[name] = toy.save_in_order(
                place / "model.safetensors", tensors, sorted(tensors, reverse=True)
            )
        base = paths.pop("base") if METHODS[method].needs_base else paths.pop("base") and None
        chosen = dict(list(paths.items())[: METHODS[method].most])
        outs.append(merged(method, chosen, base, **parameters))

    assert toy.same_bytes(outs[0], outs[1]) == []
    assert toy.same_bytes(outs[0], outs[2]) == []


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path], Tensors]:
    """A base and two bfloat16 models of more than one piece (2**20 elements) in one tensor."""
    draw = torch.Generator().manual_seed(7)
    where = tmp_path_factory.mktemp("large")
    base = {
        "model.layers.0.mlp.up_proj.weight": torch.randn(1100, 1000, generator=draw),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(70, 1001, generator=draw),
        "model.layers.1.mlp.up_proj.weight": torch.randn(17, 13, generator=draw),
        "model.norm.weight": torch.randn(5, generator=draw),
        "model.scalar": torch.tensor(0.5),
    }
    base = {n: t.to(torch.bfloat16) for n, t in base.items()}
    paths = {}
    for i, name in enumerate(("ada", "bob")):
        shift = torch.Generator().manual_seed(8 + i)
        tuned = {
            n: (t.float() + 0.01 * torch.randn(t.shape, generator=shift)).to(torch.bfloat16)
            for n, t in base.items()
        }
        paths[name] = toy.folder(where / name, tuned)
    return toy.folder(where / "base", base), paths, base


RUNS = [
    (1, 1 << 16, "5GB"), (2, 1 << 12, "1MB"), (4, 1 << 18, "100kB"),
    (2, 1 << 16, "100kB"), (4, 1 << 12, "5GB"), (1, 1 << 18, "1MB"),
]  # fmt: skip
"""Threads, elements in a block, bytes in a shard: each value with each other in two runs."""


@each_variant
def test_threads_blocks_and_shards_change_no_byte(
    method: str, parameters: Any, large: Any, tmp_path: Path
) -> None:
    """1, 2, 4 threads, three sizes of blocks and of shards: identical tensors and fingerprint."""
    base, paths, _ = large
    outs: list[tuple[Tensors, MergeReport]] = []
    for number, (threads, block, shard_size) in enumerate(RUNS):
        chosen = dict(list(paths.items())[: METHODS[method].most])
        what = toy.recipe(method, chosen, base if METHODS[method].needs_base else None,
                          output={"shard_size": shard_size}, **parameters)  # fmt: skip
        outs.append(toy.run(tmp_path / str(number), what, threads=threads, block=block))

    first, report = outs[0]
    for out, other in outs[1:]:
        assert toy.same_bytes(out, first) == []
        assert other.fingerprint == report.fingerprint
        assert (other.moved, other.writeback_loss) == (report.moved, report.writeback_loss)
        assert other.facts == report.facts
    assert len(list((tmp_path / "2").glob("*.safetensors"))) > 1


@each_variant
def test_tiny_blocks_change_no_byte(
    method: str, parameters: Any, family: Any, merged: Merged
) -> None:
    """Blocks of 8 and of 64 elements on a small model, where most tensors span several blocks."""
    models = family("mixed", grid=True)
    whole = follow(method, models, merged, parameters)

    for block in (8, 64):
        out = follow(method, models, merged, parameters, options={"block": block, "threads": 3})

        assert toy.same_bytes(out, whole) == []


RANDOM = [
    (m, p)
    for m, p in VARIANTS
    if METHODS[m].random and ("rule" not in METHODS[m].parameters or p.get("rule") == "random")
]


@pytest.mark.parametrize(("method", "parameters"), RANDOM, ids=str)
def test_the_seed_decides(method: str, parameters: Any, family: Any, merged: Merged) -> None:
    """The same seed gives the same bytes, and another seed others."""
    models = family("f32")
    one, again, other = (
        follow(method, models, merged, {**parameters, "seed": seed}) for seed in (11, 11, 12)
    )

    assert toy.same_bytes(one, again) == []
    assert set(toy.same_bytes(one, other)) >= {n for n in models.names if one[n].numel() > 30}


def test_all_random_methods_are_known() -> None:
    """Exactly the methods with a seed say that they are random."""
    for name, method in METHODS.items():
        assert method.random == ("seed" in method.parameters), name


@each_variant
def test_disjoint_supports_do_not_touch_each_other(
    method: str, parameters: Any, tmp_path: Path, merged: Merged
) -> None:
    """Where only one model changes entries, they end as if the others were not there."""
    if method in AVERAGING | MIXING:
        pytest.skip("averages vectors, or its entries decide about each other")
    if method == "consensus":
        parameters = {"min_tasks": 1}
    draw = torch.Generator().manual_seed(9)
    base = {"v": torch.randn(301, generator=draw), "w": torch.randn(20, 30, generator=draw)}
    models: dict[str, Tensors] = {"a": {}, "b": {}}
    for name, tensor in base.items():
        noise = torch.randn(tensor.shape, generator=draw)
        first = (torch.arange(tensor.numel()) % 2 == 0).reshape(tensor.shape)
        models["a"][name] = torch.where(first, tensor + noise, tensor)
        models["b"][name] = torch.where(first, tensor, tensor + noise)
    place = toy.folder(tmp_path / "base", base)
    paths = {n: toy.folder(tmp_path / n, t) for n, t in models.items()}

    both = merged(method, paths, place, **parameters)

    for model, path in paths.items():
        alone = merged(method, {model: path}, place, **parameters)
        for name, tensor in base.items():
            mine = models[model][name] != tensor
            assert torch.equal(both[name][mine], alone[name][mine])


ONE = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("key", ["density", "weight", "scale"])
@each_variant
def test_a_number_for_one_tensor_changes_that_tensor_only(
    method: str, parameters: Any, key: str, family: Any, merged: Merged
) -> None:
    """A pattern that fits one tensor changes it and no other, where tensors do not compete."""
    if key not in METHODS[method].parameters:
        pytest.skip(f"has no {key}")
    if parameters.get("zero_sign") == "majority":
        pytest.skip("the majority sign is one number for all tensors")
    if parameters.get("normalize") and "stats" in METHODS[method].parameters:
        pytest.skip("the norm of the statistics is one number for all tensors")
    if "scope" in METHODS[method].parameters:
        parameters = {**parameters, "scope": "tensor"}
    models = family("f32")
    usual = parameters.get(key, METHODS[method].parameters[key].default)
    mapping = {ONE: usual * 0.6, "*": usual}
    if method == "linear":  # where all weights change alike an average stays
        mapping, usual = {ONE: 3.0, "*": usual}, usual
    last = list(models_for(method, models))[-1:] if METHODS[method].most else ["bob"]
    own = {last[0]: {key: mapping}} if METHODS[method].parameters[key].per_model else {}
    shared = {**parameters, key: usual if own else mapping}

    plain = follow(method, models, merged, {**parameters, key: usual})
    other = merged(method, models_for(method, models), base_for(method, models), own=own, **shared)

    assert toy.same_bytes(plain, other) == [ONE]


@each_variant
def test_a_shard_merged_alone_is_the_shard_of_the_whole(
    method: str, parameters: Any, family: Any, tmp_path: Path, merged: Merged
) -> None:
    """Tensors may be merged in parts where they do not compete with one another."""
    if parameters.get("zero_sign") == "majority":
        pytest.skip("the majority sign is one number for all tensors")
    if parameters.get("normalize") and "stats" in METHODS[method].parameters:
        pytest.skip("the norm of the statistics is one number for all tensors")
    if "scope" in METHODS[method].parameters:
        parameters = {**parameters, "scope": "tensor"}
    models = family("bf16", grid=True)
    part = sorted(models.base)[::2]
    places = {
        name: toy.folder(tmp_path / name, {n: tensors[n] for n in part})
        for name, tensors in {"base": models.base, **models.models}.items()
    }
    base = places.pop("base")
    chosen = dict(list(places.items())[: METHODS[method].most])

    whole = follow(method, models, merged, parameters)
    alone = merged(method, chosen, base if METHODS[method].needs_base else None, **parameters)

    assert toy.same_bytes(alone, {n: whole[n] for n in part}) == []


@each_variant
def test_odd_tensors_survive_bit_for_bit(
    method: str, parameters: Any, tmp_path: Path, merged: Merged
) -> None:
    """A model of nothing but a zero, a scalar, empty tensors, integers and booleans."""
    base = {
        "zero.weight": torch.zeros(4, 4),
        "scalar": torch.tensor(0.25),
        "empty.weight": torch.zeros(0, 7),
        "none.weight": torch.zeros(3, 0, 2),
        "ids": torch.tensor([2**53 + 1, -(2**63), 2**63 - 1]),
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(256).to(torch.uint8),
    }
    tuned = {**base, "zero.weight": torch.full((4, 4), 0.5), "scalar": torch.tensor(0.75)}
    place = toy.folder(tmp_path / "base", base)
    path = toy.folder(tmp_path / "tuned", tuned)
    needs = METHODS[method].needs_base
    neutral = NEUTRAL[method]
    copies = {f"{i}": path for i in range(neutral.times)}

    out = merged(method, copies, place if needs else None, **{**parameters, **neutral.parameters})

    if METHODS[method].tensorwise:  # singular values are found in float32
        torch.testing.assert_close(out.pop("zero.weight"), tuned.pop("zero.weight"))
    assert toy.same_bytes(out, tuned) == []


@each_variant
def test_the_card_makes_the_same_tensors_again(
    method: str, parameters: Any, family: Any, tmp_path: Path
) -> None:
    """``suture.json`` of an output is a recipe: followed, it gives the same bytes."""
    models = family("bf16")
    what = toy.recipe(method, models_for(method, models), base_for(method, models), **parameters)
    first, report = toy.run(tmp_path / "first", what)

    from suture.run import merge

    again = merge(tmp_path / "first" / "suture.json", tmp_path / "again")

    assert toy.same_bytes(first, toy.read(tmp_path / "again")) == []
    assert again.fingerprint == report.fingerprint
