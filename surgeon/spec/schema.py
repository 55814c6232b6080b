"""The JSON schema of a spec, for editors: every installed technique with its options and their descriptions."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from surgeon.registry import names, technique
from surgeon.spec.envelope import Spec


def json_schema() -> dict[str, Any]:
    """The schema, drawn from the classes that validate; imports every technique."""
    passes = {name: technique(name) for name in names()}
    models = [(model, "validation") for model in (Spec, *passes.values())]
    refs, whole = models_json_schema(models, ref_template="#/$defs/{model}")  # type: ignore[arg-type]
    definitions = whole["$defs"]
    spec = definitions.pop(refs[Spec, "validation"]["$ref"].rpartition("/")[2])
    spec["properties"]["surgery"]["items"] = {
        "type": "object",
        "description": "One technique with its options.",
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
        "properties": {
            name: {
                "title": model.title,
                "description": f"{(model.__doc__ or '').strip().splitlines()[0]} {model.paper}".strip(),
                "anyOf": [refs[model, "validation"], {"type": "null"}],
            }
            for name, model in passes.items()
        },
    }
    tasks = spec["properties"]["tasks"]
    tasks["patternProperties"] = {
        pattern: {"anyOf": [task, {"type": "null"}]} for pattern, task in tasks["patternProperties"].items()
    }
    tasks["additionalProperties"] = False
    del definitions["BaseModel"]  # the item's class before its technique is known
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **spec,
        "title": "Surgeon spec",
        "$defs": dict(sorted(definitions.items())),
    }
