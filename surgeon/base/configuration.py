"""A base's configuration: read from its folder, or written in the spec for random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PretrainedConfig

from surgeon.base.folder import CONFIG, first_line, read_json
from surgeon.errors import BaseError, SpecError, did_you_mean

# What transformers and torch raise over a configuration or weights that do not fit; a bug of theirs looks the same.
FOREIGN = (
    OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ImportError, IndexError, ArithmeticError,
    StrictDataclassError,
)  # fmt: skip

ROPE = {"rope_theta", "partial_rotary_factor"}
"""Written beside the fields, as most checkpoints have them; transformers moves them into `rope_parameters`."""


def read_config(folder: Path, source: str, *, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration in a folder. Raises BaseError."""
    raw = read_json(folder / CONFIG, source)
    kind, remote = raw.get("model_type"), "auto_map" in raw
    if not (isinstance(kind, str) and kind in CONFIG_MAPPING) and not (remote and trust_remote_code):
        what = f"config.json has no model type that transformers knows (model_type: {kind!r})"
        try_ = did_you_mean(str(kind), CONFIG_MAPPING)
        raise BaseError(what, where=source, try_="`trust_remote_code: true`, if you trust its code" if remote else try_)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except FOREIGN as error:
        raise BaseError(f"config.json does not fit: {first_line(error)}", where=source) from error
    assert isinstance(config, PretrainedConfig)
    return config


def written_config(options: Mapping[str, object]) -> PretrainedConfig:
    """The configuration that the spec writes. Raises SpecError for a model type or a key that there is not."""
    rest = dict(options)
    kind = rest.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        kinds = sorted(CONFIG_MAPPING)
        if kind is None:
            raise SpecError("it needs a model_type", where="base.config", there_is=kinds)
        what, try_ = f"unknown model type {kind!r}", did_you_mean(str(kind), kinds)
        raise SpecError(what, where="base.config.model_type", try_=try_, there_is=kinds)
    cls: Any = CONFIG_MAPPING[kind]
    known, generation = _keys(cls), cast(Any, GenerationConfig)()
    beside = ROPE | generation.to_dict().keys()
    for key in rest:
        if not (key in known or hasattr(cls, key) or key in beside or _read_by_model(cls, key)):
            what, where = f"a {kind} configuration has no '{key}'", f"base.config.{key}"
            raise SpecError(what, where=where, try_=did_you_mean(key, known), there_is=known)
    try:
        config = cls(**rest)
    except FOREIGN as error:
        what = " ".join(str(error).split())[:300]
        raise SpecError(f"a {kind} configuration does not take this: {what}", where="base.config") from error
    assert isinstance(config, PretrainedConfig)
    return config


def _read_by_model(cls: Any, key: str) -> bool:
    """Whether the model's code asks for a key that its configuration class does not declare."""
    spec = find_spec(cls.__module__.replace("configuration_", "modeling_"))
    return spec is not None and spec.origin is not None and f'"{key}"' in Path(spec.origin).read_text(encoding="utf-8")


def _keys(cls: Any) -> list[str]:
    own = [field.name for field in fields(cls)] if is_dataclass(cls) else []
    return sorted({*own, *cls.attribute_map, "num_labels"})
