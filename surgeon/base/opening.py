"""Opens a base: the model, its fingerprint, and what a build says about it."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer, PreTrainedModel

from surgeon.base.checkpoint import Checkpoint
from surgeon.base.configuration import FOREIGN, read_config, written_config
from surgeon.base.fingerprint import fingerprint
from surgeon.base.folder import CONFIG, check_folder, find_file, find_folder, first_line, read_json, shards
from surgeon.base.gguf import BLOCKS, SUFFIX, converted
from surgeon.base.heads import head_of
from surgeon.base.loading import build, check_finite, load, quiet
from surgeon.blocks import Quantised, read_quantised
from surgeon.errors import BaseError
from surgeon.spec import BaseSpec, HeadName

IN_HAND = "a model in hand"
OLDER_TOKENIZERS = ("tokenizer_config.json", "vocab.*", "*.model")
UNBOUNDED = 10**9
"""What tokenizers say for `no limit` is larger than this."""


@dataclass(frozen=True)
class Base:
    """A base model and where it comes from."""

    model: PreTrainedModel
    source: str
    head: HeadName
    fingerprint: str
    """Empty where the model has no weights."""
    fresh: tuple[str, ...] = ()
    """Parameters that the base's files do not hold: drawn at random."""
    max_length: int | None = None
    """Positions there are for text; None where nothing limits them."""
    tokenizer_path: Path | None = None
    """A `tokenizer.json`; None where the base has no tokenizer."""
    quantised: Quantised = field(default_factory=Quantised)
    """What the base's file holds in fewer bits; the model has the numbers that these stand for."""
    checkpoint: Checkpoint | None = None
    """The files its weights were read from; None where there are none, or where they may have changed since."""

    def release(self, names: Iterable[str]) -> None:
        """Free the memory of these parameters, which a program holds in another form; their shapes stay."""
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            empty = torch.empty_like(module.get_parameter(leaf), device="meta")
            module.register_parameter(leaf, torch.nn.Parameter(empty, requires_grad=False))


def load_base(base: BaseSpec, *, weights: bool = True, seed: int = 0) -> PreTrainedModel:
    """The model alone, in eval mode."""
    return open_base(base, weights=weights, seed=seed).model


def open_base(base: BaseSpec | PreTrainedModel, *, weights: bool = True, seed: int = 0) -> Base:
    """Open the base of a spec, or one in hand. Without `weights` it is on the meta device: enough to plan and count.

    Raises BaseError where it is missing, damaged or another one than its configuration says.
    """
    with quiet():
        if isinstance(base, PreTrainedModel):
            return _in_hand(base)
        if base.config is not None:
            model = build(base, written_config(base.config), "base.config", weights=weights, seed=seed)
            source = f"a random {model.config.model_type}"
            return Base(model, source, base.head, fingerprint(model), max_length=_max_length(model, None, source))
        source = str(base.model)
        packed = source.endswith(SUFFIX)
        folder = converted(find_file(source), source) if packed else find_folder(base, weights=weights)
        check_folder(folder, source, weights=weights, trust_remote_code=base.trust_remote_code)
        config = read_config(folder, source, trust_remote_code=base.trust_remote_code)
        fresh: tuple[str, ...] = ()
        if weights:
            model, fresh = load(base, config, folder, source, seed=seed)
        else:
            model = build(base, config, source, weights=False, seed=seed)
        found = _described(model, source, base.head, folder, fresh=fresh, trusted=base.trust_remote_code)
        if packed:
            return replace(found, quantised=read_quantised(folder / BLOCKS))
        files = Checkpoint(folder.absolute(), tuple(shards(folder, source))) if weights else None
        return replace(found, checkpoint=files)


def _in_hand(model: PreTrainedModel) -> Base:
    """A model of the caller's: left as it is, looked at as one from files."""
    source = model.name_or_path or IN_HAND
    head = head_of(model)
    if not any(parameter.is_meta for parameter in model.parameters()):
        check_finite(model, source)
    return _described(model, source, head, _folder_of(model))


def _described(
    model: PreTrainedModel,
    source: str,
    head: HeadName,
    folder: Path | None,
    *,
    fresh: tuple[str, ...] = (),
    trusted: bool = False,
) -> Base:
    path, scratch = _tokenizer(folder, source, trusted) if folder else (None, None)
    base = Base(
        model=model,
        source=source,
        head=head,
        fingerprint=fingerprint(model),
        fresh=fresh,
        max_length=_max_length(model, folder, source),
        tokenizer_path=path,
    )
    if scratch:
        weakref.finalize(model, shutil.rmtree, scratch, ignore_errors=True)
    return base


def _folder_of(model: PreTrainedModel) -> Path | None:
    """Where a model in hand was loaded from, if it is still there."""
    name = model.name_or_path
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        cached = try_to_load_from_cache(name, CONFIG, revision=getattr(model.config, "_commit_hash", None))
    except ValueError:  # no hub id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _max_length(model: PreTrainedModel, folder: Path | None, source: str) -> int | None:
    """The least of what the configuration, its position table and the tokenizer allow."""
    limits = []
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions - _first_position(model, positions))
    if folder and (path := folder / "tokenizer_config.json").exists():
        said = read_json(path, source).get("model_max_length")
        if isinstance(said, int | float) and 0 < said < UNBOUNDED:
            limits.append(int(said))
    return min(limits, default=None)


def _first_position(model: PreTrainedModel, positions: int) -> int:
    """Where text starts in the position table: behind the padding row, where that table has one."""
    words = None
    with suppress(NotImplementedError):  # transformers' word for a model without one table of tokens
        words = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module is not words and module.num_embeddings == positions:
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _tokenizer(folder: Path, source: str, trusted: bool) -> tuple[Path | None, Path | None]:
    """The folder's `tokenizer.json`, or one made from the older files it has and the scratch folder that holds it."""
    if (path := folder / "tokenizer.json").exists():
        return path, None
    if not any(next(folder.glob(pattern), None) for pattern in OLDER_TOKENIZERS):
        return None, None
    scratch = Path(mkdtemp(prefix="surgeon-tokenizer-"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
        tokenizer.save_pretrained(scratch)
    except FOREIGN as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise BaseError(f"its tokenizer cannot be read: {first_line(error)}", where=source) from error
    made = scratch / "tokenizer.json"
    return (made if made.exists() else None), scratch
