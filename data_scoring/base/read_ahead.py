"""Reading ahead: a thread reads the next items while the current one is processed."""

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import TypeVar

_Item = TypeVar("_Item")


def read_ahead(items: Iterator[_Item], depth: int = 2) -> Generator[_Item, None, None]:
    """Yield `items`, read by a thread at most `depth` items ahead; its errors are raised here, in order.

    When this iterator is closed early, the thread ends with the item that it is reading.
    """
    waiting: queue.Queue[tuple[str, _Item | BaseException | None]] = queue.Queue(maxsize=depth)
    is_closed = threading.Event()

    def read() -> None:
        try:
            for item in items:
                waiting.put(("item", item))
                if is_closed.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 (raised again in the consumer)
            waiting.put(("error", error))
        else:
            waiting.put(("end", None))

    threading.Thread(target=read, daemon=True).start()
    try:
        while (entry := waiting.get())[0] == "item":
            yield entry[1]  # type: ignore[misc]
        if isinstance(entry[1], BaseException):
            raise entry[1]
    finally:
        is_closed.set()
        # Makes room for the item that the thread has read, which it puts before it looks whether to end.
        with suppress(queue.Empty):
            waiting.get_nowait()
