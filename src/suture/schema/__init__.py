"""What users write, checked; nothing here imports numpy or torch.

Recipes are frozen pydantic models: all faults are read at once, with lines, and written as JSON
Schema. ``text`` reads YAML and needs no pydantic; ``sections`` holds the models' base, ``fields``
the types of keys, ``read`` the reader, ``export`` the schemas for editors. Methods say their
parameters by a signature: ``parameters`` and ``values`` read it, ``settings`` holds a recipe
against it, ``table`` is what all methods stand in, those of plug-ins too.
"""
