"""Loads a base's weights and says exactly what did not come from its files."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from surgeon.base.configuration import FOREIGN
from surgeon.base.folder import first_line
from surgeon.base.heads import auto_class
from surgeon.errors import BaseError, SpecError, shorten
from surgeon.spec import BaseSpec


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, the hub and their warnings: what matters of it is raised or returned."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if hub_bars:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if hub_bars:
            enable_progress_bars()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random weights from `seed`, and leave the caller's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build(base: BaseSpec, config: PretrainedConfig, source: str, *, weights: bool, seed: int) -> PreTrainedModel:
    """The model from its configuration alone: random weights, or none at all on the meta device."""
    auto = auto_class(config, base.head, source)
    try:
        with seeded(seed), torch.device("cpu" if weights else "meta"):
            model = auto.from_config(
                config, dtype=getattr(torch, base.dtype), trust_remote_code=base.trust_remote_code
            ).eval()
    except FOREIGN as error:
        what = f"a {config.model_type} model cannot be built from this configuration: {first_line(error)}"
        raise (SpecError if base.config else BaseError)(what, where=source) from error
    assert isinstance(model, PreTrainedModel)
    return model


def load(
    base: BaseSpec, config: PretrainedConfig, folder: Path, source: str, *, seed: int
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model with its weights, and the names of those the files do not hold: of a head or pooler, drawn from `seed`.

    Raises BaseError where anything else is missing, left over or misshapen, or is no finite number.
    """
    auto = auto_class(config, base.head, source)
    try:
        with seeded(seed):
            model, report = auto.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, base.dtype),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=base.trust_remote_code,
                ignore_mismatched_sizes=True,  # or it raises without saying which
                output_loading_info=True,
            )
    except FOREIGN as error:
        raise BaseError(f"its weights cannot be loaded: {first_line(error)}", where=source) from error
    assert isinstance(model, PreTrainedModel)
    misshapen = sorted(f"{name} {list(file)}, not {list(here)}" for name, file, here in report["mismatched_keys"])
    if misshapen:
        raise BaseError("weights are of other shapes than config.json says", where=source, there_is=misshapen)
    core = _core(model)
    lost = sorted(name for name in report["missing_keys"] if name in core and "pooler" not in name.split("."))
    if lost:
        what = f"{len(lost)} of the {len(core)} tensors that a {config.model_type} model is made of are missing"
        there_is = shorten(sorted(report["unexpected_keys"]), 5) or "nothing"
        raise BaseError(
            f"{what}: {shorten(lost, 3)}",
            where=source,
            there_is=f"left over in the files: {there_is}",
            try_=f"the head it was saved with: config.json says {shorten(config.architectures or ['nothing'])}",
        )
    left = sorted(_left_over(report["unexpected_keys"], core, model.base_model_prefix))
    if left:
        what = f"its weights have {len(left)} tensors that config.json has no place for"
        raise BaseError(what, where=source, there_is=left, try_="a config.json of another model, or an edited one?")
    if report["error_msgs"]:
        raise BaseError(f"its weights cannot be loaded: {report['error_msgs'][0]}", where=source)
    check_finite(model, source)
    return model, tuple(sorted(report["missing_keys"]))


def check_finite(model: PreTrainedModel, source: str) -> None:
    """Raise BaseError where a weight is NaN or infinite."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if tensor.sum().isfinite():  # one pass; it is never finite where an element is not
            continue
        bad = ~tensor.isfinite()
        if bad.any():
            first = bad.nonzero()[0].tolist()
            raise BaseError(
                f"{name} holds {int(bad.sum())} values that are NaN or infinite, of {tensor.numel()}, first at {first}",
                where=source,
                try_="every answer would be NaN; fetch the base again",
            )


def _core(model: PreTrainedModel) -> set[str]:
    """Names of the parameters below every head."""
    prefix = model.base_model_prefix
    if prefix and isinstance(getattr(model, prefix, None), torch.nn.Module):
        return {name for name, _ in model.named_parameters() if name.startswith(f"{prefix}.")}
    own = {name for name, _ in model.named_parameters()}
    if type(model.config) not in MODEL_MAPPING:  # a class of the folder's own code: nothing says what its head is
        return own
    auto: Any = AutoModel
    with torch.device("meta"):
        bare = auto.from_config(model.config)
    return own & {name for name, _ in bare.named_parameters()}


def _left_over(names: Iterable[str], core: set[str], prefix: str) -> Iterator[str]:
    """Names that a layer like one of the core's would have: one layer more, or a bias where the core has none."""
    modules = {_pattern(name) for name in core}
    for name in names:
        if _pattern(name) in modules or _pattern(f"{prefix}.{name}") in modules:
            yield name


def _pattern(name: str) -> str:
    """The module that holds a tensor, with every layer number read as any."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name.rpartition(".")[0])
