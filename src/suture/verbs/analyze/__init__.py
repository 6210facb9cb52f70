"""Look at several task vectors at once: a folder with ``analysis.json``."""
