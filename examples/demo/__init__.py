"""The demo of Suture: its verbs on small real models, end to end, and one page that shows it all.

``suture demo`` (``make demo``) starts it. It is a program that uses Suture as any other would:

- ``settings``: how much of everything, in a short and a long form
- ``steps``: steps that run once, in order, and go on after an interruption
- ``verbs``: a recipe beside its output, and the verb that follows it, as a step
- ``edits``, ``safety``: the two halves, as lists of such steps
- ``tour``: both of them, the page, and what is told at the end
"""

from __future__ import annotations

from .tour import Done, run

__all__ = ["Done", "run"]
