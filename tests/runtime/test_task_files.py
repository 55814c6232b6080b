"""Task files on disk: written whole or not at all, and whatever is wrong with one is said before it runs."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnxruntime import AdapterFormat, OrtValue

from surgeon.errors import BuildError, DeltaError, SpecError
from surgeon.runtime import Session
from surgeon.runtime.taskfile import DTYPES, checksum, model_version, read_adapter, write_adapter


@pytest.fixture
def session(pristine):
    with Session(pristine, threads=1) as session:
        yield session


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_back(tmp_path_factory, data):
    array = st.sampled_from(DTYPES).flatmap(
        lambda dtype: arrays(dtype, array_shapes(min_dims=1, min_side=0, max_side=5))
    )
    tensors = data.draw(st.dictionaries(st.text(min_size=1, max_size=8).filter(encodable), array, max_size=4))
    path = tmp_path_factory.mktemp("round") / "t.onnx_adapter"
    write_adapter(path, tensors, "0123456789abcdef")
    file = read_adapter(path)
    assert file.model_version == 0x01234567
    assert file.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        assert file.tensors[name].dtype == array.dtype
        assert file.tensors[name].tobytes() == array.tobytes()


def test_tensors_that_were_read_own_their_memory(deltas, pack):
    path = pack(deltas.topics)
    for _ in range(50):
        tensors = read_adapter(path).tensors
        junk = [np.full_like(array, np.nan) for array in tensors.values() for _ in range(20)]
        assert all(np.array_equal(tensors[name], deltas.topics[name]) for name in tensors)
        assert all(array.base is None for array in tensors.values())
        del junk


def encodable(name):
    return "\0" not in name and name.encode("utf-8", "ignore").decode() == name


def test_the_same_tensors_give_the_same_bytes_in_any_order(deltas, pack):
    backwards = dict(reversed(deltas.movies.items()))
    assert pack(deltas.movies, "a").read_bytes() == pack(backwards, "b").read_bytes()


def test_a_file_costs_little_more_than_its_tensors(deltas, pack):
    tensors = sum(array.nbytes for array in deltas.topics.values())
    assert pack(deltas.topics).stat().st_size <= tensors + 100 * len(deltas.topics) + 1024


@pytest.mark.parametrize("array", [np.float32(1), np.array([True]), np.array(["x"]), np.array([1j])])
def test_what_the_format_cannot_hold_is_refused_when_written(tmp_path, array):
    with pytest.raises(DeltaError, match="cannot be stored"):
        write_adapter(tmp_path / "t.onnx_adapter", {"a": np.asarray(array)}, "0" * 8)
    assert not list(tmp_path.iterdir())


def test_writing_replaces_a_file_and_never_writes_into_it(deltas, pack):
    path = pack(deltas.movies)
    os.link(path, path.with_name("held"))
    held = path.with_name("held").read_bytes()
    pack(deltas.topics)
    assert path.read_bytes() != held == path.with_name("held").read_bytes()


@pytest.mark.parametrize(("limit", "size"), [(0, 64), (100, 1), (1000, 64)])  # what is small fails late, in a buffer
def test_a_full_disk_leaves_the_old_file_and_nothing_else(deltas, pack, limit, size):
    path = pack(deltas.topics)
    before = path.read_bytes()
    code = (
        "import sys, numpy\nfrom surgeon.runtime.taskfile import write_adapter\nfrom surgeon.errors import BuildError\n"
        "try: write_adapter(sys.argv[1], {'a': numpy.ones((int(sys.argv[2]), 64), 'f4')}, '0' * 8)\n"
        "except BuildError as error: sys.exit(7 if 'written' in str(error) else str(error))"
    )
    limits = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    result = subprocess.run(
        [sys.executable, "-c", code, path, str(size)], preexec_fn=limits, check=False, capture_output=True, text=True
    )
    assert result.returncode == 7, result.stderr
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_directory_that_is_not_there_is_an_error_and_not_made(tmp_path):
    with pytest.raises(BuildError, match="cannot be written"):
        write_adapter(tmp_path / "no" / "t.onnx_adapter", {"a": np.ones(1, np.float32)}, "0" * 8)
    assert not list(tmp_path.iterdir())


def test_every_flipped_bit_is_refused(session, pack, deltas, inputs):
    path = pack(deltas.movies)
    good = path.read_bytes()
    expected = session.run(inputs, task="movies")["logits"]
    rng = np.random.default_rng(0)
    refused = 0
    for bit in rng.choice(len(good) * 8, 400, replace=False):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            session.add_task(path, "flipped")
        except DeltaError:
            refused += 1
            continue
        assert np.array_equal(session.run(inputs, task="flipped")["logits"], expected), f"bit {bit}"
        session.remove_task("flipped")
    assert refused > 300
    assert set(session.tasks) == {"movies", "topics"}


def test_every_flipped_bit_of_a_tensor_is_refused(session, pack, deltas):
    path = pack(deltas.movies)
    good = path.read_bytes()
    payload = deltas.movies["l0.value.lora_B"].tobytes()
    start = good.index(payload)
    for bit in range(len(payload) * 8):
        damaged = bytearray(good)
        damaged[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DeltaError, match="checksum"):
            session.add_task(path)


def test_a_file_cut_at_any_length_is_refused_or_whole(session, pack, deltas):
    path = pack(deltas.movies)
    good = path.read_bytes()
    for length in [*range(0, len(good), 7), len(good) - 1]:
        path.write_bytes(good[:length])
        try:
            session.add_task(path, replace=True)
        except DeltaError:
            continue
        assert len(good) - length <= 4  # only padding is gone
        assert {n: a.tobytes() for n, a in read_adapter(path).tensors.items()} == {
            n: a.tobytes() for n, a in deltas.movies.items()
        }


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused(pristine, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bytes") / "t.onnx_adapter"
    path.write_bytes(data)
    with pytest.raises(DeltaError, match="is not a task file"):
        read_adapter(path)


def test_a_missing_file_and_a_directory_are_refused(session, tmp_path):
    for path in (tmp_path / "none.onnx_adapter", tmp_path):
        with pytest.raises(DeltaError, match="cannot be read"):
            session.add_task(path, "t")


def test_one_name_twice_is_refused_even_with_the_right_checksum(session, pack, deltas, fingerprint):
    path = pack(deltas.movies)
    poison = np.full(8, np.nan, np.float32)
    form = AdapterFormat()
    form.set_adapter_version(checksum(deltas.movies))
    form.set_model_version(model_version(fingerprint))
    both = {**deltas.movies, "l0.biaS": poison}
    form.set_parameters({name: OrtValue.ortvalue_from_numpy(array) for name, array in both.items()})
    form.export_adapter(str(path))
    path.write_bytes(path.read_bytes().replace(b"l0.biaS", b"l0.bias"))
    with pytest.raises(DeltaError, match="checksum does not hold"):
        session.add_task(path)


def test_a_file_without_our_checksum_is_refused(session, pack, deltas):
    path = pack(deltas.movies)
    form = AdapterFormat.read_adapter(str(path))
    foreign = AdapterFormat()
    foreign.set_parameters(form.get_parameters())
    foreign.export_adapter(str(path.with_name("foreign.onnx_adapter")))
    with pytest.raises(DeltaError, match="checksum"):
        session.add_task(path.with_name("foreign.onnx_adapter"))


def without(name):
    return lambda task: task.pop(name)


def changed(name, change):
    return lambda task: task.update({name: change(task[name])})


def poisoned(value):
    def change(array):
        array[1, 1] = value
        return array

    return changed("l0.query.lora_B", change)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without("l0.query.lora_B"), r"1 of 9 deltas are missing\n  there is: missing: l0.query.lora_B; the other 8"),
        (without("head.bias"), "1 of 9 deltas are missing"),
        (lambda task: task.clear(), "9 of 9|7 of 7 deltas are missing"),
        (lambda task: task.update(extra=task["l0.bias"]), r"1 tensors belong to no delta.*\n.*unexpected: extra"),
        (lambda task: task.update(embedding=task["l0.bias"]), "unexpected: embedding"),
        (poisoned(np.nan), r"NaN or infinity in l0.query.lora_B \(1 of 16 values, first at \[1, 1\]\)"),
        (poisoned(np.inf), "NaN or infinity"),
        (poisoned(-np.inf), "NaN or infinity"),
        (changed("l0.bias", lambda a: a[:7]), r"l0.bias is float32\[7\], the build wants float32\[8\]"),
        (changed("l0.bias", lambda a: a[None]), r"l0.bias is float32\[1, 8\]"),
        (changed("l0.bias", lambda a: a.astype(np.float64)), r"l0.bias is float64\[8\]"),
        (changed("l0.bias", lambda a: a.astype(np.float16)), r"l0.bias is float16\[8\]"),
        (changed("l0.value.lora_A", lambda a: a.T), r"the build wants float32\[8, r_value\]"),
        (
            changed("l0.query.lora_A", lambda a: np.ones((8, 5), np.float32)),
            r"two sizes at once\n.*r_query: 5 in l0.query.lora_A, 2 in l0.query.lora_B",
        ),
        (changed("head.bias", lambda a: a[:1]), "labels: 2 in head.weight, 1 in head.bias"),
        (changed("l0.prefix.key", lambda a: a[:, :1]), "prefix: 1 in l0.prefix.key, 3 in l0.prefix.value"),
        (
            lambda task: task.update({"head.weight": np.ones((8, 0), "f4"), "head.bias": np.ones(0, "f4")}),
            "head has no columns",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_the_task_shows(session, pack, deltas, spoil, says):
    spoil(deltas.movies)
    with pytest.raises(DeltaError, match=says):
        session.add_task(pack(deltas.movies), "spoiled")
    assert set(session.tasks) == {"movies", "topics"}


def test_a_task_of_another_base_is_refused(session, pack, deltas):
    with pytest.raises(DeltaError, match=r"another base\n.*this base: small \(Small\), fingerprint"):
        session.add_task(pack(deltas.movies, fingerprint="00000001" * 8))


def test_labels_must_be_as_many_as_the_head_has_columns(session, pack, deltas):
    with pytest.raises(DeltaError, match="2 columns for 3 labels"):
        session.add_task(pack(deltas.movies), labels=["a", "b", "c"])
    with pytest.raises(SpecError, match="a list of names"):
        session.add_task(pack(deltas.movies), labels="ab")
    headless = {name: array for name, array in deltas.movies.items() if not name.startswith("head")}
    with pytest.raises(DeltaError, match=r"missing: head\.weight, head\.bias"):
        session.add_task(pack(headless), labels=["a", "b"])


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "a\n"])
def test_a_name_that_is_no_file_name_is_refused(session, pack, deltas, name):
    with pytest.raises(SpecError, match="cannot be the name of a task"):
        session.add_task(pack(deltas.movies), name)
