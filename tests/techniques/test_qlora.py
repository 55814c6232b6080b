"""QLoRA is LoRA over the numbers that bitsandbytes reads from its own bytes, in torch and in ONNX Runtime."""

from __future__ import annotations

import gc
import shutil
import warnings
import weakref

import bitsandbytes as bnb
import numpy as np
import onnx
import pytest
import torch
from bitsandbytes import functional as F
from onnx import numpy_helper

import surgeon
from surgeon.anatomy import Projection, select
from surgeon.audit import audit
from surgeon.compiler import pack_weights
from surgeon.errors import BaseError, CompositionError, DeltaError, InvariantError, SelectorError, SpecError
from surgeon.exporters.cache import cache_key
from surgeon.nf4 import dequantise, nf4_absmax, quantise
from surgeon.runtime.taskfile import write_adapter
from surgeon.verify import reference, renewed, verify

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model

KINDS = ("bert", "llama", "gpt2", "t5", "albert")
COLUMNS = {"query": 0, "key": 32, "value": 64}


def by_bitsandbytes(weight, double=True, block=64):
    """Bytes, and the numbers bitsandbytes reads from them: as one row, see the trap in `surgeon.nf4`."""
    packed, state = F.quantize_4bit(weight.contiguous(), blocksize=block, compress_statistics=double, quant_type="nf4")
    state.shape = torch.Size((1, weight.numel()))
    return packed, F.dequantize_4bit(packed, state).view(weight.shape)


def absmax_of(made):
    return made.absmax if made.scales is None else nf4_absmax(made.absmax, made.scales, made.offset, made.code)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [64, 256, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 40), (7, 9), (32, 32), (33, 64), (256, 320)])
def test_numbers_and_bytes_are_bitsandbytes_own(shape, dtype, block, double):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    packed, wanted = by_bitsandbytes(weight, double, block)
    made = quantise(weight, block, double=double)
    assert torch.equal(made.packed, packed.flatten())
    assert torch.equal(dequantise(made.packed, absmax_of(made), shape, block).to(dtype), wanted)
    assert (wanted.float() - weight.float()).abs().max() <= 0.2 * weight.float().abs().max()


def test_a_number_takes_the_bits_of_the_paper():
    """4 + 8/64 + 32/(64·256) = 4.127 bits, 4.5 without the second quantisation, and 4 bytes of offset a weight."""
    for double, bits in ((True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4 + 32 / 64)):
        made = quantise(torch.randn(512, 1024), 64, double=double)
        held = sum(t.numel() * t.itemsize for t in made.tensors().values())
        assert held == bits * 512 * 1024 / 8 + (4 if double else 0)


def test_the_meta_device_gives_the_same_sizes():
    for shape, double in (((5, 40), True), ((7, 9), False), ((512, 300), True)):
        real, meta = (quantise(torch.ones(shape, device=d), 64, double=double).tensors() for d in ("cpu", "meta"))
        assert {n: (t.shape, t.dtype) for n, t in real.items()} == {n: (t.shape, t.dtype) for n, t in meta.items()}


def test_the_gradient_of_the_product_goes_to_its_input():
    made = quantise(torch.randn(6, 40), 64, double=False)
    arguments = (made.packed, made.absmax, 6, 40, 64)
    x = torch.randn(2, 3, 40, requires_grad=True)
    torch.library.opcheck(torch.ops.surgeon.matmul_nf4.default, (x, *arguments))
    given = torch.randn(2, 3, 6)
    torch.ops.surgeon.matmul_nf4(x, *arguments).backward(given)
    assert torch.equal(x.grad, given @ made.wanted)


def linears(model):
    """Modules with a projection in an attention or feed-forward, by path; Conv1D's weight is `[in, out]`."""
    outside = ("classifier", "pooler", "lm_head", "score", "embedding_hidden_mapping_in", "relative_attention_bias")
    kinds = ("Linear", "Conv1D")
    return {
        name: (module, type(module).__name__ == "Conv1D")
        for name, module in model.named_modules()
        if type(module).__name__ in kinds and not set(name.split(".")) & set(outside)
    }


def in_plain_torch(lab, model, weights, scale):
    """The base with dequantised weights, and products beside them: equation 5 of the paper."""
    theirs = lab.apart(model)
    with torch.no_grad():
        for module, turned in linears(theirs).values():
            _, numbers = by_bitsandbytes(module.weight.T if turned else module.weight)
            module.weight.copy_(numbers.T if turned else numbers)
    theirs.requires_grad_(False)
    own = {name: tensor.detach().clone().requires_grad_() for name, tensor in weights.items()}
    for name in (n for n in own if n.endswith(".lora_A")):
        path, a, b = name.removesuffix(".lora_A"), own[name], own[name.removesuffix("A") + "B"]
        fused = path.rpartition(".")[2] if path.rpartition(".")[2] in COLUMNS and "c_attn" in path else ""
        module = theirs.get_submodule(path.removesuffix(f".{fused}") if fused else path)
        module.register_forward_hook(_beside(a, b, scale, COLUMNS.get(fused)))
    return theirs, own


def _beside(a, b, scale, column):
    def added(_module, inputs, output):
        product = inputs[0] @ a @ (b * scale)
        if column is None:
            return output + product
        return output + torch.nn.functional.pad(product, (column, output.shape[-1] - column - product.shape[-1]))

    return added


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_gradients_are_those_of_plain_torch_over_dequantised_weights(kind, lab):
    model = lab.base(kind)
    ours = lab.move(lab.operate(model, {"qlora": {"rank": 3, "alpha": 6}}).model("a")).eval()
    theirs, own = in_plain_torch(lab, model, ours.state_dict(), 2.0)
    fed = lab.batch(model)
    found, wanted = ours(**fed), theirs(**fed)
    found.loss.backward()
    wanted.loss.backward()
    assert lab.gap(model(**fed).logits, wanted.logits) > 1e-3
    assert lab.gap(found.logits, wanted.logits) <= 1e-6
    assert lab.gap({n: p.grad for n, p in lab.own(ours).items()}, {n: t.grad for n, t in own.items()}) <= 1e-6
    assert all(p.grad.abs().max() > 0 for p in lab.own(ours).values())


def test_qlora_equals_peft_over_bitsandbytes_layers(lab):
    """Widths are multiples of the block, where bitsandbytes' kernel for CPUs is right."""
    model = lab.base("llama", hidden_size=64, intermediate_size=128)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = lab.apart(model)
    for path, (linear, _) in linears(theirs).items():
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        theirs.set_submodule(path, layer.to("cpu"))
    theirs.is_loaded_in_4bit = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(theirs, LoraConfig(target_modules=targets, r=4, lora_alpha=6)).train()
    assert type(wrapped.base_model.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    compiled = lab.operate(model, {"qlora": {"rank": 4, "alpha": 6}})
    ours = lab.move(compiled.model("a")).train()
    named = dict(wrapped.named_parameters())
    twins = {n: named[f"base_model.model.{n}.default.weight"] for n in ours.state_dict()}
    with torch.no_grad():
        for name, tensor in ours.state_dict().items():
            twins[name].copy_(tensor.T)
    layer = theirs.get_submodule("model.layers.1.mlp.down_proj").base_layer.weight
    assert torch.equal(compiled.program.tensor("model.layers.1.mlp.down_proj.weight.nf4"), layer.data.flatten())
    fed = lab.batch(model)
    found, wanted = ours(**fed), wrapped(**fed)
    found.loss.backward()
    wanted.loss.backward()
    assert lab.gap(found.logits, wanted.logits) <= 1e-6
    assert lab.gap({n: p.grad.T for n, p in lab.own(ours).items()}, {n: p.grad for n, p in twins.items()}) <= 2e-6


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_training_goes_down_over_four_bits(kind, lab):
    model = lab.base(kind)
    ours = lab.operate(model, {"qlora": {"rank": 4}}).model("a")
    held = {n: b.clone() for n, b in ours.named_buffers()}
    before = ours(**lab.batch(model)).loss.item()
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        ours(**lab.batch(model)).loss.backward()
        optimizer.step()
    assert ours(**lab.batch(model)).loss.item() < before - 0.02
    assert all(torch.equal(buffer, held[n]) for n, buffer in ours.named_buffers())


def test_a_fresh_task_is_the_quantised_base_and_its_distance_from_the_checkpoint_is_told(lab):
    model = lab.base("bert")
    compiled = lab.operate(model, {"qlora": {"rank": 4}})
    theirs, _ = in_plain_torch(lab, model, {}, 1.0)
    fed = lab.feed(model, 3, 9, pad=2)
    assert lab.gap(compiled.model("a").eval()(**fed).logits, theirs(**fed).logits) <= 1e-6
    assert 1e-4 < compiled.program.drift < 1


def test_the_module_holds_no_weight_twice_and_the_checkpoints_are_freed(base_spec):
    plain, compiled = (surgeon.compile(base_spec(*s)) for s in ([{"lora": {}}], [{"qlora": {"rank": 8}}]))
    weight = plain.base.model.get_parameter("bert.encoder.layer.0.output.dense.weight")
    count = sum(p.numel() for n, p in plain.base.model.named_parameters() if p.dim() == 2 and ".layer." in n)
    sizes = [sum(t.numel() * t.itemsize for t in c.model("a")._graph.state_dict().values()) for c in (plain, compiled)]
    deltas = [sum(t.numel() * 4 for t in c.model("a").state_dict().values()) for c in (plain, compiled)]
    saved = (sizes[0] - deltas[0]) - (sizes[1] - deltas[1])
    assert 4 * count - 0.6 * count < saved < 4 * count - 0.5 * count
    assert compiled.plan.checkpoint_bytes - compiled.plan.base_bytes == saved
    assert compiled.plan.base_parameters == plain.plan.base_parameters
    assert compiled.base.model.get_parameter("bert.encoder.layer.0.output.dense.weight").is_meta
    assert not weight.is_meta


def test_nothing_keeps_a_weight_alive_that_is_held_in_four_bits(lab, tiny):
    model = tiny("bert")
    compiled = lab.operate(model, {"qlora": {"rank": 4}})
    lab._traces.pop(id(model))
    weights = [weakref.ref(m.weight) for m, _ in linears(model).values()]
    compiled.base.release(compiled.program.stored)
    gc.collect()
    assert len(weights) == 12
    assert [w() for w in weights] == [None] * 12


@pytest.fixture
def base_spec():
    """A spec over a BERT of two layers made from its configuration."""

    def make(*surgery):
        config = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config |= {"intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 64}
        return {"base": {"config": config}, "surgery": list(surgery), "tasks": {"a": {"labels": 3}, "b": {"labels": 4}}}

    return make


COMPOSED = {
    "bert": [
        {"lora": {"rank": 2, "where": "head.dense"}},
        {"qlora": {"rank": 3, "dropout": 0.1}},
        {"bitfit": {}},
        {"head": {}},
    ],
    "llama": [{"qlora": {"rank": 3, "where": "ffn", "double": False}}, {"lora": {"rank": 2}}, {"ia3": {}}],
    "gpt2": [
        {"bitfit": {"where": ["attention.query", "ffn"]}},
        {"qlora": {"rank": 3, "block": 128}},
        {"prefix": {"length": 3}},
    ],
    "t5": [{"ia3": {}}, {"qlora": {"rank": 3, "quantise": "ffn"}}, {"adapter": {"bottleneck": 4}}],
}


@pytest.fixture(scope="module", params=COMPOSED)
def built(request, lab, tmp_path_factory):
    """A composed surgery with two tasks off their birth values, saved and open in ONNX Runtime."""
    model = lab.base(request.param)
    labels = {"labels": 3} if request.param == "bert" else {}
    compiled = lab.operate(model, *COMPOSED[request.param], tasks={"a": labels, "b": labels})
    for seed, task in enumerate("ab"):
        lab.move(compiled.model(task).eval(), seed=seed)
    folder = compiled.save(tmp_path_factory.mktemp(request.param) / "build")
    with surgeon.Session(folder, threads=1) as session:
        yield model, compiled, folder, session


def test_onnx_runtime_answers_as_torch_for_every_task_in_turn(built, lab):
    model, compiled, _, session = built
    for sizes in ((3, 11, 4), (1, 5, 0), (2, 20, 3)):
        fed = lab.feed(model, sizes[0], sizes[1], pad=sizes[2])
        arrays = {n: t.numpy() for n, t in fed.items()}
        first = {}
        for task in ("a", "b", "a", "b"):
            found = session.run(arrays, task)["logits"]
            assert np.array_equal(found, first.setdefault(task, found))
            with torch.no_grad():
                assert np.abs(found - compiled.model(task)(**fed).logits.numpy()).max() <= 1e-4
        assert not np.array_equal(first["a"], first["b"])


def test_without_a_task_onnx_runtime_is_the_quantised_base(built, lab):
    model, compiled, _, session = built
    theirs = lab.apart(model)
    with torch.no_grad():
        for name in compiled.program.stored:
            theirs.get_parameter(name).copy_(compiled.program.tensor(name))
        fed = lab.feed(model, 3, 9, pad=2)
        found = session.run({n: t.numpy() for n, t in fed.items()})["logits"]
        assert np.abs(found - theirs(**fed).logits.numpy()).max() <= 1e-5
        assert np.abs(found - model(**fed).logits.numpy()).max() > 1e-4


def test_the_file_holds_bitsandbytes_bytes_under_the_checkpoints_names(built, tmp_path):
    model, compiled, folder, _ = built
    graph = onnx.load(shutil.copytree(folder, tmp_path / "copy") / "model.onnx")  # `onnx` opens no hard links
    held = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    users = [node for node in graph.graph.node if node.op_type == "MatMulBnb4"]
    assert users
    assert {(o.domain, o.version) for o in graph.opset_import} >= {("com.microsoft", 1)}
    block = {"gpt2": 128}.get(model.config.model_type, 64)
    assert {(a.name, a.i) for n in users for a in n.attribute} >= {("block_size", block), ("quant_type", 1)}
    for name in compiled.program.stored:
        weight = model.get_parameter(name).detach()
        whole = weight.T.contiguous() if "transformer.h" in name else weight
        packed, state = F.quantize_4bit(
            whole, blocksize=block, compress_statistics=model.config.model_type != "llama", quant_type="nf4"
        )
        absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        assert held[f"{name}.nf4"].tobytes() == packed.numpy().tobytes()
        assert held[f"{name}.absmax"].tobytes() == absmax.numpy().tobytes()
        assert name not in held


def test_every_rank_runs_on_one_graph(lab, tmp_path):
    model = lab.base("bert")
    compiled = lab.operate(model, {"qlora": {"rank": 4}})
    folder = compiled.save(tmp_path / "build")
    fed = lab.feed(model, 2, 9, pad=2)
    with surgeon.Session(folder, threads=1) as session:
        for rank in (0, 1, 16):
            ours, noise = compiled.model("a").eval(), torch.Generator().manual_seed(rank)
            shapes = {n: [rank if s == 4 else s for s in t.shape] for n, t in ours.state_dict().items()}
            ours.load_state_dict({n: 0.2 * torch.randn(s, generator=noise) for n, s in shapes.items()})
            arrays = {n: t.detach().contiguous().numpy() for n, t in ours.deployed().items()}
            write_adapter(tmp_path / "t.onnx_adapter", arrays, compiled.program.fingerprint)
            session.add_task(tmp_path / "t.onnx_adapter", "t", replace=True)
            found = session.run({n: t.numpy() for n, t in fed.items()}, "t")["logits"]
            assert np.abs(found - ours(**fed).logits.detach().numpy()).max() <= 1e-4


def test_a_build_is_saved_loaded_and_verified(base_spec, lab, tmp_path):
    compiled = surgeon.compile(base_spec({"qlora": {"rank": 4}}))
    for task in "ab":
        lab.move(compiled.model(task))
    folder = compiled.save(tmp_path / "build")
    loaded = surgeon.load(folder)
    wanted, found = compiled.model("b").eval(), loaded.model("b").eval()
    assert loaded.program.fingerprint == compiled.program.fingerprint != compiled.base.fingerprint
    fed = {"input_ids": torch.arange(3, 12).view(1, 9)}
    assert torch.equal(found(**fed).logits, wanted(**fed).logits)
    audited = audit(folder).tasks
    assert [t.name for t in audited] == [None, "a", "b"]
    assert all(t.difference <= 1e-5 for t in audited)


def test_a_build_of_a_base_in_hand_is_loaded_without_the_numbers_that_nf4_stands_for(base_spec, lab, tiny, tmp_path):
    """The build's own copy of the base is nobody else's; one that the caller lends stays whole."""
    model = tiny("bert")
    spec = {name: part for name, part in base_spec({"qlora": {"rank": 4}}).items() if name != "base"}
    compiled = surgeon.compile(spec, model)
    lab.move(compiled.model("a"))
    folder = compiled.save(tmp_path / "build")
    weight = "bert.encoder.layer.0.output.dense.weight"
    loaded, lent = surgeon.load(folder), surgeon.load(folder, model)
    assert loaded.base.model.get_parameter(weight).is_meta
    assert not lent.base.model.get_parameter(weight).is_meta
    fed = lab.feed(model, 2, 9)
    wanted = compiled.model("a").eval()(**fed).logits
    for again in (loaded, lent):
        assert torch.equal(again.model("a").eval()(**fed).logits, wanted)


def test_tasks_of_the_checkpoint_and_of_its_quantised_form_refuse_each_other(base_spec, tmp_path):
    plain = surgeon.compile(base_spec({"lora": {"rank": 4, "where": ["attention", "ffn"]}}), out=tmp_path / "plain")
    held = surgeon.compile(base_spec({"qlora": {"rank": 4}}), out=tmp_path / "held")
    assert set(plain.model("a").state_dict()) == set(held.model("a").state_dict())
    for build, other in (("plain", "held"), ("held", "plain")):
        file = next((tmp_path / other / "tasks").glob("a.*.onnx_adapter"))
        with surgeon.Session(tmp_path / build) as session, pytest.raises(DeltaError, match="base"):
            session.add_task(file, "foreign")
        weights = next((tmp_path / other / "tasks").glob("a.*.safetensors"))
        with pytest.raises(DeltaError, match="another base"):
            pack_weights(tmp_path / build, "a", weights)


def test_other_bytes_are_another_base_and_another_conversion(lab):
    model = lab.base("bert")
    one, same, single, few = (
        lab.operate(model, {"qlora": {"rank": 4, **options}}).program
        for options in ({}, {}, {"block": 128}, {"quantise": "ffn"})
    )
    assert one.fingerprint == same.fingerprint
    assert len({one.fingerprint, single.fingerprint, few.fingerprint}) == 3
    before = cache_key(one, "", 20)
    assert before == cache_key(same, "", 20)
    one.constants["bert.encoder.layer.0.output.dense.weight.nf4"][3] ^= 1
    assert cache_key(one, "", 20) != before


def test_a_changed_byte_breaks_the_second_invariant(lab):
    compiled = lab.operate(lab.base("bert"), {"qlora": {"rank": 4}})
    before = renewed(compiled.program, reference(compiled.program))
    verify(compiled.program, before, identity=True)
    compiled.program.tensor("bert.encoder.layer.0.output.dense.weight.nf4")[3] ^= 1
    with pytest.raises(InvariantError, match="I2"):
        verify(compiled.program, before, identity=True)


def test_a_form_that_is_not_what_its_maker_reads_is_refused(lab):
    program = lab.operate(lab.base("bert"), {"lora": {}}).program
    (site, *_) = select(program.anatomy, ("ffn.up@0",), Projection)
    made = quantise(program.tensor(site.weight).detach(), 64, double=False)
    wrong = made.wanted.clone()
    wrong[0, 0] += 1e-3
    with pytest.raises(InvariantError, match="not what its maker reads"):
        program.store(site.weight, "nf4", made.tensors(), lambda p, a: dequantise(p, a, made.shape, 64), wanted=wrong)


def test_a_plan_needs_no_weights_and_says_what_the_base_takes(base_spec):
    spec = base_spec({"qlora": {"rank": 4}})
    real, meta = surgeon.compile(spec).plan, surgeon.compile(spec, weights=False).plan
    assert real.to_dict() == meta.to_dict()
    assert meta.base_bytes < meta.checkpoint_bytes


def test_a_head_that_was_quantised_starts_at_the_quantised_numbers(lab):
    model = lab.base("bert")
    surgery = {"qlora": {"rank": 2, "quantise": ["attention", "head.out"], "where": "attention"}}
    program = lab.operate(model, surgery, {"head": {}}).program
    _, wanted = by_bitsandbytes(model.classifier.weight.detach())
    assert torch.equal(program.ledger.deltas["classifier.head.weight"].default, wanted.T)


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


def test_a_weight_that_is_no_number_is_told():
    weight = torch.randn(8, 8)
    weight[2, 3] = float("nan")
    with pytest.raises(BaseError, match="NaN or infinity"):
        quantise(weight, 64, double=True)
