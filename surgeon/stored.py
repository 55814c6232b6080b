"""Base tensors that are held in another form than the checkpoint's, such as 4-bit numbers with scales."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.errors import InvariantError


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The base's tensor `name` as it is held: `rebuild(*parts)` gives the numbers that it stands for now."""

    name: str
    form: str
    technique: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[str, ...]
    rebuild: Callable[..., Tensor]

    def check(self, parts: Iterable[Tensor], wanted: Tensor | None) -> None:
        """Raise InvariantError unless the rebuilt tensor is `wanted`, bit for bit, in the checkpoint's shape."""
        if wanted is None:
            return
        found = self.rebuild(*parts)
        if found.shape != self.shape or not torch.equal(found, wanted.to(found.dtype)):
            raise InvariantError(f"I2: {self.name} in {self.form} is not what its maker reads from it", where=self.name)

    def renew(self, fingerprint: str, parts: Iterable[Tensor]) -> str:
        """The fingerprint of the base that this makes of another one; a base without weights has none."""
        if not fingerprint:
            return ""
        digest = hashlib.sha256(f"{fingerprint} {self.name} {self.form}".encode())
        for tensor in parts:
            digest.update(f"\n{tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
