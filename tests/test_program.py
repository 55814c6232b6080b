"""The IR's mutators: what they insert, who reads it, and what the ledger then says."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from surgeon.anatomy import Join, Projection, select
from surgeon.errors import CompositionError, InvariantError
from surgeon.starts import normal, zeros
from surgeon.trace import trace
from surgeon.verify import reference, run


@pytest.fixture(scope="module")
def traced(tiny):
    return {kind: (model, trace(model)) for kind in ("bert", "albert") for model in [tiny(kind)]}


@pytest.fixture
def fresh(traced, begun):
    """A program of its own over the traced base."""

    def make(kind="bert"):
        model, original = traced[kind]
        graph = fx.Graph()
        graph.output(graph.graph_copy(original.graph, {}))
        graph._codegen = original.graph._codegen
        module = fx.GraphModule(original, graph)
        return begun(model, module)

    return make


def query(program, layer=0):
    return select(program.anatomy, (f"attention.query@{layer}",), Projection)[0]


def answer(program, **deltas):
    program.graph_module.recompile()
    given = {name: torch.full(d.shape, deltas.get(d.part, 0.0)) for name, d in program.ledger.deltas.items()}
    return run(program, given, reference(program).inputs)


def test_a_delta_is_named_after_its_site_technique_and_part(fresh):
    program = fresh()
    site = query(program)
    with program.author("shift", "line 3"):
        delta = program.delta(site, "amount", (32,), zeros)
        own = program.delta(site, "shift_more", (32,), zeros)
        apart = program.delta(site, "amount", (32,), zeros, qualifier="left")
    assert delta.name == "bert.encoder.layer.0.attention.self.query.shift.amount"
    assert own.name == "bert.encoder.layer.0.attention.self.query.shift_more"
    assert apart.name == "bert.encoder.layer.0.attention.self.query.left.shift.amount"
    assert (delta.technique, delta.site, delta.role) == ("shift", site.path, "attention.query")
    assert program.maker(delta.name) == ("shift", "line 3")


def test_free_axes_are_symbols_of_the_site_alone_and_empty_by_default(fresh):
    program = fresh()
    with program.author("lora", "a"):
        first, second = (
            program.delta(query(program, i), "lora_A", (32, 4), normal(1), free={1: "rank"}) for i in (0, 1)
        )
        shared = program.delta(query(program), "lora_C", (4, 7), zeros, free={1: "=labels"})
    assert first.free[1] != second.free[1]
    assert first.default.shape == (32, 0)
    assert shared.free == {1: "labels"}


def test_what_is_inserted_has_shapes_that_no_size_of_this_spec_fixes(fresh):
    program = fresh()
    site = query(program)
    with program.author("lora", "a"):
        a = program.delta(site, "lora_A", (32, 4), zeros, free={1: "rank"})
        node = program.insert(lambda x, a: x @ a, [site.input], (a,))
    batch, length, rank = node.meta["val"].shape
    assert all(isinstance(size, torch.SymInt) for size in (batch, length, rank))
    assert node.meta["surgeon"] == ("lora", "a")


def test_replace_turns_every_reader_and_later_replacements_stack(fresh):
    program = fresh()
    site = query(program)
    readers = set(site.output.users)
    with program.author("shift", "a"):
        one = program.replace(site.output, torch.add, (program.delta(site, "one", (32,), zeros),))
        two = program.replace(site.output, torch.add, (program.delta(site, "two", (32,), zeros),))
    assert set(site.output.users) == {one}
    assert set(one.users) == {two}
    assert set(two.users) == readers
    assert program.current(site.output) is two
    moved = answer(program, one=1.0, two=0.5)
    assert torch.allclose(moved, answer(program, one=0.5, two=1.0))
    assert not torch.allclose(moved, answer(program))


def test_replace_operand_leaves_other_readers(fresh):
    program = fresh()
    (join, *_) = select(program.anatomy, ("residual.ffn@0",), Join)
    others = set(join.skip.users) - {join.add}
    with program.author("shift", "a"):
        delta = program.delta(join, "amount", (32,), zeros)
        node = program.replace_operand([join.add], join.skip, torch.add, (delta,))
        more = program.delta(join, "more", (32,), zeros)
        last = program.replace_operand([join.add], join.skip, torch.add, (more,))
    assert others
    assert set(join.skip.users) == others | {node}
    assert set(last.users) == {join.add}


def test_replace_operand_of_what_is_none_is_a_fault_of_ours(fresh):
    program = fresh()
    site, (join, *_) = query(program), select(program.anatomy, ("residual.ffn@0",), Join)
    with program.author("shift", "a"), pytest.raises(InvariantError, match="is no operand of"):
        program.replace_operand([site.node], join.add, torch.neg)


def test_a_body_may_not_capture_tensors(fresh):
    """They would be in the graph, and neither in the base nor in the ledger."""
    program = fresh()
    captured = torch.ones(32)
    with program.author("shift", "a"), pytest.raises(InvariantError, match="captures constants"):
        program.insert(lambda x: x + captured, [query(program).output])


def test_taking_over_a_parameter_keeps_the_base_as_default(fresh):
    program = fresh()
    site = query(program)
    before = answer(program)
    with program.author("bitfit", "a"):
        delta = program.take_over(site, "bias", site.bias)
    assert not any(node.target == site.bias and node.users for node in program.graph.nodes)
    assert torch.equal(delta.default, program.tensor(site.bias))
    program.graph_module.recompile()
    assert torch.equal(run(program, program.ledger.defaults(), reference(program).inputs), before)
    with program.author("other", "b"), pytest.raises(CompositionError, match="'bitfit' trains already"):
        program.take_over(site, "bias", site.bias)


def test_two_passes_may_not_make_the_same_tensor(fresh):
    program = fresh()
    with program.author("shift", "line 3"):
        program.delta(query(program), "amount", (32,), zeros)
    with program.author("shift", "line 5"), pytest.raises(CompositionError, match="before it has made"):
        program.delta(query(program), "amount", (32,), zeros)


def test_sites_of_a_shared_module_share_their_deltas(fresh):
    """As if the module had been replaced: one delta, read at every call."""
    program = fresh("albert")
    sites = select(program.anatomy, ("attention.query",), Projection)
    assert len(sites) == 2
    with program.author("shift", "a"):
        deltas = [program.delta(site, "amount", (32,), zeros) for site in sites]
        for site, delta in zip(sites, deltas, strict=True):
            program.replace(site.output, torch.add, (delta,))
    assert deltas[0] is deltas[1]
    assert sum(node.target == deltas[0].name for node in program.graph.nodes) == 2


def test_a_copied_region_computes_the_same_again(fresh):
    program = fresh()
    (join, *_) = select(program.anatomy, ("residual.ffn@0",), Join)
    assert join.post_norm is not None
    with program.author("twice", "a"):
        again = program.copy_region(join.add, join.post_norm.output)
        before = answer(program)
        join.post_norm.output.replace_all_uses_with(again)
    assert torch.equal(answer(program), before)
    assert again.meta["surgeon"] == ("twice", "a")
