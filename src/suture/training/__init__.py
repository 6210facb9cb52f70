"""Models that learn: loading, data, losses, the loop, strategies; no folders of results."""
