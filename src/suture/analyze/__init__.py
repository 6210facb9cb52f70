"""From a recipe to a folder with ``analysis.json``, and perhaps a basis."""

from suture.analyze.plan import AnalysisPlan, plan_analysis
from suture.analyze.request import ANALYSES, BasisRequest, Request, read_request
from suture.analyze.telling import summary_lines
from suture.analyze.work import (
    Analysis,
    analyse,
    analysis,
    run_analysis,
)

__all__ = [
    "ANALYSES",
    "Analysis",
    "AnalysisPlan",
    "BasisRequest",
    "Request",
    "analyse",
    "analysis",
    "plan_analysis",
    "read_request",
    "run_analysis",
    "summary_lines",
]
