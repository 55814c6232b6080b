"""Checkpoints that PEFT itself writes here, over tiny bases in folders, and the answers it gives with them."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx

import surgeon
from surgeon.anatomy import find
from surgeon.base.heads import auto_class
from surgeon.cli import main
from surgeon.compiler import Compiled, passes, study
from surgeon.foreign.importing import assemble, fill, read
from surgeon.inputs import text_inputs
from surgeon.pipeline import run_passes
from surgeon.program import Program
from surgeon.spec import BaseSpec, read_spec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import PeftModel, get_peft_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Foreign:
    """A folder that PEFT wrote, and the model it wrote it from."""

    path: Path
    model: Any

    def config(self, **changes: Any) -> None:
        """Change the configuration; `...` takes a key out."""
        path = self.path / "adapter_config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Change the tensors in place."""
        path = self.path / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata={"format": "pt"})


class Foundry:
    """Makes bases and checkpoints."""

    def __init__(self, tiny: Callable[..., PreTrainedModel], root: Path) -> None:
        self._tiny = tiny
        self._root = root
        self._bases: dict[str, Path] = {}
        self._traced: dict[tuple[Path, str], Any] = {}

    def base(self, kind: str, head: str | None = None, **changes: Any) -> Path:
        """A folder with a base of which no tensor is zero or one."""
        key = repr((kind, head, sorted(changes.items())))
        if key not in self._bases:
            model = self._tiny(kind, head, **changes)
            noise = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
            self._bases[key] = self._root / f"{kind}-{len(self._bases)}"
            model.save_pretrained(self._bases[key])
        return self._bases[key]

    def model(self, folder: Path, head: str, **changes: Any) -> PreTrainedModel:
        """The base of a folder, as a user of PEFT loads it."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, **changes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return (
                auto_class(config, head, str(folder))
                .from_pretrained(folder, config=config, ignore_mismatched_sizes=True)
                .eval()
            )

    def compile(self, base: Path, head: str, **folders: Path) -> Compiled:
        """What `import_build` writes, before it is written."""
        checkpoints = {task: read(folder) for task, folder in folders.items()}
        named, studied = self.study(base, head)
        return assemble(checkpoints, named, studied, ignore_base_name=False)[0]

    @staticmethod
    def fill(compiled: Compiled, task: str, folder: Path) -> None:
        """What `import_tasks` does with a task, before it is packed."""
        fill(compiled, task, read(folder), ignore_base_name=False)

    def operate(self, base: Path, head: str, spec: Mapping[str, Any]) -> Compiled:
        """`surgeon.compile` over a base that is traced once only."""
        named, (opened, program) = self.study(base, head)
        own = read_spec({"base": named.model_dump(exclude_none=True), **spec})
        return Compiled(own, opened, run_passes(program, list(passes(own))))

    def study(self, base: Path, head: str) -> tuple[BaseSpec, tuple[Any, Program]]:
        """A base's spec, itself, and a program of its own."""
        named = BaseSpec(model=str(base), head=head)
        if (base, head) not in self._traced:
            opened, program = study(named)
            self._traced[base, head] = opened, program.graph_module
        opened, traced = self._traced[base, head]
        graph = fx.Graph()
        graph.output(graph.graph_copy(traced.graph, {}))
        graph._codegen = traced.graph._codegen
        module = fx.GraphModule(traced, graph)
        program = Program(
            graph_module=module,
            anatomy=find(module),
            inputs=text_inputs(opened.model),
            config=opened.model.config,
            head=opened.head,
            fingerprint=opened.fingerprint,
            frozen=frozenset(n for n, _ in [*module.named_parameters(), *module.named_buffers()]),
        )
        return named, (opened, program)

    @staticmethod
    def moved(model: Any, seed: int = 5) -> Any:
        """Move what is trained off its birth values."""
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
        return model

    @staticmethod
    def written(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], folder: Path) -> Path:
        """The folder that `export_task` writes."""
        folder.mkdir()
        save_file({k: t.detach().contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def peft(
        self, base: Path, head: str, config: Any, out: Path, seed: int = 3, *, moved: bool = True, **changes: Any
    ) -> Foreign:
        """Give a base what `config` says, move it off its birth values, save it."""
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            wrapped = get_peft_model(self.model(base, head, **changes), config).eval()
            noise = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in wrapped.parameters():
                    if parameter.requires_grad and moved:
                        parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
            wrapped.save_pretrained(out)
        return Foreign(out, wrapped)

    def load(self, base: Path, head: str, folder: Path, **changes: Any) -> Any:
        """What PEFT loads from a folder; it must miss nothing and find nothing too much."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self.model(base, head, **changes)
            wrapped = PeftModel.from_pretrained(model, folder).eval()
            if wrapped.active_peft_config.to_dict().get("bias", "none") != "none":
                return wrapped  # PEFT takes no second one
            found = wrapped.load_adapter(folder, "again")
        assert set(found.unexpected_keys) <= {"prompt_embeddings"}  # which PEFT reads, and calls unexpected
        assert [key for key in found.missing_keys if ".again." in key] == []
        return wrapped


def answers(model: Any, fed: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Logits of a PyTorch model, or its last hidden state; of the text alone, where virtual tokens stand before it."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model(**fed)
    found = output["logits"] if "logits" in output else output["last_hidden_state"]
    length = fed.get("decoder_input_ids", fed["input_ids"]).shape[1]
    return (found[:, -length:] if found.dim() == 3 else found).numpy()


def feed(model: Any, batch: int = 3, length: int = 9, pad: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Ids, and a mask that hides the end of the first row."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (batch, length), generator=draw)
    mask = torch.ones_like(ids)
    ids[0, length - pad :], mask[0, length - pad :] = model.config.pad_token_id or 0, 0
    fed = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        fed["decoder_input_ids"] = torch.randint(3, 100, (batch, 5), generator=draw)
    return fed


def served(build: Path, task: str | None, fed: Mapping[str, torch.Tensor]) -> np.ndarray:
    """What ONNX Runtime answers."""
    with surgeon.Session(build, threads=1) as session:
        return said(session, task, fed)


def said(session: surgeon.Session, task: str | None, fed: Mapping[str, torch.Tensor]) -> np.ndarray:
    """The same of a session that is open, as one is that several tasks are asked of."""
    found = session.run({name: tensor.numpy() for name, tensor in fed.items()}, task=task)
    return found["logits"] if "logits" in found else found["last_hidden_state"]


def gap(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, relative to the largest value wanted."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="session")
def foundry(tiny: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Foundry:
    """One, so that no base is made twice."""
    torch.set_num_threads(1)
    return Foundry(tiny, tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="session")
def surgeon_cli() -> Callable[..., Any]:
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*args: object) -> Any:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(arg) for arg in args])
        return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())

    return run


@pytest.fixture(scope="session")
def compare() -> Any:
    """`feed`, `answers`, `served`, `said` and `gap`."""
    return SimpleNamespace(feed=feed, answers=answers, served=served, said=said, gap=gap)
