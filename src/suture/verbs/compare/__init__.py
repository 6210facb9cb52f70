"""Results side by side, held against a gate."""
