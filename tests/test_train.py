"""Training one task: it learns, keeps its best epoch, and a killed run ends where one that was not would have."""

import json
import math
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import surgeon
from surgeon.errors import BuildError, DataError, DeltaError, SpecError
from surgeon.train import (
    DivergedError,
    Row,
    TrainOptions,
    clear_checkpoints,
    evaluate,
    labels_of,
    load_tokenizer,
    train_task,
)
from surgeon.train.batches import collate, encode, epoch_order
from surgeon.train.checkpoint import newest_checkpoint

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", *(f"w{i}" for i in range(24))]
OPTIONS = TrainOptions(epochs=2, learning_rate=2e-2, batch_size=8, max_length=12, seed=3, threads=1)
SPEC = {
    "surgery": [{"lora": {"rank": 2}}, {"bitfit": {"where": ["norm"]}}],
    "tasks": {"taste": {"labels": ["bad", "good"]}, "other": {"labels": 3}},
}


def tiny_compiled():
    """A BERT of two layers with dropout, so that a resumed run must also restore the random state."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)
    return surgeon.compile(SPEC, base=BertForSequenceClassification(config))


def tiny_tokenizer(folder):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, max_length=16)


def tiny_rows(count, seed):
    """Texts of random words; the label says whether one of them is `good` or `bad`."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        words = [*draw.choices(WORDS[6:], k=draw.randint(1, 12)), ("bad", "good")[i % 2]]
        draw.shuffle(words)
        rows.append(Row(" ".join(words), i % 2))
    return rows


def train_and_hang(folder, at):
    """In a process of its own: train with checkpoints every second step, and hang at step `at` to be killed."""

    def hang(now):
        if now.step == at:
            print("hanging", flush=True)
            sys.stdin.read()

    model, options = tiny_compiled().model("taste"), OPTIONS.model_copy(update={"checkpoint_steps": 2})
    tokenizer = tiny_tokenizer(folder)
    train_task(model, tokenizer, tiny_rows(60, 1), None, options, checkpoint_dir=folder / "checkpoints", progress=hang)


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


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)


def test_a_task_learns_and_its_base_does_not_change(model, tokenizer):
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = evaluate(model, tokenizer, tiny_rows(100, 5))
    options = OPTIONS.model_copy(update={"epochs": 6})
    result = train_task(model, tokenizer, tiny_rows(200, 1), tiny_rows(60, 2), options)
    after = evaluate(model, tokenizer, tiny_rows(100, 5))
    assert before.accuracy < 0.7
    assert after.accuracy > 0.9
    assert after.loss < before.loss
    assert result.best_accuracy == max(epoch.accuracy for epoch in result.history)
    assert result.steps == 6 * 25
    assert result.seconds_per_step > 0
    assert_equal(dict(model.named_parameters()) | base, dict(model.named_parameters()), 0)


def test_the_weights_of_the_best_epoch_are_kept(model, tokenizer):
    held = tiny_rows(40, 2)
    result = train_task(model, tokenizer, tiny_rows(60, 1), held, OPTIONS.model_copy(update={"epochs": 4}))
    assert evaluate(model, tokenizer, held).accuracy == result.best_accuracy
    assert result.history[result.best_epoch - 1].accuracy == result.best_accuracy


def test_training_stops_when_it_no_longer_gets_better(model, tokenizer):
    options = OPTIONS.model_copy(update={"epochs": 50, "learning_rate": 1e-12, "patience": 2})
    result = train_task(model, tokenizer, tiny_rows(16, 1), tiny_rows(8, 2), options)
    assert result.stopped_early
    assert (result.best_epoch, len(result.history)) == (1, 3)
    with pytest.raises(SpecError, match="no rows to validate with"):
        train_task(model, tokenizer, tiny_rows(16, 1), None, options)


def test_without_validation_the_last_epoch_is_kept(model, tokenizer):
    result = train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS)
    assert (result.best_epoch, result.best_accuracy) == (2, None)


def test_the_seed_decides_the_weights_and_the_callers_random_state_is_left_alone(model, tokenizer):
    fresh, state = weights(model), torch.get_rng_state()
    trained = []
    for seed in (1, 1, 2):
        model.load_state_dict(fresh)
        train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS.model_copy(update={"seed": seed}))
        trained.append(weights(model))
    assert_equal(trained[0], trained[1], 0)
    assert any(not torch.equal(trained[0][name], trained[2][name]) for name in fresh)
    assert torch.equal(torch.get_rng_state(), state)


def test_accumulated_batches_step_as_one_large_batch(compiled, model, tokenizer):
    """Rows of one length and no dropout, so that the two cut the same batches."""
    rows, fresh = [Row(f"w{i} {('bad', 'good')[i % 2]}", i % 2) for i in range(16)], weights(model)
    trained = []
    for size, accumulation in ((16, 1), (4, 4)):
        model.load_state_dict(fresh)
        dropout = [m for m in model.modules() if hasattr(m, "p")]
        kept = [m.p for m in dropout]
        for module in dropout:
            module.p = 0.0
        update = {"batch_size": size, "gradient_accumulation": accumulation, "learning_rate": 1e-3}
        train_task(model, tokenizer, rows, None, OPTIONS.model_copy(update=update))
        for module, p in zip(dropout, kept, strict=True):
            module.p = p
        trained.append(weights(model))
    assert_equal(trained[0], trained[1], 1e-5)


def test_a_killed_run_resumed_ends_where_an_unbroken_one_does(model, tokenizer, tmp_path):
    fresh, rows = weights(model), tiny_rows(60, 1)
    unbroken = train_task(model, tokenizer, rows, None, OPTIONS)
    wanted = weights(model)
    code = f"import runpy, pathlib; runpy.run_path({__file__!r})['train_and_hang'](pathlib.Path({str(tmp_path)!r}), 11)"
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=one
    ) as child:
        assert child.stdout.readline() == b"hanging\n"
        child.send_signal(signal.SIGKILL)
    checkpoints = tmp_path / "checkpoints"
    assert [p.name for p in checkpoints.iterdir()] == ["step-00000010.safetensors"]
    model.load_state_dict(fresh)
    resumed = train_task(model, tokenizer, rows, None, OPTIONS, checkpoint_dir=checkpoints)
    assert (resumed.resumed_from, resumed.steps) == (10, unbroken.steps)
    assert_equal(weights(model), wanted, 1e-6)
    assert [e.loss for e in resumed.history] == pytest.approx([e.loss for e in unbroken.history], abs=1e-6)


def test_a_finished_run_is_not_run_again(model, tokenizer, tmp_path):
    fresh, folder = weights(model), tmp_path / "checkpoints"
    train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, checkpoint_dir=folder)
    wanted = weights(model)
    model.load_state_dict(fresh)
    again = train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, checkpoint_dir=folder)
    assert again.resumed_from == again.steps == 4
    assert_equal(weights(model), wanted, 0)
    (folder / "mine.txt").touch()
    clear_checkpoints(folder)
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]


def test_an_interrupt_leaves_the_last_checkpoint_and_the_model_as_it_was(model, tokenizer, tmp_path):
    fresh = weights(model)

    def interrupt(now):
        if now.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, checkpoint_dir=tmp_path, progress=interrupt)
    assert newest_checkpoint(tmp_path).step == 2
    assert_equal(weights(model), fresh, 0)
    assert train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, checkpoint_dir=tmp_path).resumed_from == 2


def test_a_checkpoint_of_another_run_is_not_taken_up(model, tokenizer, tmp_path):
    fresh = weights(model)
    train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, checkpoint_dir=tmp_path)
    model.load_state_dict(fresh)
    other = OPTIONS.model_copy(update={"learning_rate": 0.5})
    with pytest.raises(
        DataError, match=r"training rows, learning_rate \(0.02 there, 0.5 here\)|learning_rate .*training"
    ):
        train_task(model, tokenizer, tiny_rows(24, 1), None, other, checkpoint_dir=tmp_path)
    assert_equal(weights(model), fresh, 0)


def test_a_checkpoint_is_tensors_and_json_and_a_damaged_one_is_refused(model, tokenizer, tmp_path):
    folder = tmp_path / "checkpoints"
    train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, checkpoint_dir=folder)
    (path,) = folder.iterdir()
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["state"])["best_epoch"] == 2
    (folder / "step-00000099.safetensors.partial").write_bytes(b"cut off")
    assert newest_checkpoint(folder).step == 4
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="the checkpoint is damaged"):
        newest_checkpoint(folder)


def test_a_checkpoint_that_cannot_be_written_ends_the_run(model, tokenizer, tmp_path):
    fresh, taken = weights(model), tmp_path / "a-file"
    taken.touch()
    with pytest.raises(BuildError, match="the checkpoint could not be written"):
        train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, checkpoint_dir=taken)
    assert_equal(weights(model), fresh, 0)


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_nothing(model, tokenizer, tmp_path):
    fresh, folder = weights(model), tmp_path / "checkpoints"
    options = OPTIONS.model_copy(
        update={"learning_rate": 1e30, "checkpoint_steps": 1, "grad_clip": None, "warmup": 0.0}
    )
    with pytest.raises(DivergedError, match=r"at step \d+ of 4\n.*last finite loss: .* at step \d") as caught:
        train_task(model, tokenizer, tiny_rows(16, 1), None, options, checkpoint_dir=folder)
    assert caught.value.exit_code == 1
    assert not folder.exists()
    assert_equal(weights(model), fresh, 0)


def test_a_step_callback_sees_the_gradients_of_every_delta(model, tokenizer):
    seen = []

    def callback(trained, step, steps):
        seen.append((step, steps, all(p.grad is not None for p in trained.parameters() if p.requires_grad)))

    train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, callbacks=[callback])
    assert seen == [(i, 4, True) for i in (1, 2, 3, 4)]


def test_progress_is_told_after_every_step(model, tokenizer):
    told = []
    train_task(model, tokenizer, tiny_rows(16, 1), tiny_rows(8, 2), OPTIONS, progress=told.append)
    assert [(p.step, p.epoch) for p in told] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert all(p.steps == 4 and p.epochs == 2 and math.isfinite(p.loss) for p in told)
    assert told[0].accuracy is None
    assert told[-1].accuracy is not None


def test_rows_that_do_not_fit_the_task_are_refused(compiled, model, tokenizer):
    assert labels_of(model) == ("bad", "good")
    assert labels_of(compiled.model("other")) == 3
    with pytest.raises(DataError, match="label 2 is no number from 0 to 1"):
        train_task(model, tokenizer, [Row("a", 2)], None, OPTIONS)
    with pytest.raises(DataError, match="there are no rows"):
        train_task(model, tokenizer, [], None, OPTIONS)


def test_a_task_without_deltas_has_nothing_to_train(tokenizer):
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    bare = surgeon.compile({"tasks": {"plain": {}}}, base=BertForSequenceClassification(config))
    with pytest.raises(DeltaError, match="no deltas to train"):
        train_task(bare.model("plain"), tokenizer, tiny_rows(16, 1), None, OPTIONS)


def test_every_row_is_in_one_batch_of_an_epoch_and_lengths_are_alike(model, tokenizer):
    examples = encode(model, tokenizer, tiny_rows(500, 1), 16)
    batches = epoch_order(examples, 8, seed=0, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert batches == epoch_order(examples, 8, seed=0, epoch=0) != epoch_order(examples, 8, seed=0, epoch=1)
    padded = sum(len(batch) * max(len(examples[i].input_ids) for i in batch) for batch in batches)
    assert padded < 1.1 * sum(len(e.input_ids) for e in examples)


def test_long_texts_are_cut_to_what_the_base_can_take(model, tokenizer):
    (example,) = encode(model, tokenizer, [Row("good " * 100, 1)], 1000)
    assert len(example.input_ids) == 16
    assert example.input_ids[-1] == WORDS.index("[SEP]")


def test_padding_does_not_change_an_answer(model, tokenizer):
    rows = [Row("good", 1), Row("w1 w2 w3 w4 w5 w6 bad", 0)]
    examples = encode(model, tokenizer, rows, 16)
    model.eval()
    together = model(**collate(examples, 0, torch.device("cpu"))).logits
    alone = model(**collate(examples[:1], 0, torch.device("cpu"))).logits
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-6)


def test_a_missing_or_broken_tokenizer_is_told(tmp_path):
    with pytest.raises(DataError, match=r"there is no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path)


def test_a_task_trains_in_the_trainer_of_transformers_as_well(model, tokenizer, tmp_path):
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    rows = [Row(("bad", "good")[i % 2], i % 2) for i in range(64)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=4,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        report_to=[],
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=encode(model, tokenizer, rows, 16),
        data_collator=lambda part: collate(part, 0, torch.device("cpu")),
    )
    trainer.train()
    assert trainer.state.global_step == 32
    assert evaluate(model, tokenizer, rows).accuracy == 1
    assert_equal({n: p for n, p in model.named_parameters() if not p.requires_grad}, base, 0)
    with safe_open(tmp_path / "out" / "checkpoint-32" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
