"""What a session writes: prompts become rows, and rows go on together, of one task or a task each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from onnxruntime import OrtValue

from surgeon.errors import DataError, SpecError
from surgeon.runtime.bank import Bank
from surgeon.runtime.generation import (
    Aligned,
    Beams,
    Decoding,
    Groups,
    Halves,
    Listener,
    OneTask,
    OneTaskHalves,
    Prompt,
    Row,
    Slots,
    TaskPerRowHalves,
    Together,
    Writer,
    Written,
    ask,
    check_counts,
    check_list,
    choice,
    follow,
    search,
    write,
)
from surgeon.runtime.graphs import Graphs
from surgeon.runtime.manifest import MIXED_ENCODER, Generation, Manifest
from surgeon.runtime.reading import Reader
from surgeon.runtime.table import TaskTable
from surgeon.runtime.taskfile import Array
from surgeon.runtime.tasks import RunnableTask

GROUPS = 2
"""Groups of an encoder-decoder's texts that go on side by side, where texts come at any time."""
TaskEach = str | Sequence[str | None] | None
"""A task for all prompts, or one for each; None is the base."""


class Texts:
    """The writing side of a session. All methods may be called from many threads."""

    def __init__(self, manifest: Manifest, reader: Reader, table: TaskTable, graphs: Graphs) -> None:
        self._manifest, self._reader, self._table, self._graphs = manifest, reader, table, graphs

    def prepare(
        self,
        prompts: Sequence[Prompt],
        task: TaskEach = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        stream: Listener | None = None,
        drop: int = 0,
    ) -> list[Row]:
        """Rows that a writer may take, as `Session.generate` would write them. Raises as it does."""
        check_list(prompts)
        tasks = self._tasks(task, len(prompts), drop)
        chosen = choice(temperature, top_k, top_p, repetition_penalty)
        stops = check_counts(max_new_tokens=max_new_tokens, seed=seed, stop=stop)
        source = self._generation.source
        return ask(
            prompts,
            self._reader,
            tasks=tasks,
            room=self._manifest.base.max_length,
            taken=lambda own, axis: 0 if own is None else self._manifest.taken(own.info.sizes, axis),
            start=None if source is None else source.start,
            choice=chosen,
            limit=max_new_tokens,
            seed=seed,
            stop=stops,
            stream=stream,
        )

    def writer(self, batch: int = 8, failed: Callable[[Row, Exception], None] | None = None) -> Writer:
        """Rows of any tasks that go on together, of a build with the mode `mixed`; others may come in meanwhile.

        A text of an encoder-decoder goes on beside those it began with; of such groups there are two at most, and who
        comes then waits for one to end. Raises SpecError where the build does not write texts, or those of one task
        at a time.
        """
        generation = self._generation
        if generation.source is None:
            return Writer(self._several(batch), generation, batch, failed)
        bank = self._graphs.open_bank()
        if MIXED_ENCODER not in self._manifest.files:
            raise SpecError("this build writes the texts of one task at a time", try_="compile it anew")
        return Writer(Groups(self._per_row(bank), generation, GROUPS), generation, batch, failed)

    def write(self, rows: Sequence[Row], *, each: bool, batch: int, beams: Beams | None = None) -> list[Written]:
        """Write rows to their ends, `batch` at a time; without `each` all are of one task."""
        check_counts(batch=batch)
        generation = self._generation
        if beams is None:
            for own, together in self._together(rows, each=each, batch=batch):
                write(own, Writer(together, generation, batch))
        else:
            for own, halves in self._halves(rows, each=each):
                for start in range(0, len(own), batch):
                    search(own[start : start + batch], halves(), generation, beams)
        return [row.written for row in rows]

    def follow(self, prompts: Sequence[Prompt], texts: Sequence[Sequence[int]], task: TaskEach = None) -> Array:
        """The logits `[rows, 1 + tokens, vocabulary]` after each prompt, and after every token of a text that is given
        to it: what `generate` chooses from where it has written so. Texts are equally long. Raises as `generate`.
        """
        lengths = sorted({len(text) for text in texts})
        if len(texts) != len(prompts) or len(lengths) != 1:
            raise DataError("texts are equally long, one for every prompt", there_is=f"{len(texts)}, long {lengths}")
        rows = self.prepare(prompts, task, max_new_tokens=lengths[0] + 1)
        if short := [row for row in rows if row.limit <= lengths[0]]:
            raise DataError(f"the base has positions for {short[0].limit - 1} tokens behind prompt {short[0].number}")
        found: dict[int, Array] = {}
        for own, together in self._together(rows, each=isinstance(task, list | tuple), batch=len(rows)):
            numbers = [row.number for row in own]
            found |= zip(numbers, follow(own, [texts[i] for i in numbers], together), strict=True)
        return np.stack([found[i] for i in range(len(rows))])

    def _together(self, rows: Sequence[Row], *, each: bool, batch: int) -> Iterator[tuple[Sequence[Row], Together]]:
        """Rows that may go on together, and how they do."""
        generation = self._generation
        if generation.source is not None:
            for own, halves in self._halves(rows, each=each):
                yield own, Groups(halves, generation)
        elif each or self._graphs.alone:
            yield rows, self._several(batch, rows)
        else:
            for own, deltas in _by_task(rows):
                one = OneTask(self._graphs.single.session, self._manifest, generation, deltas)
                yield own, _side_by_side(one, generation, batch, own)

    def _several(self, batch: int, expected: Sequence[Row] = ()) -> Slots | Aligned:
        """Rows of a decoder, of any tasks."""
        return _side_by_side(self._graphs.open_several().decoding(), self._generation, batch, expected)

    def _halves(self, rows: Sequence[Row], *, each: bool) -> Iterator[tuple[list[Row], Callable[[], Halves]]]:
        """Rows of an encoder-decoder that may go on together, and what they go on with."""
        if (each or self._graphs.alone) and MIXED_ENCODER in self._manifest.files:
            bank = self._graphs.open_bank()
            if bank.holds({row.task for row in rows if row.task is not None}):
                yield list(rows), self._per_row(bank)
                return
        for own, deltas in _by_task(rows):
            yield own, partial(OneTaskHalves, self._graphs.open_pair(), self._generation, deltas)

    def _per_row(self, bank: Bank) -> Callable[[], Halves]:
        pair = self._graphs.open_pair(several=True)
        return partial(TaskPerRowHalves, pair, self._manifest, self._generation, bank)

    @property
    def _generation(self) -> Generation:
        if self._manifest.generation is None:
            raise SpecError("this build does not write texts", try_="compile it with `export: {generate: true}`")
        return self._manifest.generation

    def _tasks(self, task: TaskEach, count: int, drop: int) -> list[RunnableTask | None]:
        if task is None or isinstance(task, str):
            return [self._table.find(task, drop)] * count
        names = list(task)
        if len(names) != count:
            raise DataError(f"there are {len(names)} tasks for {count} prompts", try_="a task for every prompt")
        found = {name: self._table.find(name, drop if name is not None else 0) for name in dict.fromkeys(names)}
        return [found[name] for name in names]


def _by_task(rows: Sequence[Row]) -> Iterator[tuple[list[Row], Mapping[str, OrtValue]]]:
    """The rows of each task, and the tensors of that."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(id(row.task), []).append(row)
    for own in found.values():
        yield own, {} if own[0].task is None else own[0].task.values()


def _side_by_side(
    decoding: Decoding, generation: Generation, batch: int, expected: Sequence[Row] = ()
) -> Slots | Aligned:
    """How rows of a decoder stand together, as its graph keeps its cache."""
    return Slots(decoding, generation, batch, expected) if generation.shared else Aligned(decoding)
