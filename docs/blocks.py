"""What the docs say of the code, from the code: the generated blocks of hand-written pages, by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import typer.main

import surgeon
from surgeon import catalog, registry
from surgeon.anatomy.report import rows
from surgeon.cli.app import app
from surgeon.spec import BaseSpec, ExportSpec, json_schema
from surgeon.spec.envelope import TaskSpec

ROOT = Path(__file__).resolve().parent.parent
SPECS = ROOT / "specs"


def own_techniques() -> tuple[str, ...]:
    """The techniques of this package, not those of a plug-in that happens to be installed."""
    return tuple(name for name in registry.names() if registry.technique(name).__module__.startswith("surgeon."))


def techniques_of(path: Path) -> tuple[str, ...]:
    """The techniques of a spec, in order."""
    return tuple(step.name for step in surgeon.read_spec(path).steps)


def prose(docstring: str) -> str:
    """A docstring as Markdown: what is indented is an equation, and stays as it is."""
    paragraphs = []
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        if all(line.startswith(" ") for line in paragraph.splitlines()) or (" = " in paragraph and "·" in paragraph):
            paragraphs.append(f"```text\n{dedent(paragraph)}\n```")
        else:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def options_table(known: Iterable[catalog.Option]) -> str:
    """Options with their defaults and meanings."""
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
        used = " + ".join(f"`{name}`" for name in techniques_of(path))
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
    return "\n\n".join(f"### {title}\n\n{options_table(_plain(options))}" for title, options in parts.items())


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
    return prose(thing.__doc__ or "")


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
