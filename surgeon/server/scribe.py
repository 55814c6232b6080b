"""The texts of all requests written together: rows of any tasks in one batch, one that ends gives its place away."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from surgeon.runtime import Session
from surgeon.runtime.generation import Row, Writer, Written
from surgeon.server.faults import UNAVAILABLE, Fault


@dataclass(eq=False)
class Order:
    """A request's rows. `check` raises where nobody waits any more; `end` hears the texts, or why there are none."""

    rows: list[Row]
    check: Callable[[], None]
    end: Callable[[list[Written] | Exception], None]
    told: bool = False

    def fail(self, error: Exception) -> None:
        """Let none of its rows go on."""
        for row in self.rows:
            row.reason = row.reason or "gone"
        self.tell(error)

    def tell(self, found: list[Written] | Exception) -> None:
        """Once."""
        if not self.told:
            self.told = True
            self.end(found)


class Scribe:
    """One thread that writes for everybody, at most `batch` rows at a time; the others wait in order."""

    def __init__(self, session: Session, batch: int) -> None:
        self._session, self._batch = session, batch
        self._waiting: deque[tuple[Row, Order]] = deque()
        self._orders: dict[Row, Order] = {}
        self._changed = threading.Condition()
        self._closed = False
        self.going = 0
        """Rows that go on together."""
        self._thread = threading.Thread(target=self._work, name="surgeon-scribe", daemon=True)
        self._thread.start()

    def submit(self, order: Order) -> None:
        """Take an order in. Raises Fault where the server ends."""
        with self._changed:
            if self._closed:
                raise Fault(UNAVAILABLE, "the server is stopping", try_="another replica, or later")
            self._waiting.extend((row, order) for row in order.rows)
            self._changed.notify()

    def close(self) -> None:
        """Take nothing more in, and write what is there to its end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
            try:
                self._write()
            except Exception as error:  # whoever waits must hear of it
                self._fail_all(error)
            finally:
                self.going = 0

    def _write(self) -> None:
        """Until nobody waits."""
        try:
            writer = self._session.texts.writer(self._batch, self._failed)
        except Exception as error:  # its graphs may be opened now; whoever comes next tries again
            self._fail_waiting(error)
            return
        going = True
        while going or self._waiting:
            self._let_in(writer)
            for row in writer.rows:
                self._check(row)
            self._end_whole()
            self.going = len(writer.rows)
            going = writer.step()
            self._end_whole()

    def _let_in(self, writer: Writer) -> None:
        """Read the prompts of those who wait, as far as there are places."""
        while not writer.full and self._waiting:
            row, order = self._waiting.popleft()
            self._orders[row] = order
            if row.reason is None and self._check(row):
                writer.take(row)

    def _check(self, row: Row) -> bool:
        """Whether somebody waits for a row."""
        try:
            self._orders[row].check()
        except Exception as error:
            self._failed(row, error)
            return False
        return True

    def _failed(self, row: Row, error: Exception) -> None:
        self._orders[row].fail(error)

    def _end_whole(self) -> None:
        """Tell the orders whose rows have all ended."""
        for order in set(self._orders.values()):
            if all(row.reason is not None for row in order.rows):
                order.tell([row.written for row in order.rows])
                for row in order.rows:
                    self._orders.pop(row, None)

    def _fail_waiting(self, error: Exception) -> None:
        with self._changed:
            waiting = {order for _, order in self._waiting}
            self._waiting.clear()
        for order in waiting:
            order.fail(error)

    def _fail_all(self, error: Exception) -> None:
        for order in set(self._orders.values()):
            order.fail(error)
        self._orders.clear()
