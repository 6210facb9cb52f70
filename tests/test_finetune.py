"""From a recipe to a tuned folder: every strategy, resume after a kill, wrong input, the command."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError

import suture
import tiny_model
from suture.edits.mask import Mask
from suture.errors import (
    MismatchError,
    MissingExtraError,
    NonFiniteError,
    OutputError,
    Problems,
    RecipeError,
    SutureError,
)
from suture.evals.table import EVALS
from suture.runs.place import Options
from suture.runs.progress import Progress
from suture.runs.workspace import training_space
from suture.schema.sources import DataSpec, Source
from suture.schema.tuning import TuneSettings
from suture.training import models, snapshot
from suture.training.load import load_tuned
from suture.training.loop import TrainingStep
from suture.training.models import Classifier, Encoder, Head, save_head, save_model
from suture.training.rows import language_rows
from suture.training.strategies import STRATEGIES
from suture.training.trackers import tracker
from suture.verbs.finetune import VERB as finetune
from suture.verbs.finetune import run as module
from suture.verbs.finetune.plan import make_plan as plan_finetune
from suture.verbs.finetune.recipe import Finetune
from suture.verbs.finetune.recipe import read_finetune as parse
from suture.verbs.merge import VERB as merge

EXAMPLES: dict[str, dict[str, Any]] = {
    "full": {},
    "linearized": {},
    "lora": {"rank": 2, "alpha": 4.0},
    "linearized-lora": {"rank": 2, "alpha": 4.0},
    "lota": {"density": 0.2},
    "talos": {"density": 0.2, "rows": 12},
    "masked": {"mask": "random", "density": 0.2},
}
"""Parameters with which each strategy runs on a tiny model."""
TRAINING = {"epochs": 3, "batch": 8, "lr": 5e-3, "save_every": 2, "seed": 1}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and rows; nobody may change them."""
    where = tmp_path_factory.mktemp("shop")
    tiny_model.folder(where / "base")
    lines = [json.dumps({"text": r.text, "label": r.label}) for r in tiny_model.rows()]
    (where / "rows.jsonl").write_text("\n".join(lines) + "\n")
    dice = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 16, generator=dice)
    save_head(Head(("colour", "sky"), weight, torch.zeros(2)), where / "head.safetensors")
    return where


def recipe(shop: Path, strategy: str = "full", **sections: Any) -> dict[str, Any]:
    return {
        "base": str(shop / "base"),
        "strategy": strategy,
        "parameters": EXAMPLES[strategy],
        "data": {"train": str(shop / "rows.jsonl"), "validation": 0.3},
        "head": str(shop / "head.safetensors"),  # of random rows: there is much to learn
        "training": TRAINING,
        **sections,
    }


def test_every_strategy_has_an_example() -> None:
    """The table and the tests agree; each line says what it is and what its parameters mean."""
    assert set(EXAMPLES) == set(STRATEGIES)
    for line in STRATEGIES.values():
        assert line.paper
        assert line.equation
        assert all(p.doc for p in line.parameters.values())


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_every_strategy_goes_from_a_recipe_to_a_folder(
    name: str, shop: Path, tmp_path: Path
) -> None:
    """The loss falls, the folder loads and gives what the report says, what was not trained has
    its bytes, and the same recipe gives the same bytes."""
    out = tmp_path / "out"
    told: list[str] = []
    training = {**TRAINING, "epochs": 20, "lr": 1e-2, "save_every": 50}
    what = recipe(shop, name, training=training)
    report = finetune(what, out, progress=Progress(say=told.append))

    assert report.losses[1] < report.losses[0]
    assert report.metric is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    model = load_tuned(out, base=shop / "base")
    assert isinstance(model, Classifier)
    plan = plan_finetune(what, tmp_path / "other")
    assert EVALS["accuracy"](model, plan.rows.validation.batches(8))[0] == report.metric

    base, tuned = suture.open(shop / "base"), suture.open(out)
    assert tuned.specs == base.specs
    changed = {n for n in base if not np.array_equal(base[n], tuned[n])}
    assert changed
    if STRATEGIES[name].sparse:
        mask = Mask.load(out / "mask.safetensors")
        assert mask.count == report.trained == int(0.2 * 4448)
        assert (
            mask.about["base"]
            == json.loads((out / "suture.json").read_text())["inputs"]["base"]["fingerprint"]
        )
        for tensor in base:
            outside = ~mask[tensor] if tensor in mask.shapes else np.ones(base[tensor].shape, bool)
            assert np.array_equal(base[tensor][outside], tuned[tensor][outside]), tensor
    elif "lora" in name:
        assert all(".query.weight" in n or ".value.weight" in n for n in changed)
        assert (out / "adapter" / "adapter_model.safetensors").is_file()

    again = finetune(what, tmp_path / "again")
    assert again.fingerprint == report.fingerprint
    assert (again.losses, again.metric) == (report.losses, report.metric)


@pytest.mark.parametrize("name", ["full", "linearized", "lora", "linearized-lora", "talos"])
def test_only_the_last_blocks_are_trained(name: str, shop: Path, tmp_path: Path) -> None:
    """With ``blocks: 1`` every tensor below the last block keeps its bits; the report counts the
    entries that are left. Of a BERT, the norm of the embeddings stands below."""
    parameters = {**EXAMPLES[name], "blocks": 1}
    report = finetune(recipe(shop, name, parameters=parameters), tmp_path / "out")
    base, tuned = suture.open(shop / "base"), suture.open(tmp_path / "out")
    changed = {n for n in base if not np.array_equal(base[n], tuned[n])}
    assert changed
    assert all(n.startswith("encoder.layer.1.") for n in changed)
    if name in ("full", "linearized"):
        block = [n for n in base if n.startswith("encoder.layer.1.")]
        assert report.trained == sum(base[n].size for n in block)
    elif "lora" in name:
        whole = finetune(recipe(shop, name), tmp_path / "whole")
        assert report.trained * 2 == whole.trained
    for more in {"full", "lora"} & {name}:
        with pytest.raises(RecipeError, match="blocks: the model has 2 blocks, not 3"):
            finetune(recipe(shop, more, parameters={"blocks": 3}), tmp_path / "x")


def test_the_files_of_a_sentence_encoder_come_along(shop: Path, tmp_path: Path) -> None:
    """A base made by sentence-transformers has files in folders of their own."""
    base = tmp_path / "base"
    shutil.copytree(shop / "base", base)
    kinds = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
             {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]  # fmt: skip
    (base / "modules.json").write_text(json.dumps(kinds))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')

    finetune(recipe(shop, base=str(base)), tmp_path / "out")

    for name in ("modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_an_adapter_is_what_peft_reads(shop: Path, tmp_path: Path) -> None:
    """Base plus adapter, loaded by PEFT itself, gives the merged folder's vectors."""
    from peft import PeftModel

    finetune(recipe(shop, "lora"), tmp_path / "out")
    base = tiny_model.loaded(shop / "base").model
    merged = tiny_model.loaded(tmp_path / "out").model
    warnings.simplefilter("ignore", FutureWarning)  # peft asks for a word that was renamed
    loaded = PeftModel.from_pretrained(base.backbone, tmp_path / "out" / "adapter").eval()
    ids = torch.tensor([[2, 5, 8]])
    mask = torch.ones_like(ids)
    found = loaded(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = merged.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_linearized_lora_is_the_linearization_of_each_update() -> None:
    """First-order expansion of every module in A and B at (A0, 0) is the module with A frozen."""
    torch.manual_seed(0)
    x, a, b = torch.randn(5, 6), torch.randn(2, 6), torch.zeros(4, 2)
    da, db = torch.randn(2, 6), torch.randn(4, 2)

    def module_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 2.0 * x @ a.T @ b.T

    value, tangent = torch.func.jvp(module_of, (a, b), (da, db))
    torch.testing.assert_close(value + tangent, 2.0 * x @ a.T @ db.T)


def test_updates_with_different_frozen_halves_do_not_add_up(shop: Path, tmp_path: Path) -> None:
    """The hash of A0 is compared when vectors are combined; the same seed gives the same hash."""
    for name, seed in (("one", 0), ("two", 0), ("three", 7)):
        parameters = {**EXAMPLES["linearized-lora"], "adapter_seed": seed}
        finetune(recipe(shop, "linearized-lora", parameters=parameters), tmp_path / name)

    def combine(*names: str) -> dict[str, Any]:
        models = {n: str(tmp_path / n) for n in names}
        return {"base": str(shop / "base"), "models": models, "method": "task_arithmetic"}

    merge(combine("one", "two"), tmp_path / "sum")
    assert json.loads((tmp_path / "sum" / "suture.json").read_text())["adapter"]
    with pytest.raises(MismatchError, match="different frozen halves"):
        merge(combine("one", "three"), tmp_path / "wrong")


def test_arithmetic_stays_linearized(shop: Path, tmp_path: Path) -> None:
    """The sum of two linearized models is one, its features are base plus both moves; with a plain
    model it is refused, as is another base."""
    finetune(recipe(shop, "linearized"), tmp_path / "one")
    finetune(recipe(shop, "linearized", training={**TRAINING, "seed": 2}), tmp_path / "two")
    finetune(recipe(shop, "full"), tmp_path / "plain")
    models = {n: str(tmp_path / n) for n in ("one", "two")}
    merge(
        {
            "base": str(shop / "base"),
            "models": models,
            "method": "task_arithmetic",
            "space": {"exclude": []},
        },
        tmp_path / "sum",
    )

    ids, mask = torch.tensor([[2, 5, 8, 9]]), torch.ones(1, 4, dtype=torch.int64)
    start = tiny_model.loaded(shop / "base").model(ids, mask)

    def features(name: str) -> torch.Tensor:
        model = load_tuned(tmp_path / name, base=shop / "base")
        body = model.encoder if isinstance(model, Classifier) else model
        out: torch.Tensor = body(ids, mask)
        return out

    expected = features("one") + features("two") - start
    torch.testing.assert_close(features("sum"), expected, rtol=1e-4, atol=1e-5)

    with pytest.raises(MismatchError, match="do not add up"):
        both = {**models, "plain": str(tmp_path / "plain")}
        merge(
            {"base": str(shop / "base"), "models": both, "method": "task_arithmetic"},
            tmp_path / "wrong",
        )
    with pytest.raises(MismatchError, match="is not the base"):
        load_tuned(tmp_path / "one", base=tmp_path / "two")


def test_a_saved_mask_trains_and_one_of_another_model_does_not(shop: Path, tmp_path: Path) -> None:
    """Mask of a run as a given mask: the same entries; a mask of another base, shape or name: told."""
    finetune(recipe(shop, "talos"), tmp_path / "talos")
    given = str(tmp_path / "talos" / "mask.safetensors")
    finetune(recipe(shop, "masked", parameters={"mask": given}), tmp_path / "masked")
    assert Mask.load(tmp_path / "masked" / "mask.safetensors") == Mask.load(Path(given))

    tiny_model.folder(tmp_path / "other", seed=5)
    with pytest.raises(MismatchError, match="mask of another base"):
        finetune(
            {**recipe(shop, "masked", parameters={"mask": given}), "base": str(tmp_path / "other")},
            tmp_path / "x",
        )
    Mask.of({"nonesuch": np.ones(3, bool)}).save(tmp_path / "strange.safetensors")
    with pytest.raises(MismatchError, match="does not have"):
        finetune(
            recipe(shop, "masked", parameters={"mask": str(tmp_path / "strange.safetensors")}),
            tmp_path / "y",
        )
    with pytest.raises(SutureError, match="not a mask"):
        wrong = str(shop / "base" / "model.safetensors")
        finetune(recipe(shop, "masked", parameters={"mask": wrong}), tmp_path / "z")


def test_what_trains_a_restricted_mask_or_patch_is_restricted(shop: Path, tmp_path: Path) -> None:
    """The mark of a mask, and that of a patch whose entries are trained, goes to the output; also
    to the adapter that lies in a restricted output."""
    once = {"training": {**TRAINING, "epochs": 1}}
    finetune(recipe(shop, "talos", **once), tmp_path / "talos", restricted=True)
    finetune({**recipe(shop, "talos", **once), "output": {"form": "patch"}}, tmp_path / "patched",
             restricted=True)  # fmt: skip
    for number, file in enumerate(("talos/mask.safetensors", "patched/tuned.patch.safetensors")):
        what = recipe(shop, "masked", parameters={"mask": str(tmp_path / file)}, **once)
        out = tmp_path / f"out-{number}"
        finetune(what, out)
        assert json.loads((out / "suture.json").read_text()).get("restricted") is True
        assert Mask.load(out / "mask.safetensors").restricted
        assert suture.open(out).restricted

    finetune(recipe(shop, "lora", **once), tmp_path / "lora", restricted=True)
    assert suture.open(f"{shop / 'base'}+{tmp_path / 'lora' / 'adapter'}").restricted
    card = (tmp_path / "lora" / "adapter" / "README.md").read_text()
    assert "must not be passed on" in card
    assert str(tmp_path) not in card
    finetune(recipe(shop, "lora", **once), tmp_path / "free")
    assert not suture.open(f"{shop / 'base'}+{tmp_path / 'free' / 'adapter'}").restricted


def test_another_mask_in_the_same_file_does_not_take_over_checkpoints(
    shop: Path, tmp_path: Path
) -> None:
    """What a recipe names by a file is that file's content: a mask that was replaced between two
    runs, or a head, is another recipe."""
    finetune(recipe(shop, "talos"), tmp_path / "talos")
    given = tmp_path / "mask.safetensors"
    shutil.copy(tmp_path / "talos" / "mask.safetensors", given)
    what = recipe(shop, "masked", parameters={"mask": str(given)})
    assert child(what, tmp_path / "out", [["train", 5]]).returncode == 0
    (~Mask.load(given)).save(given)
    with pytest.raises(OutputError, match="another recipe"):
        finetune(what, tmp_path / "out")

    head = tmp_path / "head.safetensors"
    shutil.copy(shop / "head.safetensors", head)
    what = recipe(shop, "full", head=str(head))
    assert child(what, tmp_path / "headed", [["train", 5]]).returncode == 0
    save_head(Head(("colour", "sky"), torch.ones(2, 16), torch.zeros(2)), head)
    with pytest.raises(OutputError, match="another recipe"):
        finetune(what, tmp_path / "headed")


def test_who_finds_a_run_going_on_leaves_its_folder_alone(tmp_path: Path) -> None:
    """A second command that is turned away does not sweep away the first one's lock and key, with
    which it is gone on from when it is killed."""
    work = tmp_path / ".out.suture"
    with training_space(tmp_path / "out", "finetune", {}, Options()):
        held = {p.name for p in work.iterdir()}
        with (
            pytest.raises(OutputError, match="another process"),
            training_space(tmp_path / "out", "finetune", {}, Options()),
        ):
            pass
        assert {p.name for p in work.iterdir()} == held == {"lock", "key"}
    assert not work.exists()


CHILD = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
torch.set_num_threads(1)
from suture.runs.progress import Progress
from suture.verbs.finetune import VERB as finetune
recipe, out, stops = json.loads(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
for stop in stops:  # each run is a process of its own; what is imported is not imported again
    child = os.fork()
    if not child:
        def tell(phase, at):
            if [phase, at.step] == stop:
                os.kill(os.getpid(), signal.SIGKILL)
        report = finetune(recipe, out, progress=Progress(step=tell))
        print(report.fingerprint, report.losses, flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if stop else 0), (stop, status)
    assert out.exists() is not bool(stop)
"""


SLOW = [pytest.param(name, 10, marks=pytest.mark.slow) for name in EXAMPLES]


@pytest.mark.parametrize(("name", "kills"), [("talos", 2), ("lota", 1), *SLOW])
def test_a_killed_run_ends_as_one_that_was_not(
    name: str, kills: int, shop: Path, tmp_path: Path
) -> None:
    """``kill -9`` at random steps of every phase, dropout and early stop included; then the same
    command: the same losses and the same bytes."""
    training = {**TRAINING, "save_every": 3, "patience": 3, "validate_every": 2}
    if kills == 10:
        training = {**training, "epochs": 5, "patience": 8}
    what = recipe(shop, name, training=training)
    expected = finetune(what, tmp_path / "whole")
    dice = random.Random(name)
    phases = ["dense", "train"] if name == "lota" else ["train"]
    steps = range(1, expected.steps + 1)
    stops = [[phase, step] for phase in phases for step in sorted(dice.sample(steps, kills))]
    done = child(what, tmp_path / "out", [*stops, None])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(" ", 1)[0] == expected.fingerprint
    assert done.stdout.split(" ", 1)[1].strip() == str(expected.losses)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def child(what: dict[str, Any], out: Path, stops: list[Any]) -> subprocess.CompletedProcess[str]:
    here = str(Path(__file__).parent)
    return subprocess.run(
        [sys.executable, "-c", CHILD, here, json.dumps(what), str(out), json.dumps(stops)],
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip


def test_another_recipe_does_not_take_over_checkpoints(shop: Path, tmp_path: Path) -> None:
    """Work of hours is not thrown away in silence; --no-resume says so."""
    what = recipe(shop, "talos")
    assert child(what, tmp_path / "out", [["train", 5]]).returncode == 0
    other = {**what, "training": {**TRAINING, "lr": 1e-3}}
    with pytest.raises(OutputError, match="another recipe"):
        finetune(other, tmp_path / "out")
    finetune(other, tmp_path / "out", resume=False)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_full_disk_keeps_the_last_checkpoint(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says so, and the same command goes on from it to the same end."""
    what = recipe(shop, "talos")
    expected = finetune(what, tmp_path / "whole")
    real, count = snapshot.save_file, 0

    def full(tensors: Any, path: Any, metadata: Any) -> None:
        nonlocal count
        count += 1
        if count > 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path, metadata)

    monkeypatch.setattr(snapshot, "save_file", full)
    with pytest.raises(OutputError, match="No space left.*the one before is kept"):
        finetune(what, tmp_path / "out")
    work = tmp_path / ".out.suture"
    held = snapshot.read_snapshot(work / "train.safetensors")
    assert held is not None
    assert len(held.facts["losses"]) == 4
    monkeypatch.undo()
    assert finetune(what, tmp_path / "out").fingerprint == expected.fingerprint
    assert not work.exists()


def test_a_disk_that_is_full_at_once_says_that_nothing_is_kept(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint, the head and the room that is known to be missing."""

    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(snapshot, "save_file", full)
    with pytest.raises(OutputError, match="No space left.*it was the first"):
        finetune(recipe(shop), tmp_path / "out")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(models, "save_file", full)
    with pytest.raises(OutputError, match="No space left.*the training is kept"):
        finetune(recipe(shop), tmp_path / "out")
    assert (tmp_path / ".out.suture" / "train.safetensors").is_file()
    monkeypatch.undo()
    little = types.SimpleNamespace(free=60_000)
    monkeypatch.setattr("suture.verbs.finetune.plan.shutil.disk_usage", lambda _: little)
    assert "need about" in problems_of(recipe(shop), tmp_path / "x")[0]
    assert plan_finetune(recipe(shop, "talos"), tmp_path / "x").steps == 12


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training stops with the step, the remedy and the checkpoint."""
    real, count = module.classification, 0

    def wild(model: Any, batch: Any) -> Any:
        nonlocal count
        count += 1
        return real(model, batch) * (float("nan") if count > 5 else 1.0)

    monkeypatch.setattr(module, "classification", wild)
    with pytest.raises(NonFiniteError, match="step 6.*checkpoint of step 4 is kept"):
        finetune(recipe(shop), tmp_path / "out")
    assert (tmp_path / ".out.suture" / "train.safetensors").is_file()
    assert not (tmp_path / "out").exists()


def test_training_stops_early_and_keeps_the_best(shop: Path, tmp_path: Path) -> None:
    """With a rate that ruins the model, the weights of an early look are kept."""
    training = {
        "epochs": 30,
        "batch": 8,
        "lr": 0.5,
        "warmup": 0.3,
        "patience": 2,
        "validate_every": 1,
    }
    report = finetune(recipe(shop, training=training), tmp_path / "out")
    assert report.best is not None
    assert report.steps < 100
    assert report.metric is not None
    assert report.base_metric is not None
    assert report.metric.value >= report.base_metric.value - 0.2


def test_a_learned_head_is_kept_and_a_zero_shot_head_reads_labels(
    shop: Path, tmp_path: Path
) -> None:
    """A learned head differs from the probe it began as, also beside masks; a zero-shot head is
    cosines with the vectors of the labels' texts."""
    for name in ("full", "talos", "linearized"):
        finetune(recipe(shop, name, head="learned"), tmp_path / name)
        finetune(recipe(shop, name, head="probe"), tmp_path / f"{name}-probe")
        learned, probe = (
            load_tuned(tmp_path / name, base=shop / "base"),
            load_tuned(tmp_path / f"{name}-probe", base=shop / "base"),
        )
        assert not torch.equal(learned.linear.weight, probe.linear.weight)  # type: ignore[union-attr, arg-type]

    texts = {"colour": "red green blue", "sky": "sun moon star"}
    data = {**recipe(shop)["data"], "label_texts": texts}
    report = finetune(recipe(shop, data=data, head="zero-shot"), tmp_path / "zero")
    model = load_tuned(tmp_path / "zero")
    assert isinstance(model, Classifier)
    assert model.cosine
    assert float(model.linear.weight.norm(dim=1).max()) == pytest.approx(20, rel=1e-4)
    assert report.metric is not None
    saved = str(tmp_path / "zero" / "head.safetensors")
    finetune(recipe(shop, head=saved), tmp_path / "saved")
    with pytest.raises(MismatchError, match="is for the labels colour, sky"):
        finetune(
            recipe(shop, head=saved, data={**data, "labels": ["sky", "colour"]}),
            tmp_path / "swapped",
        )


def test_half_precision_of_the_output(shop: Path, tmp_path: Path) -> None:
    """Another dtype is one rounding of every floating tensor."""
    finetune(recipe(shop), tmp_path / "whole")
    finetune(recipe(shop, output={"dtype": "bfloat16"}), tmp_path / "half")
    whole, half = suture.open(tmp_path / "whole"), suture.open(tmp_path / "half")
    assert {s.dtype for s in half.specs.values()} == {"BF16"}
    for name in whole:
        assert torch.equal(whole.tensor(name).bfloat16(), half.tensor(name))


# -- language models -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model with a chat template."""
    where = tmp_path_factory.mktemp("talker")
    tokenizer: Any = tiny_model.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "six"})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'one ' if m.role == 'user' else 'two ' }}{{ m.content }}"
        "{{ ' six ' }}{% endfor %}{% if add_generation_prompt %}{{ 'two ' }}{% endif %}"
    )
    save_model(tiny_model.language_model(), tokenizer, where / "base")
    rows = [
        {"prompt": f"red {tiny_model.WORDS[2 + i % 6]}", "response": f"{tiny_model.WORDS[5 + i % 3]} moon"}
        for i in range(24)
    ]  # fmt: skip
    (where / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = [{"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]},
                           {"role": "user", "content": "blue"}, {"role": "assistant", "content": "star"}]} for r in rows]  # fmt: skip
    (where / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return where


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_language_models_train_by_every_strategy(name: str, talker: Path, tmp_path: Path) -> None:
    """Packed GPT-2 projections are split for masks and written as they were; only responses count."""
    parameters = {**EXAMPLES[name], **({"targets": ["qkv"]} if "lora" in name else {})}
    what = {
        "base": str(talker / "base"), "strategy": name, "parameters": parameters,
        "data": {"train": str(talker / "pairs.jsonl"), "validation": 0.3},
        "training": {**TRAINING, "lr": 1e-2, "epochs": 4},
    }  # fmt: skip
    report = finetune(what, tmp_path / "out")
    assert report.metric is not None
    assert report.metric.name == "loss"
    assert report.base_metric is not None
    assert report.metric.value < report.base_metric.value
    base, tuned = suture.open(talker / "base"), suture.open(tmp_path / "out")
    assert tuned.specs == base.specs
    if STRATEGIES[name].sparse:
        mask = Mask.load(tmp_path / "out" / "mask.safetensors")
        packed = "transformer.h.0.attn.c_attn.weight"
        assert mask[packed].shape == (16, 48)
        for tensor in base:
            outside = ~mask[tensor] if tensor in mask.shapes else np.ones(base[tensor].shape, bool)
            assert np.array_equal(base[tensor][outside], tuned[tensor][outside]), tensor


def test_only_what_the_assistant_says_is_a_target(talker: Path) -> None:
    """Prompts are masked; in a chat every answer counts with its end, no question does."""
    plan = plan_finetune(
        {
            "base": str(talker / "base"),
            "strategy": "full",
            "data": {"train": str(talker / "chats.jsonl"), "validation": 0.3},
        },
        talker / "x",
    )
    words = tiny_model.WORDS
    data = plan.rows.train
    assert data.targets is not None
    said = [words[i] for i, t in zip(data.ids[0], data.targets[0], strict=True) if t]
    whole = [words[i] for i in data.ids[0]]
    assert whole[:2] == ["one", "red"]
    assert said[1:] == ["moon", "six", "star", "six"]

    pairs = DataSpec(Source(str(talker / "pairs.jsonl")))
    rows = language_rows(pairs, plan.tokenizer, 32, 0).train
    assert rows.targets is not None
    assert rows.targets[0] == (0, 0, 1, 1, 1)
    chat = language_rows(dataclasses.replace(pairs, chat=True), plan.tokenizer, 32, 0).train
    assert chat.targets is not None
    assert words[chat.ids[0][0]] == "one"


# -- wrong input -----------------------------------------------------------------------------------


def read_finetune(what: dict[str, Any]) -> Finetune:
    """Read a recipe that must be right."""
    problems = Problems()
    found = parse(what, problems)
    problems.raise_if_any()
    assert found is not None
    return found


def problems_of(what: dict[str, Any], out: Path) -> list[str]:
    with pytest.raises(SutureError) as caught:
        plan_finetune(what, out)
    return list(getattr(caught.value, "problems", [str(caught.value)]))


def test_all_problems_of_a_recipe_at_once(shop: Path, tmp_path: Path) -> None:
    """Unknown keys with the nearest known one, wrong values, a missing file, a taken output."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    what = recipe(shop, "talos", parameters={"densty": 0.1, "rounds": 0, "score": "fischer"},
                  training={"epoch": 1, "lr": -1, "precision": "half"}, haed="learned")  # fmt: skip
    what["data"] = {"train": str(shop / "none.jsonl"), "txt": "text", "too_long": "cutt"}
    found = "\n".join(problems_of(what, tmp_path / "out"))
    for words in ("'densty'; did you mean 'density'", "parameters.rounds", "did you mean 'fisher'", "'epoch'; did you mean 'epochs'",
                  "training.precision: 'half' is not known; known: no, fp16, bf16", "'haed'; did you mean 'head'", "no file", "'txt'; did you mean 'text'",
                  "did you mean 'cut'", "so it is never replaced"):  # fmt: skip
        assert words in found, (words, found)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"label": "lable"}, "no row has a column 'lable'; did you mean 'label'"),
        ({"text": "body"}, "no row has a column 'body'"),
        (
            {"labels": ["colour", "skies"]},
            "(and 23 more rows): the label 'sky' is not among data.labels; known: colour, skies",
        ),
        ({"max_length": 2}, "tokens, but max_length is 2"),
        ({"max_length": 99}, "reads at most 32 tokens"),
        ({"validation": 0.999}, "leaves no training rows"),
        ({"limit": 1, "validation": 0.0}, "there is nothing to learn"),
    ],
)
def test_rows_that_do_not_fit_are_told_before_training(
    data: dict[str, Any], words: str, shop: Path, tmp_path: Path
) -> None:
    """Unknown column, label out of range, too long, an empty side: place, cause and remedy."""
    found = problems_of(recipe(shop, data={**recipe(shop)["data"], **data}), tmp_path / "out")
    assert any(words in text for text in found), found


def test_a_head_that_does_not_fit_is_told_before_training(shop: Path, tmp_path: Path) -> None:
    """Other labels and another width, both at once."""
    save_head(Head(("colour", "moon"), torch.zeros(2, 8), torch.zeros(2)), tmp_path / "head")
    found = problems_of(recipe(shop, head=str(tmp_path / "head")), tmp_path / "x")
    assert "is for the labels colour, moon; the rows have colour, sky" in found[0]
    assert "reads 8 numbers, the base gives 16" in found[1]


def test_a_row_of_too_many_cells_is_told(shop: Path, tmp_path: Path) -> None:
    """A text with a comma and no quotes: the line, and what to do."""
    (tmp_path / "rows.csv").write_text("text,label\nred, blue,colour\nsun,sky\n")
    found = problems_of(recipe(shop, data={"train": str(tmp_path / "rows.csv")}), tmp_path / "x")
    assert "line 2: has more cells than the first line has columns (text, label)" in found[0]


def test_long_rows_are_cut_or_left_out_if_asked(shop: Path, tmp_path: Path) -> None:
    """And the report says how many."""
    data = recipe(shop)["data"]
    for how in ("cut", "drop"):
        plan = plan_finetune(
            recipe(shop, data={**data, "max_length": 3, "too_long": how}), tmp_path / "x"
        )
        assert max(map(len, plan.rows.train.ids)) == 3
        assert any("more than 3 tokens" in note for note in plan.rows.notes)


def test_other_wrong_inputs(shop: Path, talker: Path, tmp_path: Path) -> None:
    """A device that is not here, patience without rows to look at, a head of a language model,
    a mask or strategy that is none, targets that match nothing, too many blocks, no density."""
    assert (
        "there is no cuda" in problems_of(recipe(shop, device="cuda"), tmp_path / "x")[0]
        or torch.cuda.is_available()
    )
    found = problems_of(
        recipe(shop, training={"patience": 2}, data={**recipe(shop)["data"], "validation": 0.0}),
        tmp_path / "x",
    )
    assert "needs validation rows" in found[0]
    what = {
        "base": str(talker / "base"),
        "strategy": "full",
        "head": "learned",
        "data": {"train": str(talker / "pairs.jsonl")},
    }
    assert "has its own" in problems_of(what, tmp_path / "x")[0]
    assert (
        "did you mean 'talos'"
        in problems_of({**recipe(shop), "strategy": "talso"}, tmp_path / "x")[0]
    )
    assert (
        "nor one of dense"
        in problems_of(recipe(shop, "masked", parameters={"mask": "denser"}), tmp_path / "x")[0]
    )
    assert (
        "by role; 'qq' is none; did you mean 'q'?"
        in problems_of(recipe(shop, "lora", parameters={"targets": ["qq"]}), tmp_path / "x")[0]
    )
    for name, parameters, words in (
        ("lora", {"targets": ["mlp.gate"]}, "there are"),
        ("talos", {"blocks": 9}, "has 2 blocks"),
        ("talos", {"density": 1e-7}, "nothing to train"),
        ("masked", {"mask": "dense", "only": ["mlp.gate"]}, "no prunable tensor"),
    ):
        with pytest.raises(RecipeError, match=words):
            finetune(recipe(shop, name, parameters=parameters), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_data_comes_from_csv_and_parquet_too(shop: Path, tmp_path: Path) -> None:
    """The same rows, the same model."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": r.text, "label": r.label} for r in tiny_model.rows()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows)
    )
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    expected = plan_finetune(recipe(shop), tmp_path / "x").rows
    for name in ("rows.parquet", "rows.csv"):
        data = {**recipe(shop)["data"], "train": str(tmp_path / name)}
        assert plan_finetune(recipe(shop, data=data), tmp_path / "x").rows == expected
    found = problems_of(
        recipe(shop, data={"train": str(tmp_path / "broken.parquet")}), tmp_path / "x"
    )
    assert "not a Parquet file" in found[0]


def test_a_data_set_of_the_hub_is_asked_for_by_split(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Config, split and revision go to the library; class numbers become their names."""
    import datasets

    asked: list[Any] = []
    rows = tiny_model.rows()

    def load(
        path: str, config: str | None, *, split: str, revision: str | None
    ) -> datasets.Dataset:
        asked.append((path, config, split, revision))
        names = datasets.ClassLabel(names=["colour", "sky"])
        table = {"text": [r.text for r in rows], "label": [names.str2int(r.label) for r in rows]}
        return datasets.Dataset.from_dict(
            table, features=datasets.Features({"text": datasets.Value("string"), "label": names})
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = {"path": "some/set", "config": "small", "revision": "v1"}
    plan = plan_finetune(
        recipe(shop, data={"train": source, "validation": {"path": "some/set", "split": "test"}}),
        tmp_path / "x",
    )
    assert asked == [("some/set", "small", "train", "v1"), ("some/set", None, "test", None)]
    assert plan.rows.labels == ("colour", "sky")
    assert len(plan.rows.train) == len(plan.rows.validation) == 48


def test_each_strategy_has_a_rate_of_its_own(shop: Path) -> None:
    """Where a recipe names none; the docs tell it. One that is named is taken."""
    page = (Path(__file__).parents[1] / "docs" / "finetune.md").read_text(encoding="utf-8")
    for name, line in STRATEGIES.items():
        assert read_finetune(recipe(shop, name, training={})).training.lr == line.lr
        assert read_finetune(recipe(shop, name, training={"lr": 2e-6})).training.lr == 2e-6
        assert f"{line.lr:.0e}".replace("e-0", "e-") in page, name
    assert STRATEGIES["talos"].lr == 10 * STRATEGIES["full"].lr


def test_recipes_survive_being_written_out(shop: Path) -> None:
    """What a recipe resolves to reads as the same recipe."""
    for name in EXAMPLES:
        one = read_finetune(recipe(shop, name))
        again = read_finetune(one.resolved())
        assert again.resolved() == one.resolved()


# -- the command -----------------------------------------------------------------------------------


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "suture", *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
    )


def test_ten_lines_one_command_one_table(shop: Path, tmp_path: Path) -> None:
    """A dry run writes nothing; then the table; then one JSON object; then a message and code 2."""
    short = {**recipe(shop, "talos"), "base": os.path.relpath(shop / "base", tmp_path)}
    short["data"] = {"train": os.path.relpath(shop / "rows.jsonl", tmp_path)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(short))

    dry = command("finetune", "recipe.yaml", "-o", "out", "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "nothing was written" in dry.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]

    done = command("finetune", "recipe.yaml", "-o", "out", "--log", "tensorboard", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("loss", "accuracy, tuned", "trained", "time", "peak memory"):
        assert words in done.stdout
    assert "tokens/s" in done.stderr
    assert "s left" in done.stderr
    assert list((tmp_path / "out-logs").glob("events*"))

    as_json = command("finetune", "recipe.yaml", "-o", "out", "--overwrite", "--json", cwd=tmp_path)
    assert json.loads(as_json.stdout)["strategy"] == "talos"
    taken = command("finetune", "recipe.yaml", "-o", "out", cwd=tmp_path)
    assert taken.returncode == 2
    assert "exists" in taken.stderr


def test_an_interrupt_says_how_to_go_on(shop: Path, tmp_path: Path) -> None:
    """Code 3; the same command ends the run."""
    what = recipe(shop, training={**TRAINING, "epochs": 3000, "save_every": 1})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(what))
    process = subprocess.Popen(
        [sys.executable, "-m", "suture", "finetune", "recipe.yaml", "-o", "out"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    saved = tmp_path / ".out.suture" / "train.safetensors"
    deadline = time.monotonic() + 60
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert "it goes on from what is done" in errors
    assert saved.exists()


def test_curves_go_to_trackio_or_say_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step's numbers, by phase; without the library the extra is named."""
    at = TrainingStep(3, 9, 0.5, 1e-3, 1.0, 2.0, 7.0, 0.25)
    seen: list[Any] = []
    fake = types.ModuleType("trackio")
    fake.init = lambda **facts: seen.append(facts["name"])  # type: ignore[attr-defined]
    fake.log = lambda values, step: seen.append((values, step))  # type: ignore[attr-defined]
    fake.finish = lambda: seen.append("done")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with tracker("trackio", tmp_path / "out", {}) as note:
        note("train", at)
    numbers = {"loss": 0.5, "lr": 1e-3, "tokens_per_second": 7.0, "validation": 0.25}
    assert seen == ["out", ({f"train/{k}": v for k, v in numbers.items()}, 3), "done"]

    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingExtraError, match="trackio"), tracker("trackio", tmp_path, {}):
        pass
    with (
        pytest.raises(RecipeError, match="did you mean 'tensorboard'"),
        tracker("tensorbord", tmp_path, {}),
    ):
        pass


def test_strategies_are_listed() -> None:
    """Names, defaults, papers; one in full."""
    listed = command("strategies", "--json", cwd=Path.cwd())
    found = json.loads(listed.stdout)
    assert set(found) == set(STRATEGIES)
    assert found["talos"]["parameters"]["density"]["default"] == 0.1
    one = command("strategies", "talos", cwd=Path.cwd())
    assert "2504.02620" in one.stdout
    assert "damping = 0.1" in one.stdout


def test_settings_agree_with_the_docs() -> None:
    """Every key of ``training`` stands in docs/finetune.md."""
    page = (Path(__file__).parents[1] / "docs" / "finetune.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(TuneSettings):
        assert f"`{field.name}`" in page, field.name
    for field in dataclasses.fields(DataSpec):
        assert field.name == "share" or f"`{field.name}`" in page, field.name
    for name in STRATEGIES:
        assert f"`{name}`" in page, name
    assert Encoder.__doc__
