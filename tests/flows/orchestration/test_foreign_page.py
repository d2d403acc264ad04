"""A page of another site, in Chromium, cannot use what `reprise serve` serves."""

import subprocess
from pathlib import Path

import pytest

from tests.flows.orchestration.foreign_page import CHROMIUM, EVENT, attack
from tests.flows.orchestration.place import Place

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


@pytest.fixture(scope="module")
def report(place: Place) -> str:
    run = place.folder / "runs" / "mine"
    (run / "report").mkdir(parents=True)
    (run / "report.html").write_text("a report")
    (run / "report" / "loss.png").write_bytes(Path("docs/report.png").read_bytes())
    return f"http://127.0.0.1:{place.port + 1}/mine/report.html"


# Another port of this machine is the same site, but another origin.
@pytest.mark.parametrize("host", ["evil.example", "localhost", "127.0.0.1"])
def test_a_page_neither_sends_nor_reads(place: Place, report: str, host: str, tmp_path: Path) -> None:
    seen = attack(host, place.api, report, tmp_path)
    # The page cannot tell whether its form was accepted.
    assert seen.pop("form") == "sent"
    assert set(seen.values()) == {"refused"}
    assert len(seen) == 11
    names = {flow["name"] for flow in place.ask("flows/filter", {})}
    assert names == {"multi-round", "score-shards", "evaluate", "refine", "sweep"}
    wanted = {"event": {"name": [EVENT["event"]]}, "occurred": {"since": "2020-01-01T00:00:00Z"}}
    assert place.ask("events/filter", {"filter": wanted})["total"] == 0


def test_a_name_that_resolves_to_this_machine_is_refused(place: Place, tmp_path: Path) -> None:
    """DNS rebinding: the page's own name leads to the server, so the browser sees no other origin."""
    assert CHROMIUM is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP *.example 127.0.0.1"]
    for name, expected in (("evil.example", "not a name of this server"), ("127.0.0.1", "true")):
        url = f"http://{name}:{place.port}/api/health"
        command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / name}", "--dump-dom", url]
        assert expected in subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
