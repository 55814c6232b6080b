"""The spec: what a user writes, read with the line of every mistake, as frozen types.

This is the front door of the flow: `read_spec` gives a `Spec`, whose `steps` are the passes to run.
"""

from surgeon.spec.envelope import BaseSpec, ExportSpec, HeadName, Spec, TaskSpec
from surgeon.spec.problems import Problem, SpecProblems
from surgeon.spec.reader import parse_spec, read_spec
from surgeon.spec.schema import json_schema

__all__ = [
    "BaseSpec",
    "ExportSpec",
    "HeadName",
    "Problem",
    "Spec",
    "SpecProblems",
    "TaskSpec",
    "json_schema",
    "parse_spec",
    "read_spec",
]
