"""What PEFT's folder holds for a task: its configuration, and the trained tensors under PEFT's keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from surgeon.anatomy import Projection
from surgeon.compiler import Compiled
from surgeon.errors import DeltaError
from surgeon.foreign.meaning import own_scale, scales_input
from surgeon.foreign.peft import HEADS
from surgeon.foreign.peft_inserted import p_tuning, prefix, prompt, vera
from surgeon.foreign.peft_saved import CLASSIFIERS, holds
from surgeon.foreign.sites import module_names, width_of
from surgeon.ledger import Delta

TASKS = {head: task for task, head in HEADS.items()}
MODULES = ("head", "norm_tuning")
"""Techniques whose tensors are parameters of the base, which PEFT saves module by module."""

OUTER = ("prompt_embeddings", "base_model.vera_A", "base_model.vera_B")
"""Keys that stand for no module of the base."""
REASONS = {
    "adapter": "PEFT has no bottleneck adapters",
    "compacter": "PEFT has no bottleneck adapters",
    "fusion": "PEFT has no bottleneck adapters",
    "bitfit": "PEFT has the base's biases beside a LoRA alone",
    "full": "that is a whole model, and no folder beside one",
}
"""Why PEFT has no place for a technique."""

Tensors = dict[str, Tensor]


def write(compiled: Compiled, task: str) -> tuple[dict[str, Any], Tensors]:
    """Configuration and tensors of `task`. Raises DeltaError for what PEFT has no place for."""
    return Writer(compiled, task).write()


class Writer:
    """What is at hand of one task."""

    def __init__(self, compiled: Compiled, task: str) -> None:
        self.compiled = compiled
        self.model = compiled.base.model
        self.task = task
        self.ledger = compiled.program.ledger
        self.trained = dict(compiled.model(task).state_dict())
        deployed = compiled.model(task).deployed()
        self.deployed = {name: tensor.detach() for name, tensor in deployed.items()}

    def write(self) -> tuple[dict[str, Any], Tensors]:
        used = {d.technique for d in self.ledger.deltas.values() if not self.is_default(d)}
        methods = sorted(used - set(MODULES))
        biased = methods == ["bitfit", "lora"]
        methods = ["lora"] if biased else methods
        writers: dict[str, Callable[[], tuple[dict[str, Any], Tensors]]] = {
            "lora": self._lora,
            "adalora": self._adalora,
            "ia3": self._ia3,
            "vera": lambda: vera(self),
            "prefix": lambda: prefix(self, "prefix"),
            "p_tuning_v2": lambda: prefix(self, "p_tuning_v2"),
            "prompt": lambda: prompt(self),
            "p_tuning": lambda: p_tuning(self),
        }
        if len(methods) != 1 or methods[0] not in writers:
            reasons = [f"{method}: {REASONS[method]}" for method in methods if method in REASONS]
            raise DeltaError(
                f"PEFT cannot hold the task '{self.task}': it uses {' and '.join(methods) or 'no technique'}",
                there_is=f"one of {', '.join(writers)} goes into a folder, with {' and '.join(MODULES)}",
                try_="; ".join(reasons) or None,
            )
        config, tensors = writers[methods[0]]()
        saved, names = self._modules()
        if biased:
            config["bias"], biases = self._biases(config["target_modules"], saved)
            tensors |= biases
        inner = "base_model." if "prompt_embeddings" in tensors else "base_model.model."
        keyed = {name if name in OUTER else inner + name: t for name, t in (tensors | saved).items()}
        base = self.compiled.spec.base
        config |= {
            "task_type": TASKS.get(self.compiled.base.head),
            "base_model_name_or_path": base.model if base is not None else None,
            "revision": base.revision if base is not None else None,
            "inference_mode": True,
            "modules_to_save": names or None,
        }
        return config, keyed

    def is_default(self, delta: Delta) -> bool:
        """Whether the task leaves this as the base has it."""
        return delta.name not in self.deployed or self.deployed[delta.name].equal(delta.default)

    def by_path(self, part: str, *, every: bool = False) -> dict[str, list[tuple[Projection, Delta]]]:
        """The deltas of a part with their sites, by PEFT's path of the module; `every` one, or those in use."""
        found: dict[str, list[tuple[Projection, Delta]]] = {}
        for delta in self.ledger.deltas.values():
            if delta.part != part or (self.is_default(delta) and not every):
                continue
            sites = self.compiled.program.anatomy.projections
            site = next(s for s in sites if (s.path, s.role, s.stack) == (delta.site, delta.role, delta.stack))
            if site.experts is not None:
                raise DeltaError(
                    f"{delta.name} belongs to experts, which PEFT has in a layout of its own",
                    there_is=site.weight,
                    try_="serve the task beside the base, as the build does",
                )
            path = module_names(self.model, site.weight)[0].removesuffix(".weight")
            found.setdefault(path, []).append((site, delta))
        if twice := [path for path, own in found.items() if len({s.role for s, _ in own}) < len(own)]:
            raise DeltaError(f"PEFT has one product for all calls of {twice[0]}, and this task one for each")
        return found

    # -- methods ------------------------------------------------------------------------------------------------

    def _lora(self) -> tuple[dict[str, Any], Tensors]:
        tensors: Tensors = {}
        sizes: dict[str, tuple[int, float]] = {}
        more = {"lora_magnitude": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}
        with_more: dict[str, set[str]] = {part: set() for part in more}
        for path, found in self.by_path("lora_B").items():
            a, b, scale = self._product(found)
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = a.T, b.T
            sizes[path] = (len(b), tidy(scale * len(b)))
            for part, ending in more.items():
                if (vector := self._vector(found, part)) is not None:
                    tensors[f"{path}.{ending}"] = vector
                    with_more[part].add(path)
        linear = set(sizes)
        for path, (a, b, scale) in self._tables():
            tensors[f"{path}.lora_embedding_A"], tensors[f"{path}.lora_embedding_B"] = a.T, b.T
            sizes[path] = (len(b), tidy(scale * len(b)))
        for part, paths in with_more.items():
            if paths and paths != (set(sizes) if part == "lora_magnitude" else linear):
                raise DeltaError(f"PEFT has {more[part]} at all modules or at none", there_is=sorted(paths))
        rank = Counter(r for r, _ in sizes.values()).most_common(1)[0][0]
        alpha = Counter(x for _, x in sizes.values()).most_common(1)[0][0]
        return {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(sizes),
            "rank_pattern": {path: r for path, (r, _) in sizes.items() if r != rank},
            "alpha_pattern": {path: x for path, (_, x) in sizes.items() if x != alpha},
            "fan_in_fan_out": any(type(self.model.get_submodule(path)).__name__ == "Conv1D" for path in sizes),
            "bias": "none",
            "use_dora": bool(with_more["lora_magnitude"]),
            "lora_bias": bool(with_more["lora_bias"]),
        }, tensors

    def _vector(self, found: list[tuple[Projection, Delta]], part: str) -> Tensor | None:
        """DoRA's magnitude or the bias of a module; of a fused one with what the base has for the other roles."""
        named = [(site, self.trained.get(f"{d.name.removesuffix('lora_B')}{part}")) for site, d in found]
        own = [(site, vector) for site, vector in named if vector is not None]
        if len(own) < len(named) or own[0][0].features is None:
            return own[0][1] if len(own) == len(named) else None
        weight = self.model.get_parameter(own[0][0].weight).detach()
        norms = torch.linalg.vector_norm(weight if own[0][0].in_first else weight.T, dim=0)
        whole = norms if part == "lora_magnitude" else torch.zeros_like(norms)
        for site, vector in own:
            whole[list(site.features or ())] = vector
        return whole

    def _tables(self) -> Iterator[tuple[str, tuple[Tensor, Tensor, float]]]:
        for delta in self.ledger.deltas.values():
            if delta.part == "lora_embedding_B" and not self.is_default(delta):
                a, b = self.trained[delta.name[:-1] + "A"], self.trained[delta.name]
                yield delta.site, (a, b, own_scale(self.ledger, delta.name, len(b)))

    def _adalora(self) -> tuple[dict[str, Any], Tensors]:
        """As trained, with the ranks that were pruned: PEFT then has nothing to cut."""
        tensors: Tensors = {}
        scales: dict[str, tuple[int, float]] = {}
        for path, found in self.by_path("lora_B").items():
            ((site, delta),) = found[:1]
            if site.features is not None:
                raise DeltaError(f"PEFT's AdaLoRA has one product for all of {path}, and this task one for each role")
            stem, b = delta.name.removesuffix("B"), self.trained[delta.name]
            tensors |= {f"{path}.lora_{x}": self.trained[f"{stem}{x}"].T for x in "AB"}
            tensors[f"{path}.lora_E"] = self.trained[f"{stem}E"].unsqueeze(1)
            scales[path] = len(b), own_scale(self.ledger, delta.name, len(b))
        if len(set(scales.values())) > 1:
            raise DeltaError("PEFT's AdaLoRA has one initial rank and one scale", there_is=sorted(scales))
        ((rank, scale),) = set(scales.values())
        return {
            "peft_type": "ADALORA",
            "init_r": rank,
            "target_r": rank,
            "lora_alpha": tidy(scale * (rank + 1e-5)),
            "total_step": 1,
            "target_modules": sorted(scales),
        }, tensors

    def _product(self, found: list[tuple[Projection, Delta]]) -> tuple[Tensor, Tensor, float]:
        """a, b and scale of one module: of a fused one a single product of which each role's own is a block.

        PEFT has one `a` for all roles. Where ours are equal it is that; else they stand side by side.
        """
        pairs = [self._pair(d) for _, d in found]
        if found[0][0].features is None:
            return pairs[0]
        width = width_of(self.model, found[0][0])
        spread = [_spread(b, site, width) for (site, _), (_, b, _) in zip(found, pairs, strict=True)]
        a, _, scale = pairs[0]
        if all(other.equal(a) and s == scale for other, _, s in pairs):
            return a, torch.stack(spread).sum(0), scale
        scaled = [b if s == scale else b * (s / scale) for b, (_, _, s) in zip(spread, pairs, strict=True)]
        return torch.cat([other for other, _, _ in pairs], 1), torch.cat(scaled), scale

    def _pair(self, delta: Delta) -> tuple[Tensor, Tensor, float]:
        a, b = self.trained[delta.name.removesuffix("lora_B") + "lora_A"], self.trained[delta.name]
        return a, b, own_scale(self.ledger, delta.name, len(b))

    def _ia3(self) -> tuple[dict[str, Any], Tensors]:
        tensors: Tensors = {}
        inward: list[str] = []
        for path, found in self.by_path("ia3_l").items():
            site, delta = found[0]
            vector = self.trained[delta.name]
            if scales_input(self.compiled, site):
                inward.append(path)
                tensors[f"{path}.ia3_l"] = vector.unsqueeze(0)
                continue
            if site.features is not None:
                vector = torch.ones(width_of(self.model, site), dtype=vector.dtype)
                for own, delta in found:
                    vector[list(own.features or ())] = self.trained[delta.name]
            tensors[f"{path}.ia3_l"] = vector.unsqueeze(1)
        paths = sorted(key.removesuffix(".ia3_l") for key in tensors)
        return {"peft_type": "IA3", "target_modules": paths, "feedforward_modules": sorted(inward)}, tensors

    # -- modules ------------------------------------------------------------------------------------------------

    def _modules(self) -> tuple[Tensors, list[str]]:
        """Parameters of the modules that PEFT saves whole: the task's where it has them, else the base's."""
        own = self._parameters()
        names = list(CLASSIFIERS.get(TASKS.get(self.compiled.base.head, ""), ()))
        for name in own:
            path = name.rpartition(".")[0]
            if not any(holds(n, path) for n in names):
                names.append(path)
        saved: Tensors = {}
        for path, module in self.model.named_modules():
            if path and any(path.endswith(name) for name in names):
                for leaf, parameter in module.named_parameters():
                    saved[f"{path}.{leaf}"] = own.get(f"{path}.{leaf}", parameter.detach())
        return saved, names

    def _biases(self, targets: list[str], saved: Tensors) -> tuple[str, Tensors]:
        """PEFT has the biases of all its targets, or all there are: the task's where it has them, else the base's."""
        base = {n: p.detach() for n, p in self.model.named_parameters() if n.endswith(".bias") and n not in saved}
        own: Tensors = {}
        for delta in self.ledger.deltas.values():
            if delta.technique != "bitfit" or self.is_default(delta):
                continue
            name, tensor = f"{delta.site}.bias", self.trained[delta.name]
            if tensor.shape != base[name].shape:
                sites = self.compiled.program.anatomy.projections
                features = next(s.features for s in sites if (s.path, s.role) == (delta.site, delta.role))
                whole = own.get(name, base[name].clone())
                whole[list(features or ())] = tensor
                tensor = whole
            own[name] = tensor
        targeted = {f"{path}.bias" for path in targets} & base.keys()
        names = targeted if own.keys() <= targeted else base.keys()
        inner = {name: f"{name.removesuffix('bias')}base_layer.bias" for name in targeted}
        kind = "lora_only" if names == targeted else "all"
        return kind, {inner.get(name, name): own.get(name, base[name]) for name in names}

    def _parameters(self) -> Tensors:
        """The task's own values of the base's parameters, by name and as the base stores them."""
        own: Tensors = {}
        for delta in self.ledger.deltas.values():
            if delta.technique not in MODULES or delta.name not in self.trained:
                continue
            tensor, leaf = self.trained[delta.name], delta.part.rpartition(".")[2]
            if delta.part.startswith("head."):
                site = next(s for s in self.compiled.program.anatomy.projections if s.path == delta.site)
                name = module_names(self.model, site.weight)[0].rpartition(".")[0]
                if leaf == "bias" and site.bias is None:
                    if tensor.any():
                        raise DeltaError(f"{name} has no bias in the base, and this task's head has one")
                    continue
                own[f"{name}.{leaf}"] = tensor.T if leaf == "weight" and not site.in_first else tensor
            elif not tensor.equal(delta.default):
                own[f"{delta.site}.{leaf}"] = tensor
        return own


def tidy(number: float) -> float | int:
    """A whole number where rounding alone keeps it from being one."""
    return round(number) if abs(number - round(number)) < 1e-9 else number


def _spread(b: Tensor, site: Projection, width: int) -> Tensor:
    whole = b.new_zeros(len(b), width)
    whole[:, list(site.features or ())] = b
    return whole
