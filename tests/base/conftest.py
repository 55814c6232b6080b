"""A folder to be damaged, and what a refusal must say."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from surgeon.base import open_base
from surgeon.errors import BaseError
from surgeon.spec import BaseSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tiny = Callable[..., "PreTrainedModel"]


@pytest.fixture
def folder(base_folder: Path, tiny: Tiny, tmp_path: Path) -> Path:
    """A tiny classifier's folder of two layers, to be damaged."""
    copied = Path(shutil.copytree(base_folder, tmp_path / "base"))
    tiny("bert").save_pretrained(copied)
    return copied


@pytest.fixture
def refused() -> Callable[..., str]:
    """Open what must be refused; returns what was said."""

    def check(model: Path | str, **options: Any) -> str:
        with pytest.raises(BaseError) as caught:
            open_base(BaseSpec(model=str(model), **options))
        assert caught.value.exit_code == 1
        assert caught.value.where == str(model)
        return str(caught.value)

    return check
