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
        *(
            (name, f"{name} is no column")
            for name in ("rowid", "ROWID", "filename", "file_row_number", "candidates", "user")
        ),
        ("seen_loss.abs()", r"seen_loss.abs\(\) in 'seen_loss.abs\(\)': name the function alone"),
        ("main.abs(loss)", r"main.abs\(\) in"),
        ("getenv('HOME')", r"getenv\(\) in"),
        ("error('x')", r"error\(\) in"),
        ("list_transform([1], x -> x)", r"list_transform\(\) in"),
        ("columns('l.*')", "contains a star"),
        ("exists(from read_text('/etc/passwd'))", "contains a subquery"),
        ("(" * 5000, "has more than 100 nested brackets; write fewer"),
        ("- " * 5000 + "1", "is not an SQL expression"),
        ("+".join(["1"] * 3000), "is not an SQL expression"),
        ("not " * 2000 + "true", "is not an SQL expression"),
        ("'\ud800'", "is not an SQL expression"),
        ("loss\x00", "is no column"),
    ],
)
def test_everything_else_is_refused(sql: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_expression(sql)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1000
