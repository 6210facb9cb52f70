"""What to do where the models of a merge do not hold the same tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """What to do where the models do not hold the same tensors."""

    missing: str = "error"
    """A model lacks a tensor: ``error``, or ``base`` to take it from the base."""
    extra: str = "error"
    """A model has one more: ``error``, or ``drop``."""
    buffers: str = "equal"
    """Integer and boolean tensors: ``equal`` in all models, or those of the ``base``."""
    vocabulary: str = "error"
    """Token embeddings of different size: ``error``, rows shared by id (``shared-rows``), or
    matched by token to the vocabulary of the ``base`` or to the ``union`` of all."""


POLICIES = {
    "missing": ("error", "base"),
    "extra": ("error", "drop"),
    "buffers": ("equal", "base"),
    "vocabulary": ("error", "shared-rows", "base", "union"),
}

STRICT = Policy()
"""Refuse every difference."""
