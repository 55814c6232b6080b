"""What a base's tokenizer says of conversations: its template, and the special tokens that this may name."""

from __future__ import annotations

from surgeon.base.folder import read_json
from surgeon.base.opening import Base

TEMPLATE_FILE = "chat_template.jinja"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def chat_template(base: Base) -> tuple[str | None, dict[str, str]]:
    """The template, None where there is none, and special tokens by name. Of several templates it is the default."""
    if base.tokenizer_path is None:
        return None, {}
    folder = base.tokenizer_path.parent
    path = folder / "tokenizer_config.json"
    said = read_json(path, base.source) if path.exists() else {}
    template = said.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if (file := folder / TEMPLATE_FILE).exists():
        template = file.read_text(encoding="utf-8")
    tokens = {name: _content(said.get(name)) for name in SPECIAL}
    return template if isinstance(template, str) else None, {name: t for name, t in tokens.items() if t is not None}


def _content(token: object) -> str | None:
    """A special token is a string, or an object that has one."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None
