"""SQL expressions of the user: what is accepted, and that nothing else can be reached through them."""

import pytest

from data_scoring.base.expression import check_expression


@pytest.mark.parametrize(
    ("sql", "columns"),
    [
        ("loss - 0.5 * seen_loss", {"loss", "seen_loss"}),
        ("case when num_tokens > 3 then LOSS else 1e3 end", {"num_tokens", "loss"}),
        ("ln(greatest(loss, 2)) + (source in ('a', 'b'))::int", {"loss", "source"}),
        ("nullif(loss, 1)", {"loss"}),
        ("1", set()),
    ],
)
def test_expressions_of_columns_are_accepted(sql: str, columns: set[str]) -> None:
    assert check_expression(sql) == columns


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("(select max(loss) from losses)", "contains a subquery"),
        ("rank() over (order by loss)", "contains a window"),
        ("$1", "contains a parameter"),
        ("*", "contains a star"),
        ("random()", r"random\(\) in 'random\(\)' is not allowed"),
        ("max(loss)", r"max\(\) in .* is not allowed; use one of .* ln, "),
        ("current_setting('threads')", r"current_setting\(\) in"),
        ("read_text('/etc/passwd')", r"read_text\(\) in"),
        ("epoch(current_localtimestamp())", r"(epoch|current_localtimestamp)\(\) in"),
        ("length(json_serialize_plan('from glob(''/*'')'))", r"json_serialize_plan\(\) in"),
        ("interval 1 day", "has type INTERVAL|is not allowed"),
        ("[sample]", r"list_value\(\) in"),
        ("{'a': 1}", r"struct_pack\(\) in"),
        ("loss) from read_csv('/etc/passwd') where (1=1", "is more than one expression"),
        ("loss), (1", "is more than one expression"),
        ("loss); drop table x; select (1", "is not an SQL expression"),
        ("loss -- and then", "is not an SQL expression"),
        ("'high'", "has type VARCHAR; write an expression whose result is a number"),
        ("perplexity", "cannot be computed .* the columns are sample, source, num_tokens, loss, seen_loss"),
        ("losses.loss", "name the column alone"),
    ],
)
def test_everything_else_is_refused(sql: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_expression(sql)
