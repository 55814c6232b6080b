"""Generation with a cache: a model's forward whose keys and values of earlier tokens come in and go out as tensors.

One graph serves the prompt (an empty past) and every later token. Each row's positions are counted over its mask, so
that padding in front of a row, or virtual tokens that a pass puts there, move nothing. An encoder-decoder also gives
the keys and values that its decoder reads of the source (`surgeon.halves` cuts there).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from surgeon.errors import SurgeonError, TraceError

PAST, PRESENT, CROSS = "past", "present", "cross"
PARTS = ("key", "value")


def cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Heads and their width of every tensor of the cache: key before value, layer after layer.

    Raises TraceError for a model whose layers keep another state than keys and values.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **both)
    cache = _cache_of(output)
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", [])
    tensors: list[Any] = [getattr(layer, f"{part}s", None) for layer in layers for part in PARTS]
    if not tensors or not all(isinstance(t, Tensor) and t.dim() == 4 for t in tensors):
        raise _no_cache(model)
    return [(t.shape[1], t.shape[3]) for t in tensors]


@contextmanager
def cached_forward(model: PreTrainedModel, names: Sequence[str]) -> Iterator[None]:
    """Let `model(input_ids, attention_mask, past_key_0=…, …)` give the last token's logits and the cache as it is then.

    `names` are all arguments. Every layer keeps all it has seen: where attention slides, its window is in the mask.
    """
    accepted = inspect.signature(model.forward).parameters
    both = model.config.is_encoder_decoder
    if "use_cache" not in accepted or not (both or "logits_to_keep" in accepted):
        raise _no_cache(model)
    run = _two_stacks(model.forward, accepted) if both else _one_stack(model.forward, accepted)
    named = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    run.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]  # torch.export names inputs by it
    model.forward = run
    try:
        with _exportable():
            yield
    finally:
        del model.forward


def _one_stack(forward: Callable[..., Any], accepted: Any) -> Callable[..., dict[str, Tensor]]:
    """A decoder: its mask reaches back over the cache."""

    def run(input_ids: Tensor, attention_mask: Tensor, **past: Tensor) -> dict[str, Tensor]:
        cache = _filled(past)
        given: dict[str, Any] = {_word(accepted): cache}
        if "position_ids" in accepted:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            given["position_ids"] = positions[:, -input_ids.shape[1] :]
        output = forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, logits_to_keep=1, **given)
        return {"logits": output.logits, **_named(cache, PRESENT)}

    return run


def _two_stacks(forward: Callable[..., Any], accepted: Any) -> Callable[..., dict[str, Tensor]]:
    """An encoder-decoder: the whole source, and a part of what is written of it."""

    def run(input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, **past: Tensor) -> dict[str, Tensor]:
        own, source = _filled(past), DynamicCache()
        source.layers = [cast(Any, _Fresh)() for _ in own.layers]
        cache: Any = EncoderDecoderCache(own, source)
        cache.is_updated = dict.fromkeys(range(len(own.layers)), False)
        ids: Any = {"input_ids": input_ids, "decoder_input_ids": decoder_input_ids}
        output = forward(attention_mask=attention_mask, use_cache=True, **ids, **{_word(accepted): cache})
        return {"logits": output.logits, **_named(own, PRESENT), **_named(source, CROSS)}

    return run


class _Fresh(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's keys and values of the source, which come once."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def _filled(past: dict[str, Tensor]) -> DynamicCache:
    """A cache of these tensors."""
    cache = DynamicCache()
    for i in range(len(past) // 2):
        layer: Any = cast(Any, DynamicLayer)()
        keys, values = (past[f"{PAST}_{part}_{i}"] for part in PARTS)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _named(cache: DynamicCache, word: str) -> dict[str, Tensor]:
    """The tensors of a cache, key before value, layer after layer."""
    layers: list[Any] = list(cache.layers)
    return {f"{word}_{part}_{i}": getattr(layer, f"{part}s") for i, layer in enumerate(layers) for part in PARTS}


def _word(accepted: Any) -> str:
    """What the model calls a cache."""
    return "cache" if "cache" in accepted else "past_key_values"


@contextmanager
def _exportable() -> Iterator[None]:
    """What transformers itself changes about caches and masks while it exports."""
    from transformers.exporters import exporter_dynamo, exporter_onnx  # noqa: F401 - they register the patches
    from transformers.exporters.utils import apply_patches

    patches: Callable[[str], Any] = apply_patches
    with patches("dynamo"), patches("onnx"):
        yield


def _cache_of(output: Any) -> Any:
    return getattr(output, "cache", None) or getattr(output, "past_key_values", None)


def _no_cache(model: PreTrainedModel) -> SurgeonError:
    return TraceError(
        f"{type(model).__name__} does not generate from a cache of keys and values",
        try_="`export: {generate: false}`, which answers for a whole text in one pass",
    )
