"""What to do where the models of a merge do not hold the same tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Policy:
    """What to do where the models do not hold the same tensors."""

    missing: Literal["error", "base"] = "error"
    """A model lacks a tensor: ``error``, or ``base`` to take it from the base."""
    extra: Literal["error", "drop"] = "error"
    """A model has one more: ``error``, or ``drop``."""
    buffers: Literal["equal", "base"] = "equal"
    """Integer and boolean tensors: ``equal`` in all models, or those of the ``base``."""
    vocabulary: Literal["error", "shared-rows", "base", "union"] = "error"
    """Token embeddings of different size: ``error``, rows shared by id (``shared-rows``), or
    matched by token to the vocabulary of the ``base`` or to the ``union`` of all."""


STRICT = Policy()
"""Refuse every difference."""
