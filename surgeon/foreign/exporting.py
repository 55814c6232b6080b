"""The way out: a task of a build as a folder that PEFT loads, its tensors byte for byte those that were trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from surgeon.build import check_writable
from surgeon.compiler import Compiled, load
from surgeon.errors import BuildError, SpecError, did_you_mean
from surgeon.foreign.peft import CONFIG, WEIGHTS
from surgeon.foreign.peft_writer import write

FORMATS: Mapping[str, Callable[[Compiled, str], tuple[dict[str, Any], dict[str, Tensor]]]] = {"peft": write}


def export_task(
    build: str | Path,
    task: str,
    out: str | Path,
    *,
    to: str = "peft",
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write a task of a build as a checkpoint of another library into the folder `out`, absent or empty.

    Raises DeltaError where the task has something that the library cannot hold.
    """
    if to not in FORMATS:
        raise SpecError(f"there is no format '{to}'", there_is=FORMATS, try_=did_you_mean(to, FORMATS))
    out = Path(out)
    check_writable(out)
    compiled = load(build, writes=False, progress=progress)
    if task not in compiled.tasks:
        raise SpecError(f"there is no task '{task}'", there_is=compiled.tasks, try_=did_you_mean(task, compiled.tasks))
    config, tensors = FORMATS[to](compiled, task)
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
    present = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(stored, out / WEIGHTS[0], metadata={"format": "pt", "base": compiled.program.fingerprint})
        (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        for path in out.glob("adapter_*"):
            path.unlink(missing_ok=True)
        if not present:
            shutil.rmtree(out, ignore_errors=True)
        raise BuildError(f"the folder could not be written: {error.strerror}", where=str(out)) from error
    return out
