"""An adapter of the difference of models: the nearest of its rank, read by PEFT, its error told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="PEFT is not installed")

import torch
from safetensors.torch import load_file, save_file

import adapting
import suture
import toy
from making import invoke, lines_of, tree
from suture.errors import NonFiniteError, OutputError, RecipeError, SutureError
from suture.verbs.extract_lora import run

BASES = ("llama", "tied", "bf16", "qwen", "gpt2")


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of all kinds, each with a tuned model, and two adapters of the first."""
    place = tmp_path_factory.mktemp("lowrank")
    adapting.llama(place / "llama")
    adapting.llama(place / "tied", tied=True)
    adapting.llama(place / "bf16", dtype="bfloat16")
    adapting.qwen(place / "qwen")
    adapting.gpt2(place / "gpt2")
    for name in BASES:
        model = adapting.load(place / name)
        adapting.shaken(model, 9, spread=0.01)
        model.save_pretrained(place / f"{name}-tuned")
    adapting.adapter(place / "llama", place / "ada", 1)
    adapting.adapter(place / "llama", place / "bob", 2, r=8, target_modules=["q_proj", "k_proj"])
    return place


def deltas(base: Path, tuned: Path) -> dict[str, torch.Tensor]:
    one, other = toy.read(base), toy.read(tuned)
    return {n: other[n].double() - one[n].double() for n in one}


@pytest.mark.parametrize("name", BASES)
def test_peft_makes_the_tuned_model_of_the_full_rank(
    name: str, where: Path, tmp_path: Path
) -> None:
    """With every rank and all other tensors saved, PEFT's merge of the adapter is the tuned model."""
    base, tuned = where / name, where / f"{name}-tuned"

    report = suture.extract_lora(
        suture.open(base), suture.open(tuned), tmp_path / "it", rank=1000, save_others=True
    )

    found = adapting.merged_by_peft(base, tmp_path / "it")
    back = suture.open(f"{base}+{tmp_path / 'it'}")
    narrow = 2.0**-7 if name == "bf16" else 1e-7
    for key, tensor in adapting.load(tuned).state_dict().items():
        scale = max(1.0, float(tensor.abs().max())) if name != "bf16" else float(tensor.abs().max())
        assert (found[key].float() - tensor.float()).abs().max() <= narrow * scale, key
        if key in back:
            assert abs(back[key] - tensor.float().numpy()).max() <= narrow * scale, key
    assert report.error < 1e-6
    assert not report.left_out


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_fit_is_the_best_of_its_rank(flip: bool, sampled: bool) -> None:
    """Its error is that of the singular values left out (Eckart-Young), whichever way it is found."""
    draw = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(300, 90, generator=draw, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(200, 90, generator=draw, dtype=torch.float64))[0]
    s = 0.9 ** torch.arange(90, dtype=torch.float64)
    delta = (u * s @ v.T).float()
    delta = delta.T.contiguous() if flip else delta
    how = run._How(12, None, False, torch.float32)
    norm = float(delta.double().norm())
    best = float((s[12:] ** 2).sum().sqrt()) / norm

    if sampled:
        left, right, keep = run._by_sampling(delta, "a name", norm, how)
    else:
        left, right, keep = run._by_spectrum(delta, norm, how)

    error = run._distance(delta, left, right) / norm
    assert keep == 12
    assert best * (1 - 1e-5) <= error <= best * (1.001 if sampled else 1 + 1e-5)
    assert float((left.double() @ right.double() - delta.double()).norm()) / norm == pytest.approx(
        error, rel=1e-5
    )


def test_the_errors_are_those_of_the_files(where: Path, tmp_path: Path) -> None:
    """What is reported, per tensor and in all, is what a reader of the files computes in float64."""
    base, tuned = where / "llama", where / "llama-tuned"
    report = suture.extract_lora(suture.open(base), suture.open(tuned), tmp_path / "it", rank=4)

    factors = load_file(tmp_path / "it" / "adapter_model.safetensors")
    missing = whole = 0.0
    for name, delta in deltas(base, tuned).items():
        start = f"base_model.model.{name.removesuffix('.weight')}"
        fit = torch.zeros_like(delta)
        if f"{start}.lora_A.weight" in factors:
            fit = (
                factors[f"{start}.lora_B.weight"].double()
                @ factors[f"{start}.lora_A.weight"].double()
            )
        elif f"{start}.lora_embedding_A" in factors:
            fit = (
                factors[f"{start}.lora_embedding_B"].double()
                @ factors[f"{start}.lora_embedding_A"].double()
            ).T
        missing += float((delta - fit).square().sum())
        whole += float(delta.square().sum())
        if name in report.tensors:
            s = torch.linalg.svdvals(delta)
            best = float(s[4:].norm() / s.norm())
            assert report.tensors[name].error == pytest.approx(best, rel=1e-4)
            assert report.tensors[name].norm == pytest.approx(float(delta.norm()), rel=1e-5)
        else:
            assert report.left_out[name] == pytest.approx(float(delta.norm()), rel=1e-5)
    assert report.error == pytest.approx((missing / whole) ** 0.5, rel=1e-4)


def test_energy_chooses_the_ranks(where: Path, tmp_path: Path) -> None:
    """The fewest ranks whose squared singular values make up the share; the pattern says which."""
    base, tuned = where / "llama", where / "llama-tuned"
    report = suture.extract_lora(suture.open(base), suture.open(tuned), tmp_path / "it", energy=0.6)

    for name, row in report.tensors.items():
        s = torch.linalg.svdvals(deltas(base, tuned)[name])
        share = torch.cumsum(s**2, 0) / (s**2).sum()
        assert row.rank == int((share < 0.6).sum()) + 1, name
    assert len({row.rank for row in report.tensors.values()}) > 1
    found = suture.open(f"{base}+{tmp_path / 'it'}")
    expected = adapting.merged_by_peft(base, tmp_path / "it")
    assert all(abs(found[n] - expected[n].numpy()).max() < 1e-7 for n in found)


def test_adapters_become_one_adapter_exactly(where: Path, tmp_path: Path) -> None:
    """Without a rank the weighted sum of adapters loses nothing; with one, only what the rank must."""
    base = suture.open(where / "llama")
    models = [suture.open(f"{where / 'llama'}+{where / n}") for n in ("ada", "bob")]
    named = [lowrank_open(base, where / n) for n in ("ada", "bob")]

    exact = suture.extract_lora(base, named, tmp_path / "exact", weights=[0.5, -2.0])
    cut = suture.extract_lora(base, named, tmp_path / "cut", weights=[0.5, -2.0], rank=4)

    assert exact.error < 1e-6
    assert all(row.exact_factors for row in exact.tensors.values())
    q = "model.layers.0.self_attn.q_proj.weight"
    assert exact.tensors[q].rank == 12, "the ranks of both"
    start = torch.from_numpy(base[q]).double()
    delta = sum(
        w * (torch.from_numpy(m[q]).double() - start)
        for m, w in zip(models, (0.5, -2.0), strict=True)
    )
    s = torch.linalg.svdvals(delta)
    assert cut.tensors[q].error == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-4)
    both = suture.open(f"{where / 'llama'}+{tmp_path / 'exact'}")
    assert (torch.from_numpy(both[q]).double() - start - delta).abs().max() < 3e-7


def lowrank_open(base: suture.Checkpoint, folder: Path) -> suture.Checkpoint:
    from suture.checkpoints.open import open_model

    return open_model(folder, base=base)


def test_stacked_adapters_are_one_product(where: Path, tmp_path: Path) -> None:
    """base+ada+bob is factored without its dense delta, to the sum of both."""
    base = suture.open(where / "llama")
    both = lowrank_open(base, Path(f"{where / 'ada'}+{where / 'bob'}"))

    report = suture.extract_lora(base, both, tmp_path / "it")

    assert report.error < 1e-6
    assert all(row.exact_factors for row in report.tensors.values())
    found = suture.open(f"{where / 'llama'}+{tmp_path / 'it'}")
    assert all(abs(found[n] - both[n]).max() < 3e-7 for n in found)


def test_dora_is_factored_by_its_delta(where: Path, tmp_path: Path) -> None:
    """What is no product is read whole, and needs a rank."""
    folder = adapting.adapter(where / "llama", tmp_path / "dora", use_dora=True)
    base = suture.open(where / "llama")

    report = suture.extract_lora(base, lowrank_open(base, folder), tmp_path / "it", rank=24)

    assert report.error < 1e-6
    assert not any(row.exact_factors for row in report.tensors.values())


def test_a_merge_becomes_an_adapter(where: Path, tmp_path: Path) -> None:
    """The output of a merge is a tuned model like any other."""
    recipe = {"base": str(where / "llama"), "method": "task_arithmetic",
              "models": [str(where / "ada"), str(where / "bob")]}  # fmt: skip
    toy.run(tmp_path / "merged", recipe)

    said = invoke("extract-lora", where / "llama", tmp_path / "merged", "--rank", 12, "-o", tmp_path / "it",
                  "--json")  # fmt: skip

    assert said.code == 0
    assert said.json["error"] < 1e-5
    assert (
        adapting.merged_by_peft(where / "llama", tmp_path / "it").keys()
        == toy.read(tmp_path / "merged").keys()
    )


def test_the_command_tells_errors_and_writes_a_whole_folder(where: Path, tmp_path: Path) -> None:
    """A line a tensor, what was left out, the error in all; provenance and card beside the factors."""
    said = invoke(
        "extract-lora", where / "qwen", where / "qwen-tuned", "--rank", 3, "-o", tmp_path / "it"
    )

    lines_of(
        said.out,
        "model.layers.0.self_attn.q_proj.weight",
        "left out",
        "--save-others",
        "relative error",
    )
    assert sorted(tree(tmp_path / "it")) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "suture.json"]  # fmt: skip
    modes = {p.name: p.stat().st_mode for p in (tmp_path / "it").iterdir()}
    assert len(set(modes.values())) == 1, (
        f"not everybody who reads the others may read all: {modes}"
    )
    record = json.loads((tmp_path / "it" / "suture.json").read_text())
    assert record["kind"] == "adapter"
    assert record["inputs"]["base"]["fingerprint"] != record["inputs"]["models"][0]["fingerprint"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_factors_of_another_dtype(where: Path, tmp_path: Path) -> None:
    """bfloat16 factors are half as large, and the error says what that costs."""
    base = suture.open(where / "llama")
    model = lowrank_open(base, where / "ada")
    report = suture.extract_lora(base, model, tmp_path / "it", dtype="bfloat16")

    factors = load_file(tmp_path / "it" / "adapter_model.safetensors")
    assert {t.dtype for t in factors.values()} == {torch.bfloat16}
    assert 1e-4 < report.error < 1e-2


def test_the_same_again_is_the_same_bytes(where: Path, tmp_path: Path) -> None:
    """Extraction draws no random number that is not a function of the tensor's name."""
    base, tuned = suture.open(where / "llama"), suture.open(where / "llama-tuned")
    for name in ("one", "two"):
        suture.extract_lora(base, tuned, tmp_path / name, rank=4)
    one, two = (tree(tmp_path / n)["adapter_model.safetensors"] for n in ("one", "two"))
    assert one == two


WRONG: dict[str, tuple[dict[str, Any], type[SutureError], str]] = {
    "no rank for a whole model": ({}, RecipeError, "say which rank"),
    "rank zero": ({"rank": 0}, RecipeError, "rank: a whole number from 1"),
    "too much energy": ({"energy": 1.5}, RecipeError, "energy"),
    "too many weights": ({"rank": 2, "weights": [1.0, 2.0]}, RecipeError, "2 for 1 model"),
    "an unknown dtype": ({"rank": 2, "dtype": "bf61"}, RecipeError, "no dtype 'bf61'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_wish(what: str, where: Path, tmp_path: Path) -> None:
    """Told before anything is read, and nothing is written."""
    how, kind, text = WRONG[what]
    with pytest.raises(kind, match=text):
        suture.extract_lora(
            suture.open(where / "llama"), suture.open(where / "llama-tuned"), tmp_path / "it", **how
        )
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_and_a_model_that_does_not_fit_are_two_problems(
    where: Path, tmp_path: Path
) -> None:
    """All that is wrong at once."""
    (tmp_path / "it").mkdir()
    with pytest.raises(SutureError) as caught:
        suture.extract_lora(
            suture.open(where / "llama"), suture.open(where / "gpt2"), tmp_path / "it", rank=2
        )
    lines_of(str(caught.value), "lacks", "it: exists")


def test_models_that_do_not_differ(where: Path, tmp_path: Path) -> None:
    """There is no adapter to write."""
    with pytest.raises(RecipeError, match="do not differ"):
        suture.extract_lora(
            suture.open(where / "llama"), suture.open(where / "llama"), tmp_path / "it", rank=2
        )


def test_a_folder_that_cannot_be_written(where: Path, tmp_path: Path) -> None:
    """The place is looked at before the work."""
    with pytest.raises(OutputError, match="cannot write in"):
        suture.extract_lora(
            suture.open(where / "llama"),
            suture.open(where / "llama-tuned"),
            tmp_path / "no" / "it",
            rank=2,
        )


def test_the_difference_of_doubles_is_not_rounded_before_it_is_one(tmp_path: Path) -> None:
    """A change of float64 weights that float32 weights could not hold is found and fitted."""
    name, norm = "m.layers.0.mlp.up_proj.weight", "m.norm.weight"
    draw = torch.Generator().manual_seed(0)
    one, left, right = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((16, 12), (16, 2), (2, 12))
    )
    small = 1e-12 * (left @ right)
    ones = torch.ones(12, dtype=torch.float64)
    toy.folder(tmp_path / "base", {name: one, norm: ones})
    toy.folder(tmp_path / "tuned", {name: one + small, norm: ones + 1e-12})
    base, tuned = suture.open(tmp_path / "base"), suture.open(tmp_path / "tuned")

    report = suture.extract_lora(base, [tuned, tuned], tmp_path / "it", rank=2, save_others=True)

    assert report.tensors[name].norm == pytest.approx(2 * float(small.norm()), rel=1e-3)
    assert report.tensors[name].error < 1e-3
    saved = load_file(tmp_path / "it" / "adapter_model.safetensors")
    assert torch.allclose(saved["base_model.model.m.norm.weight"] - 1, 2e-12 * ones, rtol=1e-3)


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_what_is_no_number_is_refused(what: str, where: Path, tmp_path: Path) -> None:
    """NaN in a model or in a factor is told as what it is, and nothing is written."""
    source = where / ("ada" if what == "adapter" else "llama-tuned")
    shutil.copytree(source, tmp_path / "broken")
    file = next((tmp_path / "broken").glob("*model.safetensors"))
    tensors = load_file(file)
    key = next(k for k in sorted(tensors) if "q_proj" in k and k.endswith("weight"))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    base = suture.open(where / "llama")
    model = lowrank_open(base, tmp_path / "broken")

    with pytest.raises(NonFiniteError, match=r"q_proj.* NaN or infinite values"):
        suture.extract_lora(base, model, tmp_path / "it", rank=2)
    assert not (tmp_path / "it").exists()


def test_an_adapter_of_a_restricted_model_is_restricted(where: Path, tmp_path: Path) -> None:
    """The mark of a model goes to the adapter that is made of it, and from there to all that is
    made with it; its lines and its card say so."""
    base, tuned = suture.open(where / "llama"), suture.open(where / "llama-tuned")
    free = suture.extract_lora(base, tuned, tmp_path / "free", rank=2)
    tuned.restricted = True
    found = suture.extract_lora(base, tuned, tmp_path / "secret", rank=2)

    assert (free.restricted, found.restricted) == (False, True)
    assert json.loads((tmp_path / "secret/suture.json").read_text())["restricted"] is True
    assert "restricted" not in json.loads((tmp_path / "free/suture.json").read_text())
    card, plain = ((tmp_path / n / "README.md").read_text() for n in ("secret", "free"))
    assert "must not be passed on" in card
    assert "restricted" not in plain.lower()
    for word in ("Relative error", "rank 2", "llama-tuned"):
        assert word in plain
        assert word not in card
    lines_of("\n".join(run.report_lines(found)), "restricted")
    assert suture.open(f"{where / 'llama'}+{tmp_path / 'secret'}").restricted
    assert not suture.open(f"{where / 'llama'}+{tmp_path / 'free'}").restricted
