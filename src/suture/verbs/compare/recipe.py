"""Rules that an edit must keep, judged on the end of an interval that speaks against it.

A rule is ``NAME OP EXPRESSION``: ``refusal.harmful >= base - 0.02``, ``over_refusal <= 0.1``,
``topics.accuracy >= 0.95 * base``, ``utility.min_retention >= 0.9``.

- NAME is an evaluation, then perhaps one of its metrics, then perhaps a category or language. It
  stands for the edit's number. ``utility.min_retention`` and ``utility.mean_retention`` are taken
  over the evaluations marked ``utility: true``: the edit's number over that of the best expert, or
  of the base where there is none; a name after it says of which model.
- In EXPRESSION ``base``, ``expert`` (the best of them) and the names of models stand for their
  number of the same metric, on the same rows.

``>=`` needs the lower end of the 95 % interval of the difference on the right side, ``<=`` the
upper one. A number that is missing or NaN keeps no rule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suture.errors import Problems, RecipeError, brief
from suture.schema.text import Lines, parse_yaml, text_of

OPS: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
}
_WORD = r"[A-Za-z_]\w*(?:-[A-Za-z]\w*)*"
_RULE = re.compile(rf"\s*({_WORD}(?:\.\w+(?:-[A-Za-z]\w*)*)*)\s*(>=|<=|>|<)(.*)", re.DOTALL)
_TOKEN = re.compile(rf"\s*(?:([0-9]+\.?[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+)|({_WORD})|([-+*]))")


@dataclass(frozen=True)
class Rule:
    """``name op constant + sum of factor * model``."""

    text: str
    name: str
    op: str
    constant: float
    factors: tuple[tuple[str, float], ...] = ()
    """Factors on the numbers of other models, by ``base``, ``expert`` or a name."""

    def judge(self, low: float, high: float) -> bool:
        """Whether the end of an interval that speaks against the rule keeps it."""
        end = low if self.op[0] == ">" else high
        return math.isfinite(end) and OPS[self.op](end, self.constant)


def read_rule(text: str) -> Rule:
    """Parse one rule.

    Raises:
        RecipeError: it is none.
    """
    found = _RULE.fullmatch(text)
    if found is None:
        raise RecipeError(
            f"{brief(text)} is no rule; write NAME OP EXPRESSION, such as "
            "`refusal.harmful >= base - 0.02`"
        )
    name, op, expression = found.groups()
    constant, factors = _sum(expression, text)
    return Rule(text.strip(), name, op, constant, tuple(sorted(factors.items())))


def _sum(expression: str, text: str) -> tuple[float, dict[str, float]]:
    """A sum of numbers, models, and products of a number and a model."""
    tokens, rest = [], expression.rstrip()
    while rest:
        match = _TOKEN.match(rest)
        if match is None:
            raise RecipeError(f"{brief(text)}: {brief(rest.strip())} is neither a number nor a "
                              "model nor one of + - *")  # fmt: skip
        tokens.append(match.groups())
        rest = rest[match.end() :]
    constant, factors, at = 0.0, dict[str, float](), 0
    wrong = RecipeError(f"{brief(text)}: the right side is a number, a model, or a sum of them: "
                        "`0.95 * base - 0.01`")  # fmt: skip
    while at < len(tokens) or not at:
        sign = 1.0
        if at < len(tokens) and tokens[at][2] in ("+", "-"):
            sign, at = (-1.0 if tokens[at][2] == "-" else 1.0), at + 1
        elif at:
            raise wrong
        number, model, at = _term(tokens, at, wrong)
        if model:
            factors[model] = factors.get(model, 0.0) + sign * number
        else:
            constant += sign * number
    return constant, factors


def _term(tokens: Sequence[tuple[Any, ...]], at: int, wrong: RecipeError) -> tuple[float, str, int]:
    number, model = 1.0, ""
    while True:
        if at >= len(tokens) or tokens[at][2]:
            raise wrong
        digits, word, _ = tokens[at]
        if word and model:
            raise wrong
        number, model = number * float(digits or 1), model or word or ""
        at += 1
        if at >= len(tokens) or tokens[at][2] != "*":
            return number, model, at
        at += 1


def read_gate(source: Path | Sequence[str], problems: Problems) -> list[Rule]:
    """The rules of a file, a YAML list of strings, or of a list; faults are noted."""
    texts: Any = source
    if isinstance(source, Path):
        texts = None
        with problems.collecting():
            texts = _parsed(source, problems)
        if texts is None:
            return []
    if not isinstance(texts, list | tuple) or not texts:
        problems.add(RecipeError, f"rules: a list with at least one rule, not {brief(texts)}")
        return []
    rules = []
    for number, text in enumerate(texts):
        with problems.collecting():
            try:
                if not isinstance(text, str):
                    raise RecipeError(f"{brief(text)} is no rule")
                rules.append(read_rule(text))
            except RecipeError as error:
                raise RecipeError(f"rules[{number}]: {error}") from None
    return rules


def _parsed(source: Path, problems: Problems) -> Any:
    """What stands in a file: a list, or a mapping with ``rules``."""
    text = text_of(source, "gate")
    first = next((line for line in text.splitlines() if line.strip() and line[0] != "#"), "")
    bare = first.startswith("-") and first.strip() != "---"
    lines: list[Lines] = []
    shape = "a gate is a list of rules, such as `- refusal >= base - 0.02`"
    raw = parse_yaml(f"rules:\n{text}" if bare else text, str(source), lines, shape)
    if bare:  # the line that was put before is none of the file's
        lines[0].known = {place: line - 1 for place, line in lines[0].known.items()}
        lines[0].words = {}
    problems.locate = lines[0].locate
    if raw.keys() != {"rules"}:
        raise RecipeError(f"{source}: a list of rules, or a mapping with `rules`, and nothing else")
    return raw["rules"]
