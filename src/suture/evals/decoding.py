"""How answers are generated, as data; needs no framework."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """How a model is asked and how it answers: always the likeliest token."""

    max_tokens: int = 64
    """New tokens at most."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, besides the model's own end; they are not part of it."""
    chat: bool = False
    """Whether prompts are put into the model's chat template."""
    system: str = ""
    """What the system says first, in a chat."""
