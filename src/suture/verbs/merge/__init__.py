"""Merge models by a recipe into one folder."""
