"""What cannot be held in four bits is told, and a form that is not what was stored breaks an invariant."""

from __future__ import annotations

import pytest

from surgeon.anatomy import Projection, select
from surgeon.errors import CompositionError, InvariantError, SelectorError, SpecError
from surgeon.nf4 import dequantise, quantise
from surgeon.verify import reference, renewed, verify


def test_a_changed_byte_breaks_the_second_invariant(lab):
    compiled = lab.operate(lab.apart(lab.base("bert")), {"qlora": {"rank": 4}})
    before = renewed(compiled.program, reference(compiled.program))
    verify(compiled.program, before, identity=True)
    compiled.program.tensor("bert.encoder.layer.0.output.dense.weight.nf4")[3] ^= 1
    with pytest.raises(InvariantError, match="I2"):
        verify(compiled.program, before, identity=True)


def test_a_form_that_is_not_what_its_maker_reads_is_refused(lab):
    program = lab.operate(lab.apart(lab.base("bert")), {"lora": {}}).program
    (site, *_) = select(program.anatomy, ("ffn.up@0",), Projection)
    made = quantise(program.tensor(site.weight).detach(), 64, double=False)
    wrong = made.wanted.clone()
    wrong[0, 0] += 1e-3
    with pytest.raises(InvariantError, match="not what its maker reads"):
        program.store(site.weight, "nf4", made.tensors(), lambda p, a: dequantise(p, a, made.shape, 64), wanted=wrong)


BAD = {
    "no linear": ({"quantise": "embedding.token"}, SelectorError, "selects no projection"),
    "a norm": ({"quantise": "norm"}, SelectorError, "selects no projection"),
    "unknown": ({"quantise": "atention"}, SelectorError, "attention"),
    "rank": ({"rank": 33}, SpecError, "qlora.rank 33 is larger"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_quantised_is_told(case, lab):
    options, error, match = BAD[case]
    with pytest.raises(error, match=match):
        lab.operate(lab.base("bert"), {"qlora": options})


@pytest.mark.parametrize("options", [{"block": 48}, {"block": 0}, {"quantise": []}, {"double": "perhaps"}, {"bits": 4}])
def test_options_out_of_range_are_told(options, lab):
    with pytest.raises(SpecError, match="qlora"):
        lab.operate(lab.base("bert"), {"qlora": options})


def test_a_tied_embedding_is_not_quantised_behind_its_back(lab):
    with pytest.raises(SpecError, match="read elsewhere too"):
        lab.operate(lab.base("gpt2"), {"qlora": {"quantise": "head.out"}})


def test_a_layer_that_shares_its_weights_is_not_quantised_alone(lab):
    with pytest.raises(SpecError, match="read elsewhere too"):
        lab.operate(lab.base("albert"), {"qlora": {"quantise": "ffn.up@0"}})


def test_the_same_weight_twice_or_trained_as_well_is_told(lab):
    twice = [{"qlora": {"where": "ffn"}}, {"qlora": {"where": "attention"}}]
    with pytest.raises(CompositionError, match="in nf4 already"):
        lab.operate(lab.base("bert"), *twice)
    surgery = {"qlora": {"quantise": "head.dense", "where": "attention"}}
    with pytest.raises(CompositionError, match="holds in nf4"):
        lab.operate(lab.base("bert"), surgery, {"head": {"hidden": True}})


@pytest.mark.parametrize("first", ["lora", "qlora"])
def test_a_norm_of_the_weight_is_not_taken_beside_four_bits(first, lab):
    dora = {"lora": {"dora": True, "where": "ffn.up"}}
    surgery = [dora, {"qlora": {"where": "attention"}}]
    with pytest.raises(CompositionError, match="in training"):
        lab.operate(lab.base("bert"), *(surgery if first == "lora" else surgery[::-1]))


def test_a_head_replaced_before_is_told(lab):
    with pytest.raises(SpecError, match="no plain product"):
        lab.operate(lab.base("bert"), {"head": {}}, {"qlora": {"quantise": "head.out"}})
