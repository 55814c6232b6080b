"""Running a build: ONNX Runtime and numpy only. Neither torch nor transformers is needed, or loaded, here."""

from surgeon.runtime.answers import Answer
from surgeon.runtime.document import read_manifest
from surgeon.runtime.manifest import Manifest
from surgeon.runtime.session import Session
from surgeon.runtime.tasks import TaskInfo

__all__ = ["Answer", "Manifest", "Session", "TaskInfo", "read_manifest"]
