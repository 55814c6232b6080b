"""Generation with a cache: a model's forward whose keys and values of earlier tokens come in and go out as tensors.

One graph serves the prompt (an empty past) and every later token. Each row's positions are counted over its mask, so
that padding in front of a row, or virtual tokens that a pass puts there, move nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from surgeon.errors import SurgeonError, TraceError

PAST, PRESENT = "past", "present"
PARTS = ("key", "value")


def cache_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Heads and their width of every tensor of the cache: key before value, layer after layer.

    Raises TraceError for a model whose layers keep another state than keys and values.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    layers = getattr(_cache_of(output), "layers", [])
    tensors: list[Any] = [getattr(layer, f"{part}s", None) for layer in layers for part in PARTS]
    if not tensors or not all(isinstance(t, Tensor) and t.dim() == 4 for t in tensors):
        raise _no_cache(model)
    return [(t.shape[1], t.shape[3]) for t in tensors]


@contextmanager
def cached_forward(model: PreTrainedModel, names: Sequence[str]) -> Iterator[None]:
    """Let `model(input_ids, attention_mask, past_key_0=…, …)` give the last token's logits and the cache as it is then.

    `names` are all arguments. Every layer keeps all it has seen: where attention slides, its window is in the mask.
    """
    forward, accepted = model.forward, inspect.signature(model.forward).parameters
    if "logits_to_keep" not in accepted or "use_cache" not in accepted:
        raise _no_cache(model)

    def run(input_ids: Tensor, attention_mask: Tensor, **past: Tensor) -> dict[str, Tensor]:
        cache = DynamicCache()
        for i in range(len(past) // 2):
            layer: Any = cast(Any, DynamicLayer)()
            keys, values = (past[f"{PAST}_{part}_{i}"] for part in PARTS)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        given: dict[str, Any] = {"cache" if "cache" in accepted else "past_key_values": cache}
        if "position_ids" in accepted:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            given["position_ids"] = positions[:, -input_ids.shape[1] :]
        output = forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, logits_to_keep=1, **given)
        present = {
            f"{PRESENT}_{part}_{i}": getattr(layer, f"{part}s")
            for i, layer in enumerate(cache.layers)
            for part in PARTS
        }
        return {"logits": output.logits, **present}

    named = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    run.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]  # torch.export names inputs by it
    model.forward = run
    try:
        with _exportable():
            yield
    finally:
        del model.forward


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
