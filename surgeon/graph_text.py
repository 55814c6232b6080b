"""The rewritten graph in canonical text: for people to read, for golden tests and as a cache key.

Names of nodes, symbols and order are those of the graph; nothing in it depends on the run, the path or the values.
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from surgeon.program import Program

Symbols = dict[sympy.Symbol, sympy.Symbol]
"""A trace's own, and what they are called in the text."""
TYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def graph_text(program: Program, *, only_new: bool = False) -> str:
    """One line a node: `%name = op(args) : type[shape]  # technique @ line`; `only_new` keeps what passes made."""
    symbols: Symbols = {}
    return "\n".join(line for node, line in _lines(program, symbols) if not only_new or node.meta.get("surgeon")) + "\n"


def _lines(program: Program, symbols: Symbols) -> Iterator[tuple[fx.Node, str]]:
    for node in program.graph.nodes:
        author = node.meta.get("surgeon")
        comment = f"  # {author[0]}" if author else ""
        if node.op == "output":
            yield node, f"return {_text(node.args[0], symbols)}"
        elif node.op in ("placeholder", "get_attr"):
            kind = "input" if node.op == "placeholder" else "tensor"
            yield node, f"%{node.name} = {kind} {node.target}{_shape(node, symbols)}{comment}"
        else:
            named = [f"{k}={_text(v, symbols)}" for k, v in node.kwargs.items()]
            arguments = ", ".join([*(_text(a, symbols) for a in node.args), *named])
            yield node, f"%{node.name} = {node.target}({arguments}){_shape(node, symbols)}{comment}"


def _text(argument: object, symbols: Symbols) -> str:
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, list | tuple):
        return "[" + ", ".join(_text(a, symbols) for a in argument) + "]"
    if isinstance(argument, dict):
        return "{" + ", ".join(f"{k}: {_text(v, symbols)}" for k, v in argument.items()) + "}"
    return str(argument)


def _shape(node: fx.Node, symbols: Symbols) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    return f" : {TYPES.get(value.dtype, str(value.dtype))}[{', '.join(_size(s, symbols) for s in value.shape)}]"


def _size(size: int | torch.SymInt, symbols: Symbols) -> str:
    """A plain number, or the symbols renamed in order of appearance: their own numbers depend on the run."""
    if isinstance(size, int):
        return str(size)
    expression = size.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        symbols.setdefault(symbol, sympy.Symbol(f"n{len(symbols)}"))
    return str(expression.xreplace(symbols))
