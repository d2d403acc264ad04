"""Approval between refining and training: a person reviews the selection in Prefect's UI, and approves or changes it.

A waiting flow occupies no process: it is suspended, and restarts from the run folder when it is resumed.
"""

from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from pydantic import Field

from data_scoring.refine.policies import PolicyName
from flows.orchestration.flow_progress import has_deployment
from flows.report.tables import summary
from flows.run.folder import Run
from flows.stages.refine import preview


class Approval(RunInput):
    """What the next round trains on."""

    policy: PolicyName = Field(description="How samples are selected by their losses (refine.policy).")
    sampling_rate: float = Field(gt=0, le=1, description="Share of each shard that is kept (refine.sampling_rate).")


def ask(run: Run, round_number: int) -> bool:
    """Return whether a person has just approved what a round trains on; suspends the flow run until then.

    Returns False if no approval is needed, or it was given before. A flow run without a deployment cannot be suspended:
    there, the mix stage raises an error until `reprise approve`.
    """
    if not run.awaits_approval(round_number) or not has_deployment():
        return False
    kept = preview(run, round_number)
    approval = suspend_flow_run(
        wait_for_input=Approval.with_initial_data(
            description=f"## Approve this selection for round {round_number}?\n\n{summary(kept)}",
            policy=kept.config.policy,
            sampling_rate=kept.config.sampling_rate,
        ),
        key=f"approve-{round_number}",
    )
    run.approve(round_number, approval.policy, approval.sampling_rate)
    return True
