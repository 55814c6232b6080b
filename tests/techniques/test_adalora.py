"""AdaLoRA is PEFT's AdaLoRA: the same answers, the same loss, the same budget and the same triplets at every step."""

from __future__ import annotations

import warnings

import pytest
import torch

from surgeon.errors import SpecError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import AdaLoraConfig, get_peft_model


STEPS = 20
SCHEDULE = {"warmup": 3, "final": 5, "interval": 2}
# our `where`, PEFT's targets
PEERS = {
    "bert": (None, r".*layer\.\d+\.(.*\.(query|key|value|dense))"),
    "llama": (["attention", "ffn.down"], ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]),
    "gpt2": (["attention.output", "ffn"], ["c_fc", r"c_proj"]),
    "t5": (["attention.query", "cross_attention.value"], r".*(SelfAttention\.q|EncDecAttention\.v)"),
}


def by_our_names(wrapped, read=lambda p: p.detach()):
    """PEFT's tensors under our names, turned the way we multiply."""
    found = {}
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            own = name.removeprefix("model.").removesuffix(".default").replace(".lora_", ".adalora.lora_")
            tensor = read(parameter)
            found[own] = tensor.flatten() if ".lora_E" in name else tensor.T
    return found


@pytest.fixture
def pair(lab):
    """Ours and PEFT's with the same weights. Without a task type, calling PEFT's wrapper skips its regulariser."""

    def make(kind, by=0.1, target=2, **options):
        where, targets = PEERS[kind]
        model = lab.base(kind)
        config = AdaLoraConfig(
            target_modules=targets,
            init_r=6,
            target_r=target,
            lora_alpha=9,
            total_step=STEPS,
            tinit=3,
            tfinal=5,
            deltaT=2,
        )
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(3)
            theirs = get_peft_model(lab.apart(model), config).eval()
        noise = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(by * torch.randn(parameter.shape, generator=noise))
        surgery = {"rank": 6, "target_rank": target, "alpha": 9, "where": where, **SCHEDULE, **options}
        ours = lab.operate(model, {"adalora": {k: v for k, v in surgery.items() if v is not None}}).model("a")
        ours.load_state_dict(by_our_names(theirs.base_model))
        return ours.eval(), theirs.base_model

    return make


@pytest.mark.parametrize("kind", PEERS)
def test_answers_loss_and_gradients_are_pefts(kind, pair, lab):
    ours, theirs = pair(kind)
    model, fed = lab.base(kind), lab.batch(lab.base(kind))
    found, wanted = ours.train()(**fed), theirs.train()(**fed)
    assert lab.gap(model(**fed).logits, wanted.logits) > 1e-4
    assert lab.gap(found.logits, wanted.logits) <= 1e-6
    assert found.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)
    assert (found.loss - ours.eval()(**fed).loss).item() > 0.1  # the regulariser is the training's alone
    for answer in (found, wanted):
        answer.loss.backward()
    grads = by_our_names(theirs, lambda p: p.grad)
    assert lab.gap({n: p.grad for n, p in lab.own(ours).items()}, grads) <= 3e-6


@pytest.mark.parametrize("kind", PEERS)
def test_twenty_steps_prune_the_triplets_that_peft_prunes(kind, pair, lab):
    ours, theirs = pair(kind, by=0.02)
    (schedule,) = ours.schedules
    allocator = theirs.rankallocator
    schedule.begin(ours, STEPS)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0, eps=1e-5)
        for m in (ours.train(), theirs.train())
    ]
    left = []
    for step in range(1, STEPS + 1):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model(**lab.batch(lab.base(kind), step)).loss.backward()
            optimizer.step()
        schedule.after(ours, step)
        theirs.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        wanted = by_our_names(theirs)
        values = {n: t for n, t in ours.state_dict().items() if n.endswith("lora_E")}
        assert {n: (t != 0).tolist() for n, t in values.items()} == {n: (wanted[n] != 0).tolist() for n in values}
        assert schedule.budget(step, 6 * len(values)) == allocator.budget_schedule(step)[0]
        left.append(sum(int((t != 0).sum()) for t in values.values()))
        assert schedule.settled(step) == (step >= 15)
    assert lab.gap(ours.state_dict(), wanted) <= 2e-5
    assert left[-1] == left[14] == 2 * len(values)
    assert left[0] == 6 * len(values)


def test_the_budget_falls_as_measured_of_peft():
    """Initial rank 6, target 2, four sites: the numbers that PEFT's own run gave."""
    from surgeon.passes.adalora import AdaLoRA, Allocation, Triplets

    sites = tuple(Triplets(f"a{i}", f"e{i}", f"b{i}") for i in range(4))
    schedule = Allocation(AdaLoRA(rank=6, target_rank=2, **SCHEDULE), sites)
    schedule.first, schedule.last = 3, 15
    assert [schedule.budget(step, 24) for step in range(4, 21, 2)] == [20, 14, 11, 9, 8, 8, 8, 8, 8]
    assert [schedule.budget(step, 24) for step in (1, 2, 3)] == [24, 24, 24]


def test_scores_follow_the_papers_equations(lab):
    """Section 3.2, element by element, over three steps."""
    model = lab.base("bert")
    options = {"rank": 3, "target_rank": 1, "where": "attention.query", "beta1": 0.7, "beta2": 0.6, **SCHEDULE}
    ours = lab.move(lab.operate(model, {"adalora": options}).model("a"), by=0.05)
    (schedule,) = ours.schedules
    schedule.begin(ours, STEPS)
    mean, spread = ({n: torch.zeros_like(t) for n, t in ours.state_dict().items()} for _ in range(2))
    for step in (1, 2, 3):
        ours.zero_grad()
        ours.train()(**lab.batch(model, step)).loss.backward()
        schedule.after(ours, step)
        for name in mean:
            w = ours.get_parameter(name)
            sensitivity = (w * w.grad).abs().detach()
            mean[name] = 0.7 * mean[name] + 0.3 * sensitivity
            spread[name] = 0.6 * spread[name] + 0.4 * (sensitivity - mean[name]).abs()
    for site in schedule.sites:
        s = {name: mean[name] * spread[name] for name in site}
        wanted = s[site.e] + s[site.a].sum(0) / 32 + s[site.b].sum(1) / 32
        assert lab.gap(schedule._scores(site), wanted) <= 1e-5


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
def test_a_fresh_task_is_the_base_and_all_of_it_learns(kind, lab):
    model = lab.base(kind)
    ours, fed = lab.operate(model, {"adalora": {"rank": 4, "target_rank": 2}}).model("a"), lab.batch(model)
    assert torch.equal(ours.eval()(**fed).logits, model(**fed).logits)
    lab.move(ours).train()(**fed).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in lab.own(ours).values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 4, "target_rank": 5}, "target_rank 5 is above the initial rank 4"),
        ({"rank": 33}, r"adalora.rank 33 is larger than .*\(32 -> 32\)"),
        ({"warmup": 2.5}, "adalora.warmup.* below 1 it is a share"),
        ({"final": -1}, "adalora.final"),
        ({"beta1": 1.0}, "adalora.beta1"),
        ({"interval": 0}, "adalora.interval"),
        ({"where": "norm"}, "selects no projection"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, said, lab):
    with pytest.raises(SpecError, match=said):
        lab.operate(lab.base("bert"), {"adalora": options})
