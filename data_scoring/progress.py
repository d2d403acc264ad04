"""How a long piece of work says how far it is, without knowing who listens."""

from collections.abc import Callable

# Called with (what is being done, units done, units in all or None where unknown).
Progress = Callable[[str, int, int | None], None]


def silent(what: str, done: int, total: int | None) -> None:
    """Ignore progress."""
