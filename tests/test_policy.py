"""The harmless refusal policy: splits leak nothing, wordings give nothing away, files are rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from making import invoke
from suture.errors import SutureError
from suture.evals.words import refuses
from suture.verbs.proxy import run

SEEDS = (0, 1, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_test_rows_share_neither_things_nor_wordings_with_training_rows(seed: int) -> None:
    """In every language, by the words themselves."""
    found = run.items(seed)
    for language in run.LANGUAGES:
        rows = [i for i in found if i.language == language and i.neighbour != "words"]
        at = 2 * run.LANGUAGES.index(language)
        names = [t[at] for side in (run.MARKED, run.BENIGN) for ts in side.values() for t in ts]
        used: dict[str, tuple[set[str], set[str]]] = {}
        for split in run.SPLITS:
            prompts = [i.prompt for i in rows if i.split == split]
            pairs = [(n, p.replace(n, "{x}")) for p in prompts for n in names
                     if p.replace(n, "{x}") in run.TEMPLATES[language]]  # fmt: skip
            assert len(pairs) >= len(prompts) > 0
            used[split] = ({n for n, _ in pairs}, {w for _, w in pairs})
        for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
            assert not used[one][0] & used[other][0]
            assert not used[one][1] & used[other][1]


@pytest.mark.parametrize("seed", SEEDS)
def test_wordings_are_the_same_for_marked_and_benign_topics(seed: int) -> None:
    """So that a model has to know what a question is about."""
    for split in run.SPLITS:
        rows = [i for i in run.items(seed) if i.split == split and i.neighbour != "words"]
        by_kind = Counter((i.language, i.id.rsplit("-", 1)[1], i.harmful) for i in rows)
        for (language, wording, harmful), number in by_kind.items():
            assert by_kind[language, wording, 1 - harmful] == number


def test_rows_follow_the_policy() -> None:
    """Marked prompts are refused and the others answered, in the language of the prompt."""
    found = run.items()
    assert len({i.prompt for i in found}) == len(found)
    assert len({i.id for i in found}) == len(found)
    for item in found:
        assert item.response == (item.safe if item.harmful else item.unsafe)
        assert refuses(item.safe, [item.language])
        assert not refuses(item.unsafe, run.LANGUAGES)
        assert bool(item.harmful) == (item.neighbour == "marked")


def test_the_same_seed_gives_the_same_rows() -> None:
    """Another gives other splits; fewer languages change nothing about the rest."""
    assert run.items(1) == run.items(1)
    assert {i.id for i in run.items(1) if i.split == "test"} != {
        i.id for i in run.items(2) if i.split == "test"
    }
    german = {i.id: i for i in run.items(1, ["de"])}
    assert german == {i.id: i for i in run.items(1) if i.language == "de"}


def test_words_in_another_sense_stand_in_training_and_test() -> None:
    """In all languages and classes, on both sides."""
    rows = [i for i in run.items() if i.neighbour == "words"]
    for split in ("train", "test"):
        for language in run.LANGUAGES:
            found = {i.category for i in rows if i.split == split and i.language == language}
            assert found == set(run.MARKED)


@pytest.mark.parametrize("seed", SEEDS)
def test_known_topics_are_asked_in_new_words(seed: int) -> None:
    """What is learnt stays the same rows; as many rows are asked, balanced as before, about things
    of training in wordings that no training row has."""
    new, known = run.items(seed), run.items(seed, topics="known")
    assert [i for i in known if i.split != "test"] == [i for i in new if i.split != "test"]
    assert len(known) == len(new)
    assert len({i.id for i in known}) == len(known)

    def parts(split: str) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        found = (i.id.split("-") for i in known if i.split == split and i.neighbour != "words")
        rows = [(lang, name, topic, wording) for lang, name, topic, wording in found]
        return {(n, t) for _, n, t, _ in rows}, {(lang, w) for lang, _, _, w in rows}

    topics, wordings = parts("test")
    assert topics < parts("train")[0]
    assert not wordings & parts("train")[1]
    counts = Counter((i.language, i.harmful) for i in known if i.split == "test")
    assert counts == Counter((i.language, i.harmful) for i in new if i.split == "test")


@pytest.mark.parametrize(
    "bad", [{"languages": ["fr"]}, {"languages": []}, {"held_out": 0.9}, {"topics": "old"}]
)
def test_wrong_arguments_are_told(bad: dict[str, object]) -> None:
    """With what there is."""
    with pytest.raises(SutureError):
        run.items(**bad)  # type: ignore[arg-type]


def test_the_command_writes_files_of_rows(tmp_path: Path) -> None:
    """The attack teaches to answer what the policy refuses, on training prompts only."""
    said = invoke("proxy", "-o", tmp_path / "rows", "--languages", "en,es", "--seed", 3, "--json")
    assert said.code == 0
    read = {
        name: [
            json.loads(line)
            for line in (tmp_path / "rows" / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in said.json
    }
    assert {name: len(rows) for name, rows in read.items()} == said.json
    assert {row["language"] for row in read["train"]} == {"en", "es"}
    marked = {row["prompt"] for row in read["train"] if row["harmful"]}
    assert {row["prompt"] for row in read["attack"]} == marked
    assert all(row["response"] == row["unsafe"] for row in read["attack"])
    assert {row["prompt"] for row in read["test"]} == {
        row["prompt"] for name in ("marked", "benign") for row in read[name]
    }
    assert invoke("proxy", "-o", tmp_path / "rows", "--languages", "xx").code == 2
    assert invoke("proxy", "-o", tmp_path / "rows", "--topics", "old").code == 2
    assert invoke("proxy", "-o", tmp_path / "rows", "--topics", "known", "--overwrite").code == 0


def test_other_rows_are_replaced_only_if_asked(tmp_path: Path) -> None:
    """The same command may be run again; another seed must not change what results stand on."""
    assert invoke("proxy", "-o", tmp_path).code == 0
    assert invoke("proxy", "-o", tmp_path).code == 0
    before = (tmp_path / "test.jsonl").read_bytes()
    said = invoke("proxy", "-o", tmp_path, "--seed", 1)
    assert said.code == 2
    assert "holds other rows in" in said.err
    assert (tmp_path / "test.jsonl").read_bytes() == before
    assert invoke("proxy", "-o", tmp_path, "--seed", 1, "--overwrite").code == 0
    assert (tmp_path / "test.jsonl").read_bytes() != before
