"""A session behind the queue: requests are checked and made ready at the door, alone; then they run together.

A batch that fails runs again one request at a time, so that nobody is answered for another's fault.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from surgeon.errors import DataError, SpecError
from surgeon.runtime import Manifest, Session, TaskInfo
from surgeon.runtime.answers import LOGITS, answers
from surgeon.runtime.feeds import SEQUENCE, complete
from surgeon.runtime.taskfile import Array
from surgeon.runtime.text import Text
from surgeon.server.faults import TOO_LARGE, Fault, unknown
from surgeon.server.gathering import Gatherer, Job, Outputs, answer, fail
from surgeon.server.joining import find_padding, form_of, join, length_of
from surgeon.server.limits import Limits

TEXT = "text"
LABEL, SCORE = "label", "score"
BASE = "base"
"""The name that asks for no task."""
TRIES = 3
"""How often a request runs whose task is replaced meanwhile."""

Seen = Callable[[Sequence[Job], float], None]


class Answering:
    """Requests in, outputs out. All methods may be called from many threads."""

    def __init__(
        self, session: Session, limits: Limits, *, resident: int, runners: int = 1, seen: Seen | None = None
    ) -> None:
        self.session, self.limits = session, limits
        self._manifest = session.manifest
        self._padding = find_padding(session)
        self._seen = seen
        self.mixed = "mixed" in self._manifest.modes
        self.queue = Gatherer(
            self._run,
            limits,
            tasks=resident if self.mixed else 1,
            room=self._manifest.base.max_length,
            threads=runners,
        )

    @property
    def classifies(self) -> bool:
        """Whether rows are classes, so that answers have a label and a score."""
        return classifies(self._manifest)

    def info(self, name: str | None) -> TaskInfo | None:
        """What is known of a task; None for the base. Raises SpecError where there is none."""
        return None if name is None else self.session.task(name)

    def admit(self, inputs: Mapping[str, Array], task: str | None, deadline: float) -> Job:
        """Make a request ready: texts become ids, what may be absent is filled in, all of it is checked."""
        info = self.info(task)
        if TEXT in inputs:
            if len(inputs) > 1:
                raise DataError(f"the request has '{TEXT}' and other inputs", try_=f"'{TEXT}' alone, or ids alone")
            inputs = self.session.encode(read_texts(inputs[TEXT]), task=task)
        taken = {} if info is None else info.sizes
        arrays = complete(
            self._manifest.inputs,
            inputs,
            self._manifest.base.max_length,
            lambda axis: self._manifest.taken(taken, axis),
        )
        rows = {len(array) for array in arrays.values()}
        if max(rows) > self.limits.rows:
            raise Fault(TOO_LARGE, f"the request has {max(rows)} rows, and {self.limits.rows} are the most")
        return Job(
            task=task,
            arrays=arrays,
            rows=max(rows),
            length=length_of(arrays),
            taken=self._manifest.taken(taken, SEQUENCE),
            form=form_of(self._manifest, arrays, self._padding),
            deadline=deadline,
        )

    def _run(self, jobs: Sequence[Job]) -> None:
        begun = time.monotonic()
        if self._seen is not None:
            self._seen(jobs, begun)
        try:
            found = self._together(jobs)
        except Exception as error:
            if len(jobs) == 1:
                fail(jobs[0], self._told(jobs[0], error))
                return
            for job in jobs:
                try:
                    [alone] = self._together([job])
                except Exception as own:
                    fail(job, self._told(job, own))
                else:
                    answer(job, alone)
            return
        for job, outputs in zip(jobs, found, strict=True):
            answer(job, outputs)

    def _together(self, jobs: Sequence[Job], tries: int = TRIES) -> list[Outputs]:
        """The outputs of every job. One whose task was replaced while it ran, runs again alone."""
        before = {job.task: self.info(job.task) for job in jobs}
        found = self._once(jobs)
        for i, job in enumerate(jobs):
            if tries > 1 and self._changed(job.task, before[job.task]):
                [found[i]] = self._together([job], tries - 1)
            elif self.classifies:
                found[i] |= _labels(found[i], before[job.task])
        return found

    def _told(self, job: Job, error: Exception) -> Exception:
        """What a job hears: a task that was removed while it waited is an unknown one."""
        try:
            self.info(job.task)
        except SpecError as gone:
            return unknown(gone)
        return error

    def _changed(self, task: str | None, before: TaskInfo | None) -> bool:
        try:
            return self.info(task) is not before
        except SpecError:  # removed: what ran is what was asked for
            return False

    def _once(self, jobs: Sequence[Job]) -> list[Outputs]:
        inputs = join([job.arrays for job in jobs], self._padding)
        ends = np.cumsum([job.rows for job in jobs])[:-1]
        if len({job.task for job in jobs}) == 1:
            outputs = self.session.run(inputs, jobs[0].task)
            parts = {name: np.split(array, ends) for name, array in outputs.items()}
            return [{name: arrays[i] for name, arrays in parts.items()} for i in range(len(jobs))]
        rows = iter(self.session.run(inputs, [job.task for job in jobs for _ in range(job.rows)]))
        return [_stacked([next(rows) for _ in range(job.rows)]) for job in jobs]


def classifies(manifest: Manifest) -> bool:
    """Whether a build's rows are classes."""
    return any(port.name == LOGITS and len(port.axes) == 2 for port in manifest.outputs)


def read_texts(array: Array) -> list[Text]:
    """Texts `[n]`, or pairs of texts `[n, 2]`. Raises DataError."""
    if array.dtype != object:
        raise DataError(f"input '{TEXT}' is not of datatype BYTES")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if not (array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 2)):
        raise DataError(f"input '{TEXT}' has shape {list(array.shape)}", there_is="[n] for texts, [n, 2] for pairs")
    try:
        rows = [bytes(value).decode() for value in array.ravel()]
    except UnicodeDecodeError as error:
        raise DataError(f"input '{TEXT}' is not UTF-8") from error
    return list(rows) if array.ndim == 1 else list(zip(rows[::2], rows[1::2], strict=True))


def _labels(outputs: Outputs, info: TaskInfo | None) -> Outputs:
    found = answers(outputs, None if info is None else info.labels)
    labels = np.empty(len(found), object)
    labels[:] = [one.label.encode() for one in found]
    return {LABEL: labels, SCORE: np.array([one.score for one in found], np.float32)}


def _stacked(rows: Sequence[Mapping[str, Array]]) -> Outputs:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
