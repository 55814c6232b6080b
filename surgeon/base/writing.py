"""Writes a base as a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from surgeon.base.checkpoint import Checkpoint
from surgeon.base.folder import shards
from surgeon.base.loading import quiet
from surgeon.base.opening import Base

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
    "*.model",
)


def write_base(base: Base, folder: Path, *, inside: str = "") -> Checkpoint:
    """Write a folder that opens as the same base, with its weights as they are now, and its tokenizer's files.

    `inside` is its path in a build that it is a part of.
    """
    with quiet():
        base.model.save_pretrained(folder)
    if base.tokenizer_path is not None:
        for pattern in TOKENIZER_FILES:
            for path in base.tokenizer_path.parent.glob(pattern):
                shutil.copyfile(path, folder / path.name)
    return Checkpoint(folder, tuple(shards(folder, str(folder))), inside)
