"""Reading ahead: what is read next is read while what was read is worked on."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

_Item = TypeVar("_Item")


def read_ahead(items: Iterator[_Item], depth: int = 2) -> Iterator[_Item]:
    """Yield `items`, read by a thread that stays at most `depth` ahead; what it raises is raised here, in its place."""
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
