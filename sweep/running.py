"""Runs cases, each in a process of its own under a limit of memory and time; results are lines of JSON.

The process that forks has imported everything once, so a case costs no start.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweep.cases import Case

Work = Callable[[Case, dict[str, Any]], None]
"""Does a case and writes down what it learns, as it goes: what a killed process has learnt is kept."""


@dataclass(frozen=True)
class Limits:
    """What one case may take."""

    seconds: int = 120
    """Of the processor's time; of the clock's, ten times as many."""
    gigabytes: float = 6.0


def run(cases: Iterable[Case], work: Work, out: Path, *, jobs: int = 1, limits: Limits, code: str = "") -> None:
    """Run what `out` has no result of yet, and append the results, with the state of the `code` they are of."""
    done = {(r["family"], r["head"]) for r in results(out)}
    waiting = [case for case in cases if (case.family, case.head) not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    running: dict[int, tuple[Case, Path]] = {}
    count = 0
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop(0)
            scratch = out.with_suffix(f".{case.family}.{case.head}")
            sys.stdout.flush()
            running[_fork(case, work, scratch, limits)] = case, scratch
        pid, status, used = os.wait3(0)
        case, scratch = running.pop(pid)
        count += 1
        result = _collect(case, scratch, status, used.ru_utime + used.ru_stime) | {"code": code}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{count}/{count + len(waiting) + len(running)} {case}: {result.get('cause') or 'ok'}", flush=True)


def state() -> str:
    """The commit that the code is of, with `+` where it was changed since; nothing where git knows nothing of it."""
    told = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return told.stdout.strip()


def results(out: Path) -> list[dict[str, Any]]:
    """The last result of every case."""
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    found = {(r["family"], r["head"]): r for r in map(json.loads, lines)}
    return list(found.values())


def forget(out: Path, cases: Iterable[Case], *, failed: bool = True, but: str | None = None) -> None:
    """Strike out the results of those `cases` that `failed`, and of those of other code than `but`."""
    again = {(case.family, case.head) for case in cases}

    def stale(result: dict[str, Any]) -> bool:
        of_other_code = but is not None and result.get("code") != but
        return (result["family"], result["head"]) in again and (of_other_code or (failed and "cause" in result))

    kept = [r for r in results(out) if not stale(r)]
    if out.exists():
        out.write_text("".join(json.dumps(result) + "\n" for result in kept), encoding="utf-8")


def _fork(case: Case, work: Work, scratch: Path, limits: Limits) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.alarm(10 * limits.seconds)  # ends the process, whatever it does
        resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 5))
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        ceiling = used + int(limits.gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        work(case, _Notes(scratch))
        code = 0
    finally:
        os._exit(code)


class _Notes(dict[str, Any]):
    """A dictionary that is on disk after every change."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.path.write_text(json.dumps(self), encoding="utf-8")


def _collect(case: Case, scratch: Path, status: int, seconds: float) -> dict[str, Any]:
    found = json.loads(scratch.read_text(encoding="utf-8")) if scratch.exists() else {}
    scratch.unlink(missing_ok=True)
    result = {"family": case.family, "head": case.head, "seconds": round(seconds, 1), **found}
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        reason = (
            "took too long" if number in {signal.SIGALRM, signal.SIGXCPU} else f"died of {signal.Signals(number).name}"
        )
        result["cause"] = f"{found.get('step', 'start')}: {reason}"
    elif status and "cause" not in result:
        result["cause"] = f"{found.get('step', 'start')}: the process ended with {os.waitstatus_to_exitcode(status)}"
    return result
