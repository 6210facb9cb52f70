"""Task vectors looked at from all sides: lengths, angles, conflicts, masks, bases, maps."""

from suture.analysis.basis import BASES, Basis, Nearest, make_basis
from suture.analysis.cells import Groups, Matrix, Together, groups_of
from suture.analysis.conflicts import Conflict, Conflicts, Signs
from suture.analysis.geometry import (
    Geometry,
    Move,
    Products,
    addition_bound,
    gap_bound,
    negation_bound,
    squared_distance,
)
from suture.analysis.maps import (
    Curve,
    Disentanglement,
    Point,
    Series,
    along,
    disagreement,
    disentanglement,
)
from suture.analysis.overlap import KeptShare, Masked, Overlap, independent_jaccard
from suture.analysis.theory import Diagnosis, Diagnostics, Secant, Smoothness, barrier_of

__all__ = [
    "BASES", "Basis", "Conflict", "Conflicts", "Curve", "Diagnosis", "Diagnostics",
    "Disentanglement", "Geometry", "Groups", "KeptShare", "Masked", "Matrix", "Move", "Nearest",
    "Overlap", "Point", "Products", "Secant", "Series", "Signs", "Smoothness", "Together",
    "addition_bound", "along", "barrier_of", "disagreement", "disentanglement", "gap_bound",
    "groups_of", "independent_jaccard", "make_basis", "negation_bound", "squared_distance",
]  # fmt: skip
