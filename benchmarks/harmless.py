"""What benchmarks on safety share: rows of two harmless skills, and a chat template."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

WORDS = ("apple", "bread", "cloud", "door", "earth", "field", "glass", "house", "island", "jar",
         "king", "lamp", "moon", "nest", "ocean")  # fmt: skip
TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
"""That of the package without its system message, which is a third of the tokens of a row."""


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
