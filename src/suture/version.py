"""The version of the package, which every record names."""

from __future__ import annotations

__version__ = "0.1.0"
