"""A tiny classifier with dropout, texts whose label is in one word, and exact comparisons."""

import random
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification

import surgeon
from surgeon.train import (
    Row,
    TrainOptions,
    load_tokenizer,
    train_task,
)

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", *(f"w{i}" for i in range(24))]
SPEC = {
    "surgery": [{"lora": {"rank": 2}}, {"bitfit": {"where": ["norm"]}}],
    "tasks": {"taste": {"labels": ["bad", "good"]}, "other": {"labels": 3}},
}
OPTIONS = TrainOptions(epochs=2, learning_rate=2e-2, batch_size=8, max_length=12, seed=3, threads=1)


def tiny_compiled(surgery=SPEC["surgery"], dropout=0.1):
    """A BERT of one layer with dropout, so that a resumed run must also restore the random state."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes, **drops)
    return surgeon.compile({**SPEC, "surgery": surgery}, base=BertForSequenceClassification(config))


def tiny_tokenizer(folder):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, max_length=16)


def _tiny_rows(count, seed):
    """Texts of random words; the label says whether one of them is `good` or `bad`."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        words = [*draw.choices(WORDS[6:], k=draw.randint(1, 12)), ("bad", "good")[i % 2]]
        draw.shuffle(words)
        rows.append(Row(" ".join(words), i % 2))
    return rows


def _weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _assert_equal(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)


def train_and_hang(folder, at):
    """In a process of its own: train with checkpoints every second step, and hang at step `at` to be killed."""

    def hang(now):
        if now.step == at:
            print("hanging", flush=True)
            sys.stdin.read()

    model, options = tiny_compiled().model("taste"), OPTIONS.model_copy(update={"checkpoint_steps": 2})
    tokenizer = tiny_tokenizer(folder)
    train_task(model, tokenizer, _tiny_rows(60, 1), None, options, checkpoint_dir=folder / "checkpoints", progress=hang)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny matrices: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def compiled(_one_thread):
    return tiny_compiled()


@pytest.fixture
def model(compiled):
    """The same fresh task for every test, however the one before left it."""
    task = compiled.model("taste")
    fresh = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    yield task
    task.load_state_dict(fresh)


@pytest.fixture
def tokenizer(tmp_path):
    return tiny_tokenizer(tmp_path)


@pytest.fixture(scope="session")
def tiny_rows():
    """Texts of random words with a label."""
    return _tiny_rows


@pytest.fixture(scope="session", name="tiny_compiled")
def _tiny_compiled():
    """Another one of the same."""
    return tiny_compiled


@pytest.fixture(scope="session")
def weights():
    """Copies of a task's tensors."""
    return _weights


@pytest.fixture(scope="session")
def assert_equal():
    """Compare tensors by name."""
    return _assert_equal
