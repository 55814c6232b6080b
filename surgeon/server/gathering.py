"""The queue: requests wait a moment for others, and go on in batches. What is over its limit is refused at the door."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from surgeon.runtime.taskfile import Array
from surgeon.server.faults import BUSY, LATE, UNAVAILABLE, Fault
from surgeon.server.limits import Limits

Outputs = dict[str, Array]

LOOK = 8
"""How far behind the first a batch looks for its jobs, in batches."""


@dataclass(eq=False)
class Job:
    """A request that waits: its rows, ready to run. `form` is what its batch must have in common."""

    task: str | None
    arrays: Mapping[str, Array]
    rows: int
    length: int
    taken: int
    form: Hashable
    deadline: float
    since: float = field(default_factory=time.monotonic)
    future: Future[Outputs] = field(default_factory=Future)


@dataclass(frozen=True)
class Load:
    """The queue at one moment."""

    waiting: int
    running: int


class Gatherer:
    """Threads that take batches from one queue. `run` answers a batch by setting every job's future.

    A job may stand in a batch with others of its form, of like length, and of as many tasks as can be at hand at once.
    The first of the queue always goes first, so none is overtaken for ever.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], None],
        limits: Limits,
        *,
        tasks: int,
        room: int | None,
        threads: int = 1,
    ) -> None:
        self._run, self._limits, self._tasks, self._room = run, limits, tasks, room
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._rows, self._running = 0, 0
        self._threads = [
            threading.Thread(target=self._work, name=f"surgeon-batches-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def load(self) -> Load:
        """Rows that wait and rows that run."""
        return Load(self._rows, self._running)

    @property
    def closed(self) -> bool:
        """Whether nothing more is taken in."""
        return self._closed

    def submit(self, job: Job) -> Future[Outputs]:
        """Take a job in. Raises Fault where the queue is full or the server ends."""
        with self._changed:
            if self._closed:
                raise Fault(UNAVAILABLE, "the server is stopping", try_="another replica, or later")
            if self._rows and self._rows + job.rows > self._limits.queue:
                raise Fault(
                    BUSY, "too many requests wait", there_is=f"{self._rows} rows in the queue", try_="again in a moment"
                )
            self._queue.append(job)
            self._rows += job.rows
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Take nothing more in, and answer what is there."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                self._wait_for_others()
                batch = self._take()
                rows = sum(job.rows for job in batch)
                self._running += rows
            try:
                if batch:
                    self._run(batch)
            except Exception as error:  # whoever waits must hear of it
                for job in batch:
                    fail(job, error)
            finally:
                with self._changed:
                    self._running -= rows

    def _wait_for_others(self) -> None:
        """Until the batch is full, the first has waited long enough, or another thread took it."""
        while self._queue and not self._closed and self._rows < self._limits.batch:
            left = self._queue[0].since + self._limits.wait - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)

    def _take(self) -> list[Job]:
        """The first job, and those near it in the queue that may stand with it."""
        batch = Batch(self._limits, self._tasks, self._room)
        passed: list[Job] = []
        now = time.monotonic()
        while self._queue and not batch.full and len(passed) < LOOK * self._limits.batch:
            job = self._queue.popleft()
            if job.future.cancelled() or job.deadline < now:
                self._rows -= job.rows
                fail(job, late())
            elif batch.takes(job):
                self._rows -= job.rows
            else:
                passed.append(job)
        self._queue.extendleft(reversed(passed))
        return batch.jobs


class Batch:
    """Jobs that run together."""

    def __init__(self, limits: Limits, tasks: int, room: int | None) -> None:
        self.jobs: list[Job] = []
        self._limits, self._most, self._room = limits, tasks, room
        self._tasks: set[str | None] = set()
        self._rows, self._longest, self._shortest, self._taken = 0, 0, 0, 0

    @property
    def full(self) -> bool:
        """Whether no other can come in."""
        return self._rows >= self._limits.batch

    def takes(self, job: Job) -> bool:
        """Take a job in if it may stand here; the first always may."""
        rows = self._rows + job.rows
        longest, taken = max(self._longest, job.length), max(self._taken, job.taken)
        shortest = min(self._shortest, job.length) if self.jobs else job.length
        tasks = self._tasks | {job.task}
        fits = not self.jobs or (
            job.form == self.jobs[0].form
            and rows <= self._limits.batch
            and rows * longest <= self._limits.tokens
            and longest <= 2 * shortest + 16  # padding costs as much as text
            and len(tasks) <= self._most
            and (self._room is None or longest + taken <= self._room)
        )
        if fits:
            self.jobs.append(job)
            self._rows, self._longest, self._shortest, self._taken = rows, longest, shortest, taken
            self._tasks = tasks
        return fits


def late() -> Fault:
    """A request whose time is over."""
    return Fault(LATE, "there was no answer within the deadline", try_="again, or with a longer one")


def fail(job: Job, error: Exception) -> None:
    """Tell a job's waiter, unless it went away or knows already."""
    try:
        job.future.set_exception(error)
    except InvalidStateError:
        return


def answer(job: Job, outputs: Outputs) -> None:
    """Give a job its outputs, unless its waiter went away."""
    try:
        job.future.set_result(outputs)
    except InvalidStateError:
        return
