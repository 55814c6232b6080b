"""A step of a decoder on ONNX Runtime: new tokens and a cache in, logits and the cache after them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnxruntime import InferenceSession, OrtValue

from surgeon.errors import DataError
from surgeon.runtime.manifest import Generation
from surgeon.runtime.ort import ORT_ERRORS
from surgeon.runtime.taskfile import Array

LOGITS = "logits"


class Decoder:
    """The graph with some deltas bound, from new tokens and a cache to logits and the cache after them.

    Binding keeps the cache with ONNX Runtime, and hands over a task's tensors once instead of at every step.
    """

    def __init__(self, session: InferenceSession, generation: Generation) -> None:
        self._session, self._generation = session, generation
        self._binding = session.io_binding()
        self._deltas: dict[str, OrtValue] = {}
        self._arrays: dict[str, Array] = {}
        self._bound: Sequence[OrtValue] = ()
        self._logits: dict[int, OrtValue] = {}

    def bind(self, deltas: Mapping[str, OrtValue]) -> None:
        """Let these tensors be the deltas from now on, and all others what they were."""
        for name, value in deltas.items():
            self._binding.bind_ortvalue_input(name, value)
        self._deltas.update(deltas)

    def bind_arrays(self, arrays: Mapping[str, Array]) -> None:
        """The same of arrays, whose memory is read at every step; those that are bound already cost nothing."""
        fresh = {name: array for name, array in arrays.items() if self._arrays.get(name) is not array}
        self.bind({name: OrtValue.ortvalue_from_numpy(array) for name, array in fresh.items()})
        self._arrays.update(fresh)

    def step(
        self, ids: Array, mask: Array, past: Sequence[OrtValue], task_ids: Array | None = None
    ) -> tuple[Array, list[OrtValue]]:
        """Logits `[rows, vocabulary]` of the last token, and the cache. Raises DataError where the graph cannot run.

        A shared cache is written in place, and bound only where it is another one than before. Then logits of as many
        rows go where the last ones went, and no output is asked for: for all of them that takes longer than to choose.
        """
        binding, cache, shared = self._binding, self._generation.cache, self._generation.shared
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        if task_ids is not None:
            binding.bind_cpu_input("task_ids", task_ids)
        logits = self._logits.get(len(ids)) if shared else None
        if logits is None:
            binding.bind_output(LOGITS)
        else:
            binding.bind_ortvalue_output(LOGITS, logits)
        if not (shared and past is self._bound):
            for tensor, value in zip(cache, past, strict=True):
                binding.bind_ortvalue_input(tensor.past.name, value)
                if shared:
                    binding.bind_ortvalue_output(tensor.present, value)
                else:
                    binding.bind_output(tensor.present)
        self._bound = past
        try:
            self._session.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            raise DataError(
                f"the model cannot run on these inputs: {str(error).strip()}",
                there_is=f"input_ids {list(ids.shape)} after {mask.shape[1] - ids.shape[1]} tokens",
            ) from error
        present: list[OrtValue] = []
        if logits is None:
            logits, *present = binding.get_outputs()
            self._logits[len(ids)] = logits
        return logits.numpy()[:, -1].copy(), present  # its memory goes with the OrtValue

    def empty(self) -> list[OrtValue]:
        """The cache of one row that has read nothing."""
        return [
            OrtValue.ortvalue_from_numpy(np.zeros(t.shape(batch=1, past=0), t.past.dtype))
            for t in self._generation.cache
        ]
