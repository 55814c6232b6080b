"""Whole runs of AdaLoRA: what is pruned stays so, is packed so, and goes on after a stop."""

from __future__ import annotations

import pytest
import torch

import surgeon
from surgeon.errors import DeltaError, SpecError
from surgeon.runtime.taskfile import read_adapter
from surgeon.train import Row, TrainOptions, load_tokenizer, train_task
from surgeon.train.schedules import ScheduleCallback

STEPS = 20
SCHEDULE = {"warmup": 3, "final": 5, "interval": 2}


def trained(lab, compiled, model, steps=STEPS):
    """A task after a whole run of its own loop."""
    ours = compiled.model("a").train()
    (schedule,) = ours.schedules
    schedule.begin(ours, steps)
    optimizer = torch.optim.AdamW(ours.parameter_groups(2e-2), weight_decay=0.0)
    for step in range(1, steps + 1):
        ours(**lab.batch(model, step)).loss.backward()
        optimizer.step()
        schedule.after(ours, step)
        optimizer.zero_grad()
    return ours.eval()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_task_file_holds_the_ranks_that_survived_and_no_others(kind, lab, tmp_path):
    model = lab.base(kind)
    compiled = lab.operate(model, {"adalora": {"rank": 4, "target_rank": 1, **SCHEDULE}})
    build = compiled.save(tmp_path / "build")
    ours = trained(lab, compiled, model)
    compiled.pack(build, "a")
    values = {n: t for n, t in ours.state_dict().items() if n.endswith("lora_E")}
    ranks = {n: int((t != 0).sum()) for n, t in values.items()}
    assert sum(ranks.values()) == len(ranks)
    assert min(ranks.values()) == 0
    assert max(ranks.values()) > 1
    (path,) = (build / "tasks").glob("a.*.onnx_adapter")
    tensors = read_adapter(path).tensors
    for name, rank in ranks.items():
        assert tensors[name.replace("lora_E", "lora_A")].shape[1] == rank
        assert tensors[name.replace("lora_E", "lora_B")].shape[0] == rank
    fed = lab.feed(model, 3, 11, pad=4)
    with surgeon.Session(build) as session, torch.no_grad():
        arrays = {n: t.numpy() for n, t in fed.items()}
        assert lab.gap(model(**fed).logits, ours(**fed).logits) > 1e-3
        for task, peer in (("a", ours), (None, model), ("a", ours)):
            assert lab.gap(torch.from_numpy(session.run(arrays, task)["logits"]), peer(**fed).logits) <= 1e-5


def test_a_task_that_nobody_pruned_is_not_packed(lab, tmp_path):
    model = lab.base("bert")
    compiled = lab.operate(model, {"adalora": {"rank": 3, "target_rank": 1, "where": "attention.query"}})
    build = compiled.save(tmp_path / "build")
    lab.move(compiled.model("a"))
    with pytest.raises(DeltaError, match="6 ranks are left in the task, and its budget is 2"):
        compiled.pack(build, "a")


ROWS = [Row(f"{'good' if i % 2 else 'bad'} film{' a' * (i % 5)}", i % 2) for i in range(20)]
SPEC = {"adalora": {"rank": 4, "target_rank": 1, "warmup": 0.2, "final": 0.3, "interval": 2}}


@pytest.fixture
def compiled(base_folder):
    spec = {"base": {"model": str(base_folder)}, "surgery": [SPEC, {"bitfit": {}}, {"head": {}}]}
    return surgeon.compile({**spec, "tasks": {"a": {"labels": 2}}})


def ranks_of(model):
    return {n: (t != 0).tolist() for n, t in model.state_dict().items() if n.endswith("lora_E")}


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(compiled, base_folder, tmp_path):
    tokenizer = load_tokenizer(base_folder)
    options = TrainOptions(epochs=4, batch_size=4, learning_rate=1e-2, checkpoint_steps=1)

    def stop(_, step, __):
        if step == at:
            raise KeyboardInterrupt

    whole = compiled.model("a")
    start = {n: t.clone() for n, t in whole.state_dict().items()}
    result = train_task(whole, tokenizer, ROWS, ROWS[:6], options)
    assert result.steps == 20
    assert result.best_epoch >= 3, "before the ranks are final no epoch is the best"
    wanted = {n: t.clone() for n, t in whole.state_dict().items()}
    for at in (3, 9, 17):  # warming up, pruning, pruned
        whole.load_state_dict(start)
        folder = tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt):
            train_task(whole, tokenizer, ROWS, ROWS[:6], options, checkpoint_dir=folder, callbacks=[stop])
        fresh = compiled.model("a")
        for schedule in fresh.schedules:
            schedule.mean = schedule.kept = None  # whatever it knew
        assert train_task(fresh, tokenizer, ROWS, ROWS[:6], options, checkpoint_dir=folder).resumed_from == at - 1
        assert all(torch.equal(t, wanted[n]) for n, t in fresh.state_dict().items())


def test_patience_waits_for_the_final_ranks(compiled, base_folder):
    options = TrainOptions(epochs=8, batch_size=4, learning_rate=1e-6, patience=1)
    model = compiled.model("a")
    result = train_task(model, load_tokenizer(base_folder), ROWS, ROWS[:6], options)
    assert result.stopped_early
    assert result.history[-1].epoch == 7  # the sixth is the first with final ranks
    assert sum(map(sum, ranks_of(model).values())) == 6


def test_the_trainer_of_transformers_prunes_with_the_callback(compiled, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = compiled.model("a")
    data = [{"input_ids": [2, 4 + i % 2, 3], "labels": i % 2} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=4, report_to=[], use_cpu=True, learning_rate=1e-2
    )
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[ScheduleCallback(model)]).train()
    ranks = [sum(kept) for kept in ranks_of(model).values()]
    assert sum(ranks) == len(ranks) == 6


def test_a_training_that_is_shorter_than_the_schedule_is_refused(lab, base_folder):
    options = {"rank": 2, "target_rank": 1, "warmup": 10, "final": 0.5, "where": "attention.query"}
    spec = {"base": {"model": str(base_folder)}, "surgery": [{"adalora": options}], "tasks": {"a": {"labels": 2}}}
    model = surgeon.compile(spec).model("a")
    said = r"10 steps of warm-up and 10 final ones leave none of 20 to prune in"
    with pytest.raises(SpecError, match=said):
        train_task(model, load_tokenizer(base_folder), ROWS, None, TrainOptions(epochs=4, batch_size=4))


def test_a_target_that_is_the_initial_rank_prunes_nothing(lab):
    model = lab.base("bert")
    options = {"rank": 2, "target_rank": 2, "where": "attention.query", **SCHEDULE}
    ours = trained(lab, lab.operate(model, {"adalora": options}), model)
    assert all(all(kept) for kept in ranks_of(ours).values())
    ours.schedules[0].check(ours)


def test_a_run_that_goes_on_without_the_schedules_state_keeps_the_final_ranks(lab):
    model = lab.base("bert")
    options = {"rank": 4, "target_rank": 1, "where": "attention", **SCHEDULE}
    ours = trained(lab, lab.operate(model, {"adalora": options}), model)
    (schedule,), kept = ours.schedules, ranks_of(ours)
    schedule.begin(ours, STEPS)
    schedule.before(ours, 18)
    lab.move(ours)
    schedule.after(ours, 18)
    assert ranks_of(ours) == kept
