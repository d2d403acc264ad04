"""Values inside SQL text, for the places where DuckDB takes no parameters."""


def literal(value: object) -> str:
    """Return `value` as a quoted SQL string."""
    return "'" + str(value).replace("'", "''") + "'"
