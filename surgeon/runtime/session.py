"""The runtime's door: a build opened for answers. One session holds the base once, and swaps tasks per call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from surgeon.errors import DataError, SpecError
from surgeon.runtime.answers import Answer, answers, by_length
from surgeon.runtime.document import read_manifest
from surgeon.runtime.engine import Fusions, Provider, open_model
from surgeon.runtime.feeds import SEQUENCE, complete
from surgeon.runtime.files import check_files
from surgeon.runtime.generation import Listener, Prompt, Written, check_beams
from surgeon.runtime.graphs import Graphs
from surgeon.runtime.manifest import MODEL, Manifest
from surgeon.runtime.mixed import PerRow, rows_of
from surgeon.runtime.reading import Reader
from surgeon.runtime.store import TaskStore
from surgeon.runtime.table import TaskTable
from surgeon.runtime.taskfile import Array
from surgeon.runtime.tasks import RunnableTask, TaskInfo
from surgeon.runtime.text import Text, check_texts
from surgeon.runtime.texts import Texts


class Session:
    """A build on ONNX Runtime. All methods may be called from many threads at once.

    `threads` limits ONNX Runtime's threads per call; `providers` are its execution providers (default: CPU).
    With `verify` (the default) all files are hashed and held in memory, so that no later change of the directory
    matters; without, the directory is trusted and the base's weights are mapped from it. Tasks are always checked.
    `fusions` names graph optimizers of ONNX Runtime to leave out; "all" leaves out none.
    Of a build with the mode `mixed`, `resident` tasks (and `resident_bytes` of them, where given) are at hand at once
    for batches of several tasks; others come in when they are named, for those used longest ago.
    With a `store`, a folder or URL of task files (or a `TaskStore`), a task that is named is looked for there first, as
    it is at that moment; `resident` of them are held, too. Tasks are then added to the store and removed from it.
    With `mixed`, a build of that mode has only the graph of several tasks opened, which serves batches of one task too:
    the base's weights are in memory once.
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
        store: str | Path | TaskStore | None = None,
        mixed: bool = False,
    ) -> None:
        if isinstance(fusions, str) and fusions != "all":
            raise SpecError(f"fusions is 'all' or a list of names, not '{fusions}'", try_=f"fusions=['{fusions}']")
        if not isinstance(resident, int) or resident < 1 or (resident_bytes is not None and resident_bytes < 1):
            raise SpecError("resident and resident_bytes are numbers from 1", there_is=f"{resident}, {resident_bytes}")
        self._build, self._fusions, self._bounds = Path(build), fusions, (resident, resident_bytes)
        self._manifest = read_manifest(self._build)
        self._reader = Reader(self._build, self._manifest, verify=verify)
        if store is not None and not isinstance(store, TaskStore):
            store = TaskStore(store, self._manifest)
        self._table = TaskTable(self._build, self._manifest, verify=verify, store=store, limits=self._bounds)
        opening = partial(open_model, threads=threads, providers=providers, verify=verify, fusions=fusions)
        try:
            self._graphs = Graphs(self._build, self._manifest, opening, self._table.private, self._bounds, mixed=mixed)
        except BaseException:
            self._table.close()
            raise
        self._texts = Texts(self._manifest, self._reader, self._table, self._graphs)

    @classmethod
    def tuned(
        cls,
        build: str | Path,
        *,
        shape: tuple[int, int] = (1, 64),
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
        **options: Any,
    ) -> Self:
        """Open a build with those of ONNX Runtime's fusions that a short measurement on this machine favours.

        `shape` is the batch and length that matter to you; `options` are the session's others. It takes a second or
        two, and another copy of the base meanwhile; `fusions` of the session tells the outcome.
        """
        from surgeon.runtime.tuning import faster_without

        manifest = read_manifest(build)
        check_files(build, manifest, [name for name in manifest.files if name.startswith(MODEL)])
        fusions = faster_without(Path(build), manifest, threads=threads, providers=providers, shape=shape)
        return cls(build, threads=threads, providers=providers, fusions=fusions or "all", **options)

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
        return self._table.infos

    def task(self, name: str) -> TaskInfo:
        """What is known of one task, which is at hand from then on. Raises SpecError for an unknown one."""
        task = self._table.find(name)
        if task is None:
            raise SpecError("the base is no task")
        return task.info

    def names(self) -> list[str]:
        """The names of all tasks of this moment."""
        return list(self._table.infos)

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
            self._graphs.open_several()
            names, numbers = rows_of(task, rows, self._count(inputs))
            own = [self._table.find(name, drop if name is not None else 0) for name in names]
            return self._run_rows(inputs, own, numbers)
        if rows is not None:
            raise SpecError("rows need a task each", try_="task=['a', 'b', …], as many as there are rows")
        return self._run(inputs, self._table.find(task, drop))

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
        task, former = self._table.add(Path(path), name, labels, replace=replace)
        self._graphs.forget(former)
        return task.info

    def remove_task(self, name: str) -> None:
        """Remove a task. Runs that use it end with it."""
        self._graphs.forget(self._table.remove(name))

    def encode(
        self, texts: Sequence[Text], max_length: int | None = None, task: str | Sequence[str | None] | None = None
    ) -> dict[str, Array]:
        """Inputs for `run` from texts or pairs of texts, padded to the longest, cut to what the base takes.

        With a `task`, or several, cut to what is left beside tokens of the task's own, such as a prompt.
        """
        names = [task] if task is None or isinstance(task, str) else task
        return self._encode(texts, max_length, [self._table.find(name) for name in names])

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
        active = {name: self._table.find(name, drop if one or name is not None else 0) for name in dict.fromkeys(names)}

        def answer(part: Sequence[int]) -> list[Answer]:
            own = [active[names[i]] for i in part]
            inputs = self._encode([texts[i] for i in part], max_length, own)
            if one:
                return answers(self._run(inputs, own[0]), self._labels(own[0]))
            rows = zip(own, self._run_rows(inputs, own, range(len(part))), strict=True)
            return [answers({name: array[None] for name, array in row.items()}, self._labels(t))[0] for t, row in rows]

        return by_length(texts, batch, answer)

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the tasks at hand that others may take the place of, the one used longest ago first: those in the
        bank of mixed batches, and those of a store.
        """
        return tuple(dict.fromkeys((*self._table.held, *self._graphs.resident)))

    def generate(
        self,
        prompts: Sequence[Prompt],
        task: str | Sequence[str | None] | None = None,
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
        beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
    ) -> list[Written]:
        """What the model writes after each prompt, or of each source, by a build with `generate: true`.

        A prompt is a text, token ids, or a conversation: messages with a `role` and a `content`, to which the base's
        own template gives its form.

        With `temperature` 0 every token is the likeliest; above, it is drawn from the `top_k` likeliest and from the
        fewest that have `top_p` together. Row i draws by `seed` + i, so that no row depends on its neighbours. A row
        ends at the model's own end, before a `stop` string, after `max_new_tokens`, or where the base has no positions
        left. `stream(i, piece)` is called as row i goes on. `batch` rows go on together; one that ends gives its place
        to the next. `drop` is as in `run`. `task` is one for all, or a list of one for each prompt: rows of several
        tasks go on together by the mode `mixed`.

        To an encoder-decoder a prompt is its source, and `batch` texts end before the next begin. With `beams` it
        searches for the text with the highest sum of log probabilities over length**`length_penalty`;
        `early_stopping` ends the search as soon as so many texts have ended.
        """
        rows = self.texts.prepare(
            prompts,
            task,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            seed=seed,
            stream=stream,
            drop=drop,
        )
        search = check_beams(
            beams,
            length_penalty,
            early_stopping,
            drawn=temperature > 0,
            stop=stop,
            stream=stream,
            decoder=self._manifest.goes_on,
        )
        return self.texts.write(rows, each=isinstance(task, list | tuple), batch=batch, beams=search)

    @property
    def texts(self) -> Texts:
        """The parts of `generate`: rows made ready, and a writer that others may come to while it writes."""
        self._graphs.check_open()
        return self._texts

    def close(self) -> None:
        """Let go of the model and the tasks. Runs under way end undisturbed; later ones raise BuildError."""
        self._graphs.close()
        self._table.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _run(self, inputs: Mapping[str, Any], active: RunnableTask | None) -> dict[str, Array]:
        return self._graphs.run(self._complete(inputs, [active]), active)

    def _run_rows(
        self, inputs: Mapping[str, Any], tasks: Sequence[RunnableTask | None], rows: Sequence[int]
    ) -> list[dict[str, Array]]:
        return self._graphs.run_rows(self._complete(inputs, tasks), tasks, rows)

    def _complete(self, inputs: Mapping[str, Any], tasks: Sequence[RunnableTask | None]) -> dict[str, Array]:
        self._graphs.check_open()
        return complete(self._manifest.inputs, inputs, self._manifest.base.max_length, partial(self._most, tasks))

    def _encode(
        self, texts: Sequence[Text], max_length: int | None, tasks: Sequence[RunnableTask | None]
    ) -> dict[str, Array]:
        self._graphs.check_open()
        return self._reader.encode(texts, max_length, self._most(tasks, SEQUENCE))

    def _count(self, inputs: Mapping[str, Any]) -> int:
        """Texts in a batch; `complete` tells what is wrong where there are none."""
        first = self._manifest.inputs[0].name
        return len(inputs[first]) if isinstance(inputs, Mapping) and isinstance(inputs.get(first), Sized) else 0

    def _most(self, tasks: Sequence[RunnableTask | None], axis: str) -> int:
        """Positions of an axis that the tokens of these tasks take at most."""
        return max((self._manifest.taken(task.info.sizes, axis) for task in tasks if task is not None), default=0)

    def _labels(self, task: RunnableTask | None) -> Sequence[str] | None:
        """Names of the classes; of the base's own where the task brings no head."""
        own = None if task is None else task.info.labels
        return self._manifest.base.labels if own is None and (task is None or task.info.columns is None) else own
