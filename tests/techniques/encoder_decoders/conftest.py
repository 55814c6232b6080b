"""Small encoder-decoders that write, each built once, and oracles of what they write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import surgeon
from surgeon.compiler import Compiled

if TYPE_CHECKING:
    from techniques.conftest import Decoding, Lab
    from transformers import PreTrainedModel

LONG = 64
SMALL = {"t5": {"num_layers": 1, "num_decoder_layers": 1}, "bart": {"encoder_layers": 1, "decoder_layers": 1}}
SURGERY: dict[str, list[dict[str, Any]]] = {
    "t5": [{"lora": {"rank": 4, "where": ["attention", "cross_attention"]}}, {"prompt": {"length": 3}}],
    "bart": [{"prefix": {"length": 3}}, {"adapter": {"bottleneck": 4}}],
}


class Built(NamedTuple):
    """A compile, its folder, and that folder open in ONNX Runtime."""

    made: Compiled
    path: Path
    session: surgeon.Session


class Writing:
    """Builds that write, and what transformers writes."""

    long, surgery = LONG, SURGERY

    def __init__(self, lab: Lab, decoding: Decoding, root: Path) -> None:
        self._lab = lab
        self._decoding = decoding
        self._root = root
        self._known: dict[str, Built] = {}

    def base(self, kind: str, *, small: bool = False) -> PreTrainedModel:
        """A base with room for long texts that never ends one."""
        room = {"max_position_embeddings": 128} if kind == "bart" else {}
        return self._lab.base(kind, "seq2seq-lm", eos_token_id=None, **room, **(SMALL[kind] if small else {}))

    def built(self, kind: str) -> Built:
        """A build a kind, made when it is asked for; T5's from a folder with a tokenizer of a hundred words."""
        if kind not in self._known:
            folder = self._root / kind
            model = copy.deepcopy(self.base(kind, small=True))
            if kind == "t5":
                model.save_pretrained(folder / "base")
                words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
                words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
                fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", model_max_length=LONG)
                fast.save_pretrained(folder / "base")
                model.name_or_path = str(folder / "base")
            made = self._lab.writers(model, SURGERY[kind])
            path = made.save(folder / "build")
            self._known[kind] = Built(made, path, surgeon.Session(path, threads=1))
        return self._known[kind]

    def several(self, kind: str) -> Path:
        """A build for rows of several tasks, which have other sizes."""
        path = self._root / f"{kind}-several"
        if not path.exists():
            made = self._lab.writers(self.base(kind, small=True), SURGERY[kind], ("switch", "mixed"))
            self._lab.resize(made.model("b"), rank=2, length=5, bottleneck=3)
            made.save(path)
        return path

    @staticmethod
    def saved(made: Compiled, out: Path, **said: Any) -> Path:
        """A build of the same graphs whose base has another generation configuration."""
        config = made.base.model.generation_config
        before = {name: getattr(config, name) for name in said}
        try:
            for name, value in said.items():
                setattr(config, name, value)
            return made.save(out)
        finally:
            for name, value in before.items():
                setattr(config, name, value)

    @staticmethod
    def by_transformers(
        model: PreTrainedModel, source: Sequence[int], count: int, *, prompt: Tensor | None = None, **options: Any
    ) -> list[int]:
        """What `generate` writes, with a trained prompt in front of the source."""
        given: Tensor = model.get_input_embeddings()(torch.tensor([list(source)]))
        given = given if prompt is None else torch.cat([prompt.unsqueeze(0), given], 1)
        mask = torch.ones(given.shape[:2], dtype=torch.long)
        generate: Callable[..., Tensor] = model.generate
        found = generate(inputs_embeds=given, attention_mask=mask, max_new_tokens=count, do_sample=False, **options)
        return found[0, 1:].tolist()

    def merged(self, made: Compiled) -> tuple[PreTrainedModel, Tensor]:
        """The base with the LoRA of task a in its weights, and the task's prompt."""
        return self._decoding.merged(made), made.model("a").deployed()["shared.prompt"].detach()


@pytest.fixture(scope="session")
def writing(lab: Lab, decoding: Decoding, tmp_path_factory: pytest.TempPathFactory) -> Writing:
    """One, so that no kind is built twice."""
    return Writing(lab, decoding, tmp_path_factory.mktemp("writing"))
