"""The page of `make quality`: what each technique came to, with a verdict; docs/quality.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.measure import Section, milliseconds, ratio
from benchmarks.recipes import LEFT_OUT, Recipe
from surgeon.train import TrainOptions

BASE, OURS, HEAD = "MiniLM-L6", "Surgeon", "head"


@dataclass(frozen=True)
class Setting:
    """What all runs of a table have in common."""

    rows: int
    test_rows: int
    epochs: int
    max_length: int = 64
    batch_size: int = 16

    @property
    def steps(self) -> int:
        """Of one run."""
        return self.epochs * math.ceil(self.rows / self.batch_size)

    def options(self, rate: float, seed: int, threads: int) -> TrainOptions:
        """For the one loop."""
        own = {"epochs": self.epochs, "batch_size": self.batch_size, "max_length": self.max_length}
        return TrainOptions(**own, learning_rate=rate, seed=seed, threads=threads)


@dataclass(frozen=True)
class Result:
    """One finished run."""

    technique: str
    by: str
    seed: int
    rate: float
    accuracy: float
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Runs:
    """The finished runs of a row of the table, by whose they are."""

    recipe: Recipe
    setting: Setting
    results: Mapping[str, list[Result]]

    @property
    def own(self) -> list[Result]:
        """Ours."""
        return self.results[OURS]

    @property
    def peer(self) -> list[Result]:
        """The peer's; empty where there is none."""
        return self.results.get(self.recipe.by, [])


def table(rows: list[Runs], steps: Mapping[str, Mapping[str, list[float]]], setting: Setting) -> Section:
    """A row for each technique, with a verdict."""
    text = (
        f"The demo's `movie` task on {BASE}: {setting.rows} training rows of two labels, {setting.test_rows} test "
        f"rows, {setting.epochs} epochs of batches of {setting.batch_size}, {setting.steps} steps, or the epochs that "
        f"the table says, texts cut at {setting.max_length} tokens; the last step's weights are tested. "
        "Accuracy is the mean ± standard deviation over the seeds. *Peer* is PEFT, or the base itself in plain torch "
        "with the same parameters trained; both go through the same loop with the same rows, batches, optimiser and "
        f"learning rate. A *step* is forward, backward and AdamW on {setting.batch_size} × 32 tokens with two threads, "
        "ours and the peer's in turn: medians."
        "\n\n*Above head only*: than head-only trained as long, by more than two pooled standard errors. *As the "
        "peer*: no further apart than two pooled standard errors, or than one test row."
    )
    columns = (
        "technique",
        "epochs",
        "seeds",
        "learning rate",
        "accuracy",
        "peer's",
        "trained",
        "file",
        "peer's file",
        "step",
        "step / peer's",
    )
    heads = {row.setting.epochs: row.own for row in rows if row.recipe.name == HEAD}
    cells = tuple(tuple(_row(row, heads.get(row.setting.epochs), steps[row.recipe.name])) for row in rows)
    return Section("Accuracy of every technique", text, (*columns, "above head only", "as the peer"), cells)


def _row(row: Runs, head: list[Result] | None, steps: Mapping[str, list[float]]) -> Iterator[str]:
    own, peer, by = row.own, row.peer, row.recipe.by
    yield f"`{row.recipe.name}`"
    yield str(row.setting.epochs)
    yield str(len(own))
    yield f"{row.recipe.rate:g}"
    yield _spread(own)
    yield f"{_spread(peer)} ({by})" if peer else "none"
    yield f"{own[0].parameters:,}"
    yield f"{own[0].bytes / 1e6:.2f} MB"
    yield f"{peer[0].bytes / 1e6:.2f} MB" if peer else ""
    yield milliseconds(steps[OURS])
    yield f"{ratio(steps, OURS, by):.2f}" if peer else ""
    yield "" if row.recipe.name == HEAD or head is None else _above(own, head)
    yield _like(own, peer, row.setting) if peer else ""


def _spread(results: list[Result]) -> str:
    accuracies = [r.accuracy for r in results]
    spread = f" ± {statistics.stdev(accuracies):.3f}" if len(accuracies) > 1 else ""
    return f"{statistics.mean(accuracies):.3f}{spread}"


def _difference(one: list[Result], other: list[Result]) -> tuple[float, float]:
    """Difference of the means, and twice its pooled standard error."""
    a, b = ([r.accuracy for r in side] for side in (one, other))
    if min(len(a), len(b)) < 2:
        return statistics.mean(a) - statistics.mean(b), math.nan
    squares = (len(a) - 1) * statistics.variance(a) + (len(b) - 1) * statistics.variance(b)
    pooled = squares / (len(a) + len(b) - 2)
    return statistics.mean(a) - statistics.mean(b), 2 * math.sqrt(pooled * (1 / len(a) + 1 / len(b)))


def _above(own: list[Result], head: list[Result]) -> str:
    gap, allowed = _difference(own, head)
    verdict = (
        "unknown" if math.isnan(allowed) else "yes" if gap > allowed else "within noise" if gap > -allowed else "**no**"
    )
    return f"{verdict} ({gap:+.3f})"


def _like(own: list[Result], peer: list[Result], setting: Setting) -> str:
    gap, allowed = _difference(own, peer)
    allowed = max(allowed, 1 / setting.test_rows) if not math.isnan(allowed) else allowed
    verdict = "unknown" if math.isnan(allowed) else "yes" if abs(gap) <= allowed + 1e-9 else "**no**"
    return f"{verdict} ({gap:+.3f}, noise {allowed:.3f})"


def page(section: Section) -> str:
    """docs/quality.md."""
    left = "\n".join(f"- `{name}`: {why}." for name, why in LEFT_OUT.items())
    silent = (
        "PEFT has no adapters, AdapterDrop or Compacter; its prefixes refuse a classifier under this version of "
        "transformers, so `prefix` and `p_tuning_v2` have no peer here. The classifier over virtual tokens (`prompt`, "
        "`p_tuning`) has a rate of its own, ours and the peer's alike (`HEAD_RATES` of benchmarks/recipes.py). Prompts "
        "need more steps than the other techniques (`EPOCHS` there); head-only is shown with as many. Both sides begin "
        "with one classifier, for `prompt` with the same words, and for `p_tuning` with the same tokens and encoder; "
        "what else is drawn, each draws for itself."
    )
    return f"# Quality\n\nWritten by `make quality`.\n\n{section.markdown()}\n{silent}\n\nNot in the table:\n\n{left}\n"
