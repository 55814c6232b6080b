"""How much the server takes on, in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields

from surgeon.errors import SpecError


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds. What is over a limit is refused at once and disturbs nothing else."""

    wait: float = 0.002
    """How long a request may wait for others that its batch has room for."""
    batch: int = 32
    """Rows that run together."""
    tokens: int = 8192
    """Rows times length that run together."""
    queue: int = 1024
    """Rows that may wait; above, 429."""
    rows: int = 256
    """Rows of one request; above, 413."""
    body: int = 8 << 20
    """Bytes of one request; above, 413."""
    upload: int = 1 << 30
    """Bytes of a task file that is added; above, 413."""
    deadline: float = 30.0
    """From the request to its answer; above, 504. A request may ask for less."""
    patience: float = 10.0
    """For the body to arrive; above, 408."""
    connections: int = 4096
    """Connections at once; above, 503."""
    texts: int = 8
    """Texts that are written together, of a build with the mode `mixed`."""
    writers: int = 2
    """Requests that write texts at once of other builds, each with its own cache."""
    grace: float = 30.0
    """For what is under way when the server is asked to stop."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0 or (value == 0 and field.name != "wait"):
                raise SpecError(f"{field.name} is a number above 0", there_is=str(value))
