"""The commands, a folder each: ``recipe`` has the keys, ``plan`` checks, ``run`` does the work."""
