"""LED-Merging: the acceptance tests of its algorithm, its controls, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import spearmanr

import toy
from slow import merges as slow
from suture.edits.stats import Stats
from suture.errors import MismatchError, RecipeError, SutureError
from suture.merges.elections import kept_apart, voted
from suture.verbs.merge.documents import read_recipe

NAMES = ("ada", "bob", "cyd")
EVERYTHING = {"exclude": []}
Array = np.ndarray[Any, Any]


class Given:
    """Base, deltas and gradients of a family, as the slow twin takes them."""

    def __init__(
        self, family: Any, models: tuple[str, ...] = NAMES, everything: bool = False
    ) -> None:
        names = toy.editable(family.base)
        if everything:
            names = sorted([*names, toy.EMBEDDING, toy.HEAD])

        def flat(tensors: Mapping[str, torch.Tensor], name: str) -> Array:
            return tensors[name].double().reshape(-1).numpy()

        def drawn(model: str, kind: str) -> dict[str, Array]:
            return {n: toy.invented(model, n, tuple(family.base[n].shape))[kind].reshape(-1)
                    for n in names}  # fmt: skip

        self.names = names
        self.base = {n: flat(family.base, n) for n in names}
        self.deltas = {m: {n: flat(family.models[m], n) - self.base[n] for n in names}
                       for m in models}  # fmt: skip
        self.grads = {m: drawn(m, "abs_grad") for m in models}
        self.base_grads = {m: drawn(m, "base") for m in models}

    def elected(self, *density: float, elect: str = "both", flip: bool = False) -> slow.Sets:
        return slow.led_elected(self.deltas, self.base, self.grads, self.base_grads,
                                slow.constant(*density), elect, flip)  # fmt: skip


def led(
    family: Any, out: Path, *, own: Any = None, models: Any = None, options: Any = None, **more: Any
) -> Any:
    """Merge by LED; the tensors and the report."""
    what = toy.recipe("led", models or family.some(*NAMES), family.base_path, own=own, **more)
    return toy.run(out, what, **(options or {}))


def written(out: toy.Tensors, family: Any, names: list[str]) -> dict[str, set[int]]:
    """The entries that differ from the base, by tensor."""
    return {n: set((out[n] != family.base[n]).reshape(-1).nonzero().reshape(-1).tolist())
            for n in names}  # fmt: skip


@pytest.mark.parametrize("safety", [None, "ada"])
def test_every_entry_has_one_owner(safety: str | None, family: Any, tmp_path: Path) -> None:
    """Outside of all D_i the base stays; inside of D_i stands exactly what expert i has."""
    models = family("bf16")
    given = Given(models)
    more = {"disjoint": "safety_first", "safety": safety} if safety else {}

    out, report = led(models, tmp_path / "out", density=0.6, **more)

    owned = slow.led_owned(given.elected(0.6, 0.6, 0.6), safety)
    total = sum(len(x) for x in given.base.values())
    for name in given.names:
        sets = list(owned[name].values())
        assert sum(map(len, sets)) == len(set().union(*sets))
        wanted = models.base[name].clone().reshape(-1)
        for model, mine in owned[name].items():
            wanted[list(mine)] = models.models[model][name].reshape(-1)[list(mine)]
        assert torch.equal(out[name].reshape(-1), wanted)
    shares = {m: sum(len(own[m]) for own in owned.values()) / total for m in NAMES}
    assert report.facts["owned"] == shares
    assert any(line.startswith("ada: elects") for line in report.told)


def test_one_expert_elects_all_that_has_a_score(family: Any, tmp_path: Path) -> None:
    """T = 1, r = 1, weight 1: the expert, wherever both scores are above 0; else the base."""
    models = family("f32")
    given = Given(models, ("bob",))

    out, _ = led(models, tmp_path / "out", models=models.some("bob"), density=1.0)

    for name in given.names:
        base, tuned = (t[name].reshape(-1) for t in (models.base, models.models["bob"]))
        both = (base != 0) & (tuned != 0)
        torch.testing.assert_close(out[name].reshape(-1), torch.where(both, tuned, base))
    assert not out[toy.ZERO].any()  # the base is 0 there, so its score is, too


def test_identical_experts_share_everything(family: Any, tmp_path: Path) -> None:
    """Two copies scored on the same rows elect the same, and nobody writes it."""
    models = family("f32")
    copies = {"one": models.paths["bob"], "two": models.paths["bob"]}

    out, report = led(models, tmp_path / "out", models=copies, density=0.5)

    assert toy.same_bytes(out, models.base) == []
    assert report.facts["owned"] == {"one": 0.0, "two": 0.0}
    assert report.facts["elected"]["one"] == report.facts["overlaps"][0]["share"] > 0
    assert report.facts["rank_correlations"]["models"][0]["spearman"] == pytest.approx(1)


def test_the_size_of_the_loss_does_not_matter(family: Any, tmp_path: Path) -> None:
    """Statistics of a loss that is 8 times as large elect the same entries."""
    models = family("f32")
    one, _ = led(models, tmp_path / "one")
    files: dict[str, dict[str, str]] = {"stats": {}, "base_stats": {}}
    for which, found in files.items():
        for name, path in models.some(*NAMES).items():
            stats = Stats.load(toy.invented_stats(Path(path), which))
            larger = {k: 8 * stats.tensors[k] for k in stats.tensors if k.startswith("abs_grad")}
            found[name] = str(tmp_path / f"{which}-{name}.safetensors")
            Stats(larger, stats.facts, "").save(Path(found[name]))

    two, _ = led(models, tmp_path / "two", **files)

    assert toy.same_bytes(one, two) == []


def test_counts_are_exact_with_ties_and_zeros(family: Any, tmp_path: Path) -> None:
    """Equal scores keep exactly floor(r n), zeros are never elected, and tiny tensors elect nothing."""
    base = {"tie.weight": torch.ones(10, 10), "zero.weight": torch.ones(10, 10),
            "tiny.weight": torch.ones(2, 2)}  # fmt: skip
    tuned = {n: 2 * t for n, t in base.items()}
    place, path = toy.folder(tmp_path / "base", base), toy.folder(tmp_path / "tuned", tuned)
    gradient = {f"abs_grad/{n}": np.ones(t.shape, np.float32) for n, t in base.items()}
    gradient["abs_grad/zero.weight"][3:] = 0  # rows of tokens that never came
    Stats(gradient, {}, "").save(tmp_path / "s.safetensors")
    files = {"m": str(tmp_path / "s.safetensors")}

    out, report = toy.run(tmp_path / "out", toy.recipe("led", {"m": path}, place, density=0.2399,
                                                       stats=files, base_stats=files))  # fmt: skip
    more, _ = toy.run(tmp_path / "more", toy.recipe("led", {"m": path}, place, density=0.9,
                                                    stats=files, base_stats=files))  # fmt: skip

    assert [int((out[n] == 2).sum()) for n in base] == [23, 23, 0]
    assert [int((more[n] == 2).sum()) for n in base] == [90, 30, 3]
    assert not (more["zero.weight"][3:] == 2).any()
    assert report.facts["owned"]["m"] == 46 / 204


@pytest.mark.parametrize("elect", ["both", "expert", "expert_only"])
def test_overlaps_are_those_of_the_sets(elect: str, family: Any, tmp_path: Path) -> None:
    """Shares, overlaps, kept norms and rank correlations are what plain sets and scipy give."""
    models = family("f32")
    given = Given(models)
    density = {"ada": 0.3, "bob": 0.5, "cyd": 0.8}

    _, report = led(models, tmp_path / "out", elect=elect,
                    own={m: {"density": d} for m, d in density.items()})  # fmt: skip

    sets = given.elected(*density.values(), elect=elect)
    owned = slow.led_owned(sets)
    total = sum(len(x) for x in given.base.values())
    facts = report.facts
    for model in NAMES:
        assert facts["elected"][model] == sum(len(s[model]) for s in sets.values()) / total
        deltas = given.deltas[model]
        whole = sum((deltas[n] ** 2).sum() for n in given.names)
        kept = sum((deltas[n][list(owned[n][model])] ** 2).sum() for n in given.names)
        assert facts["norm_kept"][model] == pytest.approx(kept / whole)
    for pair in facts["overlaps"]:
        one, other = pair["models"]
        assert pair["share"] == sum(len(s[one] & s[other]) for s in sets.values()) / total
    for pair in facts["rank_correlations"]["models"]:
        one, other = pair["models"]
        above = below = 0.0
        for n in given.names:
            scores = [np.abs((given.base[n] + given.deltas[m][n]).astype(np.float32))
                      * given.grads[m][n] for m in (one, other)]  # fmt: skip
            if len(scores[0]) > 1 and all(len(set(s)) > 1 for s in scores):
                above += float(spearmanr(*scores).statistic) * len(scores[0])
                below += len(scores[0])
        assert pair["spearman"] == pytest.approx(above / below, abs=1e-6)


@pytest.mark.parametrize("rule", ["magnitude", "random"])
def test_controls_have_the_density_of_the_election(rule: str, family: Any, tmp_path: Path) -> None:
    """A control marks as many entries of each tensor as the election; by size, the largest."""
    models = family("f32")
    given = Given(models)

    _, plain = led(models, tmp_path / "plain", density=0.6)
    out, report = led(models, tmp_path / "out", density=0.6, rule=rule)

    assert report.facts["elected"] == plain.facts["elected"]
    assert report.facts["matched"]["owned"] == plain.facts["owned"]
    assert toy.same_bytes(out, toy.read(tmp_path / "plain"))
    if rule == "magnitude":
        sets = given.elected(0.6, 0.6, 0.6)
        for name, own in sets.items():
            for model, mine in own.items():
                sizes = np.abs(given.deltas[model][name]).astype(np.float32)
                own[model] = set(np.argsort(-sizes, kind="stable")[: len(mine)].tolist())
        total = sum(len(x) for x in given.base.values())
        owned = slow.led_owned(sets)
        for model in NAMES:
            share = sum(len(o[model]) for o in owned.values()) / total
            assert report.facts["owned"][model] == pytest.approx(share, abs=2 / total)


@pytest.mark.parametrize("rule", ["magnitude", "random"])
def test_controls_may_write_as_much(rule: str, family: Any, tmp_path: Path) -> None:
    """With ``match: written`` every model writes as many entries of each tensor as by election."""
    models = family("f32")
    given = Given(models)
    own = {"ada": {"density": 0.4}}

    _, plain = led(models, tmp_path / "plain", density=0.7, own=own)
    out, report = led(models, tmp_path / "out", density=0.7, own=own, rule=rule, match="written")
    again, _ = led(models, tmp_path / "two", density=0.7, own=own, rule=rule, match="written",
                   options={"block": 8, "threads": 3})  # fmt: skip

    assert report.facts["owned"] == report.facts["elected"] == plain.facts["owned"]
    owned = slow.led_owned(given.elected(0.4, 0.7, 0.7))
    for name, mine in written(out, models, given.names).items():
        assert len(mine) == sum(map(len, owned[name].values()))
    assert toy.same_bytes(out, again) == []
    if rule == "magnitude":  # the one that writes least takes its largest changes first
        order = sorted(NAMES, key=lambda m: plain.facts["owned"][m])
        for name in given.names:
            sizes = np.abs(given.deltas[order[0]][name]).astype(np.float32)
            count = len(owned[name][order[0]])
            best = np.sort(np.argsort(-sizes, kind="stable")[:count])
            found = out[name].reshape(-1).numpy()[best]
            want = models.models[order[0]][name].reshape(-1).numpy()[best]
            np.testing.assert_allclose(found, want, atol=1e-6)


def test_a_control_needs_no_statistics(family: Any, tmp_path: Path) -> None:
    """Without statistics a control marks the densities themselves."""
    models = family("f32")
    _, report = led(models, tmp_path / "out", density=0.25, rule="random", seed=5, stats=None)

    sizes = [models.base[n].numel() for n in toy.editable(models.base)]
    wanted = sum(int(0.25 * n) for n in sizes) / sum(sizes)
    assert report.facts["elected"] == dict.fromkeys(NAMES, wanted)


def test_embeddings_may_be_the_safety_experts(family: Any, tmp_path: Path) -> None:
    """Elected like others, left to the base, or one expert's as a whole."""
    models = family("f32")
    given = Given(models, everything=True)
    outs = {
        e: led(models, tmp_path / e, density=0.6, embeddings=e, safety="cyd", space=EVERYTHING)[0]
        for e in ("elected", "base", "safety")
    }

    owned = slow.led_owned(given.elected(0.6, 0.6, 0.6))
    for name in (toy.EMBEDDING, toy.HEAD):
        assert torch.equal(outs["base"][name], models.base[name])
        torch.testing.assert_close(outs["safety"][name], models.models["cyd"][name])
        mine = set().union(*owned[name].values())
        assert written(outs["elected"], models, [name])[name] <= mine
    plain = [n for n in given.names if n not in (toy.EMBEDDING, toy.HEAD)]
    for name in plain:
        assert torch.equal(outs["base"][name], outs["safety"][name])


LED_PRESETS = ("led-paper", "led-released", "led-released-head")


@pytest.mark.parametrize("preset", LED_PRESETS)
def test_presets_are_their_algorithms(preset: str, family: Any, tmp_path: Path) -> None:
    """The paper elects the most important entries, its scripts the least, its last version any."""
    models = family("f32")
    given = Given(models, everything=True)
    what = toy.recipe("led", models.some(*NAMES), models.base_path)
    if preset == "led-released-head":
        what["parameters"] = {}

    out, report = toy.run(tmp_path / "out", {**what, "preset": preset})

    if preset == "led-released-head":
        assert all(0.3 < share <= 0.4 for share in report.facts["elected"].values())
        assert all(0.1 < share < 0.18 for share in report.facts["owned"].values())  # 0.4 * 0.6**2
        return
    flipped = preset == "led-released"
    wanted = given.elected(0.4, 0.4, 0.4, flip=flipped)
    if flipped:
        kept = given.elected(0.4, 0.4, 0.4)
        wanted |= {n: kept[n] for n in (toy.EMBEDDING, toy.HEAD)}
    owned = slow.led_owned(wanted)
    for name in given.names:
        expected = given.base[name].copy()
        for model, mine in owned[name].items():
            expected[list(mine)] += given.deltas[model][name][list(mine)]
        np.testing.assert_allclose(out[name].double().reshape(-1).numpy(), expected, atol=1e-6)


def test_priorities_decide(family: Any) -> None:
    """An entry goes to its elector of the highest priority; where two share that, to nobody."""
    rows = np.array([[0b0001111], [0b0110011], [0b1010101]], np.uint8)

    exclusive = kept_apart(rows, [0, 0, 0])
    first = kept_apart(rows, [0, 1, 0])
    order = kept_apart(rows, [3, 2, 1])

    assert exclusive[:, 0].tolist() == [0b0001000, 0b0100000, 0b1000000]
    assert first[:, 0].tolist() == [0b0001000, 0b0110011, 0b1000000]
    assert order[:, 0].tolist() == [0b0001111, 0b0110000, 0b1000000]
    assert voted("neither", rows[:1], rows[1:2], 7)[0, 0] == 0b1000000


def test_priorities_may_differ_from_tensor_to_tensor(family: Any, tmp_path: Path) -> None:
    """A pattern in the place of the number counts for the tensors that it fits."""
    models = family("f32")
    given = Given(models)
    one = "model.layers.1.mlp.down_proj.weight"

    out, _ = led(models, tmp_path / "out", density=0.7, disjoint="priority",
                 own={"bob": {"priority": {one: 1.0, "*": 0.0}}})  # fmt: skip

    elected = given.elected(0.7, 0.7, 0.7)
    plain, first = slow.led_owned(elected), slow.led_owned(elected, "bob")
    for name in given.names:
        wanted = first[name] if name == one else plain[name]
        changed = written(out, models, [name])[name]
        assert changed == set().union(*wanted.values()), name


def test_an_expert_that_writes_nothing_is_told(family: Any, tmp_path: Path) -> None:
    """A density below one entry of each tensor is no error, but an expert is lost by it."""
    _, report = led(family("f32"), tmp_path / "out", density=0.7, own={"ada": {"density": 1e-9}})
    assert "note: ada writes nothing: the merge has none of its changes" in report.told
    assert not any("bob writes nothing" in line for line in report.told)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"disjoint": "safety_first"}, "safety: missing; .* one of ada, bob, cyd"),
        ({"match": "written"}, "match: written: counts for a control"),
        ({"safety": "adda"}, "parameters.safety: no model 'adda'; did you mean 'ada'"),
        ({"density": 0}, r"density is the share of entries kept, in \(0, 1\]; got 0"),
        ({"density": 1.2}, r"in \(0, 1\]; got 1.2"),
        ({"stats": None}, "stats: missing; the folder of statistics"),
        ({"base_stats": None}, "base_stats: missing; `elect: both` asks the base"),
        ({"elect": "11"}, "'11' is not one of both, expert"),
        ({"embeddings": "safety", "safety": "ada"}, "the space of this recipe leaves them out"),
        ({"embeddings": "safety"}, "needs the name of the safety expert"),
    ],
)
def test_wrong_parameters(more: Any, match: str, family: Any, tmp_path: Path) -> None:
    """What a user can get wrong is told before a tensor is read."""
    models = family("f32")
    what = toy.recipe("led", models.some(*NAMES), models.base_path)
    what["parameters"] |= more

    with pytest.raises(RecipeError, match=match):
        toy.run(tmp_path / "out", what)
    assert not (tmp_path / "out").exists()


def test_statistics_that_do_not_belong(family: Any, tmp_path: Path) -> None:
    """Of another base, of other rows, of the base in the expert's place, of the wrong kind."""
    models = family("f32")
    right = toy.recipe("led", models.some("ada", "bob"), models.base_path)
    tensors = {m: Stats.load(Path(p)) for m, p in right["parameters"]["base_stats"].items()}

    def refused(match: str, facts: Any, kind: type[SutureError] = MismatchError) -> None:
        files = {}
        for model, own in facts.items():
            stats = tensors[model]
            files[model] = str(tmp_path / f"{model}.safetensors")
            kinds = own.pop("kinds", "abs_grad")
            kept = {k: stats.tensors[k] for k in stats.tensors if k.startswith(kinds)}
            Stats(kept, own, "").save(Path(files[model]))
        what = {**right, "parameters": {**right["parameters"], "base_stats": files}}
        with pytest.raises(kind, match=match):
            toy.run(tmp_path / "out", what)
        assert not (tmp_path / "out").exists()

    ok = {"at": "base"}
    refused(
        "another base than the others", {"ada": {**ok, "model": "1"}, "bob": {**ok, "model": "2"}}
    )
    refused(
        "measured on the tuned model; those of the base one", {"ada": {"at": "tuned"}, "bob": ok}
    )
    refused("measured on other rows", {"ada": {**ok, "data": "x"}, "bob": dict(ok)})
    refused("base: .* is not the model", {"ada": {**ok, "model": "1"}, "bob": {**ok, "model": "1"}})
    refused("no 'abs_grad'", {"ada": {"kinds": "fisher"}, "bob": dict(ok)}, RecipeError)


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    "path", [*EXAMPLES.glob("led*.yaml"), *EXAMPLES.glob("protect*.yaml"),
             *EXAMPLES.glob("safety-[at]*.yaml")],
    ids=lambda p: p.stem,
)  # fmt: skip
def test_the_examples_are_recipes(path: Path) -> None:
    """The recipes of the examples read as what their names say, controls beside what they control."""
    if path.stem == "led-locate":
        assert yaml.safe_load(path.read_text())["at"] == "both"
        return
    recipe = read_recipe(path)
    assert set(recipe.models) == {"safety", "math", "code"}
    assert (recipe.method.name == "led") == path.stem.startswith("led")
    assert (recipe.protect is not None) == path.stem.startswith("protect")
    rule = recipe.parameters.get("rule") or getattr(recipe.protect, "rule", None)
    assert rule == next((r for r in ("random", "magnitude") if path.stem.endswith(r)), None)


@pytest.mark.parametrize(
    ("identical", "expected"),
    [(False, (0.006, 0.118, 0.208)), (True, (0.030, 0.180, 0.270))],
)
def test_the_published_ratios_write_little(
    identical: bool, expected: tuple[float, ...], tmp_path: Path
) -> None:
    """With ratios 0.1, 0.4, 0.5 and unrelated tasks most of the model stays the base's.

    That is (0.6, 11.8, 20.8) % where base and expert rank independently, and (3, 18, 27) % where
    they rank alike.
    """
    shape, density = (400, 500), dict(zip(NAMES, (0.1, 0.4, 0.5), strict=True))
    base = toy.folder(tmp_path / "base", {"w.weight": torch.ones(shape)})
    tuned = {m: toy.folder(tmp_path / m, {"w.weight": torch.full(shape, 2.0)}) for m in NAMES}
    draw = np.random.default_rng(1)
    files: dict[str, dict[str, str]] = {"stats": {}, "base_stats": {}}
    for model in NAMES:
        first = draw.random(shape, np.float32)
        for which, own in (("stats", first), ("base_stats", first if identical else None)):
            values = draw.random(shape, np.float32) if own is None else own
            files[which][model] = str(tmp_path / f"{which}-{model}.safetensors")
            Stats({"abs_grad/w.weight": values}, {}, "").save(Path(files[which][model]))

    what = toy.recipe(
        "led", tuned, base, own={m: {"density": d} for m, d in density.items()}, **files
    )
    _, report = toy.run(tmp_path / "out", what)

    assert list(report.facts["owned"].values()) == pytest.approx(expected, abs=0.003)
