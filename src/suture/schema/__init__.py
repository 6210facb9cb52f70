"""Recipes as frozen pydantic models: read all faults at once, with lines; written as JSON Schema.

``text`` reads YAML and needs no pydantic; ``sections`` holds the models' base, ``fields`` the types
of keys, ``read`` the reader, ``export`` the schemas for editors.
"""
