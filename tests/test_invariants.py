"""Each invariant of the compiler, broken on purpose by a pass, is named by the verifier."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import surgeon
from surgeon.anatomy import Projection, select
from surgeon.errors import CompositionError, InvariantError
from surgeon.passes import Pass, PassResult
from surgeon.passes.lora import LoRA
from surgeon.pipeline import run_passes
from surgeon.starts import normal, zeros
from surgeon.trace import trace

_numbers = itertools.count()


class Bad(Pass):
    """A pass that breaks one promise: the subclass says which."""

    name: ClassVar[str] = "bad"
    title: ClassVar[str] = "Breaks an invariant"
    paper: ClassVar[str] = ""
    identity_at_birth: ClassVar[bool] = True

    def call(self, program):
        (site, *_) = select(program.anatomy, ("attention.query",), Projection)
        self.spoil(program, site)
        return PassResult(program, modified=True)

    def shifted(self, program, site, init, **options):
        """Add a delta to the output of `site`."""
        delta = program.delta(site, "shift", (site.out_features,), init, **options)
        program.replace(site.output, torch.add, (delta,))


class WithoutShape(Bad):
    def spoil(self, program, site):
        with program.graph.inserting_after(site.output):
            node = program.graph.call_function(torch.ops.aten.clone.default, (site.output,))
        site.output.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


class WritesIntoTheBase(Bad):
    def spoil(self, program, site):
        with torch.no_grad():
            program.tensor(site.weight).mul_(1.0)


class ExchangesABaseTensor(Bad):
    def spoil(self, program, site):
        program.tensor(site.weight).data = program.tensor(site.weight).detach().clone()


class RegistersAStrayParameter(Bad):
    def spoil(self, program, site):
        program.graph_module.register_parameter("stray", torch.nn.Parameter(torch.zeros(1)))


class MakesADeltaNobodyReads(Bad):
    def spoil(self, program, site):
        program.delta(site, "shift", (site.out_features,), zeros)


class StartsElsewhere(Bad):
    def spoil(self, program, site):
        self.shifted(program, site, normal(1.0))


class DefaultIsNotTheBase(Bad):
    def spoil(self, program, site):
        self.shifted(program, site, zeros, default=torch.ones(site.out_features))


class StartsWithOneTensorForAll(Bad):
    def spoil(self, program, site):
        shared = torch.zeros(site.out_features)
        self.shifted(program, site, lambda shape, rng: shared)


class StartsWithTheBasesOwn(Bad):
    identity_at_birth: ClassVar[bool] = False

    def spoil(self, program, site):
        bias = program.tensor(site.bias).detach()
        self.shifted(program, site, lambda shape, rng: bias)


class DrawsWithoutTheSeed(Bad):
    identity_at_birth: ClassVar[bool] = False

    def spoil(self, program, site):
        self.shifted(program, site, lambda shape, rng: torch.randn(shape))


class HidesThatItWasHere(Bad):
    def spoil(self, program, site):
        self.shifted(program, site, zeros, qualifier=f"take_{next(_numbers)}")


BROKEN = {
    "I1": [WithoutShape],
    "I2": [WritesIntoTheBase, ExchangesABaseTensor],
    "I3": [RegistersAStrayParameter, MakesADeltaNobodyReads],
    "I4": [StartsElsewhere, DefaultIsNotTheBase],
    "I5": [StartsWithOneTensorForAll, StartsWithTheBasesOwn],
    "I6": [DrawsWithoutTheSeed],
}


@pytest.fixture
def program(tiny, begun):
    """A fresh one for every test: a broken program is of no more use."""
    model = tiny("bert", num_hidden_layers=1)
    return begun(model, trace(model))


@pytest.mark.parametrize(("invariant", "broken"), [(i, b) for i, several in BROKEN.items() for b in several])
def test_a_pass_that_breaks_an_invariant_is_told_which(invariant, broken, program):
    with pytest.raises(InvariantError, match=f"after pass 2 of 2, 'bad': {invariant}: ") as caught:
        run_passes(program, [LoRA(rank=2), broken()])
    assert caught.value.exit_code == 3
    assert "bug in Surgeon" in str(caught.value)


def test_a_pass_twice_at_one_place_is_i7_where_its_names_do_not_tell(program):
    run_passes(program, [HidesThatItWasHere()])
    with pytest.raises(InvariantError, match="I7: 'bad' was applied twice at "):
        run_passes(program, [LoRA(rank=2, where=["attention.value"]), HidesThatItWasHere()])


def test_a_pass_twice_at_one_place_is_the_specs_mistake_where_they_do(program):
    with pytest.raises(CompositionError, match="lora"):
        run_passes(program, [LoRA(rank=2), LoRA(rank=4, where=["attention.query"])])


def test_a_pass_twice_at_different_places_composes(program):
    run_passes(program, [LoRA(rank=2, where=["attention.query"]), LoRA(rank=4, where=["attention.value"])])
    assert program.applied == ["lora", "lora"]


SPEC = {
    "base": {
        "config": {"model_type": "bert", "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 24}
    },
    "surgery": [{"lora": {"rank": 2}}, {"prefix": {"length": 3, "hidden": 4}}, {"adapter": {"bottleneck": 3}}],
    "tasks": {"one": {"labels": 2}, "two": {"labels": 3}},
    "seed": 7,
}


def build_and_hash(folder: Path) -> dict[str, str]:
    """Compile the spec above, without help from a cache, and hash every file."""
    saved, os.environ["SURGEON_CACHE"] = os.environ.get("SURGEON_CACHE"), str(folder / "cache")
    try:
        surgeon.compile(SPEC, out=folder / "build")
    finally:
        os.environ["SURGEON_CACHE"] = saved or ""
    files = sorted(path for path in (folder / "build").rglob("*") if path.is_file())
    return {str(p.relative_to(folder / "build")): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_same_spec_base_and_seed_give_the_same_bytes(tmp_path):
    """I6, of a whole build; state left in between by another compile and the global generator must not matter."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = build_and_hash(tmp_path / "a")
    torch.manual_seed(12345)
    assert build_and_hash(tmp_path / "b") == first
    assert {"model.onnx", "model.onnx.data", "manifest.json", "spec.yaml", "graph.txt"} <= first.keys()


@pytest.mark.sweep
def test_another_process_with_another_hash_seed_gives_the_same_bytes(tmp_path):
    code = (
        "import importlib.util, json, pathlib, sys;"
        f"spec = importlib.util.spec_from_file_location('tested', {str(__file__)!r});"
        "tested = importlib.util.module_from_spec(spec); spec.loader.exec_module(tested);"
        "print(tested.build_and_hash(pathlib.Path(sys.argv[1])))"
    )
    answers = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(folder)],
            env=environment,
            capture_output=True,
            check=True,
            text=True,
        )
        answers.append(run.stdout.splitlines()[-1])
    assert answers[0] == answers[1]
