"""From an analysis recipe to a folder: what is refused, what is written, what it holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import suture
import tiny_model
import toy
from making import invoke, lines_of, quick_disk
from suture.analysis.maps import disentanglement
from suture.checkpoints.atomic import alone
from suture.edits.mask import localize
from suture.errors import MismatchError, NonFiniteError, OutputError, RecipeError, SutureError
from suture.evals.walk import Walk, classes
from suture.runs.place import Options
from suture.training.data import tokenise
from suture.training.labelled import labels_of
from suture.training.models import Classifier, Head
from suture.verbs.analyze import VERB as analysis
from suture.verbs.analyze.plan import make_plan as plan_analysis
from suture.verbs.analyze.run import analyse


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_disk(monkeypatch)


@pytest.fixture
def models(family: Callable[..., Any]) -> Any:
    return family("bf16")


def request(models: Any, **more: Any) -> dict[str, Any]:
    paths = {name: str(path) for name, path in models.paths.items()}
    return {"base": str(models.base_path), "models": paths, **more}


# -- what is refused -------------------------------------------------------------------------------


def test_masks_are_compared_where_there_are_some(models: Any) -> None:
    """Without a density or a folder there are none, which is told beside other faults."""
    with pytest.raises(SutureError) as caught:
        plan_analysis(request(models, analyses=["overlap", "structure"], bases={"size": 9}))
    lines_of(
        str(caught.value), "analyses: overlap compares masks; give a density, or a folder",
        "analyses: structure shows masks", "bases.size: from 1 to 3",
    )  # fmt: skip


def test_everything_wrong_is_told_at_once(models: Any, tmp_path: Path) -> None:
    """Keys, values, models, masks and the output: one message, nothing written."""
    wrong = request(
        models, desity=0.1, density=0, scope="world", analyses=["overlap", "angles"],
        bases={"kinds": ["pka"], "size": 9}, space={"exclude": ["nosuchrole"]}, seed=-1,
    )  # fmt: skip
    wrong["models"]["gone"] = "nowhere"
    with pytest.raises(SutureError) as caught:
        plan_analysis(wrong, models.base_path)

    lines_of(
        str(caught.value), "did you mean 'density'", "in (0, 1], not 0", "scope: 'world'",
        "'angles' is not known", "did you mean 'pca'", "from 1 to 4",
        "'nosuchrole' is no role", "seed: a whole number", "nowhere", "holds the input",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [({"base": None}, "base: missing; what the models were fine-tuned from"), ({"models": {}}, "at least one model"),
     ({"models": {"base": "x"}}, "cannot be the name"), ({"unseen": {"ada": "x"}}, "is one of the models"),
     ({"masks": 3, "analyses": ["overlap"]}, "masks: a folder"), ({"bases": []}, "bases: a mapping"),
     ({"density": True}, "in (0, 1]"), ({"analyses": 3}, "analyses[0]: 3 is not known; known: geometry")],
)  # fmt: skip
def test_a_recipe_that_cannot_be_followed(
    models: Any, change: Mapping[str, Any], says: str
) -> None:
    """Each fault has its own message."""
    with pytest.raises(RecipeError) as caught:
        plan_analysis({**request(models), **change})
    assert says in str(caught.value)


def test_one_model_has_no_conflicts_and_no_basis(models: Any) -> None:
    """They are left out where nothing was asked for, and refused where they were."""
    one = request(models) | {"models": {"ada": str(models.paths["ada"])}}

    assert plan_analysis(one).request.analyses == ("geometry",)
    with pytest.raises(RecipeError, match="conflicts takes two models"):
        plan_analysis({**one, "analyses": ["conflicts"]})


def test_masks_of_another_model_are_refused(models: Any, tmp_path: Path) -> None:
    """Missing masks, and masks of other shapes, are named before anything is read."""
    masks = tmp_path / "masks"
    masks.mkdir()
    with pytest.raises(RecipeError, match="ada.safetensors is missing"):
        plan_analysis(request(models, masks=str(masks)))
    other = toy.folder(tmp_path / "other", {"model.layers.0.mlp.up_proj.weight": torch.ones(3, 3)})
    third = toy.folder(tmp_path / "third", {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)})
    mask = localize(suture.open(other) - suture.open(third), density=0.5)
    for name in models.paths:
        mask.save(masks / f"{name}.safetensors")
    with pytest.raises(MismatchError, match="mask of another model"):
        plan_analysis(request(models, masks=str(masks)))


def test_a_folder_of_somebody_else_is_left_alone(models: Any, tmp_path: Path) -> None:
    """Only an older analysis is replaced, and only when asked to."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not written by `suture analyze`"):
        analysis(request(models), tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes/mine.txt").read_text() == "mine"

    analysis(request(models), tmp_path / "out")
    with pytest.raises(OutputError, match="--overwrite"):
        analysis(request(models), tmp_path / "out")
    analysis(request(models), tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "out"]


def test_masks_and_rows_are_never_replaced(models: Any, tmp_path: Path) -> None:
    """What an analysis reads besides models is an input, too, also where it lies in an older one."""
    out = tmp_path / "out"
    analysis(request(models), out)
    masks = out / "masks"
    masks.mkdir()
    for name, path in models.paths.items():
        tau = suture.open(path) - suture.open(models.base_path)
        suture.localize(tau, density=0.1).save(masks / f"{name}.safetensors")

    with pytest.raises(OutputError, match="holds the input 'masks'"):
        analysis(request(models, masks=str(masks), analyses=["overlap"]), out, overwrite=True)

    assert len(list(masks.iterdir())) == len(models.paths)


def test_what_a_killed_run_left_is_replaced_and_nothing_else(models: Any, tmp_path: Path) -> None:
    """A staging folder of ours is taken over; one with somebody's files is named and kept."""
    staging = tmp_path / ".out.suture"
    (staging / "model/out/basis/pca").mkdir(parents=True)
    (staging / "lock").touch()
    analysis(request(models), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    staging.mkdir()
    (staging / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds thesis.txt, which no run left; move it away"):
        analysis(request(models), tmp_path / "out", overwrite=True)
    assert (staging / "thesis.txt").read_text() == "mine"


def test_two_runs_of_one_output_do_not_meet(models: Any, tmp_path: Path) -> None:
    """The second is refused while the first holds the place."""
    with (
        alone(tmp_path / ".out.suture", tmp_path / "out", "writing"),
        pytest.raises(OutputError, match="another process is writing it"),
    ):
        analysis(request(models), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- what is written -------------------------------------------------------------------------------


def test_an_analysis_is_plain_data_that_names_its_inputs(models: Any, tmp_path: Path) -> None:
    """JSON without NaN; relative paths, fingerprints; the recipe in it gives the same again."""
    out = tmp_path / "out"
    (tmp_path / "look.yaml").write_text(yaml.safe_dump(request(models, density=0.2)))
    found = analysis(str(tmp_path / "look.yaml"), str(out))
    raw = json.loads((out / "analysis.json").read_text())

    assert raw == json.loads(json.dumps(found.to_dict()))
    assert raw["kind"] == "analysis"
    assert set(raw["inputs"]) == {"base", *models.paths}
    assert all(len(entry["fingerprint"]) == 32 for entry in raw["inputs"].values())
    assert not any(entry["path"].startswith("/") for entry in raw["inputs"].values())
    again = analysis(raw["request"], tmp_path / "again", folder=out)
    for part in ("geometry", "conflicts", "overlap", "bases"):
        assert getattr(again, part) == getattr(found, part)


def test_an_analysis_does_not_depend_on_threads(models: Any) -> None:
    """The same numbers from one thread and from three."""
    one = analyse(plan_analysis(request(models, density=0.2), options=Options(threads=1)))
    three = analyse(plan_analysis(request(models, density=0.2), options=Options(threads=3)))

    assert one == three


def test_masks_from_a_folder_count_instead_of_magnitudes(models: Any, tmp_path: Path) -> None:
    """Saved masks by magnitude give the overlaps that the density gives."""
    base = suture.open(models.base_path)
    for name, path in models.paths.items():
        vector = (suture.open(path) - base).select(*models.names)
        (tmp_path / "masks").mkdir(exist_ok=True)
        localize(vector, density=0.2).save(tmp_path / "masks" / f"{name}.safetensors")
    saved = analyse(plan_analysis(request(models, masks=str(tmp_path / "masks")))).overlap
    drawn = analyse(plan_analysis(request(models, density=0.2))).overlap

    assert saved is not None
    assert drawn is not None
    assert "masks" in saved.source
    assert "20 %" in drawn.source
    assert {**saved.to_dict(), "source": ""} == {**drawn.to_dict(), "source": ""}


@pytest.mark.parametrize("kind", ["autoencoder", "pca", "random"])
def test_a_written_basis_is_the_base_plus_its_vectors(
    family: Callable[..., Any], kind: str, tmp_path: Path
) -> None:
    """Each folder is base + V B[:, m] in float32 over the space, and the base's own elsewhere."""
    models = family("f32")
    out = tmp_path / "out"
    found = analysis(
        request(models, bases={"kinds": [kind], "write": kind, "size": 2}, analyses=["bases"]), out
    )
    (basis,) = found.bases
    assert list(found.written[kind]) == [f"basis/{kind}/{name}" for name in basis.names]
    for column, where in enumerate(found.written[kind]):
        written = toy.read(out / where)
        for name, start in models.base.items():
            if name not in models.names:
                assert torch.equal(written[name], start)
                continue
            delta = sum(
                basis.vectors[i][column] * (models.models[task][name].double() - start.double())
                for i, task in enumerate(basis.tasks)
            )
            torch.testing.assert_close(
                written[name].double(), start.double() + delta, atol=1e-6, rtol=1e-6
            )


def test_a_subset_is_added_with_the_written_basis(
    family: Callable[..., Any], tmp_path: Path
) -> None:
    """Task arithmetic over the basis with the factors of ``addition`` gives the rebuilt tasks."""
    models = family("f32")
    out = tmp_path / "out"
    what = {"kinds": ["spectral"], "size": 3, "write": ["spectral"]}
    (basis,) = analysis(request(models, bases=what, analyses=["bases"]), out).bases
    folders = {n: suture.open(out / "basis/spectral" / n) for n in basis.names}
    made = suture.merge(
        suture.open(models.base_path), folders, method="task_arithmetic",
        weight=basis.addition({"ada": 1.0, "cyd": -0.5}), space=suture.ParamSpace(),
    )  # fmt: skip
    suture.save(made, tmp_path / "merged")
    merged = toy.read(tmp_path / "merged")
    for name in models.names:
        start = models.base[name].double()
        expected = start + (models.models["ada"][name].double() - start)
        expected = expected - 0.5 * (models.models["cyd"][name].double() - start)
        torch.testing.assert_close(merged[name].double(), expected, atol=1e-5, rtol=1e-5)


def test_an_unseen_model_has_its_place_to_every_basis(models: Any) -> None:
    """The nearest vector to a model that is also in the sample is that model itself."""
    raw = request(models, unseen={"new": str(models.paths["bob"])}, bases={"size": 3})
    found = analyse(plan_analysis(raw))

    assert found.geometry is not None
    assert found.geometry.models == ("ada", "bob", "cyd")
    place = found.nearest["new"]["random"]
    assert max(place["cosines"]) == pytest.approx(1)
    assert place["error"] == pytest.approx(0, abs=1e-5)


# -- the command -----------------------------------------------------------------------------------


def test_the_command_tells_and_writes(models: Any, tmp_path: Path) -> None:
    """A dry run writes nothing; the run speaks to people, or prints one JSON object."""
    recipe = tmp_path / "look.yaml"
    recipe.write_text(yaml.safe_dump(request(models, density=0.2)))
    dry = invoke("analyze", recipe, "-o", tmp_path / "out", "--dry-run")
    assert dry.code == 0, dry
    lines_of(dry.out, "input    ada", "analysis overlap", "nothing was written")
    assert not (tmp_path / "out").exists()

    said = invoke("analyze", recipe, "-o", tmp_path / "out")
    assert said.code == 0, said
    lines_of(said.out, "ada: norm", "largest cosine", "opposite signs", "most alike masks",
             "basis pca", "wrote")  # fmt: skip
    told = invoke("analyze", recipe, "-o", tmp_path / "out", "--overwrite", "--json")
    assert json.loads(told.out) == json.loads((tmp_path / "out/analysis.json").read_text())
    wrong = invoke("analyze", tmp_path / "gone.yaml", "-o", tmp_path / "new")
    assert wrong.code == 2
    lines_of(wrong.err, "gone.yaml")


# -- a loaded model --------------------------------------------------------------------------------


def test_a_walk_goes_anywhere_and_comes_back_exactly() -> None:
    """Weights are base + sum of amounts times deltas; back at 0 every bit is the base's."""
    encoder = tiny_model.encoder(0)
    before = {n: p.detach().clone() for n, p in encoder.backbone.named_parameters()}
    draw = np.random.default_rng(0)
    deltas = [
        {n: draw.normal(size=tuple(p.shape)).astype(np.float32) for n, p in before.items()}
        for _ in range(2)
    ]
    walk = Walk(encoder, deltas)
    walk.move((0.5, -2.0))
    for name, parameter in encoder.backbone.named_parameters():
        expected = before[name] + 0.5 * torch.tensor(deltas[0][name]) - 2 * torch.tensor(deltas[1][name])  # fmt: skip
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-5, rtol=1e-5)
    walk.move((0, 0))
    assert all(torch.equal(p, before[n]) for n, p in encoder.backbone.named_parameters())
    with pytest.raises(RecipeError, match="1 amounts for 2"):
        walk.move((1,))
    with pytest.raises(MismatchError, match="does not fit"):
        Walk(encoder, [{"no.such": np.zeros(3, np.float32)}])


def test_a_map_of_real_encoders(tmp_path: Path) -> None:
    """Task vectors from folders, an encoder, heads and rows: xi is 0 at the base, on both axes
    what one task vector does to the other's rows, and the encoder is left as it was."""
    base = suture.open(tiny_model.folder(tmp_path / "base", 0))
    vectors = [
        suture.open(tiny_model.folder(tmp_path / name, seed)) - base
        for seed, name in ((1, "one"), (2, "two"))
    ]
    loaded = tiny_model.loaded(tmp_path / "base")
    rows = tiny_model.rows(24)
    data = tokenise(rows, loaded.tokenizer, labels=labels_of(rows), max_length=8)
    draw = torch.Generator().manual_seed(0)
    heads = [
        Head(("colour", "sky"), torch.randn(2, 16, generator=draw), torch.zeros(2))
        for _ in range(2)
    ]
    known = dict(loaded.model.backbone.named_parameters())
    walk = Walk(loaded.model, [v.select(*(n for n in v if n in known)) for v in vectors])
    predict = walk.predict(heads, [lambda: data.batches(5), lambda: data.batches(7)])
    found = disentanglement(predict, ("one", "two"), [0, 0.5, 1])
    walk.move((0, 0))

    assert found.error[0][0] == 0
    start = classes(Classifier(loaded.model, heads[1]), data.batches(24))
    alone = classes(Classifier(walk.move((1.0, 0.0)), heads[1]), data.batches(24))
    walk.move((0, 0))
    assert found.error[2][0] == pytest.approx(np.mean(start != alone))
    assert found.rows == 48

    walk.move((float("nan"), 0.0))
    with pytest.raises(NonFiniteError, match="NaN instead of logits"):
        classes(Classifier(loaded.model, heads[1]), data.batches(24))
