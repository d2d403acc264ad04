"""Values inside SQL text, for the places where DuckDB takes no parameters."""


def literal(value: object) -> str:
    """Return `value` as a quoted SQL string."""
    return "'" + str(value).replace("'", "''") + "'"


def random_bits(*parts: object) -> str:
    """Return the SQL expression of 64 random bits that `parts`, integers or SQL expressions, decide alone.

    DuckDB's hash of several values is a xor of theirs: with it alone, two seeds would order all rows alike but for a
    constant. Hashing once more mixes them.
    """
    return f"hash(hash({', '.join(str(part) for part in parts)}))"
