"""The user's own score: one SQL expression over a sample's columns, checked before it runs."""

import functools
import json
import re
from typing import TYPE_CHECKING, Any

from data_scoring.base.messages import one_line, shown
from data_scoring.base.sql import check_nesting

if TYPE_CHECKING:
    import duckdb

COLUMNS = {
    "sample": "integer",
    "source": "varchar",
    "num_tokens": "integer",
    "loss": "float",
    "seen_loss": "float",
}

# The node classes that an expression may contain. Subqueries, windows and parameters are excluded, so that the result
# depends only on the sample's own columns and not on other rows or their order.
_CLASSES = {
    "BETWEEN", "CASE", "CAST", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT", "FUNCTION", "OPERATOR", "TYPE",
}  # fmt: skip
# Pure functions: the result depends on the arguments alone.
_FUNCTIONS = (
    {"+", "-", "*", "/", "//", "%", "^", "**", "~~", "!~~", "~~*", "!~~*"}
    | {"abs", "sign", "ceil", "floor", "round", "trunc", "mod", "greatest", "least", "nullif", "ifnull"}
    | {"sqrt", "cbrt", "exp", "ln", "log", "log2", "log10", "pow", "power", "sin", "cos", "tan", "atan", "tanh", "pi"}
    | {"isnan", "isinf", "isfinite"}
    | {"length", "lower", "upper", "contains", "starts_with", "ends_with", "prefix", "suffix", "regexp_matches"}
)
_NUMBERS = re.compile(r"(U?TINYINT|U?SMALLINT|U?INTEGER|U?BIGINT|U?HUGEINT|FLOAT|DOUBLE|BOOLEAN|DECIMAL\(\d+, ?\d+\))")


@functools.cache
def check_expression(sql: str) -> frozenset[str]:
    """Return the columns (of `COLUMNS`) that the SQL expression `sql` uses.

    Raises ValueError unless it is a single numeric expression of these columns that reads nothing else and is
    deterministic.
    """
    import duckdb

    check_nesting(sql)
    with duckdb.connect(config={"enable_external_access": "false"}) as connection:
        nodes = list(_nodes(_parse(connection, sql)))
        for node in nodes:
            kind = node["class"]
            if kind not in _CLASSES:
                raise ValueError(f"sql: {shown(sql)} contains a {kind.lower()}; use only expressions of columns")
            if kind == "COLUMN_REF" and len(node["column_names"]) > 1:
                name = one_line(".".join(node["column_names"]))
                raise ValueError(f"sql: {name} in {shown(sql)}: name the column alone")
            # Tables have other columns too, such as rowid, but candidates are no table.
            if kind == "COLUMN_REF" and node["column_names"][0].lower() not in COLUMNS:
                name = one_line(node["column_names"][0])
                raise ValueError(
                    f"sql: {shown(sql)} cannot be computed ({name} is no column); the columns are {', '.join(COLUMNS)}"
                )
            # `seen_loss.abs()` is a function of the schema seen_loss, and then one of the column.
            if kind == "FUNCTION" and (node["schema"] or node["catalog"]):
                name = one_line(f"{node['schema']}.{node['function_name']}")
                raise ValueError(f"sql: {name}() in {shown(sql)}: name the function alone, as in abs(loss)")
            if kind == "FUNCTION" and node["function_name"] not in _FUNCTIONS:
                raise ValueError(
                    f"sql: {one_line(node['function_name'])}() in {shown(sql)} is not allowed; use one of "
                    f"{', '.join(sorted(_FUNCTIONS))}"
                )
        _check_type(connection, sql)
    return frozenset(node["column_names"][-1].lower() for node in nodes if node["class"] == "COLUMN_REF")


def _parse(connection: "duckdb.DuckDBPyConnection", sql: str) -> dict[str, Any]:
    """Return the expression's tree. Raises ValueError for SQL that closes the bracket early to add more."""
    import duckdb

    try:
        [(text,)] = connection.execute("select json_serialize_sql(?::varchar)", [f"select ({sql})"]).fetchall()
        parsed = json.loads(text)
    except (duckdb.Error, UnicodeEncodeError, RecursionError) as error:
        raise ValueError(f"sql: {shown(sql)} is not an SQL expression ({one_line(error)}); correct it") from None
    if parsed["error"]:
        reason = one_line(parsed["error_message"])
        raise ValueError(f"sql: {shown(sql)} is not an SQL expression ({reason}); correct it")
    node = parsed["statements"][0]["node"]
    is_plain = (
        len(parsed["statements"]) == 1
        and node["type"] == "SELECT_NODE"
        and len(node["select_list"]) == 1
        and node["from_table"]["type"] == "EMPTY"
        and not any(node[part] for part in ("modifiers", "where_clause", "group_expressions", "having", "qualify"))
    )
    if not is_plain:
        raise ValueError(f"sql: {shown(sql)} is more than one expression; write one, such as 'loss - 0.5 * seen_loss'")
    expression: dict[str, Any] = node["select_list"][0]
    return expression


def _nodes(tree: Any) -> Any:
    if isinstance(tree, dict):
        if "class" in tree:
            yield tree
        for value in tree.values():
            yield from _nodes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _nodes(value)


def _check_type(connection: "duckdb.DuckDBPyConnection", sql: str) -> None:
    import duckdb

    columns = ", ".join(f"null::{kind} as {name}" for name, kind in COLUMNS.items())
    try:
        kind = str(connection.sql(f"select ({sql}) as score from (select {columns})").types[0])
    except duckdb.Error as error:
        raise ValueError(
            f"sql: {shown(sql)} cannot be computed ({one_line(error)}); the columns are {', '.join(COLUMNS)}"
        ) from None
    if not _NUMBERS.fullmatch(kind):
        raise ValueError(f"sql: {shown(sql)} has type {one_line(kind)}; write an expression whose result is a number")
