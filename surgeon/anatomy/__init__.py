"""Anatomy: a traced graph becomes sites with roles, found by structure alone, and the language that selects them."""

from surgeon.anatomy.finding import find
from surgeon.anatomy.report import rows, summary
from surgeon.anatomy.select import Selector, Where, select, selectors
from surgeon.anatomy.sites import Anatomy, Attention, Embedding, Experts, Join, Norm, Projection, Site

__all__ = [
    "Anatomy",
    "Attention",
    "Embedding",
    "Experts",
    "Join",
    "Norm",
    "Projection",
    "Selector",
    "Site",
    "Where",
    "find",
    "rows",
    "select",
    "selectors",
    "summary",
]
