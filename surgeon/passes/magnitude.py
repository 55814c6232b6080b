"""DoRA's trained magnitude of every output feature of a projection that has a low-rank product beside it.

    y = x·V·(m / n) + b      V = W + s·A·B,  n = ‖V‖ feature by feature,  m [out] starts as the norm of W

n is a constant to the gradient. Deployed as B' = s·B·(m / n) and the gain m / n - 1, both of the size of vectors.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024 (arXiv:2402.09353), equation 5 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from surgeon.anatomy import Projection
from surgeon.ledger import Delta
from surgeon.program import Program
from surgeon.starts import value


def magnitude(program: Program, site: Projection, a: Delta, b: Delta, scale: Callable[[Tensor], float]) -> Delta:
    """Train m and fold it, and `scale(B)`, into B; returns the gain `lora_gain` [out], zero by default."""
    w = program.borrow(site.weight)  # the parameter itself, so that it moves with the model

    def norm(product: Tensor | float) -> Tensor:
        v = w.detach() if site.in_first else w.detach().T
        v = v[:, list(site.features)] if site.features else v
        length: Tensor = torch.linalg.vector_norm(v + product, dim=0)
        return length

    def folded(a: Tensor, b: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        b = b * scale(b)
        with torch.no_grad():
            n = norm(a @ b)
        return b * (m / n), m / n - 1

    own = a.name.removeprefix(f"{site.path}.").removesuffix(a.part).rstrip(".")
    gain = program.delta(site, "lora_gain", (site.out_features,), None, qualifier=own)
    m = program.trained(gain.name.replace("lora_gain", "lora_magnitude"), (site.out_features,), value(norm(0.0)))
    program.fold((a.name, b.name, m.name), (b.name, gain.name), folded)
    return gain
