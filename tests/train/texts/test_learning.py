"""Models that write text learn the answers alone: alone, in packed rows, in accumulated batches, and resumed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import surgeon
from surgeon.errors import SpecError
from surgeon.train import Chat, Completion, TrainOptions, evaluate, kind_of, train_task
from surgeon.train.batches import encode

ROWS = [Completion(f"w{i} is", f"c{i} c{i + 1}" if i % 2 else f"c{i}") for i in range(8)]
OPTIONS = TrainOptions(epochs=2, learning_rate=3e-2, batch_size=4, seed=1, threads=1)
ANSWER = {"role": "assistant", "content": "c1"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_completions_are_learned(fresh, tokenizer, name):
    model = fresh(name)
    before = evaluate(model, tokenizer, ROWS)
    options = OPTIONS.model_copy(update={"epochs": 30, "learning_rate": 1e-2})
    result = train_task(model, tokenizer, ROWS, ROWS, options)
    after = evaluate(model, tokenizer, ROWS)
    assert (before.exact_match, after.exact_match, after.accuracy) == (0, 1, 1)
    assert result.history[-1].loss < 0.2 * result.history[0].loss
    assert after.perplexity == pytest.approx(np.exp(result.best_loss))
    assert result.best_loss == min(epoch.validation_loss for epoch in result.history)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_accumulated_batches_of_uneven_lengths_step_as_one_large_batch(fresh, tokenizer, name):
    """Their labels are not as many, so a mean of means would be another step."""
    trained = []
    for size, accumulation in ((8, 1), (3, 3)):
        model = fresh(name)
        start = {n: t.clone() for n, t in model.state_dict().items()}
        update = {"batch_size": size, "gradient_accumulation": accumulation, "epochs": 1, "learning_rate": 1e-3}
        train_task(model, tokenizer, ROWS, None, OPTIONS.model_copy(update=update))
        trained.append({n: t.clone() - start[n] for n, t in model.state_dict().items()})
        model.load_state_dict(start)
    for found, wanted in zip(trained[0].values(), trained[1].values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert max(t.abs().max() for t in trained[0].values()) > 5e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(fresh, tokenizer, name):
    """RoPE and a table of positions; a LoRA and a prefix, which every text sees."""
    model, device = fresh(name), torch.device("cpu")
    rows = [Completion("w1 " * n, "c1 c2 " * m) for n, m in ((4, 2), (1, 1), (2, 1), (0, 1), (3, 2), (1, 2))]
    examples, found = encode(model, tokenizer, rows, 64), []
    for make in (kind_of(model).batch, kind_of(model).packed):
        model.zero_grad()
        batch = make(examples, 0, device)
        loss = model(**batch).loss
        loss.backward()
        own = [p.grad for p in model.parameters() if p.requires_grad]
        found.append((batch["input_ids"].shape, loss.detach(), torch.cat([g.flatten() for g in own])))
    (padded, *alone), (packed, *together) = found
    assert packed[0] < padded[0]
    assert packed[1] == padded[1]
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_packing_steps_as_padding_does(fresh, tokenizer):
    losses = []
    for packing in (False, True):
        model = fresh("llama")
        start = {n: t.clone() for n, t in model.state_dict().items()}
        result = train_task(model, tokenizer, ROWS, ROWS, OPTIONS.model_copy(update={"packing": packing}))
        losses.append([(epoch.loss, epoch.validation_loss) for epoch in result.history])
        model.load_state_dict(start)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_an_interrupted_run_over_texts_ends_where_an_unbroken_one_does(fresh, tokenizer, tmp_path, packing):
    """Completions and conversations, five steps of six."""
    model = fresh("llama")
    born = {n: t.clone() for n, t in model.state_dict().items()}
    rows = [*ROWS, *(Chat(({"role": "user", "content": f"w{i}"}, ANSWER)) for i in range(4))]
    options = OPTIONS.model_copy(update={"checkpoint_steps": 2, "packing": packing})
    unbroken = train_task(model, tokenizer, rows, ROWS, options)
    wanted = {n: t.clone() for n, t in model.state_dict().items()}

    def interrupt(now):
        if now.step == 5:
            raise KeyboardInterrupt

    model.load_state_dict(born)
    with pytest.raises(KeyboardInterrupt):
        train_task(model, tokenizer, rows, ROWS, options, checkpoint_dir=tmp_path, progress=interrupt)
    resumed = train_task(model, tokenizer, rows, ROWS, options, checkpoint_dir=tmp_path)
    assert (resumed.resumed_from, resumed.steps) == (4, unbroken.steps)
    assert resumed.history == unbroken.history
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name])


def test_what_cannot_be_packed_is_told(fresh, tokenizer, tiny):
    options = OPTIONS.model_copy(update={"packing": True})
    with pytest.raises(SpecError, match="rows of this task are not packed"):
        train_task(fresh("t5"), tokenizer, ROWS, None, options)
    prompt = surgeon.compile({"surgery": [{"prompt": {"length": 2}}], "tasks": {"a": {}}}, base=tiny("llama"))
    with pytest.raises(SpecError, match="attention takes no mask of the row's own tokens alone"):
        train_task(prompt.model("a"), tokenizer, ROWS, None, options)
    windows = tiny("gemma2", sliding_window=4)
    prefix = surgeon.compile({"surgery": [{"prefix": {"length": 2, "std": 1.0}}], "tasks": {"a": {}}}, base=windows)
    with pytest.raises(SpecError, match="a text that shares its row is read otherwise than alone"):
        train_task(prefix.model("a"), tokenizer, ROWS, None, options)
