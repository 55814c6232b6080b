"""The runtime's door: a build opened for answers. One session holds the base once, and swaps tasks per call."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, overload

import numpy as np
from onnxruntime import InferenceSession, RunOptions

from surgeon.errors import BuildError, DataError, SpecError, did_you_mean, shorten
from surgeon.runtime.answers import Answer, answers
from surgeon.runtime.engine import WARNING, Fusions, Provider, open_model
from surgeon.runtime.feeds import SEQUENCE, complete
from surgeon.runtime.generation import Listener, Prompt, Written, check_counts, choice, write
from surgeon.runtime.generation.asking import check_prompts, is_chat, make_rows, read_prompts
from surgeon.runtime.generation.chat import Chat
from surgeon.runtime.manifest import (
    MODEL,
    TEMPLATE,
    TOKENIZER,
    Manifest,
    check_files,
    read_file,
    read_manifest,
)
from surgeon.runtime.mixed import MixedGraph, PerRow, open_mixed, rows_of
from surgeon.runtime.ort import ORT_ERRORS
from surgeon.runtime.taskfile import Array
from surgeon.runtime.tasks import RunnableTask, TaskInfo, load_task, name_of
from surgeon.runtime.text import Text, Texts, check_texts, length, read_texts


class Session:
    """A build on ONNX Runtime. All methods may be called from many threads at once.

    `threads` limits ONNX Runtime's threads per call; `providers` are its execution providers (default: CPU).
    With `verify` (the default) all files are hashed and held in memory, so that no later change of the directory
    matters; without, the directory is trusted and the base's weights are mapped from it. Tasks are always checked.
    `fusions` names graph optimizers of ONNX Runtime to leave out; "all" leaves out none.
    Of a build with the mode `mixed`, `resident` tasks (and `resident_bytes` of them, where given) are at hand at once
    for batches of several tasks; others come in when they are named, for those used longest ago.
    """

    def __init__(
        self,
        build: str | Path,
        *,
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
        verify: bool = True,
        fusions: Fusions = "all",
        resident: int = 64,
        resident_bytes: int | None = None,
    ) -> None:
        if isinstance(fusions, str) and fusions != "all":
            raise SpecError(f"fusions is 'all' or a list of names, not '{fusions}'", try_=f"fusions=['{fusions}']")
        if not isinstance(resident, int) or resident < 1 or (resident_bytes is not None and resident_bytes < 1):
            raise SpecError("resident and resident_bytes are numbers from 1", there_is=f"{resident}, {resident_bytes}")
        self._bounds = (resident, resident_bytes)
        self._opening = partial(open_model, threads=threads, providers=providers, verify=verify, fusions=fusions)
        self._mixed: MixedGraph | None = None
        self._build = Path(build)
        self._manifest = read_manifest(self._build)
        self._verify, self._fusions = verify, fusions
        self._lock, self._mixing = threading.Lock(), threading.Lock()
        self._texts: Texts | None = None
        self._tasks: Mapping[str, RunnableTask] = {}
        self._session: InferenceSession | None = self._opening(self._build, self._manifest)
        self._private = Path(tempfile.mkdtemp(prefix="surgeon-"))
        self._cleanup = weakref.finalize(self, shutil.rmtree, self._private, ignore_errors=True)
        generation = self._manifest.generation
        self._cache = () if generation is None else generation.cache
        inside = {tensor.present for tensor in self._cache}
        self._outputs = [port.name for port in self._manifest.outputs if port.name not in inside]
        try:
            self._tasks = {
                task.name: load_task(
                    self._manifest,
                    self._build / task.adapter,
                    self._private,
                    name=task.name,
                    labels=task.labels,
                    sha256=task.adapter_sha256 if verify else None,
                )
                for task in self._manifest.tasks.values()
            }
        except BaseException:
            self.close()
            raise

    @classmethod
    def tuned(
        cls,
        build: str | Path,
        *,
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
        shape: tuple[int, int] = (1, 64),
    ) -> Self:
        """Open a build with those of ONNX Runtime's fusions that a short measurement on this machine favours.

        `shape` is the batch and length that matter to you. It takes a second or two, and another copy of the base
        meanwhile; `fusions` of the session tells the outcome.
        """
        from surgeon.runtime.tuning import faster_without

        manifest = read_manifest(build)
        check_files(build, manifest, [name for name in manifest.files if name.startswith(MODEL)])
        fusions = faster_without(Path(build), manifest, threads=threads, providers=providers, shape=shape)
        return cls(build, threads=threads, providers=providers, fusions=fusions or "all")

    @property
    def fusions(self) -> Fusions:
        """The graph optimizers left out, or "all" if none is."""
        return self._fusions

    @property
    def manifest(self) -> Manifest:
        """What the build says of itself."""
        return self._manifest

    @property
    def tasks(self) -> Mapping[str, TaskInfo]:
        """The tasks of this moment, by name. Later changes do not show in the mapping."""
        return MappingProxyType({name: task.info for name, task in self._tasks.items()})

    @overload
    def run(self, inputs: Mapping[str, Any], task: str | None = None, *, drop: int = 0) -> dict[str, Array]: ...

    @overload
    def run(
        self, inputs: Mapping[str, Any], task: PerRow, *, rows: Sequence[int] | None = None, drop: int = 0
    ) -> list[dict[str, Array]]: ...

    def run(
        self,
        inputs: Mapping[str, Any],
        task: str | PerRow | None = None,
        *,
        rows: Sequence[int] | None = None,
        drop: int = 0,
    ) -> dict[str, Array] | list[dict[str, Array]]:
        """The graph's outputs by name, as `task` gives them; without one, exactly the base's.

        A list of tasks, of a build with the mode `mixed`, gives a list of rows, each as its task alone answers its
        text: a task for every text (None is the base), a list of tasks for every text, or a task for every one of
        `rows`, which are numbers of texts. What no task changes on a text's way is computed once.

        `drop` leaves out the task's adapters in so many of the lowest layers (AdapterDrop, arXiv:2010.11918).

        Inputs are numpy arrays (or lists) by name, a batch each. What has a neutral value, as a mask of ones, may be
        absent. Raises DataError for inputs that do not fit, SpecError for an unknown task.
        """
        if isinstance(task, list | tuple):
            self._open_mixed()
            names, numbers = rows_of(task, rows, self._count(inputs))
            return self._run_rows(inputs, [self._task(n, drop if n is not None else 0) for n in names], numbers)
        if rows is not None:
            raise SpecError("rows need a task each", try_="task=['a', 'b', …], as many as there are rows")
        return self._run(inputs, self._task(task, drop))

    def add_task(
        self,
        path: str | Path,
        name: str | None = None,
        labels: Sequence[str] | None = None,
        *,
        replace: bool = False,
    ) -> TaskInfo:
        """Add a task from an `.onnx_adapter` file; runs may go on meanwhile. It shows only once all of it is checked.

        The name defaults to the file's. With `replace`, a task of that name gives way; runs that use it end with it.
        """
        self._open()
        path = Path(path)
        name = name_of(path) if name is None else name
        if isinstance(labels, str):
            raise SpecError("labels are a list of names", try_=f"labels=['{labels}', …]")
        task = load_task(self._manifest, path, self._private, name=name, labels=labels)
        with self._lock:
            self._open()
            if name in self._tasks and not replace:
                raise SpecError(
                    f"there is a task '{name}' already",
                    there_is=shorten(self._tasks),
                    try_="give it another name, or say replace=True",
                )
            former = self._tasks.get(name)
            self._tasks = {**self._tasks, name: task}
        self._forget(former)
        return task.info

    def remove_task(self, name: str) -> None:
        """Remove a task. Runs that use it end with it."""
        with self._lock:
            former = self._task(name)
            self._tasks = {other: task for other, task in self._tasks.items() if other != name}
        self._forget(former)

    def encode(
        self, texts: Sequence[Text], max_length: int | None = None, task: str | Sequence[str | None] | None = None
    ) -> dict[str, Array]:
        """Inputs for `run` from texts or pairs of texts, padded to the longest, cut to what the base takes.

        With a `task`, or several, cut to what is left beside tokens of the task's own, such as a prompt.
        """
        names = [task] if task is None or isinstance(task, str) else task
        return self._encode(texts, max_length, [self._task(name) for name in names])

    def classify(
        self,
        texts: Sequence[Text],
        task: str | Sequence[str | None] | None = None,
        *,
        batch: int = 32,
        max_length: int | None = None,
        drop: int = 0,
    ) -> list[Answer]:
        """The likeliest label of every text. Labels without names are numbered from 0. `drop` is as in `run`.

        `task` is one for all texts, or a list of one for each (of a build with the mode `mixed`).

        Texts of like length share a batch, so that little is spent on padding; answers come in the order of the texts.
        """
        check_texts(texts)
        one = task is None or isinstance(task, str)
        names = [task] * len(texts) if task is None or isinstance(task, str) else list(task)
        if len(names) != len(texts):
            raise DataError(f"there are {len(names)} tasks for {len(texts)} texts", try_="a task for every text")
        active = {name: self._task(name, drop if one or name is not None else 0) for name in dict.fromkeys(names)}
        order = sorted(range(len(texts)), key=lambda i: length(texts[i]))
        found: dict[int, Answer] = {}
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            own = [active[names[i]] for i in part]
            inputs = self._encode([texts[i] for i in part], max_length, own)
            if one:
                found.update(zip(part, answers(self._run(inputs, own[0]), _labels(own[0])), strict=True))
                continue
            for i, task_, row in zip(part, own, self._run_rows(inputs, own, range(len(part))), strict=True):
                [found[i]] = answers({name: array[None] for name, array in row.items()}, _labels(task_))
        return [found[i] for i in range(len(texts))]

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the tasks at hand for batches of several tasks, the one used longest ago first."""
        mixed = self._mixed
        return () if mixed is None else mixed.bank.tasks

    def generate(
        self,
        prompts: Sequence[Prompt],
        task: str | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        stream: Listener | None = None,
        batch: int = 8,
        drop: int = 0,
    ) -> list[Written]:
        """What the model writes after each prompt, by a build with `generate: true`.

        A prompt is a text, token ids, or a conversation: messages with a `role` and a `content`, to which the base's
        own template gives its form.

        With `temperature` 0 every token is the likeliest; above, it is drawn from the `top_k` likeliest and from the
        fewest that have `top_p` together. Row i draws by `seed` + i, so that no row depends on its neighbours. A row
        ends at the model's own end, before a `stop` string, after `max_new_tokens`, or where the base has no positions
        left. `stream(i, piece)` is called as row i goes on. `batch` rows go on together; one that ends gives its place
        to the next. `drop` is as in `run`.
        """
        active = self._task(task, drop)
        chosen = choice(temperature, top_k, top_p, repetition_penalty)
        stops = check_counts(max_new_tokens=max_new_tokens, batch=batch, seed=seed, stop=stop)
        generation = self._manifest.generation
        if generation is None:
            raise SpecError("this build does not write texts", try_="compile it with `export: {generate: true}`")
        check_prompts(prompts)
        chats = any(map(is_chat, prompts))
        words = bool(stops) or stream is not None or chats or any(isinstance(prompt, str) for prompt in prompts)
        tokenizer = self._tokenizer().plain() if words or TOKENIZER in self._manifest.files else None
        room, taken = self._manifest.base.max_length, self._most([active], SEQUENCE)
        rows = make_rows(
            read_prompts(prompts, tokenizer, self._chat() if chats else None, room=room, taken=taken),
            tokenizer,
            limit=max_new_tokens,
            room=None if room is None else room - taken,
            seed=seed,
            stop=stops,
            stream=stream,
        )
        deltas = {} if active is None else active.values()
        write(rows, self._open(), self._manifest, generation, deltas, choice=chosen, batch=batch)
        return [row.written for row in rows]

    def close(self) -> None:
        """Let go of the model and the tasks. Runs under way end undisturbed; later ones raise BuildError."""
        with self._lock:
            self._session, self._mixed, self._tasks = None, None, {}
        self._cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _run(self, inputs: Mapping[str, Any], active: RunnableTask | None) -> dict[str, Array]:
        session = self._open()
        limit = self._manifest.base.max_length
        feed = complete(self._manifest.inputs, inputs, limit, partial(self._most, [active]))
        rows = next(iter(feed.values())).shape[0]
        feed |= {t.past.name: np.zeros(t.shape(batch=rows, past=0), t.past.dtype) for t in self._cache}
        options = RunOptions()
        options.log_severity_level = WARNING
        if active is not None:
            active.activate(options)
        # `active` must outlive the run: the options hold no reference to its tensors.
        try:
            outputs = session.run(self._outputs, feed, options)
        except ORT_ERRORS as error:
            raise DataError(
                f"the model cannot run on these inputs: {str(error).strip()}",
                there_is="; ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feed.items()),
            ) from error
        return dict(zip(self._outputs, outputs, strict=True))

    def _forget(self, task: RunnableTask | None) -> None:
        """Let a task that nobody can name any more give way before all others."""
        mixed = self._mixed
        if task is not None and mixed is not None:
            mixed.bank.forget(task)

    def _encode(
        self, texts: Sequence[Text], max_length: int | None, tasks: Sequence[RunnableTask | None]
    ) -> dict[str, Array]:
        self._open()
        taken, room = self._most(tasks, SEQUENCE), self._manifest.base.max_length
        if room is not None and taken:
            max_length = min(room - taken, max_length or room)
        return self._tokenizer().encode(texts, self._manifest.inputs, max_length)

    def _run_rows(
        self, inputs: Mapping[str, Any], tasks: Sequence[RunnableTask | None], rows: Sequence[int]
    ) -> list[dict[str, Array]]:
        mixed, limit = self._open_mixed(), self._manifest.base.max_length
        return mixed.run(complete(self._manifest.inputs, inputs, limit, partial(self._most, tasks)), tasks, rows)

    def _count(self, inputs: Mapping[str, Any]) -> int:
        """Texts in a batch; `complete` tells what is wrong where there are none."""
        first = self._manifest.inputs[0].name
        return len(inputs[first]) if isinstance(inputs, Mapping) and isinstance(inputs.get(first), Sized) else 0

    def _open_mixed(self) -> MixedGraph:
        """The second graph, opened by the first batch of several tasks."""
        self._open()
        mixed = self._mixed
        if mixed is not None:
            return mixed
        with self._mixing:
            if self._mixed is None:
                graph = open_mixed(self._build, self._manifest, self._private, self._opening, self._bounds)
                with self._lock:
                    self._open()
                    self._mixed = graph
            return self._mixed

    def _tokenizer(self) -> Texts:
        if self._texts is None:
            self._texts = read_texts(self._build, self._manifest, verify=self._verify)
        return self._texts

    def _chat(self) -> Chat:
        """The base's chat template. Raises BuildError where it has none."""
        generation = self._manifest.generation
        if TEMPLATE not in self._manifest.files or generation is None:
            raise BuildError(
                "this base has no chat template, so it takes no conversations",
                where=str(self._build),
                try_="prompts that are texts",
            )
        data = read_file(self._build, TEMPLATE, self._manifest.files[TEMPLATE], verify=self._verify)
        return Chat(data.decode(), generation.tokens, str(self._build / TEMPLATE))

    def _most(self, tasks: Sequence[RunnableTask | None], axis: str) -> int:
        """Positions of an axis that the tokens of these tasks take at most."""
        return max((self._manifest.taken(task.info.sizes, axis) for task in tasks if task is not None), default=0)

    def _open(self) -> InferenceSession:
        session = self._session
        if session is None:
            raise BuildError("this session is closed", where=str(self._build))
        return session

    def _task(self, name: str | None, drop: int = 0) -> RunnableTask | None:
        self._open()
        tasks = self._tasks  # one look: other threads exchange the mapping
        if name is None:
            if drop != 0:
                raise SpecError("drop leaves out adapters of a task, and no task is named", there_is=shorten(tasks))
            return None
        if name not in tasks:
            raise SpecError(
                f"there is no task '{name}'",
                there_is=shorten(tasks) or "no task; task=None is the base itself",
                try_=did_you_mean(str(name), tasks),
            )
        return tasks[name].without(self._manifest, drop)


def _labels(task: RunnableTask | None) -> Sequence[str] | None:
    return None if task is None else task.info.labels
