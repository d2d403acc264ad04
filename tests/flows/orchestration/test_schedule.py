"""What Prefect says of runs stays true: five minutes after scheduled runs ended, their states are what they were."""

import time
from typing import Any

import pytest

from tests.flows.orchestration.place import CONFIG, Place, wait_for

pytestmark = pytest.mark.slow

ENDED = {"Completed", "Failed", "Crashed", "Cancelled"}


def test_states_of_runs_that_ended_stay(place: Place) -> None:
    deployment = place.ask("deployments/name/multi-round/demo")["id"]
    # What follows finds nothing to do, and ends within a minute.
    place.wait(place.submit({**CONFIG, "name": "form"}), "Completed", 600)
    failed = place.start_run("score-shards/score-shards", run_folder="runs/missing")
    every_minute = {"schedule": {"cron": "* * * * *", "timezone": "Etc/UTC"}, "active": True}
    [schedule] = place.ask(f"deployments/{deployment}/schedules", [every_minute])

    def ended() -> list[dict[str, Any]]:
        runs = place.ask("flow_runs/filter", {"sort": "START_TIME_ASC"})
        return [run for run in runs if run["state"]["name"] in ENDED]

    wait_for("three scheduled runs", lambda: len(ended()) >= 5, 600)
    place.delete(f"deployments/{deployment}/schedules/{schedule['id']}")
    before = {run["id"]: (run["state"]["name"], run["state"]["message"]) for run in ended()}
    assert before[failed][0] == "Failed"
    assert "runs/missing" in before[failed][1]
    assert [name for name, _ in before.values()].count("Completed") >= 4
    time.sleep(300)
    for run, expected in before.items():
        state = place.ask(f"flow_runs/{run}")["state"]
        assert (state["name"], state["message"]) == expected
        states = place.ask(f"flow_run_states/?flow_run_id={run}")
        assert [state["name"] for state in states][-1] == expected[0]
        assert sum(state["name"] in ENDED for state in states) == 1
