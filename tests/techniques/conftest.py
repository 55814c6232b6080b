"""A laboratory: tiny bases that are no special case, each traced once; surgery on them; and fair comparisons."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers.modeling_outputs import CausalLMOutput

import surgeon
from surgeon.anatomy import find
from surgeon.base import Base, open_base
from surgeon.compiler import Compiled, passes
from surgeon.inputs import text_inputs
from surgeon.pipeline import run_passes
from surgeon.program import Program
from surgeon.spec import Spec, read_spec
from surgeon.trace import trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from surgeon.model import TaskModel

Tensors = Mapping[str, Tensor]

NO_DROPOUT = dict.fromkeys(
    (
        *("dropout", "dropout_rate", "attention_dropout", "activation_dropout", "hidden_dropout", "classifier_dropout"),
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob", "seq_classif_dropout"),
        *("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    ),
    0.0,
)


class Lab:
    """What every comparison needs."""

    def __init__(self, tiny: Callable[..., PreTrainedModel]) -> None:
        self._tiny = tiny
        self._bases: dict[str, PreTrainedModel] = {}
        self.tokenizer: Path | None = None
        self._traces: dict[int, tuple[PreTrainedModel, fx.GraphModule]] = {}
        self._programs: dict[tuple[int, str], Program] = {}

    def base(self, kind: str, head: str | None = None, **changes: Any) -> PreTrainedModel:
        """No bias of it is zero, no gain one, nothing drops out; the same object for the same request."""
        key = repr((kind, head, sorted(changes.items())))
        if key not in self._bases:
            self._bases[key] = self._tiny(kind, head, **NO_DROPOUT, **changes)
            noise = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in self._bases[key].parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
        return self._bases[key]

    def operate(
        self, model: PreTrainedModel, *surgery: Mapping[str, Any], tasks: Mapping[str, Any] | None = None
    ) -> Compiled:
        """`surgeon.compile`, but a model is traced once only, and operated on once in the same way.

        Most of the time goes there. Models of tasks are new at every call; a test that changes the program or the base
        itself takes a base `apart`.
        """
        spec = read_spec({"surgery": list(surgery), "tasks": tasks or {"a": {}}})
        opened = open_base(model)
        key = id(model), repr((surgery, tasks, self.tokenizer))
        if key not in self._programs:
            self._programs[key] = self._program(model, opened, spec)
        return Compiled(spec, opened, self._programs[key])

    def _program(self, model: PreTrainedModel, opened: Base, spec: Spec) -> Program:
        if id(model) not in self._traces:
            self._traces[id(model)] = model, trace(model)
        graph_module = _twin(self._traces[id(model)][1])
        program = Program(
            graph_module=graph_module,
            anatomy=find(graph_module),
            inputs=text_inputs(model),
            config=model.config,
            head=opened.head,
            fingerprint=opened.fingerprint,
            max_length=opened.max_length,
            tokenizer=self.tokenizer,
            frozen=frozenset(n for n, _ in [*graph_module.named_parameters(), *graph_module.named_buffers()]),
        )
        return run_passes(program, list(passes(spec)))

    @staticmethod
    def in_nf4(weight: Tensor, double: bool = True, block: int = 64) -> tuple[Tensor, Tensor]:
        """bitsandbytes' bytes, and the numbers it reads from them: as one row, see the trap in `surgeon.nf4`."""
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=block, compress_statistics=double, quant_type="nf4"
        )
        state.shape = torch.Size((1, weight.numel()))
        return packed, functional.dequantize_4bit(packed, state).view(weight.shape)

    def forget(self, model: PreTrainedModel) -> None:
        """Keep nothing of a base."""
        del self._traces[id(model)]
        self._programs = {key: program for key, program in self._programs.items() if key[0] != id(model)}

    @staticmethod
    def apart(model: PreTrainedModel) -> PreTrainedModel:
        """A copy of a base of which everything is trained, for an oracle to change."""
        return copy.deepcopy(model).requires_grad_(True).eval()

    @staticmethod
    def behind(layer: nn.Module, f: Callable[[Tensor], Tensor]) -> None:
        """Let an oracle's layer add `f` of its last join.

        Post-norm (BERT's): LN(f(LN(h + x)) + h + x), one norm used twice. Pre-norm: join + f(join).
        """
        out = getattr(layer, "output", None)
        if out is None:
            layer.register_forward_hook(lambda _module, _inputs, x: x + f(x))
            return
        out.forward = lambda h, x: out.LayerNorm(f(out.LayerNorm(out.dense(h) + x)) + out.dense(h) + x)

    @staticmethod
    def move(model: TaskModel, by: float = 0.2, seed: int = 5) -> TaskModel:
        """Move trained tensors off their birth values, where most techniques are the base and test nothing."""
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name in model.state_dict():
                parameter = model.get_parameter(name)
                parameter.add_(by * torch.randn(parameter.shape, generator=noise))
        return model

    def writers(
        self,
        model: PreTrainedModel,
        surgery: Sequence[Mapping[str, Any]],
        modes: Sequence[str] = ("switch",),
        by: float = 0.2,
    ) -> Compiled:
        """Two tasks that write and are not the base."""
        export = {"generate": True, "modes": list(modes)}
        spec = {"surgery": list(surgery), "tasks": {"a": {}, "b": {}}, "export": export}
        made = surgeon.compile(spec, base=model)
        for seed, task in enumerate(made.tasks):
            self.move(made.model(task), by, seed).eval()
        return made

    @staticmethod
    def prompts(lengths: Sequence[int] = (5, 1, 9, 14)) -> list[list[int]]:
        """Token ids of texts of these lengths."""
        draw = torch.Generator().manual_seed(9)
        return [torch.randint(3, 100, (length,), generator=draw).tolist() for length in lengths]

    @staticmethod
    def feed(
        model: PreTrainedModel, batch: int, length: int, *, pad: int = 0, side: str = "right", seed: int = 0
    ) -> dict[str, Tensor]:
        """Ids, and a mask that hides the end (or the start) of the first row."""
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 100, (batch, length), generator=draw)
        mask = torch.ones_like(ids)
        hidden = slice(length - pad, length) if side == "right" else slice(0, pad)
        ids[0, hidden], mask[0, hidden] = model.config.pad_token_id or 0, 0
        fed = {"input_ids": ids, "attention_mask": mask}
        if model.config.is_encoder_decoder:
            fed["decoder_input_ids"] = torch.randint(3, 100, (batch, max(length - 3, 1)), generator=draw)
        return fed

    def batch(self, model: PreTrainedModel, step: int = 0) -> dict[str, Tensor]:
        """A padded batch with labels, another one every step: classes for a classifier, the text for the rest."""
        fed = self.feed(model, 3, 9, pad=2, seed=step)
        text = fed.get("decoder_input_ids", fed["input_ids"])
        classifies = type(model).__name__.endswith("ForSequenceClassification")
        return {**fed, "labels": torch.arange(3) % model.config.num_labels if classifies else text}

    @staticmethod
    def gap(found: Tensor | Tensors, wanted: Tensor | Tensors) -> float:
        """The largest difference relative to the largest value wanted, of one tensor or of all that belong together."""
        if isinstance(found, Tensor):
            found = {"": found}
        if isinstance(wanted, Tensor):
            wanted = {"": wanted}
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in wanted.items()}
        difference = max(float((found[n] - t).detach().abs().max()) for n, t in wanted.items())
        return difference / max(float(t.detach().abs().max()) for t in wanted.values())

    def train(self, model: nn.Module, of: PreTrainedModel, parameters: Iterable[Tensor], steps: int = 20) -> None:
        """Steps of AdamW over the batches of the base `of`, the same for whoever is trained."""
        # Adam divides by the gradient's size: an eps below its rounding would make whole steps of noise.
        optimizer = torch.optim.AdamW(list(parameters), lr=1e-3, weight_decay=0.0, eps=1e-5)
        model.train()
        for step in range(steps):
            optimizer.zero_grad()
            model(**self.batch(of, step)).loss.backward()
            optimizer.step()

    def served(self, compiled: Compiled, folder: Path, feeds: Iterable[Tensors]) -> float:
        """Every task in ONNX Runtime, swapped back and forth, against PyTorch: the largest difference of any output."""
        gaps = []
        with surgeon.Session(compiled.save(folder / "build"), threads=1) as session, torch.no_grad():
            for fed in feeds:
                arrays = {name: tensor.numpy() for name, tensor in fed.items()}
                for task in (*compiled.tasks, None, *reversed(compiled.tasks)):
                    model = compiled.base.model if task is None else compiled.model(task).eval()
                    wanted = model(**fed)
                    for name, found in session.run(arrays, task).items():
                        gaps.append(self.gap(torch.from_numpy(found), wanted[name]))
        return max(gaps)

    @staticmethod
    def resize(model: TaskModel, **sizes: int) -> TaskModel:
        """Other sizes for the free axes whose symbol holds the word, all trained tensors drawn anew."""
        draw = torch.Generator().manual_seed(3)
        tensors = {}
        for name, tensor in model.state_dict().items():
            free = model.ledger.free(name)
            shape = [
                next((n for word, n in sizes.items() if word in free.get(axis, "").split(".")), size)
                for axis, size in enumerate(tensor.shape)
            ]
            tensors[name] = torch.randn(shape, generator=draw).to(tensor.dtype)
        model.load_state_dict(tensors)
        return model

    @staticmethod
    def own(model: TaskModel) -> dict[str, nn.Parameter]:
        """The trained tensors of a task, themselves."""
        return {name: model.get_parameter(name) for name in model.state_dict()}


def _twin(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Another graph over the same tensors."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    graph._codegen = graph_module.graph._codegen
    return fx.GraphModule(graph_module, graph)


@pytest.fixture(scope="session")
def lab(tiny: Callable[..., PreTrainedModel]) -> Lab:
    """One laboratory, so that no base is traced twice."""
    torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it brings
    return Lab(tiny)


class Decoding:
    """Oracles of what is written."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def base(self, kind: str, **changes: Any) -> PreTrainedModel:
        """A base with room for long texts that never ends one. A smaller table keeps T5 from repeating its tokens."""
        rooms: dict[str, dict[str, float]] = {"gpt2": {"n_positions": 128}, "t5": {"initializer_factor": 0.05}}
        room = rooms.get(kind, {"max_position_embeddings": 128})
        return self._lab.base(kind, eos_token_id=None, **room, **changes)

    @staticmethod
    def uncached(model: nn.Module, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest token again and again, from the whole text each time."""
        ids = torch.tensor([list(prompt)])
        for _ in range(count):
            with torch.no_grad():
                logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        return ids[0, len(prompt) :].tolist()

    @staticmethod
    def by_transformers(
        model: PreTrainedModel, prompt: Sequence[int], count: int, trained: nn.Module | None = None
    ) -> list[int]:
        """What `generate` writes greedily; with what was `trained`, which keeps no cache, in the model's place."""
        ids = torch.tensor([list(prompt)])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        both = model.config.is_encoder_decoder
        if trained is not None:
            model, names = copy.copy(model), ("input_ids", "attention_mask", "decoder_input_ids")

            def forward(**said: Any) -> Any:
                read = given | {"decoder_input_ids": said["decoder_input_ids"]} if both else said
                return CausalLMOutput(logits=trained(**{name: read[name] for name in names if name in read}).logits)

            model.forward = forward
        generate: Callable[..., Tensor] = model.generate
        cached = {} if trained is None else {"use_cache": False}
        found = generate(**given, max_new_tokens=count, do_sample=False, pad_token_id=0, **cached)
        return found[0, 1 if both else len(prompt) :].tolist()

    @staticmethod
    def merged(made: Compiled) -> PreTrainedModel:
        """The base with a task's products added to its weights."""
        model = copy.deepcopy(made.base.model)
        tensors = made.model("a").deployed()
        with torch.no_grad():
            for name in [n for n in tensors if n.endswith("lora_A")]:
                product = tensors[name] @ tensors[name.replace("lora_A", "lora_B")]
                model.get_parameter(name.replace("lora_A", "weight")).add_(product.T)
        return model


@pytest.fixture(scope="session")
def decoding(lab: Lab) -> Decoding:
    """For tests of what decoders write."""
    return Decoding(lab)
