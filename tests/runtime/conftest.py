"""A small real build, written by hand: one attention layer with two LoRAs, a prefix, a bias and a head as deltas."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from surgeon.runtime.document import seal
from surgeon.runtime.files import hash_file
from surgeon.runtime.taskfile import write_adapter

VOCABULARY, WIDTH = 32, 8
Tensors = dict[str, np.ndarray]

# `__` stands for the dot of a name, which ONNX's text form does not take.
GRAPH = """<ir_version: 10, opset_import: ["": 20]>
small (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask{inputs})
=> (float[batch,{labels}] logits) {{
  one = Constant<value_float=1.0>()  far = Constant<value_float=-1e9>()  scale = Constant<value_float=0.35355339>()
  axis1 = Constant<value_ints=[1]>()  axis2 = Constant<value_ints=[2]>()  ones = Constant<value_ints=[1,1]>()
  mask = Cast<to=1>(attention_mask)
  x = Gather(embedding, input_ids)
  base_q = MatMul(x, query)  base_v = MatMul(x, value)  k = MatMul(x, key)
  open_mask = Sub(one, mask)  closed = Mul(open_mask, far)
  {deltas}
  turned = Transpose<perm=[0,2,1]>(keys)
  raw = MatMul(q, turned)  scaled = Mul(raw, scale)
  hide3 = Unsqueeze(hide, axis1)
  scores = Add(scaled, hide3)
  p = Softmax<axis=-1>(scores)
  y = MatMul(p, values)  h = Add(x, y)
  mask3 = Unsqueeze(mask, axis2)  kept = Mul(h, mask3)
  total = ReduceSum<keepdims=0>(kept, axis1)  count = ReduceSum<keepdims=1>(mask, axis1)
  mean = Div(total, count)  moved = Add(mean, l0__bias)
  out = MatMul(moved, head__weight)  logits = Add(out, head__bias)
}}"""
PLAIN = "q = Identity(base_q)  keys = Identity(k)  values = Identity(base_v)  hide = Identity(closed)"
DELTAS = """
  qa = MatMul(x, l0__query__lora_A)  qb = MatMul(qa, l0__query__lora_B)  q = Add(base_q, qb)
  va = MatMul(x, l0__value__lora_A)  vb = MatMul(va, l0__value__lora_B)  v = Add(base_v, vb)
  batch = Shape<start=0, end=1>(input_ids)  wide = Concat<axis=0>(batch, ones)
  pk = Expand(l0__prefix__key, wide)  pv = Expand(l0__prefix__value, wide)
  keys = Concat<axis=1>(pk, k)  values = Concat<axis=1>(pv, v)
  sums = ReduceSum<keepdims=0>(pk, axis2)  none = Sub(sums, sums)  hide = Concat<axis=1>(none, closed)"""

FREE = {  # name: shape as declared
    "l0.query.lora_A": (WIDTH, "r_query"),
    "l0.query.lora_B": ("r_query", WIDTH),
    "l0.value.lora_A": (WIDTH, "r_value"),
    "l0.value.lora_B": ("r_value", WIDTH),
    "l0.prefix.key": (1, "prefix", WIDTH),
    "l0.prefix.value": (1, "prefix", WIDTH),
    "l0.bias": (WIDTH,),
    "head.weight": (WIDTH, "labels"),
    "head.bias": ("labels",),
}


def values(seed: int, **sizes: int) -> Tensors:
    """Seeded values for every delta, its free dimensions as given."""
    rng = np.random.default_rng(seed)
    shapes = {name: [sizes[axis] if isinstance(axis, str) else axis for axis in axes] for name, axes in FREE.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def base_weights() -> Tensors:
    rng = np.random.default_rng(7)
    shapes = {"embedding": (VOCABULARY, WIDTH), **dict.fromkeys(("query", "key", "value"), (WIDTH, WIDTH))}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def defaults() -> Tensors:
    """The base as deltas: nothing inserted, its own bias and its own head of three labels."""
    return values(8, r_query=0, r_value=0, prefix=0, labels=3)


def numpy_model(inputs: Tensors, deltas: Tensors) -> np.ndarray:
    """The same model in numpy: the oracle."""
    w, d = base_weights(), deltas
    mask = inputs.get("attention_mask", np.ones_like(inputs["input_ids"])).astype(np.float64)
    x = w["embedding"][inputs["input_ids"]].astype(np.float64)
    q = x @ w["query"] + x @ d["l0.query.lora_A"] @ d["l0.query.lora_B"]
    v = x @ w["value"] + x @ d["l0.value.lora_A"] @ d["l0.value.lora_B"]
    prefix = [np.repeat(d[f"l0.prefix.{part}"], len(x), axis=0) for part in ("key", "value")]
    keys, vals = np.concatenate([prefix[0], x @ w["key"]], 1), np.concatenate([prefix[1], v], 1)
    hide = np.concatenate([np.zeros(prefix[0].shape[:2]), (1 - mask) * -1e9], 1)
    scores = q @ keys.transpose(0, 2, 1) / np.sqrt(WIDTH) + hide[:, None]
    p = np.exp(scores - scores.max(-1, keepdims=True))
    h = x + p / p.sum(-1, keepdims=True) @ vals
    mean = (h * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return (mean + d["l0.bias"]) @ d["head.weight"] + d["head.bias"]


def write_model(path: Path, *, plain: bool = False) -> None:
    """The model with its deltas as overridable initializers; with `plain`, the base that was never operated on."""
    declared = "".join(
        f", float[{','.join(str(axis) for axis in axes)}] {name.replace('.', '__')}" for name, axes in FREE.items()
    )
    text = GRAPH.format(
        inputs="" if plain else declared, labels=3 if plain else "labels", deltas=PLAIN if plain else DELTAS
    )
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.input[:] = [name.replace("__", ".") for name in node.input]
    for value in model.graph.input:
        value.name = value.name.replace("__", ".")
    for name, array in {**base_weights(), **defaults()}.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    onnx.checker.check_model(path, full_check=True)


def write_tokenizer(path: Path) -> None:
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=20, pad_id=0, pad_token="[PAD]")  # checkpoints often ship a fixed length
    tokenizer.save(str(path))


def manifest_doc(build: Path, fingerprint: str, tasks: dict[str, Any]) -> dict[str, Any]:
    techniques = {"lora": "lora", "prefix": "prefix", "bias": "bitfit", "head": "head"}
    deltas = [
        {
            "name": name,
            "shape": [4 if isinstance(axis, str) else axis for axis in axes],
            "free": {str(i): axis for i, axis in enumerate(axes) if isinstance(axis, str)},
            "dtype": "float32",
            "technique": next(
                t for key, t in techniques.items() if key in name and not (key == "bias" and "head" in name)
            ),
            "site": name.rsplit(".", 1)[0],
            "part": name.rsplit(".", 1)[1],
            "role": "other",
            "stack": "encoder",
            "layer": 0,
            "optional": "head" in name,
            "droppable": False,
        }
        for name, axes in FREE.items()
    ]
    ids, mask = [
        {"name": name, "dtype": "int64", "axes": ["batch", "sequence"], "fill": fill}
        for name, fill in (("input_ids", None), ("attention_mask", 1))
    ]
    files = ("model.onnx", "model.onnx.data", "tokenizer.json")
    return {
        "format": 1,
        "surgeon": "0.1.0",
        "base": {
            "source": "small",
            "architecture": "Small",
            "head": "sequence-classification",
            "fingerprint": fingerprint,
            "parameters": sum(array.size for array in base_weights().values()),
            "max_length": 16,
        },
        "opset": 20,
        "ir_version": 10,
        "modes": ["switch"],
        "inputs": [ids, mask],
        "outputs": [{"name": "logits", "dtype": "float32", "axes": ["batch", "labels"]}],
        "deltas": deltas,
        "tasks": tasks,
        "files": {name: {"sha256": hash_file(build / name), "bytes": (build / name).stat().st_size} for name in files},
        "positions": {},
        "tools": {"onnx": onnx.__version__},
    }


def write_task(build: Path, name: str, tensors: Tensors, labels: list[str] | None, fingerprint: str) -> dict[str, Any]:
    """A task's two files, and its entry in the manifest."""
    (build / "tasks").mkdir(exist_ok=True)
    paths = {"adapter": f"tasks/{name}.onnx_adapter", "weights": f"tasks/{name}.safetensors"}
    write_adapter(build / paths["adapter"], tensors, fingerprint)
    safetensors.numpy.save_file(tensors, build / paths["weights"])
    return {"labels": labels, **paths, "sha256": {key: hash_file(build / path) for key, path in paths.items()}}


FINGERPRINT = hashlib.sha256(b"".join(array.tobytes() for array in base_weights().values())).hexdigest()
MOVIES = values(1, r_query=2, r_value=1, prefix=3, labels=2)
TOPICS = values(2, r_query=16, r_value=0, prefix=0, labels=4)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("pristine") / "build"
    build.mkdir()
    write_model(build / "model.onnx")
    write_tokenizer(build / "tokenizer.json")
    tasks = {
        "movies": write_task(build, "movies", MOVIES, ["bad", "good"], FINGERPRINT),
        "topics": write_task(build, "topics", TOPICS, ["arts", "sports", "money", "science"], FINGERPRINT),
    }
    (build / "manifest.json").write_text(json.dumps(seal(manifest_doc(build, FINGERPRINT, tasks))))
    return build


@pytest.fixture
def build(pristine: Path, tmp_path: Path) -> Path:
    """A build of the test's own, free to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "build"))


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "plain.onnx"
    write_model(path, plain=True)
    return path


@pytest.fixture
def deltas() -> SimpleNamespace:
    """The build's two tasks, the base as a task, and a maker of others; fresh copies each time."""
    movies, topics = ({name: array.copy() for name, array in task.items()} for task in (MOVIES, TOPICS))
    return SimpleNamespace(movies=movies, topics=topics, base=defaults(), make=values)


@pytest.fixture
def oracle() -> Callable[[Tensors, Tensors], np.ndarray]:
    return numpy_model


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., Path]:
    """Write tensors as a task file outside the build."""

    def write(tensors: Tensors, name: str = "t", fingerprint: str = FINGERPRINT) -> Path:
        path = tmp_path / f"{name}.onnx_adapter"
        write_adapter(path, tensors, fingerprint)
        return path

    return write


@pytest.fixture
def fingerprint() -> str:
    return FINGERPRINT


@pytest.fixture
def inputs() -> Tensors:
    rng = np.random.default_rng(3)
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2])
    return {"input_ids": rng.integers(2, VOCABULARY, (2, 6)), "attention_mask": mask}


@pytest.fixture
def reseal(build: Path) -> Callable[[Callable[[dict[str, Any]], object]], None]:
    """Edit the manifest of `build` as a knowing hand would, its hash renewed."""

    def edit(change: Callable[[dict[str, Any]], object]) -> None:
        path = build / "manifest.json"
        doc = json.loads(path.read_text())
        change(doc)
        path.write_text(json.dumps(seal(doc)))

    return edit


@pytest.fixture
def replace_inode() -> Callable[[Path, bytes], None]:
    """Replace a file as programs that write carefully do: under another name, then renamed."""

    def replace(path: Path, data: bytes) -> None:
        other = path.with_suffix(".new")
        other.write_bytes(data)
        os.replace(other, path)

    return replace
