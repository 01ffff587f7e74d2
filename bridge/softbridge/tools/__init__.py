"""What else can be done with prompts than running and converting them."""

from __future__ import annotations

from softbridge.tools.ensemble import ensemble, vote
from softbridge.tools.join import concatenate, slice
from softbridge.tools.mix import average, interpolate
from softbridge.tools.nearest import Neighbours, nearest_words
from softbridge.tools.similarity import similarity, similarity_matrix

__all__ = [
    "Neighbours",
    "average",
    "concatenate",
    "ensemble",
    "interpolate",
    "nearest_words",
    "similarity",
    "similarity_matrix",
    "slice",
    "vote",
]
