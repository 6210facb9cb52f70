"""Slow twins: each algorithm once more in plain loops, as the papers state it. The definition."""
