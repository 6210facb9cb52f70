"""From a recipe to a folder of masks: check, measure or learn, rank, publish; prints nothing.

The folder holds a mask for each model, the statistics that were measured for it, and
``localize.json``: the recipe, fingerprints, and where the masks lie, by layer and role.
"""

from __future__ import annotations

from suture.regions.plan import Plan, plan_regions
from suture.regions.request import Regions
from suture.regions.work import execute, lines, profile

__all__ = ["Plan", "Regions", "execute", "lines", "plan_regions", "profile"]
