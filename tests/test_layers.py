"""Arrows between rooms point one way; the runtime stands alone; the core knows no technique."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
# Each line reads from the front door down: what stands later must never lead back to what stands earlier.
CHAINS = (
    ("__main__", "cli", "train", "compiler", "pipeline", "passes", "program", "anatomy", "errors"),
    ("cli", "compiler", "build", "exporters", "program", "ledger", "errors"),
    ("compiler", "model", "ledger", "errors"),
    ("compiler", "trace", "errors"),
    ("pipeline", "verify", "program"),
)
CORE = (
    "program",
    "bodies",
    "rewriting",
    "holding",
    "anatomy",
    "ledger",
    "trace",
    "module",
    "verify",
    "pipeline",
    "compiler",
    "model",
    "graph_text",
    "plan",
)
TECHNIQUES = {path.stem for path in (ROOT / "surgeon/passes").glob("*.py")} - {"__init__"}


def modules() -> dict[str, Path]:
    """Dotted name of every module of the package but its door."""
    paths = (ROOT / "surgeon").rglob("*.py")
    named = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}
    return {name: path for name, path in named.items() if name != "surgeon"}


def imports(tree: ast.AST, *, lazy: bool) -> Iterator[str]:
    """Modules of ours that a module imports when it is imported, or with `lazy` ever; never those for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("surgeon"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("surgeon"):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node, lazy=lazy)


def import_graph(*, lazy: bool) -> nx.DiGraph:
    """An edge from every module to those it imports."""
    known = modules()
    graph = nx.DiGraph()
    graph.add_nodes_from(known)
    for name, path in known.items():
        found = set(imports(ast.parse(path.read_text(encoding="utf-8")), lazy=lazy))
        graph.add_edges_from((name, other) for other in found if other in known and other != name)
    return graph


def room(module: str) -> str:
    return module.split(".")[1]


def rooms(*, lazy: bool) -> nx.DiGraph:
    """The same between rooms."""
    edges = {(room(a), room(b)) for a, b in import_graph(lazy=lazy).edges}
    return nx.DiGraph([(a, b) for a, b in edges if a != b])


@pytest.mark.parametrize("chain", CHAINS, ids=" → ".join)
def test_arrows_between_rooms_point_one_way(chain: tuple[str, ...]) -> None:
    graph = rooms(lazy=False)
    back = [(b, a) for a, b in combinations(chain, 2) if a in graph and b in graph and nx.has_path(graph, b, a)]
    assert back == []


@pytest.mark.parametrize("lazy", [False, True])
def test_no_room_leads_back_to_itself(lazy: bool) -> None:
    assert list(nx.simple_cycles(rooms(lazy=lazy))) == []


def test_no_module_imports_itself_in_a_circle() -> None:
    parents = [(a, b) for a, b in import_graph(lazy=False).edges if not a.startswith(f"{b}.")]
    circles = nx.simple_cycles(nx.DiGraph([(a, b) for a, b in parents if not b.startswith(f"{a}.")]))
    assert list(circles) == []


def test_the_runtime_imports_nothing_of_ours_but_errors() -> None:
    outside = {b for a, b in import_graph(lazy=True).edges if room(a) == "runtime" and room(b) != "runtime"}
    assert outside == {"surgeon.errors"}


def test_the_core_imports_no_technique() -> None:
    named = {(a, b) for a, b in import_graph(lazy=True).edges if room(a) in CORE and b.startswith("surgeon.passes.")}
    assert named == set()


def test_no_two_techniques_import_each_other() -> None:
    """They may share a part, as `train_norms`; a circle would make neither removable."""
    graph = import_graph(lazy=True)
    passes = graph.subgraph([f"surgeon.passes.{name}" for name in TECHNIQUES])
    assert nx.is_directed_acyclic_graph(passes)


@pytest.mark.parametrize("statement", ["import surgeon", "import surgeon.runtime", "from surgeon import Session"])
def test_the_door_loads_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print(*{{'torch', 'transformers', 'onnx', 'pydantic'}} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
