"""What a build says about writing texts: where the cache goes in and comes out, how a text begins, and what ends it."""

from __future__ import annotations

from typing import Any

from surgeon.base import Base
from surgeon.base.talking import chat_template
from surgeon.errors import SpecError
from surgeon.exporters.shared import starts
from surgeon.halves import Halves
from surgeon.inputs import Input
from surgeon.program import Program

UNSUPPORTED = (
    "begin_suppress_tokens",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "forced_decoder_ids",
    "guidance_scale",
    "sequence_bias",
)
"""What transformers would heed in a generation configuration and the runtime does not."""
NEUTRAL: tuple[Any, ...] = (None, 0, 1, [], {})


def generation(base: Base, served: Program | Halves) -> dict[str, Any]:
    """The manifest's entry. Raises SpecError where the base's generation configuration asks for what is not done."""
    program = served if isinstance(served, Program) else served.decoder
    begin = starts(program) if program.shares_cache else {}
    cache = [
        {"start": begin.get(i.name), "past": _port(i), "present": present}
        for i, present in zip((i for i in program.inputs if i.cached), program.presents, strict=True)
    ]
    said: Any = getattr(base.model, "generation_config", base.model.config)
    entry: dict[str, Any] = {
        "cache": cache,
        "shared": program.shares_cache,
        "end": _listed(getattr(said, "eos_token_id", None)),
        "tokens": chat_template(base)[1],
    }
    if isinstance(served, Halves):
        entry["bridge"] = [_port(i) for i in served.bridge]
        entry["start"] = _start(base, said)
        entry["rules"] = _rules(said)
    return entry


def _port(i: Input) -> dict[str, Any]:
    return {"name": i.name, "dtype": str(i.dtype).removeprefix("torch."), "axes": list(i.axes)}


def _start(base: Base, said: Any) -> int:
    """The token that a decoder's text begins with, which is none of the text."""
    owners = (said, base.model.config)
    places = [(owner, name) for name in ("decoder_start_token_id", "bos_token_id") for owner in owners]
    found = next((token for owner, name in places if isinstance(token := getattr(owner, name, None), int)), None)
    if found is None:
        raise SpecError(
            "export.generate: this base does not say which token its decoder starts with",
            try_="`decoder_start_token_id` in its generation_config.json",
        )
    return found


def _rules(said: Any) -> dict[str, Any]:
    """What the base's own generation configuration asks of every text, however it is searched for."""
    asked = [name for name in UNSUPPORTED if getattr(said, name, None) not in NEUTRAL]
    words = getattr(said, "bad_words_ids", None) or []
    if any(len(word) != 1 for word in words):
        asked.append("bad_words_ids of several tokens")
    if asked:
        raise SpecError(
            f"export.generate: the base's generation configuration asks for {', '.join(asked)}, which is not done",
            try_="leave it out of generation_config.json, if texts may be written without",
        )
    return {
        "first": _one(said, "forced_bos_token_id"),
        "last": _one(said, "forced_eos_token_id"),
        "banned": sorted({*(word[0] for word in words), *(getattr(said, "suppress_tokens", None) or [])}),
        # Its length counts the token that the decoder starts with.
        "least": max((getattr(said, "min_length", None) or 0) - 1, getattr(said, "min_new_tokens", None) or 0, 0),
        "ngram": getattr(said, "no_repeat_ngram_size", None) or 0,
    }


def _one(said: Any, name: str) -> int | None:
    """A token that may be written as a list of one."""
    tokens = _listed(getattr(said, name, None))
    if len(tokens) > 1:
        raise SpecError(f"export.generate: {name} names {len(tokens)} tokens, and one can be forced")
    return tokens[0] if tokens else None


def _listed(tokens: Any) -> list[int]:
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)
