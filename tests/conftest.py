"""Tiny bases of many shapes, a folder as a hub would give one, and a cache that no user's is touched by."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only spin

import pytest

if TYPE_CHECKING:
    from torch import fx
    from transformers import PreTrainedModel

    from surgeon.base import Base
    from surgeon.compiler import Compiled
    from surgeon.program import Program
    from surgeon.spec import BaseSpec, Spec

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {"vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0}
_ENCODER_DECODER = {"decoder_start_token_id": 0, "eos_token_id": 1}

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_SMALL, **_TEXT},
    "roberta": {**_SMALL, **_TEXT, "max_position_embeddings": 66, "pad_token_id": 1},
    "albert": {**_SMALL, **_TEXT, "embedding_size": 16},
    "distilbert": {**_TEXT, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 100, "bos_token_id": 1,
             "eos_token_id": 1, "pad_token_id": 0},
    "gpt_neox": {**_SMALL, **_TEXT, "bos_token_id": 1, "eos_token_id": 1},
    "opt": {**_TEXT, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "ffn_dim": 64, "bos_token_id": 1, "eos_token_id": 1},
    "llama": {**_SMALL, **_TEXT, "num_key_value_heads": 2},
    "qwen3": {**_SMALL, **_TEXT, "num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {**_SMALL, **_TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    "gemma3_text": {**_SMALL, **_TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16,
                    "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {**_SMALL, **_TEXT, "num_key_value_heads": 2, "sliding_window": 16},
    "mixtral": {**_SMALL, **_TEXT, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_SMALL, **_TEXT, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "gpt_oss": {**_SMALL, **_TEXT, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4,
                "num_experts_per_tok": 2, "sliding_window": 16},
    "t5": {**_ENCODER_DECODER, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2,
           "num_heads": 4, "vocab_size": 100, "pad_token_id": 0},
    "bart": {**_ENCODER_DECODER, **_TEXT, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
             "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
             "bos_token_id": 2, "forced_eos_token_id": None},
}  # fmt: skip
HEADS = {"gpt2": "causal-lm", "gpt_neox": "causal-lm", "opt": "causal-lm", "llama": "causal-lm", "qwen3": "causal-lm",
         "gemma2": "causal-lm", "gemma3_text": "causal-lm", "mistral": "causal-lm",
         "mixtral": "causal-lm", "qwen2_moe": "causal-lm", "gpt_oss": "causal-lm",
         "t5": "seq2seq-lm", "bart": "seq2seq-lm"}  # fmt: skip
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "fine", "great", "bad", "poor", "dull", "the", "a", "film", "was")

Tiny = Callable[..., "PreTrainedModel"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write the golden graph texts anew")


@pytest.fixture
def begun() -> Callable[..., Program]:
    """A program over a traced base that no pass has changed yet."""

    def begin(model: PreTrainedModel, module: fx.GraphModule) -> Program:
        from surgeon.anatomy import find
        from surgeon.inputs import text_inputs
        from surgeon.program import Program

        return Program(
            graph_module=module,
            anatomy=find(module),
            inputs=text_inputs(model),
            config=model.config,
            head="sequence-classification",
            frozen=frozenset(n for n, _ in [*module.named_parameters(), *module.named_buffers()]),
        )

    return begin


class Traces:
    """`study` and `compile` of the compiler, but a base is traced once only: most of the time goes there."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[BaseSpec | PreTrainedModel, Base, Program]] = {}

    def study(self, source: BaseSpec | PreTrainedModel, seed: int = 0) -> tuple[Base, Program]:
        """A base, and a program that no pass has changed yet: a graph of its own over the base's tensors."""
        from torch import fx

        from surgeon.compiler import begin, study
        from surgeon.spec import BaseSpec

        key = (source.model_dump_json(), seed) if isinstance(source, BaseSpec) else id(source)
        if key not in self._known:
            self._known[key] = source, *study(source, seed=seed)
        _, opened, program = self._known[key]
        traced, graph = program.graph_module, fx.Graph()
        graph.output(graph.graph_copy(traced.graph, {}))
        graph._codegen = traced.graph._codegen
        module = fx.GraphModule(traced, graph)
        module.meta.update(traced.meta)
        return opened, begin(opened, module)

    def compile(self, spec: Spec, base: PreTrainedModel | None = None) -> Compiled:
        """What `surgeon.compile` gives for a spec that writes no texts; its base stays whole."""
        from surgeon.compiler import Compiled, passes
        from surgeon.pipeline import run_passes

        source = base if base is not None else spec.base
        assert source is not None
        opened, program = self.study(source, spec.seed)
        return Compiled(spec, opened, run_passes(program, list(passes(spec))))


@pytest.fixture(scope="session")
def traces() -> Traces:
    """One, so that no base is traced twice."""
    return Traces()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of converted graphs, of this session alone; they are small, so it keeps more of them than for users."""
    from surgeon.exporters import cache as graphs

    graphs.KEEP = 64
    folder = tmp_path_factory.mktemp("cache")
    os.environ["SURGEON_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def odd_model() -> ModuleType:
    """The module of a model that nobody told Surgeon of; its text is the module's file."""
    spec = importlib.util.spec_from_file_location("odd_model", Path(__file__).with_name("odd_model.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its configuration looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """`tiny("llama", head="causal-lm", num_hidden_layers=3)`: a seeded random model of a few thousand parameters."""
    import torch
    from transformers import AutoConfig

    from surgeon.base.heads import auto_class

    def make(kind: str, head: str | None = None, seed: int = 0, **changes: Any) -> PreTrainedModel:
        head = head or HEADS.get(kind, "sequence-classification")
        config = AutoConfig.for_model(kind, **{**CONFIGS[kind], **changes})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return auto_class(config, head, kind).from_config(config).eval()

    return make


@pytest.fixture(scope="session")
def base_folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as a hub would give it, with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("base")
    tiny("bert", num_hidden_layers=1, initializer_range=0.3).save_pretrained(folder)  # large enough to tell texts apart
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
