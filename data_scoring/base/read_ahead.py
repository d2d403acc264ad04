"""Reading ahead: a thread reads the next items while the current one is processed."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

_Item = TypeVar("_Item")


def read_ahead(items: Iterator[_Item], depth: int = 2) -> Iterator[_Item]:
    """Yield `items`, read by a thread at most `depth` items ahead; its errors are raised here, in order."""
    waiting: queue.Queue[tuple[str, _Item | BaseException | None]] = queue.Queue(maxsize=depth)

    def read() -> None:
        try:
            for item in items:
                waiting.put(("item", item))
        except BaseException as error:  # noqa: BLE001 (raised again in the consumer)
            waiting.put(("error", error))
        else:
            waiting.put(("end", None))

    threading.Thread(target=read, daemon=True).start()
    while (entry := waiting.get())[0] == "item":
        yield entry[1]  # type: ignore[misc]
    if isinstance(entry[1], BaseException):
        raise entry[1]
