"""What ONNX Runtime raises: its exceptions share no base class, so those a file or an input can cause are named."""

from __future__ import annotations

from onnxruntime.capi import onnxruntime_pybind11_state as state

ORT_ERRORS: tuple[type[Exception], ...] = (
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoModel,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
    RuntimeError,
    ValueError,
)
