"""Merges from files to files against their slow twins, and the acceptance tests of the methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import suture
import toy
from slow import merges as slow
from slow import more_merges as more
from slow import philox, rounding
from suture.errors import MismatchError, NonFiniteError, RecipeError
from suture.merges.dare import limit_of, stream_key
from suture.runs.progress import Progress
from toy import EMBEDDING, Tensors

Array = np.ndarray[Any, Any]
Merged = Callable[..., Tensors]
MODELS = ("ada", "bob", "cyd")


class Case(NamedTuple):
    """A method with its parameters: shared ones, and each model's own."""

    method: str
    shared: Mapping[str, Any] = {}
    own: Mapping[str, Mapping[str, Any]] = {}
    models: Sequence[str] = MODELS
    based: bool = False
    """Whether a method that can do without a base is given one."""

    @property
    def deltas(self) -> bool:
        """Whether differences to the base are merged."""
        return self.based or suture.METHODS[self.method].needs_base

    def each(self, key: str, default: float) -> slow.Shares:
        """The numbers of the models for a tensor, as the recipe states them."""
        values = [
            self.own.get(model, {}).get(key, self.shared.get(key, default)) for model in self.models
        ]
        return lambda name: [at(value, name, default) for value in values]

    def number(self, key: str, default: float) -> Callable[[str], float]:
        """One number for a tensor."""
        return lambda name: at(self.shared.get(key, default), name, default)

    def options(self, *keys: str) -> dict[str, Any]:
        """Those of the shared parameters that are set."""
        return {key: self.shared[key] for key in keys if key in self.shared}

    def __str__(self) -> str:
        words = [f"{k}={v}" for k, v in self.shared.items() if not isinstance(v, Mapping)]
        words += ["patterns"] * any(isinstance(v, Mapping) for v in self.shared.values())
        return "-".join([self.method, *words, *(["own"] if self.own else []),
                         *(["one"] if len(self.models) == 1 else []),
                         *(["based"] if self.based else [])])  # fmt: skip


def at(value: float | Mapping[str, float], name: str, default: float) -> float:
    """A number, or the one of the first pattern that fits a name."""
    if not isinstance(value, Mapping):
        return value
    return next((v for p, v in value.items() if fnmatchcase(name, p)), default)


class Given(dict[str, dict[str, Array]]):
    """What a twin is given, and beside it the base and the shapes of tensors."""

    base: dict[str, Array]
    shapes: dict[str, tuple[int, ...]]


def statistics(kind: str, of: slow.Vectors) -> dict[str, dict[str, Array]]:
    """The invented statistics that ``toy.recipe`` gives these models."""
    shapes = {n: tuple(t.shape) for n, t in toy.base_tensors().items()}
    found: dict[str, dict[str, Array]] = {}
    for model, vector in of.items():
        for name in vector:
            kinds = toy.invented(model, name, shapes[name])
            if kind in kinds:
                values = kinds[kind] if kind == "gram" else kinds[kind].ravel()
                found.setdefault(model, {})[name] = values
    return found


TWINS: dict[str, Callable[[Given, Case], dict[str, Array]]] = {
    "linear": lambda v, c: slow.linear(v, c.each("weight", 1.0), **c.options("normalize")),
    "slerp": lambda v, c: slow.slerp(v, c.number("t", 0.5)),
    "passthrough": lambda v, c: slow.linear(v, c.each("scale", 1.0), normalize=False),
    "task_arithmetic": lambda v, c: slow.task_arithmetic(
        v, c.each("weight", 1.0), c.number("scale", 1.0), **c.options("normalize")
    ),
    "ties": lambda v, c: (more.ties if {"votes", "rescale"} & c.shared.keys() else slow.ties)(
        v, c.each("weight", 1.0), c.each("density", 0.2), c.number("scale", 1.0),
        **c.options("scope", "elect", "aggregate", "zero_sign", "rounding", "votes", "rescale"),
    ),
    "breadcrumbs": lambda v, c: more.breadcrumbs(
        v, c.each("weight", 1.0), c.each("density", 0.14), c.each("gamma", 0.01),
        c.number("scale", 1.0), **c.options("scope", "rounding", "rescale", "normalize"),
    ),
    "breadcrumbs_ties": lambda v, c: more.voted(
        more.restored(
            more.crumbs(v, c.each("density", 0.14), c.each("gamma", 0.01),
                        **c.options("scope", "rounding")),
            v, c.shared.get("rescale") == "l1"),
        c.each("weight", 1.0), c.number("scale", 1.0),
        **c.options("elect", "aggregate", "zero_sign", "votes"),
    ),
    "della_linear": lambda v, c: more.della_linear(
        v, v.shapes, c.each("weight", 1.0), c.each("density", 0.7), c.each("epsilon", 0.07),
        c.number("scale", 1.0), **c.options("seed", "rescale", "normalize"),
    ),
    "della": lambda v, c: more.voted(
        more.magprune(v, v.shapes, c.each("density", 0.7), c.each("epsilon", 0.07),
                      c.shared.get("seed", 0), c.shared.get("rescale", "probability")),
        c.each("weight", 1.0), c.number("scale", 1.0),
        **c.options("elect", "aggregate", "zero_sign", "votes"),
    ),
    "sce": lambda v, c: more.sce(
        v, c.number("density", 0.1), c.number("scale", 1.0),
        **c.options("counted", "rounding", "zero_sign", "equal_below"),
    ),
    "ram": lambda v, c: more.ram(v, c.number("scale", 1.0), **c.options("epsilon")),
    "ramplus_tl": lambda v, c: more.ram(
        v, c.number("scale", 1.0),
        **{"gain": 0.1, "most": 0.2, **c.options("epsilon", "gain", "most")},
    ),
    "model_stock": lambda v, c: more.model_stock(
        v, v.shapes, c.number("scale", 1.0), **c.options("over", "clamp")
    ),
    "nuslerp": lambda v, c: more.nuslerp(
        v, c.each("weight", 1.0), v.shapes, **c.options("over")
    ),
    "multislerp": lambda v, c: more.multislerp(
        v, c.each("weight", 1.0), **c.options("normalize")
    ),
    "karcher": lambda v, c: more.karcher(
        v, c.each("weight", 1.0), **c.options("max_iter", "tolerance")
    ),
    "nearswap": lambda v, c: more.nearswap(v, c.number("t", 1e-4)),
    "arcee_fusion": lambda v, c: more.arcee_fusion(v, v.base, v.shapes, c.number("spread", 1.5)),
    "tsv_merge": lambda v, c: more.tsv_merge(
        v, v.shapes, c.each("weight", 1.0), c.number("scale", 1.0)
    ),
    "iso_c": lambda v, c: more.iso_c(
        v, v.shapes, c.each("weight", 1.0), c.number("scale", 1.0), **c.options("isotropy")
    ),
    "iso_cts": lambda v, c: more.iso_cts(
        v, v.shapes, c.each("weight", 1.0), c.number("scale", 1.0),
        **c.options("common", "isotropy"),
    ),
    "stitch": lambda v, c: slow.stitch(
        v, c.each("weight", 1.0), c.each("density", 0.05), c.number("scale", 1.0),
        **c.options("scope"),
    ),
    "dare_linear": lambda v, c: slow.dare_linear(
        v, c.each("weight", 1.0), c.each("density", 0.5), c.number("scale", 1.0),
        **c.options("seed", "rescale", "normalize"),
    ),
    "dare_ties": lambda v, c: slow.dare_ties(
        v, c.each("weight", 1.0), c.each("density", 0.5), c.number("scale", 1.0),
        **c.options("seed", "rescale", "elect", "aggregate", "zero_sign"),
    ),
    "consensus": lambda v, c: slow.consensus(
        v, c.each("weight", 1.0), c.each("tall_threshold", 0.4), c.number("scale", 1.0),
        **c.options("min_tasks"),
    ),
    "fisher_merging": lambda v, c: slow.fisher_merging(
        v, c.each("weight", 1.0), statistics("fisher", v), c.number("scale", 1.0),
        **c.options("floor", "normalize"),
    ),
    "led": lambda v, c: slow.led(
        v, v.base, statistics("abs_grad", v), statistics("base", v), c.each("density", 0.4),
        c.each("weight", 1.0), **c.options("elect", "safety"),
    ),
    "regmean": lambda v, c: slow.regmean(
        v, statistics("gram", v), c.number("scale", 1.0), **c.options("alpha")
    ),
}  # fmt: skip
"""Each method's twin, with the defaults that the method's signature has."""

# Crooked numbers: 0.3 times a multiple of a bfloat16 step is often the middle between two steps,
# and then the error of 0.3 itself, far below float32, decides the rounding.
OWN = {
    "ada": {"weight": 0.7137, "density": 0.5},
    "bob": {"weight": 1.2941},
    "cyd": {"weight": -0.4173, "density": 0.9},
}
WEIGHTS = {"ada": {"weight": 0.7137}, "bob": {"weight": 1.2941}, "cyd": {"weight": -0.4173}}
PATTERNS = {"*.mlp.*": 0.25, "*.0.*": 0.6137, "*": 0.1173}

CASES = [
    Case("linear"),
    Case("linear", models=MODELS[:1]),
    Case("linear", {"normalize": False}, WEIGHTS),
    Case("linear", {"weight": {"*.mlp.*": 2.0, "*": 0.5}}, {"bob": {"weight": 0.1173}}),
    Case("linear", {"weight": -1.1371}, {"bob": {"weight": -3.2913}}),
    Case("passthrough", models=MODELS[:1]),
    Case("passthrough", {"scale": {"*.mlp.*": 0.6137, "*": 1.0}}, models=MODELS[:1]),
    Case("slerp", models=MODELS[:2]),
    Case("slerp", {"t": 0.2}, models=("bob", "ada")),
    Case("slerp", {"t": PATTERNS}, models=("cyd", "ada")),
    Case("task_arithmetic"),
    Case("task_arithmetic", {"scale": 0.3173}, WEIGHTS),
    Case("task_arithmetic", {"normalize": True, "scale": {"*.mlp.*": 2.0}}, WEIGHTS),
    Case("task_arithmetic", {"scale": -1.0}, models=MODELS[:1]),
    Case("ties"),
    Case("ties", {"scope": "layer", "density": 0.5}, WEIGHTS),
    Case("ties", {"scope": "tensor", "rounding": "floor", "density": 0.3, "scale": 1.7113}),
    Case("ties", {"density": PATTERNS, "scope": "tensor"}),
    Case("ties", {"density": PATTERNS}, {"bob": {"density": 0.5}}),
    Case("ties", {"scale": PATTERNS}, OWN),
    Case("stitch"),
    Case("stitch", {"density": 0.4, "scope": "layer"}, WEIGHTS),
    Case("stitch", {"density": 0.7, "scope": "tensor", "scale": 0.5}),
    Case("stitch", {"density": PATTERNS}),
    Case("dare_linear"),
    Case("dare_linear", {"seed": 5, "rescale": "l1", "normalize": True}, OWN),
    Case("dare_linear", {"rescale": "none", "density": PATTERNS, "scale": 0.3173}),
    Case("dare_ties", {"seed": 2**63 - 1}),
    Case(
        "dare_ties", {"rescale": "l1", "aggregate": "weighted_mean", "zero_sign": "positive"}, OWN
    ),
    Case("dare_ties", {"rescale": "none", "elect": "count", "aggregate": "sum"}, WEIGHTS),
    Case("consensus"),
    Case("consensus", {"min_tasks": 1, "tall_threshold": 0.2, "scale": 0.4173}, WEIGHTS),
    Case("consensus", {"min_tasks": 3, "tall_threshold": PATTERNS}),
    Case("consensus", {"min_tasks": 0}, WEIGHTS),
    Case("ties", {"scope": "tensor", "density": 0.3, "rescale": "l1"}, WEIGHTS),
    Case("ties", {"rescale": "l1", "zero_sign": "majority", "votes": "equal"}, WEIGHTS),
    *(
        Case("ties", {"density": 0.6, "votes": "equal", "aggregate": a, "elect": e}, WEIGHTS)
        for a in ("mean", "sum", "weighted_mean", "max")
        for e in ("mass", "count")
    ),
    Case("breadcrumbs"),
    Case("breadcrumbs", {"density": 0.4, "gamma": 0.2, "rescale": "l1"}, WEIGHTS),
    Case("breadcrumbs", {"scope": "global", "rounding": "floor", "normalize": True}, OWN),
    Case("breadcrumbs", {"density": PATTERNS, "gamma": {"*.mlp.*": 0.9, "*": 0.1}}),
    Case("breadcrumbs_ties", {"density": 0.5, "gamma": 0.1, "scope": "layer"}, WEIGHTS),
    Case("breadcrumbs_ties", {"rescale": "l1", "votes": "equal", "density": 0.8}, WEIGHTS),
    Case("della_linear", {"seed": 5, "density": 0.4, "epsilon": 0.3}, WEIGHTS),
    Case("della_linear", {"rescale": "l1", "normalize": True}, WEIGHTS),
    Case("della_linear", {"rescale": "none", "density": PATTERNS, "epsilon": 0.1, "scale": 0.3173}),
    Case("della", {"seed": 2**63 - 1}),
    Case(
        "della", {"rescale": "l1", "aggregate": "weighted_mean", "zero_sign": "positive"}, WEIGHTS
    ),
    Case("sce", {"density": 1.0}),
    Case("sce", {"density": 0.3, "scale": 0.4173, "zero_sign": "positive"}),
    Case("sce", {"density": PATTERNS, "counted": "nonzero", "rounding": "floor"}),
    Case("sce", {"density": 0.5, "equal_below": 1.0}),
    Case("sce", {"density": 1.0}, models=MODELS[:1]),
    Case("ram", {"epsilon": 0.05, "scale": 0.7137}),
    Case("ramplus_tl", {"epsilon": 0.1, "gain": 0.7, "most": 1.3}),
    Case("model_stock", {"scale": 0.7137}),
    Case("model_stock", {"clamp": False}),
    Case("model_stock", {"over": "row", "clamp": False}, models=MODELS[:2]),
    *(
        Case("nuslerp", {"over": over}, WEIGHTS, MODELS[:2], based)
        for over in ("tensor", "row", "column")
        for based in (False, True)
    ),
    Case("multislerp", {}, {"bob": {"weight": 0.2}}),
    Case("multislerp", {"normalize": False}, WEIGHTS, based=True),
    Case("karcher", {"weight": PATTERNS}, {"bob": {"weight": 2.0}}),
    Case("karcher", {"max_iter": 1}),
    Case("nearswap", {"t": {"*.mlp.*": 0.03, "*": 0.1}}, models=MODELS[:1]),
    Case("arcee_fusion", models=MODELS[:1]),
    Case("arcee_fusion", {"spread": -0.25}, models=MODELS[1:2]),
    Case("tsv_merge", {"scale": 0.7137}, WEIGHTS),
    Case("tsv_merge", models=MODELS[:2]),
    Case("iso_c", {"scale": 0.7137}, WEIGHTS),
    Case("iso_c", {"isotropy": 0.3}),
    Case("iso_cts", {"scale": 0.7137}, WEIGHTS),
    Case("iso_cts", {"common": 0.3, "isotropy": 0.9}, models=MODELS[:2]),
    Case("fisher_merging"),
    Case(
        "fisher_merging",
        {"normalize": True, "floor": 1e-3, "scale": PATTERNS},
        {"bob": {"weight": 1.2941}},
    ),
    Case("fisher_merging", models=MODELS[:1]),
    Case("led"),
    Case("led", {"density": PATTERNS}, WEIGHTS),
    *(
        Case("led", {"elect": e, "density": 0.6}, OWN)
        for e in ("expert", "base", "either", "expert_only", "base_only", "neither")
    ),
    Case("led", {"disjoint": "safety_first", "safety": "bob", "density": 0.7}),
    Case("regmean"),
    Case("regmean", {"alpha": 0.3173, "scale": 0.7113}),
    Case("regmean", {"alpha": 1.0}, models=MODELS[:2]),
]
TIES_OPTIONS = [
    Case("ties", {"density": density, "elect": elect, "aggregate": aggregate, "zero_sign": zero})
    for density in (0.3, 1.0)
    for elect in ("mass", "count")
    for aggregate in ("mean", "sum", "weighted_mean", "max")
    for zero in ("zero", "majority", "positive")
]


def wide(tensor: torch.Tensor) -> Array:
    """The numbers of a tensor, flattened; float64 only where the file has it."""
    kind = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.to(kind).reshape(-1).numpy()


def vectors(case: Case, family: Any, names: Sequence[str], deltas: bool) -> Given:
    """What a twin is given: deltas (formed as the specification says) or weights, as float64."""
    found = Given()
    found.base = {n: wide(family.base[n]).astype(np.float64) for n in names}
    found.shapes = {n: tuple(family.base[n].shape) for n in names}
    for model in case.models:
        tensors = family.models[model]
        found[model] = {}
        for name in names:
            value = wide(tensors[name])
            if deltas:
                start = wide(family.base[name])
                if value.dtype != start.dtype:
                    value, start = value.astype(np.float32), start.astype(np.float32)
                value = (value - start).astype(np.float32)
            found[model][name] = value.astype(np.float64)
    return found


def exact(case: Case, family: Any, names: Sequence[str]) -> dict[str, Array]:
    """The merged weights by the twin, in float64, not yet rounded."""
    merged = TWINS[case.method](vectors(case, family, names, case.deltas), case)
    if not case.deltas:
        return merged
    return {n: family.base[n].double().reshape(-1).numpy() + x for n, x in merged.items()}


def follow(case: Case, family: Any, merged: Merged, **sections: Any) -> Tensors:
    base = family.base_path if case.deltas else None
    paths = family.some(*case.models)
    return merged(case.method, paths, base, own=case.own, **case.shared, **sections)


def nearest(values: Array, dtype: torch.dtype) -> torch.Tensor:
    """Float64 rounded once to a 16-bit dtype."""
    form = rounding.BF16 if dtype == torch.bfloat16 else rounding.F16
    return torch.tensor([rounding.nearest(x, form) for x in values.tolist()]).to(dtype)


def assert_close(
    out: torch.Tensor, expected: Array, name: str, near: float = 1e-6
) -> tuple[int, int]:
    """Float32 tolerance, or one step of 16 bits; how many entries are unequal, of how many."""
    if out.dtype in (torch.bfloat16, torch.float16):
        steps = toy.steps_apart(out, nearest(expected, out.dtype))
        # Where base and delta nearly cancel, float32 leaves a dust of many tiny steps.
        dust = np.abs(out.double().reshape(-1).numpy() - expected) < 1e-7
        assert ((steps <= 1) | dust).all(), name
        return int((steps > 0).sum()), steps.size
    np.testing.assert_allclose(
        out.double().reshape(-1).numpy(), expected, rtol=1e-6, atol=near, err_msg=name
    )
    return 0, 0


def check(out: Tensors, case: Case, family: Any, names: Sequence[str]) -> None:
    """Every tensor of an output: merged ones as the twin has them, the others untouched."""
    reference = family.base
    if not case.deltas:
        first = case.models[0] if suture.METHODS[case.method].ordered else min(case.models)
        reference = family.models[first]
    expected = exact(case, family, names)
    assert out.keys() == reference.keys()
    unequal = total = 0
    for name, tensor in reference.items():
        assert (out[name].dtype, out[name].shape) == (tensor.dtype, tensor.shape), name
        if name in expected:
            # Singular vectors of float32 that lie near each other are less sharp than its sums.
            near = 1e-5 if suture.METHODS[case.method].tensorwise else 1e-6
            off, of = assert_close(out[name], expected[name], name, near)
            unequal, total = unequal + off, total + of
        else:
            assert toy.raw_bytes(out[name]) == toy.raw_bytes(tensor), name
    # Two roundings instead of one may differ only where the exact value is nearly a tie.
    assert unequal <= max(2, total / 200), f"{unequal} of {total} entries are a step off"


def test_a_tensor_of_two_pieces_is_one_tensor(tmp_path: Path, merged: Merged) -> None:
    """Angles, sums of magnitudes and counts take in more than the first 2**20 elements."""
    n = (1 << 20) + 5000
    draw = torch.Generator().manual_seed(6)
    one = torch.randn(n, generator=draw)
    one[1 << 20 :] += 5
    other = torch.randn(n, generator=draw)
    place, paths = small_family(
        tmp_path, {"w": torch.zeros(n)}, {"a": {"w": one}, "b": {"w": other}}
    )

    arc = merged("slerp", paths, t=0.3)["w"]
    thin = merged("dare_linear", {"a": paths["a"]}, place, rescale="l1", density=0.5)["w"]
    what = toy.recipe("stitch", {"a": paths["a"]}, place, density=0.25)
    _, report = toy.run(tmp_path / "out", what)

    vectors_of = {m: {"w": x.double().numpy()} for m, x in (("a", one), ("b", other))}
    expected = slow.slerp(vectors_of, lambda name: 0.3)["w"]
    np.testing.assert_allclose(arc.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert float(thin.double().abs().sum()) == pytest.approx(
        float(one.double().abs().sum()), rel=1e-6
    )
    assert report.moved == report.facts["kept"][0] == round(0.25 * n)

    base = toy.folder(tmp_path / "64", {"w": torch.full((n,), 64.0, dtype=torch.bfloat16)})
    tuned = {"c": toy.folder(tmp_path / "c", {"w": 64 + other / 4})}
    _, report = toy.run(tmp_path / "rounded", toy.recipe("task_arithmetic", tuned, base))
    changed = 64 + other / 4 != 64
    lost = changed & ((64 + other / 4).to(torch.bfloat16) == 64)
    assert report.writeback_loss == int(lost.sum()) / int(changed.sum()) > 0.2


def test_every_method_has_a_twin() -> None:
    """A new method needs its paper's algorithm in plain loops."""
    own = {name for name, line in suture.METHODS.own.items() if line.example.twin is not None}
    assert TWINS.keys() | own == suture.METHODS.own.keys()
    assert not TWINS.keys() & own


@pytest.mark.parametrize("flavour", ["f32", "mixed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_merge_is_its_twin(case: Case, flavour: str, family: Any, merged: Merged) -> None:
    """From files to files each method does what its paper says, with any of its options."""
    models = family(flavour)

    check(follow(case, models, merged), case, models, models.names)


@pytest.mark.parametrize("flavour", ["bf16", "f16", "f64"])
@pytest.mark.parametrize("method", sorted(TWINS))
def test_a_merge_is_its_twin_in_every_dtype(
    method: str, flavour: str, family: Any, merged: Merged
) -> None:
    """In 16 bits within one step of the exact result, and almost always equal to it."""
    case = Case(method, models=MODELS[: suture.METHODS[method].most])
    models = family(flavour)

    check(follow(case, models, merged), case, models, models.names)


@pytest.mark.parametrize("case", TIES_OPTIONS, ids=str)
def test_ties_with_ties(case: Case, family: Any, merged: Merged) -> None:
    """All options of TIES where nearly every magnitude is tied and votes cancel exactly."""
    models = family("bf16", grid=True)

    check(follow(case, models, merged), case, models, models.names)


GRID_CASES = [
    Case("stitch", {"density": 0.3}),
    Case("stitch", {"density": 0.5, "scope": "tensor"}),
    Case("ties", {"density": 0.45, "scope": "layer"}),
    Case("consensus", {"tall_threshold": 0.5}),
    Case("consensus", {"tall_threshold": 1.0, "min_tasks": 1}),
    Case("dare_ties", {"zero_sign": "positive", "elect": "count"}),
]


@pytest.mark.parametrize("flavour", ["f32", "f16", "mixed"])
@pytest.mark.parametrize("case", GRID_CASES, ids=str)
def test_ties_everywhere(case: Case, flavour: str, family: Any, merged: Merged) -> None:
    """Tied thresholds, cancelled votes and equal bounds, in several dtypes."""
    models = family(flavour, grid=True)

    check(follow(case, models, merged), case, models, models.names)


SPACES = [
    {"exclude": []},
    {"include": ["q", "mlp.down"]},
    {"include": ["*.layers.1.*"], "exclude": ["norm", "*.bias"]},
    {"include": ["embedding"], "exclude": []},
]


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "linear", "dare_linear"])
def test_the_space_decides_what_is_merged(
    method: str, space: Any, family: Any, merged: Merged
) -> None:
    """Tensors outside the space come from the base and do not count in a global threshold."""
    models = family("f32")
    case = Case(method, {"density": 0.3} if method != "linear" else {})
    if method == "task_arithmetic":
        case = Case(method)
    chosen = suture.ParamSpace(
        tuple(space.get("include", ())), tuple(space.get("exclude", ("embedding", "head")))
    )

    out = follow(case, models, merged, space=space)

    check(out, case, models, toy.editable(models.base, chosen))


@pytest.mark.parametrize(
    ("flavour", "word", "dtype"),
    [
        ("f32", "bfloat16", torch.bfloat16),
        ("f64", "bfloat16", torch.bfloat16),
        ("bf16", "float32", torch.float32),
        ("mixed", "float16", torch.float16),
        ("mixed", "float32", torch.float32),
    ],
)
@pytest.mark.parametrize("method", ["ties", "linear"])
def test_the_output_dtype_is_the_last_rounding(
    method: str, flavour: str, word: str, dtype: torch.dtype, family: Any, merged: Merged
) -> None:
    """Everything floating but buffers gets the dtype asked for, rounded from float32 once."""
    models = family(flavour)
    case = Case(method)

    out = follow(case, models, merged, output={"dtype": word})

    expected = exact(case, models, models.names)
    reference = models.base if method == "ties" else models.models["ada"]
    for name, tensor in reference.items():
        if name in toy.BUFFERS:
            assert toy.raw_bytes(out[name]) == toy.raw_bytes(tensor)
            continue
        assert out[name].dtype == dtype
        if name in expected:
            assert_close(out[name], expected[name], name)
        else:
            assert torch.equal(out[name], tensor.float().to(dtype))


# ---------------------------------------------------------- acceptance (spec/stitch.md, section 9)

ALONE: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"scale": 1.0},
    "stitch": {"density": 1.0},
    "ties": {"density": 1.0, "scale": 1.0},
    "consensus": {"min_tasks": 1, "tall_threshold": 0.0, "scale": 1.0},
    "dare_linear": {"density": 1.0},
    "dare_ties": {"density": 1.0},
}


def small_family(where: Path, base: Tensors, models: Mapping[str, Tensors]) -> tuple[Path, Any]:
    paths = {name: toy.folder(where / name, tensors) for name, tensors in models.items()}
    return toy.folder(where / "base", base), paths


@pytest.mark.parametrize("method", sorted(ALONE))
def test_one_model_alone_comes_back(method: str, family: Any, merged: Merged) -> None:
    """Acceptance 1: with T = 1 each method, at its neutral setting, returns that model."""
    models = family("f32")
    base = models.base_path if method != "linear" else None

    out = merged(method, models.some("bob"), base, **ALONE[method])

    for name in models.names:
        torch.testing.assert_close(out[name], models.models["bob"][name], rtol=1e-6, atol=1e-6)


def test_disjoint_supports_add_up(tmp_path: Path, merged: Merged) -> None:
    """Acceptance 2: where no entry is shared, stitching = task arithmetic = TIES with sum."""
    base = {"w": torch.randn(900, generator=torch.Generator().manual_seed(1))}
    models = {}
    for i in range(3):
        w = base["w"].clone()
        w[i::3] += 0.1 * torch.randn(300, generator=torch.Generator().manual_seed(2 + i))
        models[f"m{i}"] = {"w": w}
    place, paths = small_family(tmp_path, base, models)

    stitched = merged("stitch", paths, place, density=0.4)
    added = merged("task_arithmetic", paths, place, scale=1.0)
    elected = merged("ties", paths, place, density=0.4, aggregate="sum")

    assert toy.same_bytes(stitched, added) == toy.same_bytes(elected, added) == []
    expected = sum(m["w"] - base["w"] for m in models.values()) + base["w"]
    torch.testing.assert_close(added["w"], expected)


def test_identical_experts(family: Any, merged: Merged) -> None:
    """Acceptance 3: of three copies soup, stitching and TIES make the model; adding overshoots."""
    models = family("f32")
    copies = {f"copy{i}": models.paths["ada"] for i in range(3)}
    expert, base = models.models["ada"], models.base

    same = [
        merged("linear", copies),
        merged("stitch", copies, models.base_path, density=1.0),
        merged("ties", copies, models.base_path, density=1.0),
    ]
    added = merged("task_arithmetic", copies, models.base_path, scale=0.4)

    for name in models.names:
        for out in same:
            torch.testing.assert_close(out[name], expert[name], rtol=1e-6, atol=1e-6)
        overshot = base[name] + 0.4 * 3 * (expert[name] - base[name])
        torch.testing.assert_close(added[name], overshot, rtol=1e-6, atol=1e-6)


def test_where_masks_overlap_the_mean_is_taken(tmp_path: Path, merged: Merged) -> None:
    """Acceptance 4: entries of one, two, three masks get the whole, half, third of the sum."""
    base = {"w": torch.zeros(8)}
    deltas = {
        "a": [9.0, 8.0, 7.0, 0.1, 0, 0, 0, 0.2],
        "b": [0.1, 6.0, 3.0, 0, 0, 5.0, 0, 0],
        "c": [0.1, 0.1, 5.0, 0, 0, 0, -6.0, 4.0],
    }
    place, paths = small_family(
        tmp_path, base, {n: {"w": torch.tensor(d)} for n, d in deltas.items()}
    )

    out = merged("stitch", paths, place, density=3 / 8)

    assert out["w"].tolist() == [9.0, 7.0, 5.0, 0, 0, 5.0, -6.0, 4.0]


def test_no_input_is_touched(family: Any, merged: Merged) -> None:
    """Acceptance 5: after a merge by every method the bytes of base and models are the same."""
    models = family("mixed")
    places = (models.base_path, *models.paths.values())
    before = toy.files_digest(*places)

    for method in suture.METHODS:
        chosen = MODELS[: suture.METHODS[method].most]
        follow(Case(method, models=chosen), models, merged)

    assert toy.files_digest(*places) == before


def test_names_order_buffers_and_ties_do_not_matter(tmp_path: Path, merged: Merged) -> None:
    """Acceptance 6: all-zero base tensor, tied head, one more buffer, other key order: the same."""
    base = toy.base_tensors("bf16")
    base[toy.HEAD] = base[EMBEDDING].clone()
    models = {n: toy.tuned(base, i) for i, n in enumerate(MODELS)}
    for tensors in models.values():
        tensors[toy.HEAD] = tensors[EMBEDDING].clone()
    space = {"exclude": []}

    def in_order(where: Path, keys: Callable[[Tensors], Sequence[str]], tied: bool) -> Tensors:
        paths = {}
        for name, tensors in {"base": base, **models}.items():
            (where / name).mkdir(parents=True)
            text = '{"tie_word_embeddings": true}' if tied else "{}"
            (where / name / "config.json").write_text(text)
            paths[name] = where / name
            toy.save_in_order(where / name / "model.safetensors", tensors, keys(tensors))
        place = paths.pop("base")
        return merged("ties", paths, place, space=space, density=0.3)

    def forward(tensors: Tensors) -> list[str]:
        return sorted(tensors)

    def backward(tensors: Tensors) -> list[str]:
        return sorted(tensors, reverse=True)

    def without_tied(tensors: Tensors) -> list[str]:
        return [n for n in sorted(tensors) if n != toy.HEAD]

    def without_more(tensors: Tensors) -> list[str]:
        return [n for n in sorted(tensors) if n not in (toy.HEAD, toy.BUFFERS[1])]

    one = in_order(tmp_path / "1", forward, tied=True)
    assert toy.HEAD not in one, "the second name of a tied tensor is not written"
    assert one[toy.ZERO].any()
    assert toy.same_bytes(one, in_order(tmp_path / "2", backward, tied=True)) == []
    assert toy.same_bytes(one, in_order(tmp_path / "3", without_tied, tied=False)) == []
    fewer = in_order(tmp_path / "4", without_more, tied=True)
    assert toy.same_bytes(one, fewer) == [toy.BUFFERS[1]]


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_a_cancelling_pair_contributes_nothing(method: str, tmp_path: Path, merged: Merged) -> None:
    """Acceptance 7: where +1 and -1 meet the elected sign is 0 and the entry stays at the base."""
    base = {"w": torch.full((4,), 0.5)}
    plus, minus = torch.tensor([1.0, 1, -1, 0]), torch.tensor([-1.0, 2, 1, 0])
    place, paths = small_family(
        tmp_path, base, {"plus": {"w": base["w"] + plus}, "minus": {"w": base["w"] + minus}}
    )

    out = merged(method, paths, place, density=1.0)

    assert out["w"].tolist() == [0.5, 2.0, 0.5, 0.5]


@pytest.mark.parametrize("block", [1 << 6, 1 << 10, 1 << 16])
def test_top_k_keeps_exactly_k(block: int, tmp_path: Path) -> None:
    """Acceptance 8: with all deltas tied in bfloat16 exactly k entries move, in any blocks."""
    base = {"v": torch.ones(3001), "w": torch.ones(50, 70)}
    base = {n: t.to(torch.bfloat16) for n, t in base.items()}
    tuned = {n: t * 1.5 for n, t in base.items()}
    place, paths = small_family(tmp_path, base, {"a": tuned})
    what = toy.recipe("stitch", paths, place, density=0.37)

    out, report = toy.run(tmp_path / "out", what, block=block)

    moved = torch.cat([(out[n] != base[n]).flatten() for n in ("v", "w")])
    assert moved.tolist() == [i < round(0.37 * 6501) for i in range(6501)]
    assert report.facts["kept"] == [round(0.37 * 6501)]
    assert report.facts["tied_at_threshold"] == [6501]
    assert report.moved == round(0.37 * 6501)


def test_dare_is_the_same_in_any_chunks_and_averages_out(tmp_path: Path) -> None:
    """Acceptance 9: the same bytes in any blocks; n seeds err by sqrt(p / ((1 - p) n))."""
    draw = torch.Generator().manual_seed(3)
    base = {"w": torch.zeros(20_000)}
    delta = torch.randn(20_000, generator=draw)
    place, paths = small_family(tmp_path, base, {"a": {"w": delta}})
    seeds, p = 40, 0.9
    total = torch.zeros(20_000, dtype=torch.float64)
    for seed in range(seeds):
        what = toy.recipe("dare_linear", paths, place, density=1 - p, seed=seed)
        out, _ = toy.run(tmp_path / f"{seed}", what, block=1 << (6 + seed % 11))
        again, _ = toy.run(tmp_path / f"again-{seed}", what) if seed < 5 else (out, None)
        assert toy.same_bytes(out, again) == []
        total += out["w"].double()

    error = (total / seeds - delta).norm() / delta.norm()

    expected = math.sqrt(p / ((1 - p) * seeds))
    assert abs(error / expected - 1) < 0.05


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_slerp_on_the_circle(t: float, tmp_path: Path, merged: Merged) -> None:
    """Perpendicular: along the arc. Parallel, antiparallel: linearly. Zero: as if perpendicular."""
    one = {"arc": [1.0, 0.0], "same": [2.0, 4.0], "back": [1.0, 2.0], "zero": [0.0, 0.0]}
    other = {"arc": [0.0, 1.0], "same": [1.0, 2.0], "back": [-2.0, -4.0], "zero": [3.0, 4.0]}
    paths = {
        name: toy.folder(tmp_path / name, {n: torch.tensor(x) for n, x in values.items()})
        for name, values in (("z", one), ("a", other))
    }

    out = merged("slerp", paths, t=t)

    c, s = math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)
    assert out["arc"].tolist() == pytest.approx([c, s], abs=1e-6)
    assert out["same"].tolist() == pytest.approx([2 - t, 4 - 2 * t])
    assert out["back"].tolist() == pytest.approx([1 - 3 * t, 2 - 6 * t])
    assert out["zero"].tolist() == pytest.approx([3 * s, 4 * s])


# ------------------------------------------------------------------ traps (peers.md, section 4)


def three(where: Path, *columns: Sequence[float], base: float = 0.0) -> tuple[Path, Any]:
    """Models ``a``, ``b``, ... that change one small tensor by these deltas."""
    start = {"w": torch.full((len(columns[0]),), base)}
    return small_family(
        where,
        start,
        {chr(97 + i): {"w": start["w"] + torch.tensor(c)} for i, c in enumerate(columns)},
    )


@pytest.mark.parametrize(("elect", "merged_to"), [("mass", 10.0), ("count", -1.0)])
def test_the_sign_of_the_mass_is_elected(
    elect: str, merged_to: float, tmp_path: Path, merged: Merged
) -> None:
    """T4: of [10, -1, -1] the mass elects plus; counting signs, an option, elects minus."""
    place, paths = three(tmp_path, [10.0], [-1.0], [-1.0])

    out = merged("ties", paths, place, density=1.0, elect=elect)

    assert out["w"].tolist() == [merged_to]


@pytest.mark.parametrize(("zero", "first"), [("zero", 0.0), ("positive", 1.0), ("majority", -1.0)])
def test_a_tied_vote_is_an_option(zero: str, first: float, tmp_path: Path, merged: Merged) -> None:
    """T5: an exact zero sum elects nothing, plus, or the sign that most entries elected."""
    place, paths = three(tmp_path, [1.0, -2, -3, 4], [-1.0, -2, -3, 4], base=0.0)

    out = merged("ties", paths, place, density=1.0, zero_sign=zero)

    # The signs elected are 0, -, -, +: minus has the majority.
    assert out["w"].tolist() == [first, -2, -3, 4]


@pytest.mark.parametrize(
    ("aggregate", "half", "whole"),
    [("mean", 1.5, 3.0), ("sum", 3.0, 6.0), ("weighted_mean", 3.0, 3.0), ("max", 2.0, 4.0)],
)
def test_what_weights_do(
    aggregate: str, half: float, whole: float, tmp_path: Path, merged: Merged
) -> None:
    """T6: weights 0.5 / 0.5 and 1 / 1 give half and whole, but for ``weighted_mean``."""
    place, paths = three(tmp_path, [4.0], [2.0], [-1.0])
    for weight, expected in ((0.5, half), (1.0, whole)):
        out = merged("ties", paths, place, density=1.0, aggregate=aggregate, weight=weight)

        assert out["w"].tolist() == [expected]


def test_dare_divides_by_the_density(tmp_path: Path, merged: Merged) -> None:
    """T7: kept entries are divided by the density itself, not by what happened to be kept."""
    place, paths = three(tmp_path, [float(i) for i in range(1, 65)])

    out = merged("dare_linear", paths, place, density=0.25, seed=3)

    kept = np.array(philox.keeps(3, "a", "w", 64, 0.25))
    assert 0 < kept.sum() != 16
    assert out["w"].tolist() == (np.arange(1, 65) * kept * 4.0).tolist()


def test_dare_can_restore_the_sum_of_magnitudes(tmp_path: Path, merged: Merged) -> None:
    """T7, T8: ``rescale: l1`` gives each tensor its sum of magnitudes back, in float64."""
    delta = torch.randn(30_000, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    place, paths = small_family(tmp_path, {"w": torch.zeros(30_000)}, {"a": {"w": delta.float()}})

    out = merged("dare_linear", paths, place, density=0.1, rescale="l1")

    sums = [float(x.double().abs().sum()) for x in (out["w"], delta)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


@pytest.mark.parametrize("density", [0.999, 0.9, 0.001])
def test_the_density_of_dare_is_not_rounded(density: float, tmp_path: Path, merged: Merged) -> None:
    """T9: in bfloat16, too, 0.999 and 0.001 are kept shares of their own (within 5 sigma)."""
    n = 200_000
    base = {"w": torch.zeros(n, dtype=torch.bfloat16)}
    place, paths = small_family(tmp_path, base, {"a": {"w": base["w"] + 1}})

    out = merged("dare_linear", paths, place, density=density, rescale="none")

    share = float((out["w"] != 0).double().mean())
    assert abs(share - density) < 5 * math.sqrt(density * (1 - density) / n)


def test_a_density_is_a_limit_on_32_bit_words() -> None:
    """T9: the limit is the nearest to the density; all words are below that of density 1."""
    for density in (2**-32, 0.1, 1 / 3, 0.7, 0.999, 1 - 2**-32, 1.0):
        assert limit_of(density) == round(density * 2**32)


def test_masks_of_layers_are_not_the_same(tmp_path: Path, merged: Merged) -> None:
    """T22: masks of tensors of one shape, and of models, agree no more often than by chance."""
    n = 40_000
    names = [f"model.layers.{i}.w" for i in range(2)]
    base = {name: torch.zeros(n) for name in names}
    tuned = {name: torch.ones(n) for name in names}
    place, paths = small_family(
        tmp_path, base, {"a": tuned, "b": {k: 10 * v for k, v in tuned.items()}}
    )

    out = merged("dare_linear", paths, place, density=0.5, rescale="none")

    masks = [(out[n].remainder(10) > 0, out[n] >= 10) for n in names]
    flat = [m for pair in masks for m in pair]
    for i, one in enumerate(flat):
        for other in flat[:i]:
            agree = float((one == other).double().mean())
            assert abs(agree - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_the_result_is_float64_s_rounded_once(tmp_path: Path, merged: Merged) -> None:
    """T13: TIES in bfloat16 is the exact result rounded; fewer than 1 in 1,000 are a step off."""
    draw = torch.Generator().manual_seed(5)
    base = {"w": (0.02 * torch.randn(20_000, generator=draw)).to(torch.bfloat16)}
    models = {
        n: {"w": (base["w"] + 0.002 * torch.randn(20_000, generator=draw)).to(torch.bfloat16)}
        for n in MODELS
    }
    place, paths = small_family(tmp_path, base, models)

    out = merged("ties", paths, place, density=0.5, scale=0.7137)["w"]

    deltas = {n: {"w": toy.flat(m, ["w"]) - toy.flat(base, ["w"])} for n, m in models.items()}
    merged_delta = slow.ties(
        deltas, slow.constant(1, 1, 1), slow.constant(0.5, 0.5, 0.5), lambda n: 0.7137
    )
    true = toy.flat(base, ["w"]) + merged_delta["w"]
    steps = toy.steps_apart(out, torch.from_numpy(rounding.to_bf16(true)).to(torch.bfloat16))
    dust = np.abs(out.double().numpy() - true) < 1e-8  # base and delta cancel but for a rounding
    assert ((steps <= 1) | dust).all()
    assert (steps > 0).mean() < 1e-3, f"{(steps > 0).sum()} of {steps.size} differ"


@pytest.mark.parametrize("flavour", ["bf16", "f16", "f32", "mixed", "f64"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "stitch"])
def test_what_rounding_undoes_is_counted(
    method: str, flavour: str, family: Any, tmp_path: Path
) -> None:
    """``writeback_loss``: the share of changed entries that rounding makes the base again."""
    models = family(flavour)
    shared = {"scale": 1e-4} if method == "task_arithmetic" else {"density": 0.5, "scale": 0.003}
    case = Case(method, shared)
    what = toy.recipe(method, models.some(*MODELS), models.base_path, **shared)

    out, report = toy.run(tmp_path / "out", what)

    merged_delta = TWINS[method](vectors(case, models, models.names, deltas=True), case)
    moved = lost = 0
    for name in models.names:
        changed = merged_delta[name] != 0
        same = (out[name] == models.base[name]).flatten().numpy()
        moved, lost = moved + int(changed.sum()), lost + int((changed & same).sum())
    assert abs(report.moved - moved) <= moved / 100  # float32 leaves a dust where float64 cancels
    assert report.writeback_loss == pytest.approx(lost / moved, abs=0.01)
    assert (report.writeback_loss > 0.2) == (flavour in ("bf16", "f16", "mixed"))


def test_nothing_moves_between_equal_models(family: Any, tmp_path: Path) -> None:
    """Where no entry changes there is no loss to speak of: ``None``, not a division by zero."""
    models = family("f32")
    what = toy.recipe("task_arithmetic", {"a": models.base_path}, models.base_path)

    _, report = toy.run(tmp_path / "out", what)

    assert (report.moved, report.writeback_loss) == (0, None)


def test_reports_tell_what_was_kept(family: Any, tmp_path: Path) -> None:
    """Entries kept, of how many, and the density reached, by model in the order of names."""
    models = family("bf16", grid=True)
    what = toy.recipe("ties", models.some(*reversed(MODELS)), models.base_path,
                      own={"ada": {"density": 0.001}, "bob": {"density": 1.0}},
                      density=0.1)  # fmt: skip

    _, report = toy.run(tmp_path / "out", what)

    n = sum(models.base[name].numel() for name in models.names)
    nonzero = sum(
        int((models.models["bob"][name] != models.base[name]).sum()) for name in models.names
    )
    assert report.facts["entries"] == n
    assert report.facts["kept"] == [round(0.001 * n), nonzero, round(0.1 * n)]
    assert report.facts["density"] == [kept / n for kept in report.facts["kept"]]


def test_the_majority_sign_is_that_of_the_whole_vector(tmp_path: Path) -> None:
    """T5: one tensor's tied vote takes the sign that most entries of all tensors elected."""
    base = {"a": torch.zeros(1), "b": torch.zeros(5)}
    one = {"a": torch.tensor([1.0]), "b": torch.tensor([-1.0, -1, -1, 1, 0])}
    other = {"a": torch.tensor([-1.0]), "b": torch.tensor([-1.0, -1, -1, 1, 0])}
    place, paths = small_family(tmp_path, base, {"one": one, "other": other})
    what = toy.recipe("ties", paths, place, density=1.0, zero_sign="majority")

    out, report = toy.run(tmp_path / "out", what)

    assert out["a"].tolist() == [-1.0]
    assert report.facts["majority_sign"] == -1


def test_float32_experts_of_a_bfloat16_base_keep_their_digits(
    tmp_path: Path, merged: Merged
) -> None:
    """T14: a delta between dtypes is formed in float32, not in the base's dtype."""
    base = {"w": torch.ones(4, dtype=torch.bfloat16)}
    place, paths = small_family(tmp_path, base, {"a": {"w": torch.tensor([1.0009765625] * 4)}})

    out = merged("task_arithmetic", paths, place, output={"dtype": "float32"})

    assert out["w"].tolist() == [1.0009765625] * 4


@pytest.mark.parametrize("method", sorted(TWINS))
def test_odd_tensors_survive(method: str, family: Any, merged: Merged) -> None:
    """T18: integer and boolean buffers bit for bit; scalars, empty and all-zero tensors, too."""
    models = family("mixed")
    chosen = MODELS[: suture.METHODS[method].most]

    out = follow(Case(method, models=chosen), models, merged)

    for name in toy.BUFFERS:
        assert toy.raw_bytes(out[name]) == toy.raw_bytes(models.base[name])
    assert out[toy.SCALAR].shape == ()
    assert out[toy.EMPTY].shape == (0, 4)
    assert out[toy.ZERO].shape == (3, 5)


def test_buffers_must_agree_or_be_named(family: Any, tmp_path: Path, merged: Merged) -> None:
    """T18: integer tensors that differ are an error, or those of the base if a recipe says so."""
    models = family("f32")
    other = dict(models.models["bob"])
    other[toy.BUFFERS[1]] = other[toy.BUFFERS[1]] + 1
    paths = {"ada": models.paths["ada"], "bob": toy.folder(tmp_path / "bob", other)}

    with pytest.raises(MismatchError, match=r"position_ids: integer tensors differ"):
        merged("task_arithmetic", paths, models.base_path)
    out = merged("task_arithmetic", paths, models.base_path, policy={"buffers": "base"})

    assert torch.equal(out[toy.BUFFERS[1]], models.base[toy.BUFFERS[1]])


def test_all_mismatches_are_told_at_once(family: Any, tmp_path: Path, merged: Merged) -> None:
    """T19, T20: wrong shapes, missing and extra tensors, all in one error, before the work."""
    models = family("f32")
    other = dict(models.models["bob"])
    del other["model.norm.weight"]
    other["model.more.weight"] = torch.zeros(2)
    other[toy.ZERO] = torch.zeros(5, 3)
    paths = {"bob": toy.folder(tmp_path / "bob", other)}

    with pytest.raises(MismatchError) as caught:
        merged("task_arithmetic", paths, models.base_path)

    text = str(caught.value)
    assert "model.norm.weight" in text
    assert "model.more.weight" in text
    assert f"{toy.ZERO} is [5, 3], not [3, 5]" in text


@pytest.mark.parametrize(
    "method", ["task_arithmetic", "ties", "stitch", "consensus", "dare_linear"]
)
def test_a_missing_tensor_may_be_the_base_s(
    method: str, family: Any, tmp_path: Path, merged: Merged
) -> None:
    """T20: with ``policy: missing: base`` a model without a tensor has a delta of zero there."""
    models = family("bf16")
    gone = "model.layers.0.mlp.up_proj.weight"
    without = {n: t for n, t in models.models["bob"].items() if n != gone}
    filled = {**models.models["bob"], gone: models.base[gone]}
    paths = models.some("ada", "cyd")

    one = merged(method, {**paths, "bob": toy.folder(tmp_path / "1" / "bob", without)},
                 models.base_path, policy={"missing": "base"})  # fmt: skip
    other = merged(method, {**paths, "bob": toy.folder(tmp_path / "2" / "bob", filled)},
                   models.base_path)  # fmt: skip

    assert toy.same_bytes(one, other) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["base", "bob"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear", "slerp", "dare_linear"])
def test_no_number_no_merge(
    method: str, where: str, value: float, family: Any, tmp_path: Path, merged: Merged
) -> None:
    """T24: NaN and infinity are refused, with tensor and count, unless they are allowed."""
    models = family("bf16")
    tensors = {"base": models.base, **models.models}
    bad = {n: t.clone() for n, t in tensors[where].items()}
    bad["model.norm.weight"][3] = value
    place = toy.folder(tmp_path / where, bad)
    base = place if where == "base" else models.base_path
    paths = {"ada": models.paths["ada"], "bob": place if where == "bob" else models.paths["bob"]}
    if not suture.METHODS[method].needs_base and where == "base":
        base, paths = None, {"ada": place, "bob": models.paths["bob"]}
    if not suture.METHODS[method].needs_base:
        base = None

    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight holds 1 NaN or infinite"):
        merged(method, paths, base)
    merged(method, paths, base, {"allow_nonfinite": True})


def test_what_does_not_fit_the_dtype_is_refused(family: Any, merged: Merged) -> None:
    """A merged value beyond float16 is an error with the tensor's name, not an infinity."""
    models = family("f16")

    with pytest.raises(NonFiniteError, match=r"do not fit into float16"):
        merged("task_arithmetic", models.some("ada"), models.base_path, scale=1e7)


# ------------------------------------------------------------------------ from Python


def test_python_and_recipes_give_the_same_bytes(family: Any, tmp_path: Path) -> None:
    """``suture.merge`` of open checkpoints writes what the recipe writes."""
    models = family("bf16")
    base, *rest = (suture.open(p) for p in (models.base_path, *models.some("ada", "bob").values()))
    weights = {"ada": 0.3, "bob": 0.8}

    made = suture.merge(
        base, dict(zip(weights, rest, strict=True)), "ties", weight=weights, density=0.3
    )
    suture.save(made, tmp_path / "one")
    what = toy.recipe("ties", models.some("ada", "bob"), models.base_path, density=0.3,
                      own={n: {"weight": w} for n, w in weights.items()})  # fmt: skip
    other, _ = toy.run(tmp_path / "two", what)

    assert toy.same_bytes(toy.read(tmp_path / "one"), other) == []


def test_a_task_vector_is_added_to_its_base(family: Any, tmp_path: Path) -> None:
    """Arithmetic of task vectors, saved: base + 0.5 (ada - base) - 2 (bob - base)."""
    models = family("f32")
    base, ada, bob = (
        suture.open(p) for p in (models.base_path, models.paths["ada"], models.paths["bob"])
    )

    suture.save(suture.merge(base, 0.5 * (ada - base) - 2 * (bob - base)), tmp_path / "out")

    out = toy.read(tmp_path / "out")
    for name in toy.editable(models.base, suture.ParamSpace((), ())):
        start, one, other = (
            x[name] for x in (models.base, models.models["ada"], models.models["bob"])
        )
        torch.testing.assert_close(
            out[name], start + 0.5 * (one - start) - 2 * (other - start), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize(
    "parameters",
    [
        {"densty": 0.5},
        {"density": 0},
        {"density": 1.5},
        {"density": -1},
        {"density": math.nan},
        {"density": True},
        {"density": "half"},
        {"density": {"*": 2}},
        {"scope": "everything"},
        {"scale": math.inf},
        {"scale": 10**400},
        {"weight": None},
        {"seed": -1},
    ],
    ids=str,
)
def test_wrong_parameters_are_refused(parameters: Any, family: Any, merged: Merged) -> None:
    """Unknown names, shares outside (0, 1], what is no number: refused by name."""
    models = family("f32")

    with pytest.raises(RecipeError, match=next(iter(parameters))):
        merged("ties", models.some("ada"), models.base_path, **parameters)


# ------------------------------------------------------------------------ found by breaking it


def test_roles_and_names_choose_numbers(family: Any, merged: Merged) -> None:
    """In a mapping of numbers a role, a pattern and a whole name work as they do in ``space``."""
    models = family("f32")
    one = "model.layers.0.mlp.up_proj.weight"

    out = merged("task_arithmetic", models.some("ada"), models.base_path,
                 scale={one: 3.0, "q": 0.0, "*.layers.1.*": 2.0})  # fmt: skip

    for name in models.names:
        factor = 3.0 if name == one else 0.0 if "q_proj.weight" in name else 1.0
        factor = 2.0 if factor == 1.0 and ".layers.1." in name else factor
        start, tuned = models.base[name], models.models["ada"][name]
        torch.testing.assert_close(
            out[name], start + factor * (tuned - start), rtol=1e-6, atol=1e-6
        )


def test_names_with_brackets_are_names(tmp_path: Path) -> None:
    """A tensor called ``blocks[0].w`` is not a glob when its task vector is added."""
    base = {"blocks[0].w": torch.zeros(4), "q": torch.zeros(4), "bias": torch.zeros(4)}
    tuned = {n: t + 1 for n, t in base.items()}
    start, end = (
        suture.open(toy.folder(tmp_path / n, t)) for n, t in (("base", base), ("tuned", tuned))
    )

    suture.save(suture.merge(start, end - start), tmp_path / "out")

    assert toy.same_bytes(toy.read(tmp_path / "out"), tuned) == []


def test_a_seed_is_a_number_not_its_spelling(family: Any, merged: Merged) -> None:
    """``seed: 7`` and ``seed: 7.0`` are one seed, in whichever order they are asked for."""
    models = family("f32")
    outs = []
    for seed in (7.0, 7):
        stream_key.cache_clear()
        outs.append(merged("dare_linear", models.some("ada"), models.base_path, seed=seed))

    assert toy.same_bytes(*outs) == []


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_progress_adds_up_to_what_is_read(scope: str, tmp_path: Path) -> None:
    """Every byte is told once: the calls of a stage add up to what was announced."""
    base = {"a": torch.zeros(2 * (1 << 20) + 5), "b": torch.zeros(0), "c": torch.zeros(7)}
    place, paths = small_family(tmp_path, base, {"m": {n: t + 1 for n, t in base.items()}})
    announced: dict[str, int] = {}
    told: dict[str, int] = {}

    def stage(name: str, nbytes: int) -> Callable[[str, int], None]:
        announced[name] = nbytes

        def progress(tensor: str, more: int) -> None:
            told[name] = told.get(name, 0) + more

        return progress

    toy.run(
        tmp_path / "out",
        toy.recipe("ties", paths, place, scope=scope),
        progress=Progress(stage=stage),
    )

    assert told == announced
    assert announced["prepare"] == sum(2 * 4 * t.numel() for t in base.values())


def test_a_model_given_twice_is_not_lost(family: Any, tmp_path: Path) -> None:
    """Two entries of one path would be one model under one name; they are refused."""
    models = family("f32")
    path = str(models.paths["ada"])
    native = {"base": str(models.base_path), "models": [path, path], "method": "task_arithmetic"}
    entry = {"model": path, "parameters": {"weight": 0.5}}
    mergekit = {"base_model": str(models.base_path), "models": [entry, entry],
                "merge_method": "task_arithmetic"}  # fmt: skip

    for what in (native, mergekit):
        with pytest.raises(RecipeError, match="stands twice"):
            toy.run(tmp_path / "out", what)


def test_output_is_no_name_for_a_model(family: Any, merged: Merged) -> None:
    """The provenance calls the result ``output``; a model of that name would be lost."""
    models = family("f32")

    with pytest.raises(RecipeError, match="'output' cannot be the name"):
        merged("task_arithmetic", {"output": models.paths["ada"]}, models.base_path)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_integers_are_not_merged_as_floats(method: str, tmp_path: Path, merged: Merged) -> None:
    """A tensor of floats in one model and of integers in another is refused, not dropped."""
    base = {"v": torch.zeros(2), "w": torch.zeros(3)}
    place, paths = small_family(
        tmp_path, base, {"a": base, "b": {**base, "w": torch.ones(3, dtype=torch.int64)}}
    )

    with pytest.raises(MismatchError, match="w cannot be computed with: I64, not F32"):
        merged(method, paths, place if method != "linear" else None)


@pytest.mark.parametrize("tied", ["base", "model"])
def test_tied_and_untied_heads_are_told_apart(tied: str, tmp_path: Path, merged: Merged) -> None:
    """T17: where only one of base and model ties its head, it is merged or refused, not lost."""
    base = {"model.embed_tokens.weight": torch.zeros(3, 2), "lm_head.weight": torch.zeros(3, 2)}
    tuned = {n: t + 1 for n, t in base.items()}
    if tied == "base":
        tuned["lm_head.weight"] = tuned["lm_head.weight"] + 5
    config = {"tie_word_embeddings": True}
    place = toy.folder(tmp_path / "base", base, config=config if tied == "base" else {})
    path = toy.folder(tmp_path / "tuned", tuned, config=config if tied == "model" else {})

    try:
        out = merged("task_arithmetic", {"a": path}, place, space={"exclude": []})
    except MismatchError:
        return
    assert torch.equal(out["lm_head.weight"], tuned["lm_head.weight"])
