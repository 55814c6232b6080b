"""Training one task: it learns, keeps its best epoch, and tells how it goes."""

import math

import pytest
import torch
from safetensors import safe_open
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import surgeon
from surgeon.errors import DataError, DeltaError, SpecError
from surgeon.train import (
    Row,
    TrainOptions,
    evaluate,
    kind_of,
    labels_of,
    train_task,
)
from surgeon.train.batches import encode

OPTIONS = TrainOptions(epochs=2, learning_rate=2e-2, batch_size=8, max_length=12, seed=3, threads=1)


def test_a_task_learns_and_its_base_does_not_change(model, tokenizer, tiny_rows, assert_equal):
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


def test_the_weights_of_the_best_epoch_are_kept(model, tokenizer, tiny_rows):
    held = tiny_rows(40, 2)
    result = train_task(model, tokenizer, tiny_rows(60, 1), held, OPTIONS.model_copy(update={"epochs": 4}))
    assert evaluate(model, tokenizer, held).accuracy == result.best_accuracy
    assert result.history[result.best_epoch - 1].accuracy == result.best_accuracy
    assert all(epoch.exact_match is None for epoch in result.history)  # of one label a row it would be the accuracy


def test_training_stops_when_it_no_longer_gets_better(model, tokenizer, tiny_rows):
    options = OPTIONS.model_copy(update={"epochs": 50, "learning_rate": 1e-12, "patience": 2})
    result = train_task(model, tokenizer, tiny_rows(16, 1), tiny_rows(8, 2), options)
    assert result.stopped_early
    assert (result.best_epoch, len(result.history)) == (1, 3)
    with pytest.raises(SpecError, match="no rows to validate with"):
        train_task(model, tokenizer, tiny_rows(16, 1), None, options)


def test_without_validation_the_last_epoch_is_kept(model, tokenizer, tiny_rows):
    result = train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS)
    assert (result.best_epoch, result.best_accuracy) == (2, None)


def test_the_seed_decides_the_weights_and_the_callers_random_state_is_left_alone(
    model, tokenizer, tiny_rows, weights, assert_equal
):
    fresh, state = weights(model), torch.get_rng_state()
    trained = []
    for seed in (1, 1, 2):
        model.load_state_dict(fresh)
        train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS.model_copy(update={"seed": seed}))
        trained.append(weights(model))
    assert_equal(trained[0], trained[1], 0)
    assert any(not torch.equal(trained[0][name], trained[2][name]) for name in fresh)
    assert torch.equal(torch.get_rng_state(), state)


def test_accumulated_batches_step_as_one_large_batch(compiled, model, tokenizer, weights, assert_equal):
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


def test_a_step_callback_sees_the_gradients_of_every_delta(model, tokenizer, tiny_rows):
    seen = []

    def callback(trained, step, steps):
        seen.append((step, steps, all(p.grad is not None for p in trained.parameters() if p.requires_grad)))

    train_task(model, tokenizer, tiny_rows(16, 1), None, OPTIONS, callbacks=[callback])
    assert seen == [(i, 4, True) for i in (1, 2, 3, 4)]


def test_progress_is_told_after_every_step(model, tokenizer, tiny_rows):
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


def test_a_task_without_deltas_has_nothing_to_train(tokenizer, tiny_rows):
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    bare = surgeon.compile({"tasks": {"plain": {}}}, base=BertForSequenceClassification(config))
    with pytest.raises(DeltaError, match="no deltas to train"):
        train_task(bare.model("plain"), tokenizer, tiny_rows(16, 1), None, OPTIONS)


def test_a_task_trains_in_the_trainer_of_transformers_as_well(model, tokenizer, tmp_path, assert_equal):
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
        data_collator=lambda part: kind_of(model).batch(part, 0, torch.device("cpu")),
    )
    trainer.train()
    assert trainer.state.global_step == 32
    assert evaluate(model, tokenizer, rows).accuracy == 1
    assert_equal({n: p for n, p in model.named_parameters() if not p.requires_grad}, base, 0)
    with safe_open(tmp_path / "out" / "checkpoint-32" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
