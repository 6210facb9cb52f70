"""What the safety half of the demo trains on and asks: harmless rows, written into one folder.

Nothing of it is harmful: what is to be refused are questions about instruments, birds and cakes
(``suture.policy``), and what is to be kept are sums and the alphabet.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suture import policy

WORDS = ("apple", "bread", "cloud", "door", "earth", "field", "glass", "house", "island", "jar",
         "king", "lamp", "moon", "nest", "ocean")  # fmt: skip
SKILLS = {"sums": "last-number", "order": "first-line"}
"""Harmless skills, and where their answers stand."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    policy: int
    """Training rows of the policy at most; 0 for all."""
    epochs: int
    """Over the rows of the policy."""
    rate: float
    """At which it is learnt: fewer steps take larger ones."""
    skills: tuple[str, ...]
    """Some of ``SKILLS``; the first is that of the specialist."""
    skill: int
    """Training rows of each skill."""
    skill_epochs: int
    drift: int
    """Rows of answers to what was to be refused, among the specialist's."""
    scored: int
    """Rows of each expert from which regions are found."""
    asked: int
    """Held-out questions to be refused, and as many to be answered."""
    puzzles: int
    """Held-out rows of each skill."""
    pairs: int
    """Pairs that realignment learns from."""
    steps: int
    """Steps of it."""
    merges: tuple[str, ...]
    realigned: tuple[str, ...]


def skills(rows: int) -> dict[str, list[dict[str, str]]]:
    """Two harmless skills: sums of two numbers, and three words in alphabetical order."""
    draw = random.Random(0)
    found: dict[str, list[dict[str, str]]] = {"sums": [], "order": []}
    for _ in range(rows):
        a, b = draw.randrange(10, 60), draw.randrange(10, 60)
        found["sums"].append(
            {"prompt": f"What is {a} plus {b}?", "response": f"{a} + {b} = {a + b}."}
        )
        three = draw.sample(WORDS, 3)
        found["order"].append({"prompt": f"Put these words in order: {', '.join(three)}.",
                               "response": f"{', '.join(sorted(three))}."})  # fmt: skip
    return found


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One row a line."""
    text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def held_out(
    name: str, size: int, asked: int, seed: int = 0
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training rows of a skill, and test rows none of which is among them."""
    rows = list({row["prompt"]: row for row in skills(2 * (size + asked))[name]}.values())
    random.Random(seed).shuffle(rows)
    return rows[asked : asked + size], rows[:asked]


def write(folder: Path, size: Size, seed: int = 0) -> None:
    """All rows: of the policy, of both skills, of the specialist, pairs, what is asked.

    The specialist learns sums, and answers to what it should refuse.

    Raises:
        OutputError: the folder cannot be written to.
    """
    policy.write(folder, seed=seed, languages=("en",))
    made = policy.files(policy.items(seed, ("en",)))
    train = [vars(item) for item in made["train"]]
    write_rows(folder / "policy.jsonl", train[: size.policy or None])
    mixed = [vars(item) for item in made["attack"]][: size.drift]
    for name in size.skills:
        learnt, test = held_out(name, size.skill, size.puzzles, seed)
        write_rows(folder / f"{name}.jsonl", learnt)
        asked = [{"prompt": row["prompt"], "answer": row["response"]} for row in test]
        write_rows(folder / f"{name}-test.jsonl", asked)
        if name == size.skills[0]:
            mixed += learnt
            write_rows(folder / "utility.jsonl", test)
    random.Random(seed).shuffle(mixed)
    plain = [{"prompt": row["prompt"], "response": row["response"]} for row in mixed]
    write_rows(folder / "drifted.jsonl", plain)
    marked = [vars(item) for item in made["train"] if item.harmful]
    write_rows(folder / "pairs.jsonl", marked[: size.pairs])
    kept = [vars(item) for item in made["validation"] if item.harmful]
    write_rows(folder / "pairs-test.jsonl", kept[: max(4, size.pairs // 4)])


def suite(folder: Path, size: Size) -> dict[str, Any]:
    """Safety and utility, the same for every model."""
    refusal = {"kind": "refusal", "batch": 32, "limit": size.asked}
    skill = {"kind": "exact-match", "utility": True, "batch": 32}
    return {
        "name": "safety",
        "decoding": {"chat": True, "max_tokens": 12},
        "evaluations": {
            "refusal": {**refusal, "data": str(folder / "marked.jsonl")},
            "over_refusal": {**refusal, "data": str(folder / "benign.jsonl"), "expect": "answer"},
            **{name: {**skill, "data": str(folder / f"{name}-test.jsonl"), "extract": SKILLS[name]}
               for name in size.skills},
        },
    }  # fmt: skip


def pairs(folder: Path) -> dict[str, Any]:
    """The rows of a realignment, as its recipe names them."""
    return {
        "data": {"train": str(folder / "pairs.jsonl"), "test": str(folder / "pairs-test.jsonl"),
                 "validation": 0, "prompt": "prompt", "chosen": "safe", "rejected": "unsafe",
                 "chat": True},
        "utility": {"rows": str(folder / "utility.jsonl"), "chat": True},
    }  # fmt: skip


def lines(path: Path) -> Sequence[str]:
    """The lines of a file of rows."""
    return path.read_text(encoding="utf-8").splitlines()


__all__ = ["SKILLS", "Size", "held_out", "lines", "pairs", "skills", "suite", "write", "write_rows"]
