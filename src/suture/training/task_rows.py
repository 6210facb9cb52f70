"""The rows of one model's task, as recipes name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from suture.schema.fields import Column, Count, FilePath
from suture.schema.sections import Faults, Section, check
from suture.schema.sources import DataSpec, Source

TOKENS = {"classification": 128, "causal": 1024}
"""Most tokens of a row, where the recipe does not say."""


class Task(Section):
    """The data of one model."""

    shape = "a mapping with data, a .jsonl or .csv file"

    data: FilePath
    """A .jsonl or .csv file."""
    kind: Literal["classification", "causal"] = "classification"
    """What the rows are: texts with labels, or texts that a language model continues."""
    head: FilePath | None = None
    """Of a classifier: the file that Suture wrote."""
    text: Column = "text"
    """The column of texts."""
    label: Column = "label"
    """The column of labels."""
    prompt: Column = "prompt"
    """The column of prompts."""
    response: Column = "response"
    """The column of answers."""
    messages: Column = "messages"
    """The column of chats: lists of messages with a role and a content."""
    format: Literal["", "text", "prompt", "chat"] = ""
    """Of a language model's rows; found out from the columns unless given."""
    chat: bool = False
    """Whether prompts and responses are put into the chat template."""
    max_length: Count = TOKENS["classification"]
    """Most tokens of a row; 1024 for a language model."""
    rows: Count | None = None
    """Most rows of each label, or of all where there are none."""
    batch: Count = 8
    """Rows that go through the model together."""
    draws: Count = 1
    """Labels that are drawn for each row, by statistics that draw them."""

    @check
    def _has_a_head(self) -> Faults:
        if self.kind == "classification" and self.head is None:
            yield "head", "a classifier needs its head, a file that Suture wrote"

    def settled(self) -> Mapping[str, Any]:
        """Return the length that belongs to the kind."""
        return {} if "max_length" in self.model_fields_set else {"max_length": TOKENS[self.kind]}

    @property
    def language(self) -> DataSpec | None:
        """Return the columns of a language model's rows; ``None`` for a classifier."""
        if self.kind != "causal":
            return None
        return DataSpec(
            Source(str(self.data)), share=0.0, text=self.text, prompt=self.prompt,
            response=self.response, messages=self.messages, format=self.format, chat=self.chat,
            max_length=self.max_length, too_long="cut", limit=self.rows or 0,
        )  # fmt: skip


__all__ = ["TOKENS", "Task"]
