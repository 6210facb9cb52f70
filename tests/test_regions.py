"""`suture localize`: from a recipe to a folder of masks; what is wrong is told at once."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

import adapting
import making
import suture
import tiny_model
import toy
from suture import Mask, Stats
from suture.checkpoints.atomic import alone
from suture.edits.mask_file import popcount
from suture.training.models import load_encoder, load_language_model, parameters_of, save_model
from suture.verbs.localize import run

LABELS = ("colour", "sky")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, two models near it, a head, rows."""
    return tiny_model.workshop(tmp_path_factory.mktemp("workshop"))


def recipe(workshop: Path, name: str = "r.yaml", **more: Any) -> Path:
    found = {"base": "base", "models": {"one": "one", "two": "two"}, "density": 0.05, **more}
    path = workshop / name
    path.write_text(yaml.safe_dump({k: v for k, v in found.items() if v is not None}))
    return path


def tasks(**more: Any) -> dict[str, Any]:
    entry = {"data": "rows.jsonl", "head": "head.safetensors", "max_length": 16, **more}
    return {"one": entry, "two": entry}


def test_masks_without_data(workshop: Path, tmp_path: Path) -> None:
    """The folder holds the masks that Python gives, and a record that fits them."""
    said = making.invoke("localize", recipe(workshop), "-o", tmp_path / "out", "--json")

    record = said.json
    assert said.code == 0, said.err
    assert json.loads((tmp_path / "out" / "localize.json").read_text()) == record
    base = suture.open(workshop / "base")
    masks = {}
    for model in ("one", "two"):
        tau = (suture.open(workshop / model) - base).select(exclude=["embedding", "head"])
        mask = masks[model] = Mask.load(tmp_path / "out" / f"{model}.safetensors")
        assert mask == suture.localize(tau, density=0.05)
        found = record["masks"][model]
        assert found["kept"] == mask.count == round(0.05 * mask.size)
        for section in ("layers", "roles"):
            assert sum(r["kept"] for r in found[section].values()) == mask.count
            assert sum(r["entries"] for r in found[section].values()) == mask.size
        row = found["roles"]["mlp.up"]
        names = [n for n in mask.shapes if n.endswith("intermediate.dense.weight")]
        assert row["kept"] == sum(int(mask[n].sum()) for n in names)
        assert row["enrichment"] == pytest.approx(row["density"] / mask.density)
        assert mask.about["model"] == record["inputs"][model]["fingerprint"]
    (pair,) = record["overlaps"]
    assert pair["jaccard"] == masks["one"].jaccard(masks["two"])
    assert pair["independent"] == pytest.approx(0.05 / 1.95, rel=1e-2)
    assert pair["low"] <= pair["matched"] <= pair["high"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_recipe_may_leave_out_the_entries_of_a_mask(workshop: Path, tmp_path: Path) -> None:
    """One mask for all models or one a model; of another base, or of nothing, it is refused."""
    first = tmp_path / "first"
    making.invoke("localize", recipe(workshop), "-o", first)
    for without in (str(first / "one.safetensors"), {"two": str(first / "one.safetensors")}):
        where = recipe(workshop, "without.yaml", without=without)
        said = making.invoke("localize", where, "-o", tmp_path / "out", "--overwrite")
        assert said.code == 0, said.err
        one, two, gone = (Mask.load(folder / f"{m}.safetensors") for folder, m in (
            (tmp_path / "out", "one"), (tmp_path / "out", "two"), (first, "one")))  # fmt: skip
        assert (two & gone).count == 0
        assert (one & gone).count == (0 if isinstance(without, str) else gone.count)
        assert one.count == two.count == gone.count
        assert two.about["without"] == "one.safetensors"

    foreign = Mask(gone.shapes, gone.bits, {"base": "another"})
    foreign.save(tmp_path / "foreign.safetensors")
    where = recipe(workshop, "without.yaml", without=str(tmp_path / "foreign.safetensors"))
    said = making.invoke("localize", where, "-o", tmp_path / "no")
    assert said.code == 2
    assert "marks entries of another base" in said.err
    where = recipe(workshop, "without.yaml", without={"one": "missing.safetensors", "thre": "x"})
    said = making.invoke("localize", where, "-o", tmp_path / "no")
    assert said.code == 2
    assert "missing.safetensors" in said.err
    assert "without: no model 'thre'" in said.err


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("fisher", {}),
        ("snip", {"at": "base"}),
        ("delta_grad", {"scope": "tensor"}),
        ("first_order", {"positive": True, "density": None}),
        ("wanda", {}),
        ("learned", {"learn": {"epochs": 2}}),
    ],
)
def test_masks_from_data(rule: str, more: Any, workshop: Path, tmp_path: Path) -> None:
    """Statistics are measured, kept, and give the same masks when they are named instead of data."""
    where = recipe(workshop, f"{rule}.yaml", rule=rule, tasks=tasks(), **more)

    said = making.invoke("localize", where, "-o", tmp_path / "out", "--threads", 1)

    assert said.code == 0, said.err
    kept = {m: str(tmp_path / "out" / "stats" / f"{m}.safetensors") for m in ("one", "two")}
    stats = Stats.load(Path(kept["one"]))
    record = json.loads((tmp_path / "out" / "localize.json").read_text())
    whose = "base" if more.get("at") == "base" else "one"
    assert stats.facts["model"] == record["inputs"][whose]["fingerprint"]
    assert stats.facts["rows"] == 20
    again = recipe(workshop, f"{rule}-again.yaml", rule=rule, stats=kept,
                   **{k: v for k, v in more.items() if k != "learn"})  # fmt: skip
    assert making.invoke("localize", again, "-o", tmp_path / "again").code == 0
    for model in ("one", "two"):
        one, other = (Mask.load(tmp_path / d / f"{model}.safetensors") for d in ("out", "again"))
        assert one == other
        if "density" not in more:
            assert one.count == (
                round(0.05 * one.size) if more.get("scope") != "tensor" else one.count
            )


def test_masks_of_a_language_model(workshop: Path, tmp_path: Path) -> None:
    """``kind: causal`` needs rows of text and no head."""
    for number, name in enumerate(("lm", "lm-tuned")):
        save_model(tiny_model.language_model(number), tiny_model.tokenizer(), tmp_path / name)
    what = {
        "base": str(tmp_path / "lm"), "models": {"m": str(tmp_path / "lm-tuned")}, "rule": "fisher",
        "density": 0.1, "tasks": {"m": {"data": "rows.jsonl", "kind": "causal", "max_length": 16}},
    }  # fmt: skip
    (workshop / "lm.yaml").write_text(yaml.safe_dump(what))

    said = making.invoke("localize", workshop / "lm.yaml", "-o", tmp_path / "out")

    assert said.code == 0, said.err
    mask = Mask.load(tmp_path / "out" / "m.safetensors")
    assert mask.count == round(0.1 * mask.size)


CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model with a chat template, two models near it, and prompts with answers."""
    folder = tmp_path_factory.mktemp("talkers")
    tokenizer: Any = tiny_model.tokenizer()
    tokenizer.chat_template = CHAT
    for number, name in enumerate(("base", "safe", "maths")):
        model = tiny_model.language_model(0)
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * number * torch.randn(p.shape, generator=draw))
        save_model(model, tokenizer, folder / name)
    for name, words in (("safe", tiny_model.COLOURS), ("maths", tiny_model.SKIES)):
        rows = [{"prompt": f"{words[i % 3]} one two", "response": f"three {words[(i + 1) % 3]} {w}"}
                for i, w in enumerate(tiny_model.WORDS[8:])]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def talking(talkers: Path, where: Path, **more: Any) -> Path:
    entry = {"kind": "causal", "chat": True, "batch": 4, **more.pop("task", {})}
    what = {
        "base": str(talkers / "base"), "models": {m: str(talkers / m) for m in ("safe", "maths")},
        "rule": "snip", "at": "both", "density": 0.2, "scope": "tensor",
        "tasks": {m: {"data": str(talkers / f"{m}.jsonl"), **entry} for m in ("safe", "maths")},
        **more,
    }  # fmt: skip
    where.write_text(yaml.safe_dump(what))
    return where


def test_scores_at_both_feed_led(talkers: Path, tmp_path: Path) -> None:
    """One command scores expert and base on the same tokens; LED merges by them, and says how."""
    where = talking(talkers, tmp_path / "r.yaml")

    said = making.invoke("localize", where, "-o", tmp_path / "out")

    assert said.code == 0, said.err
    stats = {
        at: Stats.load(tmp_path / "out" / "stats" / at / "safe.safetensors") for at in ("", "base")
    }
    record = json.loads((tmp_path / "out" / "localize.json").read_text())
    assert stats[""].facts["data"] == stats["base"].facts["data"]
    assert stats[""].facts["model"] == record["inputs"]["safe"]["fingerprint"]
    assert stats["base"].facts["model"] == record["inputs"]["base"]["fingerprint"]
    loaded = load_language_model(talkers / "base", dtype=torch.float32)
    rows = [json.loads(line) for line in (talkers / "safe.jsonl").read_text().splitlines()]
    total: dict[str, Any] = {}
    for row in rows:  # the slow twin: a row at a time, through the template by hand
        before = f"user {row['prompt']} assistant "
        ids = loaded.tokenizer([before + row["response"]], truncation=True, max_length=64)[
            "input_ids"
        ]
        start = len(loaded.tokenizer([before], truncation=True, max_length=64)["input_ids"][0])
        logits = loaded.model(torch.tensor(ids), torch.ones(1, len(ids[0]), dtype=torch.int64))[0]
        loss = F.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[0][start:]))
        loaded.model.zero_grad()
        loss.backward()
        for name, p in parameters_of(loaded.model).items():
            if p.grad is not None:
                total[name] = total.get(name, 0) + p.grad.double().abs().numpy() / len(rows)
    for name in stats["base"].names("abs_grad"):
        found = stats["base"].whole("abs_grad", name)
        np.testing.assert_allclose(found, total[name], atol=1e-6 * total[name].max() + 1e-9)

    folder = tmp_path / "out" / "stats"
    what = toy.recipe("led", {m: talkers / m for m in ("safe", "maths")}, talkers / "base",
                      stats=str(folder), base_stats=str(folder / "base"), disjoint="safety_first",
                      safety="safe", own={"safe": {"density": 0.3}})  # fmt: skip
    _, report = toy.run(tmp_path / "merged", what)
    assert report.facts["owned"]["safe"] == report.facts["elected"]["safe"] > 0
    results = json.loads((tmp_path / "merged" / "suture.json").read_text())["results"]
    assert results["overlaps"] == report.facts["overlaps"]
    assert -1 <= results["rank_correlations"]["base_and_model"]["safe"] <= 1
    with pytest.raises(suture.MismatchError, match="is not the model that the masks"):
        swapped = {m: {"path": str(talkers / o)} for m, o in (("safe", "maths"), ("maths", "safe"))}
        toy.run(tmp_path / "no", {**what, "models": swapped})


def test_masks_are_enough_for_led(talkers: Path, tmp_path: Path) -> None:
    """Without the statistics, the masks of experts and base elect; swapped ones are refused."""
    where = talking(talkers, tmp_path / "r.yaml", density=0.4, keep_stats=False)
    assert making.invoke("localize", where, "-o", tmp_path / "out").code == 0
    out, base = tmp_path / "out", tmp_path / "out" / "base"
    assert not (out / "stats").exists()
    models = {m: talkers / m for m in ("safe", "maths")}
    what = toy.recipe("led", models, talkers / "base", masks=str(out), base_masks=str(base),
                      stats=None)  # fmt: skip

    merged, report = toy.run(tmp_path / "merged", what)
    drawn, control = toy.run(
        tmp_path / "drawn", {**what, "parameters": {**what["parameters"], "rule": "random"}}
    )

    elected = {m: Mask.load(out / f"{m}.safetensors") & Mask.load(base / f"{m}.safetensors")
               for m in models}  # fmt: skip
    start = toy.read(talkers / "base")
    tuned = {m: toy.read(path) for m, path in models.items()}
    for name in elected["safe"].shapes:
        both = {m: torch.from_numpy(np.array(mask[name])) for m, mask in elected.items()}
        wanted = start[name].clone()
        for mine, other in (("safe", "maths"), ("maths", "safe")):
            alone = both[mine] & ~both[other]
            wanted[alone] = tuned[mine][name][alone]
        torch.testing.assert_close(merged[name], wanted, rtol=1e-6, atol=1e-7)
    for model, mask in elected.items():
        assert report.facts["elected"][model] == mask.density
        assert control.facts["elected"][model] == mask.density
    assert "rank_correlations" not in report.facts
    assert toy.same_bytes(merged, drawn)
    for parameters, match in (
        ({"masks": str(base)}, "marks what matters to the base model; a mask of the tuned"),
        ({"base_masks": str(out)}, "marks what matters to the tuned model; a mask of the base"),
        ({"base_masks": None}, "base_masks: missing"),
        ({"flip": True}, "flip: reverses scores"),
        ({"stats": str(out)}, "stats and masks: give one"),
    ):
        with pytest.raises(suture.SutureError, match=match):
            toy.run(tmp_path / "no", {**what, "parameters": {**what["parameters"], **parameters}})


@pytest.mark.parametrize(
    ("rows", "task", "match"),
    [
        ([{"prompt": "red one"}], {}, "line 1: no column 'response'"),
        ([{"prompt": "red one", "response": " "}], {}, "line 1: the column 'response' is empty"),
        ([{"prompt": "red", "rejected": "one"}], {"response": "chosen"}, "no column 'chosen'"),
        ([], {}, "holds no rows"),
        ([{"messages": [{"role": "user", "content": "red"}]}], {}, "no words of the assistant"),
        ([{"body": "red"}], {}, "no column 'messages', 'prompt' or 'text', but body"),
    ],
)
def test_rows_with_a_side_missing(
    rows: Any, task: Any, match: str, talkers: Path, tmp_path: Path
) -> None:
    """A pair without one of its sides, and data without a row, are refused before a model is loaded."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    where = talking(
        talkers, tmp_path / "r.yaml", task={"data": str(tmp_path / "rows.jsonl"), **task}
    )

    said = making.invoke("localize", where, "-o", tmp_path / "out")

    assert said.code == 2
    assert match in said.err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_chat_template(talkers: Path, workshop: Path, tmp_path: Path) -> None:
    """It cannot be asked in one; the message says what to do, and nothing is left."""
    for number, name in enumerate(("lm", "tuned")):
        save_model(tiny_model.language_model(number), tiny_model.tokenizer(), tmp_path / name)
    what = {"base": str(tmp_path / "lm"), "models": {"safe": str(tmp_path / "tuned")}}
    tasks = {"safe": {"data": str(talkers / "safe.jsonl"), "kind": "causal", "chat": True}}
    where = talking(talkers, tmp_path / "r.yaml", **what, tasks=tasks)

    said = making.invoke("localize", where, "-o", tmp_path / "out")

    assert said.code == 2
    assert "has no chat template; use a prompt and a response column" in said.err
    assert not (tmp_path / "out").exists()


def test_localize_then_stitch(workshop: Path, tmp_path: Path) -> None:
    """Masks and grafts from the command line stitch to the same bytes; another model is refused."""
    where = recipe(workshop, "both.yaml", rule="random", density=0.4)
    for flag, out in (((), "masks"), (("--values",), "state")):
        assert making.invoke("localize", where, "-o", tmp_path / out, *flag).code == 0
    made = {}
    for kind, models in (
        ("masks", {"one": workshop / "one", "two": workshop / "two"}),
        ("state", {m: tmp_path / "state" / f"{m}.safetensors" for m in ("one", "two")}),
    ):
        what = toy.recipe("stitch", models, workshop / "base", masks=str(tmp_path / kind))
        made[kind], _ = toy.run(tmp_path / f"stitched-{kind}", what)
    wrong = toy.recipe("stitch", {"one": workshop / "two", "two": workshop / "one"}, workshop / "base",
                       masks=str(tmp_path / "masks"))  # fmt: skip

    assert toy.same_bytes(made["masks"], made["state"]) == []
    with pytest.raises(suture.MismatchError, match="not the model that the masks"):
        toy.run(tmp_path / "wrong", wrong)
    assert not (tmp_path / "wrong").exists()


def test_what_is_measured_weighs_merges(workshop: Path, tmp_path: Path) -> None:
    """Kinds named under ``measure`` are kept for Fisher merging and RegMean, which find them."""
    where = recipe(workshop, "kinds.yaml", tasks=tasks(), measure=["gram", "fisher"])
    assert making.invoke("localize", where, "-o", tmp_path / "out").code == 0
    stats = Stats.load(tmp_path / "out" / "stats" / "one.safetensors")
    assert stats.kinds == ["fisher", "gram"]
    models = {m: workshop / m for m in ("one", "two")}

    for method in ("fisher_merging", "regmean"):
        what = toy.recipe(method, models, workshop / "base", stats=str(tmp_path / "out" / "stats"))
        out, report = toy.run(tmp_path / method, what)
        assert report.facts["statistics"][0]["rows"] == 20
        assert out.keys() == toy.read(workshop / "base").keys()


def test_a_dry_run_writes_nothing(workshop: Path, tmp_path: Path) -> None:
    """It says what would be done, for people and as JSON."""
    where = recipe(workshop, "dry.yaml", rule="snip", tasks=tasks())

    text = making.invoke("localize", where, "-o", tmp_path / "out", "--dry-run")
    data = making.invoke("localize", where, "-o", tmp_path / "out", "--dry-run", "--json").json

    assert text.code == 0
    making.lines_of(text.out, "snip, from abs_grad", "density 0.05, 20 rows", "nothing was written")
    assert data["needs"] == ["abs_grad"]
    assert not list(tmp_path.iterdir())


def test_everything_wrong_is_told_at_once(workshop: Path, tmp_path: Path) -> None:
    """Words, numbers, models, data: one message, nothing written, exit code 2."""
    what = {
        "base": "base", "models": {"one": "nonesuch", "two": {"path": "two", "density": 0}},
        "rule": "fisher", "scope": "globl", "densty": 0.1, "density": 1.5, "seed": -1,
        "space": {"exclude": ["embeding"]}, "at": "here", "measure": ["grams"],
        "tasks": {"two": {"data": "nothing.jsonl", "rows": 0}, "three": {"data": "rows.jsonl"}},
    }  # fmt: skip
    (workshop / "wrong.yaml").write_text(yaml.safe_dump(what))

    said = making.invoke("localize", workshop / "wrong.yaml", "-o", tmp_path / "out")

    assert said.code == 2
    making.lines_of(
        said.err, "did you mean 'density'?", "did you mean 'global'?", "nonesuch: no such file",
        "models.two.density: the share of entries kept, in (0, 1], not 0", "seed: a whole number from 0",
        "did you mean 'embedding'?", "at: 'here' is not known; known: tuned, base, both", "nothing.jsonl",
        "tasks.two.head: a classifier needs its head", "tasks.two.rows: a whole number from 1, not 0",
        "no model 'three'", "measure[0]: 'grams' is not known; did you mean 'gram'?", "needs data for 'one': `tasks: {one: {data: ..., head: ...}}`, or `stats: {one: FILE}`",
    )  # fmt: skip
    assert "missing" not in said.err, "a density that is refused is not missing"
    assert not list(tmp_path.iterdir())


def test_bad_data_is_refused(workshop: Path, tmp_path: Path) -> None:
    """Empty data, missing labels, labels the head lacks, statistics of another model."""
    (workshop / "empty.jsonl").write_text("\n")
    (workshop / "bare.jsonl").write_text('{"text": "red sun"}\n')
    (workshop / "odd.jsonl").write_text('{"text": "red sun", "label": "sea"}\n')
    for file, match in (("empty", "holds no rows"), ("bare", "no column 'label'"),
                        ("odd", "the head has no label 'sea'")):  # fmt: skip
        where = recipe(workshop, "bad.yaml", rule="snip", tasks=tasks(data=f"{file}.jsonl"))
        said = making.invoke("localize", where, "-o", tmp_path / "out")
        assert said.code == 2
        assert match in said.err
    alone = {"one": tasks()["one"]}
    where = recipe(workshop, "ok.yaml", rule="snip", tasks=alone, models={"one": "one"})
    assert making.invoke("localize", where, "-o", tmp_path / "masks").code == 0
    foreign = recipe(workshop, "foreign.yaml", rule="snip", models={"two": "two"},
                     stats={"two": str(tmp_path / "masks" / "stats" / "one.safetensors")})  # fmt: skip
    said = making.invoke("localize", foreign, "-o", tmp_path / "out")
    assert said.code == 2
    assert "measured on another model than two" in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["masks"]


def test_a_broken_model_leaves_nothing(workshop: Path, tmp_path: Path) -> None:
    """A loss that is NaN names the model and the step; the folder is not there."""
    loaded = load_encoder(workshop / "one", dtype=torch.float32)
    with torch.no_grad():
        for name, p in loaded.model.named_parameters():
            if name.endswith("query.weight"):
                p[0, 0] = float("nan")
    save_model(loaded.model, loaded.tokenizer, tmp_path / "broken")
    alone = {"one": tasks()["one"]}
    where = recipe(
        workshop, "nan.yaml", rule="snip", tasks=alone, models={"one": str(tmp_path / "broken")}
    )

    said = making.invoke("localize", where, "-o", tmp_path / "out")

    assert said.code == 2, said.out
    assert "while measuring one" in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


def test_an_older_folder_is_replaced_only_when_asked(workshop: Path, tmp_path: Path) -> None:
    """And what Suture did not write is never replaced."""
    where = recipe(workshop, "over.yaml")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert making.invoke("localize", where, "-o", tmp_path / "out").code == 0

    again = making.invoke("localize", where, "-o", tmp_path / "out")
    mine = making.invoke("localize", where, "-o", tmp_path / "mine", "--overwrite")

    assert (again.code, mine.code) == (2, 2)
    assert "add --overwrite" in again.err
    assert "was not written by `suture localize`" in mine.err
    assert making.invoke("localize", where, "-o", tmp_path / "out", "--overwrite").code == 0


def test_the_null_of_permuted_masks_is_a_permutation() -> None:
    """The drawn intersections have mean and spread of masks that are really permuted."""
    draw = np.random.default_rng(0)
    shapes = {"a": (400,), "b": (300,)}
    marks = [
        {"a": draw.random(400) < s, "b": draw.random(300) < t} for s, t in ((0.5, 0.1), (0.4, 0.2))
    ]
    one, other = (
        Mask(shapes, {n: np.packbits(x, bitorder="little") for n, x in m.items()}) for m in marks
    )
    found = one.overlap(other, draws=4000)
    real = []
    for _ in range(1500):
        both = sum(int((draw.permutation(marks[0][n]) & marks[1][n]).sum()) for n in shapes)
        total = sum(int(m[n].sum()) for m in marks for n in shapes)
        real.append(both / (total - both))

    assert found.matched == pytest.approx(np.mean(real), rel=0.01)
    assert found.low == pytest.approx(np.quantile(real, 0.025), abs=0.01)
    assert found.high == pytest.approx(np.quantile(real, 0.975), abs=0.01)
    assert found.jaccard == one.jaccard(other)


def test_counts_are_exact_on_odd_sizes() -> None:
    """Popcounts take words and rests alike."""
    random.seed(1)
    for size in (0, 1, 7, 8, 9, 8_388_608 + 77):
        bits = np.frombuffer(random.randbytes(size), np.uint8)
        assert popcount(bits) == int(np.unpackbits(bits).sum())


def test_a_killed_run_goes_on_to_the_same_bytes(workshop: Path, tmp_path: Path) -> None:
    """``kill -9`` while masks are learned: epochs and finished models are kept, bytes are the same;
    another recipe starts anew, and a finished run leaves nothing beside its folder."""
    what: dict[str, Any] = {"rule": "learned", "tasks": tasks(), "learn": {"epochs": 30}}
    where = recipe(workshop, "killed.yaml", **what)
    assert making.invoke("localize", where, "-o", tmp_path / "truth").code == 0
    staging = tmp_path / ".out.suture"
    state = staging / "learning" / "two.safetensors"
    with making.start("localize", str(where), "-o", str(tmp_path / "out"), cwd=workshop) as process:
        end = time.monotonic() + 120
        while not state.is_file() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert state.is_file(), "it was over before it could be killed"
    assert not (tmp_path / "out").exists()

    said = making.invoke("localize", where, "-o", tmp_path / "out")

    assert said.code == 0, said.err
    making.lines_of(said.err, "one: measured before the interruption")
    assert "two: epoch 1 of 30" not in said.err
    assert making.tree(tmp_path / "out") == making.tree(tmp_path / "truth")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "truth"]


def test_what_another_run_left_is_not_used(workshop: Path, tmp_path: Path) -> None:
    """Statistics beside the output count only if everything that they depend on is the same."""
    staging = tmp_path / ".out.suture"
    (staging / "stats").mkdir(parents=True)
    (staging / "lock").touch()
    (staging / "key").write_text("of something else")
    (staging / "stats" / "one.safetensors").write_text("not what it should be")
    where = recipe(workshop, "anew.yaml", rule="snip", tasks=tasks())

    said = making.invoke("localize", where, "-o", tmp_path / "out")

    assert said.code == 0, said.err
    assert "before the interruption" not in said.err


def test_two_runs_of_one_output_do_not_mix(workshop: Path, tmp_path: Path) -> None:
    """The second is refused and touches nothing of the first."""
    where = recipe(workshop, "twice.yaml")
    staging = tmp_path / ".out.suture"
    with alone(staging, tmp_path / "out", "writing"):
        (staging / "masks").mkdir()
        (staging / "masks" / "one.safetensors").write_text("half")
        said = making.invoke("localize", where, "-o", tmp_path / "out")

    assert said.code == 2
    assert "out: another process is writing it just now" in said.err
    assert (staging / "masks" / "one.safetensors").read_text() == "half"


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_appeared_meanwhile_is_left_alone(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Somebody's folder that takes the output's name while masks are made is not replaced."""
    make = run._made
    out = tmp_path / "out"

    def slow(*given: Any) -> dict[str, Any]:
        record = make(*given)
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        return record

    monkeypatch.setattr(run, "_made", slow)
    flags = ["--overwrite"] if overwrite else []
    said = making.invoke("localize", recipe(workshop, "late.yaml"), "-o", out, *flags)

    assert said.code == 2
    assert "was not written by `suture localize`" in said.err
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("notes.txt", "mine")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_full_disk_costs_no_measurement(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a mask cannot be written, what was measured stays, and the same command goes on."""
    where = recipe(workshop, "full.yaml", rule="snip", tasks=tasks())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run, "locate", full)
        said = making.invoke("localize", where, "-o", tmp_path / "out")
    assert said.code == 2
    assert "No space left on device" in said.err

    again = making.invoke("localize", where, "-o", tmp_path / "out")

    assert again.code == 0, again.err
    making.lines_of(again.err, "one: measured before the interruption")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_an_output_that_holds_what_is_read_is_not_replaced(workshop: Path, tmp_path: Path) -> None:
    """Neither the statistics nor the recipe of a run are removed by it."""
    out = tmp_path / "out"
    alone = {"one": tasks()["one"]}
    measured = recipe(workshop, "first.yaml", rule="snip", models={"one": "one"}, tasks=alone)
    assert making.invoke("localize", measured, "-o", out).code == 0
    stats = out / "stats" / "one.safetensors"
    again = recipe(
        workshop, "again.yaml", rule="snip", models={"one": "one"}, stats={"one": str(stats)}
    )
    inside = out / "recipe.yaml"
    inside.write_text(
        yaml.safe_dump({"base": str(workshop / "base"), "models": {"one": str(workshop / "one")},
                        "density": 0.1})
    )  # fmt: skip

    lost = making.invoke("localize", again, "-o", out, "--overwrite")
    gone = making.invoke("localize", inside, "-o", out, "--overwrite")

    assert (lost.code, gone.code) == (2, 2)
    assert "holds the input 'stats.one'" in lost.err
    assert "--overwrite would remove the recipe" in gone.err
    assert stats.is_file()
    assert inside.is_file()


def test_restricted_is_inherited_by_everything(workshop: Path, tmp_path: Path) -> None:
    """Masks, grafts, statistics, algebra, patches, merges, cards and the report: all are marked."""
    alone = {"one": tasks()["one"]}
    where = recipe(workshop, "secret.yaml", rule="snip", tasks=alone, models={"one": "one"})
    said = making.invoke("localize", where, "-o", tmp_path / "masks", "--values", "--restricted")
    assert said.code == 0, said.err
    assert "restricted: neither the masks" in said.out
    record = json.loads((tmp_path / "masks" / "localize.json").read_text())
    path = tmp_path / "masks" / "one.safetensors"
    mask, other = (
        Mask.load(path),
        Mask.of({n: np.ones(s, bool) for n, s in Mask.load(path).shapes.items()}),
    )
    assert record["restricted"] is True
    assert not other.restricted
    for found in (mask, mask & other, other | mask, other - mask, ~mask, ~(other & mask)):
        found.save(tmp_path / "again.safetensors")
        assert Mask.load(tmp_path / "again.safetensors").restricted
    assert Stats.load(tmp_path / "masks" / "stats" / "one.safetensors").restricted

    patch = making.invoke("patch", "make", workshop / "base", workshop / "one", "--mask", path, "-o",
                          tmp_path / "p.patch.safetensors", "--json")  # fmt: skip
    assert patch.json["restricted"] is True
    made = {}
    for kind, models in (("masks", workshop / "one"), ("graft", path)):
        what = toy.recipe("stitch", {"one": models, "two": workshop / "two"}, workshop / "base",
                          masks={"one": str(path), "two": str(_open_mask(workshop, tmp_path))})  # fmt: skip
        toy.run(tmp_path / f"stitched-{kind}", what)
        made[kind] = json.loads((tmp_path / f"stitched-{kind}" / "suture.json").read_text())
        card = (tmp_path / f"stitched-{kind}" / "README.md").read_text()
        assert made[kind]["restricted"] is True
        assert made[kind]["withheld"] == ["one"]
        assert "Restricted" in card
        assert made[kind]["inputs"]["one"]["fingerprint"] not in card
        assert made[kind]["inputs"]["two"]["fingerprint"] in card
        assert "share of entries kept" not in card
        assert "entries moved" not in card
        assert "- restricted\n" in card.split("---")[1]
    assert suture.open(tmp_path / "stitched-masks").restricted
    tau = suture.open(tmp_path / "stitched-masks") - suture.open(workshop / "base")
    assert suture.localize(tau, density=0.1).restricted
    again = recipe(workshop, "of-secret.yaml", models={"one": str(tmp_path / "stitched-masks")})
    assert making.invoke("localize", again, "-o", tmp_path / "derived", "--json").json["restricted"]


def _open_mask(workshop: Path, tmp_path: Path) -> Path:
    """A mask of ``two`` without a mark."""
    where = recipe(workshop, "open.yaml", models={"two": "two"})
    out = tmp_path / "open"
    if not out.exists():
        assert making.invoke("localize", where, "-o", out).code == 0
    assert not Mask.load(out / "two.safetensors").restricted
    return out / "two.safetensors"


def test_models_are_opened_as_merges_open_them(tmp_path: Path) -> None:
    """A base with an adapter, the adapter alone and a patch mean the model that they make; rules
    that run the model run that model."""
    base = adapting.llama(tmp_path / "base")
    tiny_model.tokenizer().save_pretrained(str(base))
    tuned = adapting.adapter(base, tmp_path / "adapter")
    whole = toy_merge(f"{base}+{tuned}", tmp_path / "whole")
    patch = tmp_path / "p.patch.safetensors"
    assert making.invoke("patch", "make", base, whole, "-o", patch).code == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": r.text}) for r in tiny_model.rows(6)))
    names = {
        "joined": f"{base}+{tuned}",
        "adapter": str(tuned),
        "patch": str(patch),
        "whole": str(whole),
    }
    task = {"data": str(rows), "kind": "causal", "max_length": 8}
    for rule, more in (("magnitude", {}), ("snip", {"tasks": {m: task for m in names}})):
        what = {"base": str(base), "models": names, "rule": rule, "density": 0.01, **more}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(what))
        said = making.invoke("localize", tmp_path / "r.yaml", "-o", tmp_path / rule)
        assert said.code == 0, said.err
        masks = {m: Mask.load(tmp_path / rule / f"{m}.safetensors") for m in names}
        for name, mask in masks.items():
            assert mask == masks["whole"], name


def toy_merge(model: str, out: Path) -> Path:
    """What a merge makes of one model."""
    suture.merge_recipe({"models": {"m": model}, "method": "linear", "space": {"exclude": []}}, out)  # type: ignore[attr-defined]
    return out


def test_a_model_without_a_network_cannot_be_run(workshop: Path, tmp_path: Path) -> None:
    """Rules with data need a config.json, and say so before anything is read."""
    alone = {"one": tasks()["one"]}
    where = recipe(workshop, "file.yaml", rule="snip", tasks=alone,
                   models={"one": "one/model.safetensors"})  # fmt: skip

    said = making.invoke("localize", where, "-o", tmp_path / "out")

    assert said.code == 2
    assert "models.one: the rule snip runs the model" in said.err
    assert not list(tmp_path.iterdir())
