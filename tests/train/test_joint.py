"""Several tasks in one run: drawn by their size, independent over a frozen base, and with it when it is trained too."""

import pytest
import torch

import surgeon
from surgeon.errors import CompositionError, DataError, DeltaError, SpecError
from surgeon.train import Row, TaskRows, TrainOptions, kind_of, train_task, train_tasks
from surgeon.train.batches import encode
from surgeon.train.checkpoint import newest_checkpoint
from surgeon.train.sampling import draws, epoch_batches

OPTIONS = TrainOptions(
    epochs=2, learning_rate=2e-2, base_learning_rate=1e-3, batch_size=8, max_length=12, seed=3, threads=1
)
STEADY = OPTIONS.model_copy(update={"schedule": "constant", "warmup": 0.0})


@pytest.fixture
def fresh(compiled):
    """Both tasks as they were, and no dropout: it would draw from one source for both."""
    models = [compiled.model(task) for task in compiled.tasks]
    before = [(m, {n: t.clone() for n, t in m.state_dict().items()}) for m in models]
    dropout = {m: m.p for model in models for m in model.modules() if hasattr(m, "p")}
    for module in dropout:
        module.p = 0.0
    yield compiled
    for module, p in dropout.items():
        module.p = p
    for model, tensors in before:
        model.load_state_dict(tensors)


@pytest.fixture
def rows(tiny_rows):
    """Two tasks, one of them of three labels and four times the other's size."""
    return {"taste": TaskRows(tiny_rows(20, 1)), "other": TaskRows([*tiny_rows(78, 2), Row("w1 w2", 2), Row("w3", 2)])}


def test_tasks_are_drawn_by_their_size_and_with_exponent_one_every_batch_once():
    assert draws({"a": 300, "b": 30, "c": 3}, 1.0) == {"a": 300, "b": 30, "c": 3}
    assert draws({"a": 300, "b": 30, "c": 3}, 0.0) == {"a": 111, "b": 111, "c": 111}
    assert draws({"a": 100, "b": 25}, 0.5) == {"a": 83, "b": 42}
    assert draws({"a": 10_000, "b": 1}, 1.0) == {"a": 10_000, "b": 1}
    assert draws({"a": 1, "b": 1000, "c": 1000}, 0.9)["a"] >= 1


@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.0])
def test_every_row_comes_as_often_as_any_other_of_its_task(compiled, tokenizer, rows, exponent):
    examples = {t: encode(compiled.model(t), tokenizer, one.training, 12) for t, one in rows.items()}
    counts = draws({"taste": 3, "other": 10}, exponent)
    seen = {task: [0] * len(one) for task, one in examples.items()}
    for epoch in range(6):
        batches = epoch_batches(examples, counts, 8, 3, epoch)
        assert batches == epoch_batches(examples, counts, 8, 3, epoch) != epoch_batches(examples, counts, 8, 4, epoch)
        assert {task: sum(t == task for t, _ in batches) for task in counts} == counts
        for task, batch in batches:
            for i in batch:
                seen[task][i] += 1
    for task, times in seen.items():
        passes = 6 * counts[task] / {"taste": 3, "other": 10}[task]
        assert max(times) - min(times) <= 1
        assert passes - 1 <= min(times) <= passes <= max(times) <= passes + 1


def test_over_a_frozen_base_training_together_is_training_alone(fresh, tokenizer, rows, weights, assert_equal):
    alone = {}
    for task, one in rows.items():
        model = fresh.model(task)
        before = weights(model)
        train_task(model, tokenizer, one.training, None, STEADY)
        alone[task] = weights(model)
        model.load_state_dict(before)
    result = train_tasks(fresh, rows, tokenizer, STEADY)
    assert result.steps == 2 * (3 + 10)
    for task, wanted in alone.items():
        assert_equal(weights(fresh.model(task)), wanted, 1e-6)


def test_with_the_base_it_is_the_loop_that_one_would_write(tokenizer, rows, weights, assert_equal, tiny_compiled):
    """Plain torch: the modules of both tasks, one AdamW, the batches in the same order."""
    compiled, peer = tiny_compiled(dropout=0.0), tiny_compiled(dropout=0.0)
    peers = {task: peer.model(task) for task in rows}
    base = peers["taste"].base_parameters()
    assert all(base[n] is p for n, p in peers["other"].base_parameters().items())
    assert base.keys() >= {"bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight"}
    for parameter in base.values():
        parameter.requires_grad_(True)
    own = [p for task in sorted(peers) for n in peers[task].state_dict() for p in [peers[task].get_parameter(n)]]
    groups = [{"params": own, "lr": STEADY.learning_rate}, {"params": [*base.values()], "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    examples = {t: encode(peers[t], tokenizer, one.training, 12) for t, one in rows.items()}
    for epoch in range(2):
        for task, batch in epoch_batches(examples, {"taste": 3, "other": 10}, 8, 3, epoch):
            optimizer.zero_grad()
            peers[task].train()
            fed = kind_of(peers[task]).batch([examples[task][i] for i in batch], 0, torch.device("cpu"))
            peers[task](**fed).loss.backward()
            torch.nn.utils.clip_grad_norm_([*own, *base.values()], 1.0)
            optimizer.step()
    train_tasks(compiled, rows, tokenizer, STEADY, train_base=True)
    for task, wanted in peers.items():
        assert_equal(weights(compiled.model(task)), weights(wanted), 1e-5)
        assert_equal(compiled.model(task).base_parameters(), base, 1e-5)


def test_a_resumed_run_with_the_base_ends_where_an_unbroken_one_does(
    tokenizer, tiny_rows, tmp_path, weights, assert_equal, tiny_compiled
):
    """With dropout; interrupted in the middle of an epoch, whose rows the smaller task has seen already."""
    rows = {"taste": TaskRows(tiny_rows(20, 1), tiny_rows(8, 5)), "other": TaskRows(tiny_rows(80, 2), tiny_rows(8, 6))}
    options = OPTIONS.model_copy(update={"checkpoint_steps": 2, "sampling": 0.3})

    def outcome(compiled):
        return {**weights(compiled.model("taste")), **compiled.model("other").base_parameters()}

    unbroken = tiny_compiled()
    before = {name: p.detach().clone() for name, p in unbroken.model("taste").base_parameters().items()}
    wanted = train_tasks(unbroken, rows, tokenizer, options, train_base=True)
    assert wanted.history[0].accuracies.keys() == rows.keys()
    assert wanted.history[0].accuracy == pytest.approx(sum(wanted.history[0].accuracies.values()) / 2)

    def interrupt(now):
        if now.step == 17:
            raise KeyboardInterrupt

    broken = tiny_compiled()
    given = {"train_base": True, "checkpoint_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        train_tasks(broken, rows, tokenizer, options, **given, progress=interrupt)
    assert newest_checkpoint(tmp_path).step == 16
    assert_equal(broken.model("other").base_parameters(), before, 0)
    assert not any(p.requires_grad for p in broken.model("other").base_parameters().values())
    with pytest.raises(DataError, match=r"another run[\s\S]*train_base \(True there, False here\)"):
        train_tasks(broken, rows, tokenizer, options, checkpoint_dir=tmp_path)
    result = train_tasks(broken, dict(reversed(rows.items())), tokenizer, options, **given)
    assert result.resumed_from == 16
    assert result.history == wanted.history
    assert_equal(outcome(broken), outcome(unbroken), 1e-6)


def test_rows_options_and_bases_that_do_not_fit_are_refused(fresh, tokenizer, rows, tiny_rows, tiny_compiled):
    half = {**rows, "taste": TaskRows(tiny_rows(8, 1), tiny_rows(4, 2))}
    with pytest.raises(SpecError, match="no rows to validate other with, and the best epoch is one for all tasks"):
        train_tasks(fresh, half, tokenizer, OPTIONS)
    with pytest.raises(SpecError, match="no rows to validate with"):
        train_tasks(fresh, rows, tokenizer, OPTIONS.model_copy(update={"patience": 1}))
    with pytest.raises(SpecError, match="no tasks to train"):
        train_tasks(fresh, {}, tokenizer, OPTIONS)
    with pytest.raises(SpecError, match=r"no task 'tast'[\s\S]*did you mean 'taste'"):
        train_tasks(fresh, {"tast": rows["taste"]}, tokenizer, OPTIONS)
    with pytest.raises(DataError, match="label 2 is no number from 0 to 1"):
        train_tasks(fresh, {"taste": rows["other"], "other": rows["taste"]}, tokenizer, OPTIONS)
    stored = tiny_compiled(surgery=[{"qlora": {"rank": 2}}])
    with pytest.raises(CompositionError, match="holds weights in nf4, which cannot be trained"):
        train_tasks(stored, rows, tokenizer, OPTIONS, train_base=True)


def test_early_stop_and_best_epoch_go_by_the_mean(fresh, tokenizer, tiny_rows):
    rows = {task: TaskRows(tiny_rows(16, 1), tiny_rows(8, 2)) for task in ("taste", "other")}
    update = {"epochs": 50, "learning_rate": 1e-12, "patience": 2}
    result = train_tasks(fresh, rows, tokenizer, OPTIONS.model_copy(update=update))
    assert result.stopped_early
    assert (result.best_epoch, len(result.history)) == (1, 3)


def test_what_was_trained_with_its_base_is_not_packed_over_the_old_one(tokenizer, rows, tmp_path, tiny_compiled):
    compiled = tiny_compiled()
    compiled.save(tmp_path / "old")
    only = {"taste": rows["taste"]}
    train_tasks(compiled, only, tokenizer, OPTIONS.model_copy(update={"epochs": 1}), train_base=True)
    with pytest.raises(DeltaError, match="trained on another base than the build's"):
        compiled.pack(tmp_path / "old", "taste")
    assert compiled.tasks == ("taste",), "the other one was trained for the old base"
    compiled.save(tmp_path / "new")
    again = surgeon.load(tmp_path / "new")
    assert again.program.fingerprint == compiled.program.fingerprint
