"""A folder of task files over one base, changed while it is read: what a session looks tasks up in, on demand."""

from surgeon.runtime.store.hand import Hand
from surgeon.runtime.store.places import Place, place_of
from surgeon.runtime.store.store import Stored, TaskStore

__all__ = ["Hand", "Place", "Stored", "TaskStore", "place_of"]
