"""What a graph under rewriting holds: the base's tensors, as the checkpoint has them or in another form, and constants.

Deltas are not among them: they are the program's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from surgeon.errors import CompositionError
from surgeon.rewriting import Rewriting
from surgeon.stored import Stored


@dataclass(kw_only=True)
class Holding(Rewriting):
    """A graph and the tensors that no task owns.

    `frozen` names the base's tensors; `fingerprint` is empty where the base has no weights. `stored` are those held in
    another form than the checkpoint's, `borrowed` those that a fold reads in training, and who reads them. `operators`
    say how an exporter writes an operator that torch does not have: by torch code of its own, or (None) computed when
    exporting.
    """

    frozen: frozenset[str]
    fingerprint: str = ""
    constants: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)
    borrowed: dict[str, str] = field(default_factory=dict)
    operators: dict[Any, Callable[..., Tensor] | None] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by its dotted name; the numbers it stands for where it is held in another form."""
        if name in self.stored:
            return self.stored[name].rebuild(*map(self.tensor, self.stored[name].parts))
        owner, _, leaf = name.rpartition(".")
        found = getattr(self.graph_module.get_submodule(owner), leaf)
        assert isinstance(found, Tensor)
        return found

    def constant(self, name: str, make: Callable[[], Tensor], *, dtype: torch.dtype | None = None) -> fx.Node:
        """A tensor that all tasks share and none trains, such as VeRA's random matrices; made once for its name.

        It becomes an initializer of the base's graph, so every compile must make the same bytes. Without `dtype` it
        has the base's floating type.
        """
        made: list[fx.Node] = [node for node in self.graph.nodes if node.op == "get_attr" and node.target == name]
        if made:
            return made[0]
        parameter = next(self.graph_module.parameters())
        tensor = make().to(parameter.device, dtype or self.dtype)
        self._owner(name).register_buffer(name.rpartition(".")[2], tensor)
        self.constants[name] = tensor
        last = max(n for n in self.graph.nodes if n.op == "placeholder")
        with self.graph.inserting_before(last.next):
            node = self.graph.get_attr(name)
        modes = (n.meta["val"].fake_mode for n in self.graph.nodes if isinstance(n.meta.get("val"), FakeTensor))
        node.meta["val"] = next(modes).from_tensor(tensor, static_shapes=True)
        node.meta["surgeon"] = self._author
        return node

    def store(
        self,
        name: str,
        form: str,
        parts: Mapping[str, Tensor],
        rebuild: Callable[..., Tensor],
        *,
        wanted: Tensor | None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> tuple[fx.Node, ...]:
        """Hold the base's tensor `name` as `parts` from now on, under its own name; returns the nodes to read them by.

        `rebuild(*parts, *shared)` gives the numbers that it stands for: `wanted`, bit for bit. `shared` parts keep
        their own names and are the same for several tensors. The caller lets every reader `recompute`. The base is
        another one afterwards, and so is its fingerprint; fresh tasks are compared with it, not with the checkpoint.
        """
        if name in self.borrowed:
            raise CompositionError(
                f"'{self._author[0]}' would hold {name} in {form}, and '{self.borrowed[name]}' reads it in training",
                try_="leave it out of one of the two",
            )
        base = self.tensor(name)
        owner, leaf = self.graph_module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        delattr(owner, leaf)
        named = {f"{name}.{part}": tensor for part, tensor in parts.items()} | dict(shared or {})
        nodes = tuple(self.constant(n, lambda t=t: t, dtype=t.dtype) for n, t in named.items())  # type: ignore[misc]
        entry = Stored(
            name=name,
            form=form,
            technique=self._author[0],
            shape=tuple(base.shape),
            dtype=base.dtype,
            parts=tuple(named),
            rebuild=rebuild,
        )
        held = [self.tensor(part) for part in named]
        entry.check(held, wanted)
        self.fingerprint = entry.renew(self.fingerprint, held)
        self.stored[name] = entry
        self.frozen = self.frozen - {name} | set(named)
        return nodes

    def borrow(self, name: str) -> Tensor:
        """A parameter of the base that a fold reads in training. Raises CompositionError where it is held otherwise."""
        self.refuse_stored(name)
        self.borrowed[name] = self._author[0]
        return self.tensor(name)

    def refuse_stored(self, name: str) -> None:
        """Raise CompositionError where a tensor that training reads or changes is held in another form."""
        if name in self.stored:
            raise CompositionError(
                f"'{self._author[0]}' needs {name} in training, which '{self.stored[name].technique}' holds in "
                f"{self.stored[name].form}",
                try_="leave it out of one of the two",
            )

    def operator(self, operator: Any, exported: Callable[..., Tensor] | None) -> None:
        """Say how exporters write an operator that torch does not have; see `operators`."""
        self.operators[operator] = exported

    @property
    def dtype(self) -> torch.dtype:
        """The base's floating type."""
        return next(p.dtype for p in self.graph_module.parameters() if p.is_floating_point())

    def _owner(self, name: str) -> torch.nn.Module:
        """The module that holds a tensor of this name, made where there is none."""
        module: torch.nn.Module = self.graph_module
        for part in filter(None, name.rpartition(".")[0].split(".")):
            if not isinstance(module._modules.get(part), torch.nn.Module):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        return module
