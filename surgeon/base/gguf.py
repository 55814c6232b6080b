"""Bases from GGUF files: read once by transformers, kept as a folder of safetensors in Surgeon's cache.

The model has the numbers that the file's blocks stand for. Beside them the folder has the blocks themselves, for an
export that holds them as they are. Which block belongs to which parameter is found by their numbers: transformers
renames tensors, permutes rows and turns some.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from surgeon.base.folder import first_line
from surgeon.base.heads import auto_class
from surgeon.base.loading import quiet
from surgeon.blocks import EXACT, Blocks, Quantised, read_blocks, write_quantised
from surgeon.errors import BaseError, SpecError
from surgeon.runtime.files import hash_file

SUFFIX = ".gguf"
MAGIC = b"GGUF"
BLOCKS = "gguf.safetensors"
"""What the converted folder holds beside a model's usual files."""
BASES = "bases"
KEEP = 2
LAYOUT = 1
"""Of the converted folder; another number reads every file anew."""


def cache_folder() -> Path:
    """`$SURGEON_CACHE`, or `surgeon` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "surgeon"
    return Path(os.environ.get("SURGEON_CACHE", default))


def converted(path: Path, source: str) -> Path:
    """The folder that the file becomes, made where the cache lacks it. Raises BaseError; SpecError without `gguf`."""
    _check(path, source)
    versions = [LAYOUT, version("transformers"), version("gguf")]
    key = hashlib.sha256(f"{hash_file(path)} {versions}".encode()).hexdigest()
    entry = cache_folder() / BASES / key
    if (entry / BLOCKS).exists():
        os.utime(entry)
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=entry.parent))
    except OSError as error:
        where = str(entry.parent)
        raise BaseError(
            f"the converted base cannot be kept: {error.strerror}", where=where, try_="set SURGEON_CACHE to a folder"
        ) from error
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # a bar that nothing else switches off
            _convert(path, partial, source)
        if not entry.exists():
            partial.replace(entry)
    except OSError as error:
        raise BaseError(f"the converted base cannot be written: {first_line(error)}", where=source) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    others = [p for p in entry.parent.iterdir() if not p.name.startswith(".") and p != entry]
    for old in sorted(others, key=lambda p: p.stat().st_mtime)[: 1 - KEEP or None]:
        shutil.rmtree(old, ignore_errors=True)
    return entry


def _check(path: Path, source: str) -> None:
    if find_spec("gguf") is None:
        raise SpecError(
            "GGUF files need gguf, which is not installed", where=source, try_="pip install 'modelsurgeon[gguf]'"
        )
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise BaseError("this is no GGUF file: it does not begin as one", where=source)


def _convert(path: Path, folder: Path, source: str) -> None:
    """Write model, tokenizer and blocks of a GGUF file as a folder."""
    auto_config: Any = AutoConfig
    given: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        config = auto_config.from_pretrained(path.parent, **given)
        auto = auto_class(config, "seq2seq-lm" if config.is_encoder_decoder else "causal-lm", source)
        model, report = auto.from_pretrained(
            path.parent, config=config, dtype=torch.float32, output_loading_info=True, **given
        )
    except Exception as error:  # whatever a damaged file makes of its readers
        raise BaseError(
            f"transformers cannot read this GGUF file: {first_line(error)}",
            where=source,
            try_="fetch the file again, if it may be cut; not every architecture can be read from GGUF",
        ) from error
    if report["missing_keys"]:
        raise BaseError("tensors are missing in it", where=source, there_is=sorted(report["missing_keys"]))
    write_quantised(_matched(path, model), folder / BLOCKS)
    plain = _plain(model, auto)
    plain.save_pretrained(folder)
    try:
        AutoTokenizer.from_pretrained(path.parent, **given).save_pretrained(folder)
    except Exception as error:
        raise BaseError(f"its tokenizer cannot be read: {first_line(error)}", where=source) from error


def _plain(model: PreTrainedModel, auto: Any) -> PreTrainedModel:
    """The same model as one that was never quantised: transformers refuses to save the one it read."""
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = auto.from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    assert isinstance(plain, PreTrainedModel)
    return plain


def _matched(path: Path, model: PreTrainedModel) -> Quantised:
    """The blocks of every matrix of the model, its rows in the model's order."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    known = dict(_rows(model))
    forms: dict[str, str] = {}
    exact: dict[str, Blocks] = {}
    for tensor in GGUFReader(path).tensors:
        form = tensor.tensor_type.name
        if form in ("F64", "F32", "F16", "BF16") or tensor.data.ndim != 2:
            continue
        hashes = _hashes(torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)))
        name, rows, turned = known.get(frozenset(hashes), ("", [], False))
        if len(rows) != len(hashes):
            continue
        forms[name] = form
        if form in EXACT:
            place = {row: at for at, row in enumerate(hashes)}
            blocks = read_blocks(form, tensor.data[[place[row] for row in rows]])
            matrix = model.get_parameter(name).detach()
            if torch.equal(blocks.numbers(), matrix.T if turned else matrix):
                exact[name] = Blocks(form, blocks.codes, blocks.scales, blocks.least, turned)
    return Quantised(forms, exact)


def _rows(model: PreTrainedModel) -> Iterator[tuple[frozenset[bytes], tuple[str, list[bytes], bool]]]:
    """Every matrix by the set of its rows, as it is and turned."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            for turned in (True, False):
                rows = _hashes(parameter.detach().T if turned else parameter.detach())
                yield frozenset(rows), (name, rows, turned)


def _hashes(matrix: Tensor) -> list[bytes]:
    return [hashlib.blake2b(row, digest_size=16).digest() for row in matrix.float().contiguous().numpy()]
