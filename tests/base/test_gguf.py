"""GGUF files as bases: the numbers of their blocks, and on ONNX Runtime the blocks themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from gguf import GGMLQuantizationType as Form

import surgeon
from surgeon.audit import audit
from surgeon.base import open_base
from surgeon.blocks import EXACT
from surgeon.compiler import Compiled
from surgeon.errors import BaseError, SpecError
from surgeon.spec import BaseSpec, read_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tiny = Callable[..., "PreTrainedModel"]
WORDS = ["<unk>", "<s>", "</s>", "w", "1", "w1", *(f"x{i}" for i in range(58))]
HEADS = {"q_proj": 4, "k_proj": 2}
"""Whose rows a GGUF file has in another order: halves of a head, not pairs."""
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHERS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def write(path: Path, model: PreTrainedModel, forms: dict[str, Form]) -> Path:
    """A Llama as llama.cpp would write it. `forms` are by a part of the file's names; what is not named is in Q4_1."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["w 1"])
    writer.add_token_types([3, 3, 3, *[1] * 61])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, tensor in model.state_dict().items():
        array, leaf = tensor.numpy(), name.split(".")[-2]
        if leaf in HEADS:
            array = array.reshape(HEADS[leaf], 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        file_name = OTHERS.get(name)
        if name.startswith("model.layers."):
            layer, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
            file_name = f"blk.{layer}.{NAMES[part]}.weight"
        if file_name is None:
            continue
        form = Form.F32 if array.ndim < 2 else next((f for n, f in forms.items() if n in file_name), Form.Q4_1)
        data = gguf.quants.quantize(array, form) if form != Form.F32 else array
        writer.add_tensor(file_name, data, raw_dtype=None if form == Form.F32 else form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, the head tied to the table: Q4_1, Q8_0 and Q4_0 as ONNX Runtime has them, and Q5_1 as it does not."""
    model = tiny("llama", vocab_size=64, tie_word_embeddings=True)
    forms = {"token_embd": Form.Q8_0, "ffn_down": Form.Q4_0, "attn_output": Form.Q5_1, "1.attn_v": Form.Q8_0}
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, forms)


@pytest.fixture(scope="module")
def spec(file: Path) -> dict[str, Any]:
    base = {"model": str(file), "head": "causal-lm"}
    return {"base": base, "surgery": [{"lora": {"rank": 2}}], "tasks": {"a": {}}}


@pytest.fixture(scope="module")
def compiled(spec: dict[str, Any]) -> Compiled:
    made = surgeon.compile(spec)
    with torch.no_grad():
        for tensor in made.model("a").eval().state_dict().values():
            tensor.add_(0.05)
    return made


def test_the_model_has_the_numbers_of_the_files_blocks(file: Path, tiny: Tiny) -> None:
    base = open_base(BaseSpec(model=str(file), head="causal-lm"))
    source = tiny("llama", vocab_size=64, tie_word_embeddings=True).state_dict()
    found = base.model.state_dict()
    assert found.keys() == source.keys()
    for name, form in {"model.layers.0.self_attn.q_proj.weight": Form.Q4_1, "lm_head.weight": Form.Q8_0}.items():
        numbers = gguf.quants.dequantize(gguf.quants.quantize(source[name].numpy(), form), form)
        assert torch.equal(found[name], torch.from_numpy(numbers))
    assert Counter(base.quantised.forms.values()) == {"Q4_1": 9, "Q8_0": 2, "Q4_0": 2, "Q5_1": 2}
    assert {base.quantised.forms[name] for name in base.quantised.exact} == set(EXACT)
    for name, blocks in base.quantised.exact.items():
        assert torch.equal(blocks.numbers(), found[name])
    assert base.tokenizer_path is not None
    assert base.source == str(file)


def test_a_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = BaseSpec(model=str(file), head="causal-lm")
    first = open_base(wanted)
    monkeypatch.setattr(gguf.GGUFReader, "__init__", None)
    assert open_base(wanted).fingerprint == first.fingerprint


@pytest.mark.parametrize("weights", ["copy", "base-rounded", "float32"])
def test_onnx_runtime_reads_the_blocks_themselves(
    spec: dict[str, Any], compiled: Compiled, tmp_path: Path, weights: str
) -> None:
    made = Compiled(read_spec({**spec, "export": {"weights": weights}}), compiled.base, compiled.program)
    made.model("a").eval().load_state_dict(compiled.model("a").state_dict())
    build = made.save(tmp_path / "build")
    found = [
        n for n in onnx.load(build / "model.onnx", load_external_data=False).graph.node if n.op_type == "MatMulNBits"
    ]
    # Nine matrices of Q4_1 and two of Q4_0, two of Q8_0 as halves; with rounded inputs these are whole.
    assert len(found) == {"copy": 15, "base-rounded": 13, "float32": 0}[weights]
    levels = {a.i for node in found for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {"copy": {0}, "base-rounded": {4}, "float32": set()}[weights]
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with surgeon.Session(build, threads=1) as session, torch.no_grad():
        for task in ("a", None):
            wanted = (made.model("a") if task else made.base.model)(input_ids=ids).logits.numpy()
            logits = session.run({"input_ids": ids.numpy()}, task)["logits"]
            gap = float(np.abs(logits - wanted).max() / np.abs(wanted).max())
            assert 1e-5 < gap < 0.05 if weights == "base-rounded" else gap < 1e-5
    if weights == "copy":
        checked = audit(build)
        assert checked.tolerance is not None
        assert all(task.difference is not None and task.difference < 1e-5 for task in checked.tasks)


def test_plan_says_what_stays_and_what_does_not(spec: dict[str, Any], compiled: Compiled) -> None:
    blocks = {"Q4_1": (9, 0), "Q8_0": (2, 0), "Q4_0": (2, 0), "Q5_1": (0, 2)}
    assert compiled.plan.blocks == surgeon.compile(spec, weights=False).plan.blocks == blocks
    held = surgeon.compile({**spec, "surgery": [{"full": {"where": "ffn"}}]}, weights=False)
    assert held.plan.blocks == {"Q4_1": (5, 4), "Q8_0": (2, 0), "Q4_0": (0, 2), "Q5_1": (0, 2)}


def test_what_is_no_gguf_file_is_told(tmp_path: Path, file: Path, refused: Callable[..., str]) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGML" + bytes(100))
    assert "no GGUF file" in refused(bad)
    bad.write_bytes(file.read_bytes()[:3000])
    assert "transformers cannot read" in refused(bad)
    assert "no such file" in refused(tmp_path / "none.gguf")
    assert "bad.gguf" in refused(tmp_path / "none.gguf")
    assert "no such file" in refused("package:gguf/none.gguf")


def test_what_needs_blocks_says_so_without_them(tiny: Tiny) -> None:
    with pytest.raises(SpecError, match="no matrix whose blocks could stay"):
        surgeon.compile({"surgery": [{"lora": {}}], "export": {"weights": "base-rounded"}}, tiny("bert"))


def test_a_cache_that_cannot_be_written_is_told(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path / "file"))
    with pytest.raises(BaseError, match="cannot be kept"):
        open_base(BaseSpec(model=str(file), head="causal-lm"))
