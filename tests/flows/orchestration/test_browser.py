"""Prefect's pages in a real browser: the form, the start, what is shown, the cancelling."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.run.locks import is_locked
from tests.flows.orchestration.place import Place, wait_for
from trainer.checkpoint_folder import list_checkpoints

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(place: Place) -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser.new_page(viewport={"width": 1300, "height": 1000})
        browser.close()


def keep(page: Any, name: str, place: Place) -> None:
    """Keep a picture; REPRISE_SCREENSHOTS names another folder than the test's own."""
    page.screenshot(path=str(Path(os.environ.get("REPRISE_SCREENSHOTS", place.folder)) / f"{name}.png"))


def test_form_start_artifacts_and_cancel(place: Place, page: Any) -> None:
    ui = place.api.removesuffix("/api")
    deployment = place.ask("deployments/name/multi-round/demo")["id"]
    page.goto(f"{ui}/deployments/deployment/{deployment}/run")
    page.get_by_text("Name of the run and of its folder").wait_for(timeout=30_000)
    for text in ("Seed of all random numbers.", "Share of each shard that is kept (paper: 0.5)."):
        assert page.get_by_text(text).count() == 1
    keep(page, "prefect-form", place)
    field = page.get_by_text("Name of the run and of its folder").locator("xpath=following::textarea[1]")
    assert field.input_value() == "form"
    field.fill("browser")
    page.get_by_role("button", name="Submit").click()
    folder = place.folder / "runs" / "browser"
    wait_for("a checkpoint", lambda: list_checkpoints(folder / "rounds" / "1" / "checkpoint"))
    runs = place.ask("flow_runs/filter", {})
    [run] = [run["id"] for run in runs if run["name"] == "browser"]
    page.goto(f"{ui}/runs/flow-run/{run}")
    page.get_by_text("Artifacts", exact=True).click()
    page.get_by_text("browser-train-1").first.wait_for(timeout=30_000)
    page.get_by_text("Logs", exact=True).last.click()
    page.get_by_text("Beginning flow run").first.wait_for(timeout=30_000)
    keep(page, "prefect-run", place)
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Confirm").click()
    wait_for("the ranks' end", lambda: not place.ranks(), 30)
    page.get_by_text("Cancelled").first.wait_for(timeout=60_000)
    wait_for("the flow's end", lambda: not is_locked(folder), 30)
    assert list_checkpoints(folder / "rounds" / "1" / "checkpoint")
