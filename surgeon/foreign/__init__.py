"""Foreign weights: what PEFT and AdapterHub have saved becomes tasks of a build, and a task becomes what PEFT loads.

A reader (`peft`, `adapterhub`) turns a folder into pieces of the model it changes; `placing` puts the pieces into the
deltas of a compiled spec; `union` writes the spec that holds the pieces of many folders.
"""

from surgeon.foreign.exporting import export_task
from surgeon.foreign.importing import Imported, import_build, import_tasks

__all__ = ["Imported", "export_task", "import_build", "import_tasks"]
