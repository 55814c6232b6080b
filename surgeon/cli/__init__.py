"""The command line's door: runs one command, and turns whatever goes wrong into a message and an exit code.

0 done · 1 data or files that do not fit · 2 the command or the spec · 3 a fault of Surgeon's own · 130 interrupted
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from surgeon.errors import SpecError, SurgeonError

EXTRAS = dict.fromkeys(
    ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "yaml", "networkx"), "compile"
) | {
    "accelerate": "train",
    "bitsandbytes": "qlora",
    **dict.fromkeys(("starlette", "uvicorn", "httptools", "prometheus_client", "anyio"), "serve"),
}
"""The extra that installs a package a command may need."""

INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = list(sys.argv[1:] if args is None else args) or ["--help"]
    try:
        with _terminable():
            return _run(args)
    except KeyboardInterrupt:
        return _interrupted()


def _run(args: list[str]) -> int:
    from typer import TyperException

    from surgeon.cli.app import app
    from surgeon.cli.screen import show_error

    options = args[: args.index("--")] if "--" in args else args
    try:
        code = int(app(args, prog_name="surgeon", standalone_mode=False) or 0)
        return _interrupted() if code == INTERRUPTED else code
    except Exception as error:
        if "--traceback" in options:
            raise
        told = _usage(error) if isinstance(error, TyperException) else explained(error, args)
        show_error(told, machine="--json" in options)
        return told.exit_code


def explained(error: Exception, args: Sequence[str]) -> SurgeonError:
    """What went wrong as an error for people: a missing extra, a file the system refuses, or a fault of our own."""
    if isinstance(error, SurgeonError):
        return error
    extra = EXTRAS.get((error.name or "").partition(".")[0]) if isinstance(error, ModuleNotFoundError) else None
    if extra:
        return SpecError(
            f"this command needs more than the runtime: '{error.name}' is not installed",  # type: ignore[attr-defined]
            try_=f"pip install 'modelsurgeon[{extra}]'",
        )
    if isinstance(error, OSError) and error.strerror:
        return SurgeonError(error.strerror, where=error.filename and str(error.filename))
    return InternalError(
        f"internal error: {type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:300]}",
        there_is="a fault of Surgeon, not of what you gave it",
        try_=f"report it to the project's issues with what `surgeon --traceback {shlex.join(args)}` shows",
    )


class InternalError(SurgeonError):
    """A fault of Surgeon's own that nothing foresaw."""

    exit_code = 3


def _usage(error: Exception) -> SurgeonError:
    """A command that was typed wrongly."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "surgeon"
    what = error.format_message() if hasattr(error, "format_message") else str(error)
    return SpecError(what.rstrip("."), where=command, try_=f"`{command} --help`")


def _interrupted() -> int:
    print("interrupted; every file that was there is whole. `surgeon train` goes on where it was.", file=sys.stderr)
    return INTERRUPTED


@contextmanager
def _terminable() -> Iterator[None]:
    """Let a polite kill clean up behind a command, as an interrupt does."""

    def stop(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    try:
        saved = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever owns it decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, saved)
