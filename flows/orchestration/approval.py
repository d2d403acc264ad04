"""The gate between refining and training: a person sees in Prefect's UI what would be kept, and approves or changes it.

A flow that waits holds no process: it is suspended, and run again from the top, and so from the run folder, when it
is resumed.
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

    policy: PolicyName = Field(description="How losses become what is kept (refine.policy).")
    sampling_rate: float = Field(gt=0, le=1, description="Share of each shard that is kept (refine.sampling_rate).")


def ask(run: Run, round_number: int) -> bool:
    """Return whether a person has just approved what a round trains on; suspends the flow run until one has.

    Where nobody needs to be asked, or was asked before, returns False. A flow run without a deployment cannot be
    suspended: there the mix refuses to be made until `reprise approve`.
    """
    if not run.awaits_approval(round_number) or not has_deployment():
        return False
    kept = preview(run, round_number)
    approval = suspend_flow_run(
        wait_for_input=Approval.with_initial_data(
            description=f"## May round {round_number} train on this?\n\n{summary(kept)}",
            policy=kept.config.policy,
            sampling_rate=kept.config.sampling_rate,
        ),
        key=f"approve-{round_number}",
    )
    run.approve(round_number, approval.policy, approval.sampling_rate)
    return True
