"""Who may use a server on this machine: its own pages and programs, not pages of other sites."""

import socket
from collections.abc import Iterator

import psutil
import pytest
from starlette.types import Receive, Scope, Send

from flows.orchestration.guard import Guard, is_loopback, own_names
from tests.flows.orchestration.web import WEBSOCKET, ask, serving


async def greet(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"welcome"})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(Guard(greet, own_names("127.0.0.1"))) as port:
        yield port


OWN = [
    {},
    {"Host": "localhost:{port}"},
    {"Host": "LOCALHOST:{port}"},
    {"Host": "[::1]:{port}"},
    # A tunnel: `ssh -L 8000:localhost:4200`.
    {"Host": "localhost:8000", "Origin": "http://localhost:8000"},
    {"Origin": "http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
]
FOREIGN = [
    {"Host": None},
    {"Host": ""},
    {"Host": "evil.example"},
    {"Host": "evil.example:{port}"},
    {"Host": "evil.example:{port}", "Origin": "http://evil.example:{port}"},
    {"Host": "127.0.0.1.evil.example:{port}"},
    {"Host": "localhost.evil.example:{port}"},
    {"Host": "127.0.0.1:{port}@evil.example"},
    {"Host": "evil.example@127.0.0.1:{port}"},
    {"Host": "evil.example#127.0.0.1"},
    {"Host": "10.0.0.1:{port}"},
    {"Host": "127.0.0.1:{port}, evil.example"},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://127.0.0.1"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://localhost:{port}"},
    {"Origin": "http://127.0.0.1:{port}.evil.example"},
    {"Origin": "file://127.0.0.1:{port}"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
]
# A link on another page, which a person follows, opens a page of ours.
LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


def filled(headers: dict[str, str | None], port: int) -> dict[str, str | None]:
    return {name: value.replace("{port}", str(port)) if value else value for name, value in headers.items()}


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("headers", OWN, ids=str)
def test_own_pages_and_programs_are_answered(port: int, method: str, headers: dict[str, str | None]) -> None:
    answer = ask(port, "/", filled(headers, port), method)
    assert (answer.status, answer.body) == (200, b"welcome")
    assert answer.headers["x-frame-options"] == "SAMEORIGIN"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_other_pages_are_refused(port: int, method: str, headers: dict[str, str | None]) -> None:
    answer = ask(port, "/", filled(headers, port), method)
    # Without a Host, HTTP itself is violated.
    assert answer.status in ({400, 403} if headers.get("Host", " ") is None else {403})
    assert b"welcome" not in answer.body
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("headers", OWN, ids=str)
def test_own_websockets_are_accepted(port: int, headers: dict[str, str | None]) -> None:
    assert ask(port, "/", {**WEBSOCKET, **filled(headers, port)}).status == 101


@pytest.mark.parametrize("headers", [*FOREIGN, LINK], ids=str)
def test_other_websockets_are_refused(port: int, headers: dict[str, str | None]) -> None:
    assert ask(port, "/", {**WEBSOCKET, **filled(headers, port)}).status in (400, 403)


def test_links_open_pages_and_send_nothing(port: int) -> None:
    assert ask(port, "/", LINK).status == 200
    assert ask(port, "/", LINK, "POST").status == 403


def test_names_of_a_server_are_those_of_what_it_listens_on() -> None:
    loopback = {"localhost", "127.0.0.1", "[::1]"}
    for host in loopback - {"[::1]"} | {"::1"}:
        assert is_loopback(host)
        assert own_names(host) == loopback
    addresses = {
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET
    }
    assert own_names("0.0.0.0") >= loopback | addresses | {socket.gethostname().lower()}
    assert own_names("192.0.2.7") >= loopback | {"192.0.2.7", socket.gethostname().lower()}
    assert "192.0.2.8" not in own_names("192.0.2.7")
    # What resolves to the loopback interface today may not do so tomorrow.
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "", "192.0.2.7", socket.gethostname()))
