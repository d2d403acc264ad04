"""What the server of reports answers with: reports, pictures and logs of runs, and nothing else."""

import os
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from flows.orchestration.guard import Guard, own_names
from flows.orchestration.report_server import ReportServer
from tests.flows.orchestration.web import WEBSOCKET, ask, serving

SERVED = {
    "mine/report.html": "text/html; charset=utf-8",
    "mine/report/loss.png": "image/png",
    "mine/report/loss.svg": "image/svg+xml",
    "mine/logs/train-1.log": "text/plain; charset=utf-8",
    "mine-sweep/sweep.html": "text/html; charset=utf-8",
    "mine-compare/arm/report.html": "text/html; charset=utf-8",
    "a run: 100 %/report.html": "text/html; charset=utf-8",
    "läuft/report.html": "text/html; charset=utf-8",
}
KEPT = (
    "mine/run.yaml",
    "mine/ledger.duckdb",
    "mine/corpus/shard-0000.bin",
    "mine/logs/progress.json",
    "mine/logs/errors/rank-0.json",
    "mine/notes.log",
    "mine/.hidden.html",
    ".prefect/page.html",
    ".prefect/logs/server.log",
    "mine/.report.html.1.tmp",
)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    place = tmp_path_factory.mktemp("reports")
    runs = place / "runs"
    for name in (*SERVED, *KEPT):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_text(f"content of {name}")
    (place / "outside").mkdir()
    (place / "outside" / "report.html").write_text("outside")
    (place / "outside" / "secret").write_text("outside")
    (place / "runs-too").mkdir()
    (place / "runs-too" / "report.html").write_text("outside")
    for name, target in (
        ("mine/passwd.html", "/etc/passwd"),
        ("mine/logs/passwd.log", "/etc/passwd"),
        ("mine/out.html", place / "outside" / "report.html"),
        ("linked", place / "outside"),
        ("mine/up", "../.."),
        ("mine/config.html", "run.yaml"),
        ("mine/hidden.html", ".hidden.html"),
        ("mine/circle.html", "circle.html"),
        ("mine/nothing.html", "missing.html"),
        ("latest", "mine"),
    ):
        (runs / name).symlink_to(target)
    (runs / "folder.html").mkdir()
    os.mkfifo(runs / "pipe.html")
    with serving(Guard(ReportServer(runs), own_names("127.0.0.1"))) as port:
        yield port


@pytest.mark.parametrize(("name", "kind"), SERVED.items())
def test_reports_pictures_and_logs_are_served(port: int, name: str, kind: str) -> None:
    answer = ask(port, f"/{quote(name)}")
    assert (answer.status, answer.body.decode()) == (200, f"content of {name}")
    assert answer.headers["content-type"] == kind
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert ask(port, f"/{quote(name)}", method="HEAD").headers["content-length"] == str(len(answer.body))


def test_a_link_from_one_run_to_another_is_followed(port: int) -> None:
    assert ask(port, "/latest/report.html").body == b"content of mine/report.html"


@pytest.mark.parametrize(
    "path",
    [
        *(f"/{name}" for name in KEPT),
        # Folders.
        *("/", "//", "/.", "/mine", "/mine/", "/mine/report", "/mine/logs/", "/folder.html", "/folder.html/"),
        # Links.
        *("/mine/passwd.html", "/mine/logs/passwd.log", "/mine/out.html", "/linked/report.html", "/linked/"),
        *("/mine/up/outside/report.html", "/mine/config.html", "/mine/hidden.html", "/mine/circle.html"),
        *("/mine/nothing.html", "/latest/run.yaml"),
        # Paths out of the folder.
        *("/../outside/report.html", "/mine/../../outside/report.html", "/%2e%2e/outside/report.html"),
        *("/..%2foutside/report.html", "/%2e%2e%2foutside%2freport.html", "/..%5coutside%5creport.html"),
        *("/../runs-too/report.html", "/mine/../report.html", "/mine/%2e%2e/mine/report.html"),
        *("/%252e%252e/report.html", "/mine//report.html", "//mine/report.html", "/mine/./report.html"),
        *("/etc/passwd", "//etc/passwd", "/%2fetc/passwd", "///etc/passwd", "//127.0.0.1/etc/passwd"),
        # Names that are none.
        *("/mine/report.html%00", "/mine/run.yaml%00.html", "/%00", "/mine/%ff.html", "/" + "a" * 5000 + ".html"),
        *("/pipe.html", "/mine/report.html/", "/mine/report.html/x.html", "/mine/REPORT.HTML", "/mine/report.htm"),
    ],
)  # fmt: skip
def test_everything_else_is_refused(port: int, path: str) -> None:
    answer = ask(port, path)
    assert (answer.status, answer.body) == (404, b"not a report, picture or log of a run\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_but_reading(port: int, method: str) -> None:
    assert ask(port, "/mine/report.html", method=method).status == 405


@pytest.mark.parametrize(
    "headers",
    [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, WEBSOCKET],
    ids=str,
)
def test_other_sites_are_refused(port: int, headers: dict[str, str | None]) -> None:
    assert ask(port, "/mine/report.html", headers).status == 403
