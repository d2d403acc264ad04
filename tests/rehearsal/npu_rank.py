"""A rank that runs several jobs in sequence, since starting it takes much longer: `python -m … JOBS.json`.

JOBS.json has the file of each job, the step at which it is asked to stop, or null, and the rendezvous store's port.
"""

import json
import os
import sys
from pathlib import Path

import torch

from trainer.checkpoint_folder import list_checkpoints
from trainer.devices import Device, initialise
from trainer.job import Job, read_job
from trainer.pickles import allow_plain_pickles_only
from trainer.rank import do
from trainer.stopping import StoppedError, StopRequest, end_with_launcher


class StopAtStep(StopRequest):
    """What a rank is asked in a step, and in no other."""

    def __init__(self, step: int) -> None:
        self._step, self._asked = step, 0
        super().__init__()

    @property
    def is_made(self) -> bool:
        """Return whether to stop; ranks agree on it once a step."""
        self._asked += 1
        return self._asked == self._step

    @is_made.setter
    def is_made(self, _: bool) -> None: ...


def main(jobs: Path) -> None:
    allow_plain_pickles_only()
    tasks = [(read_job(Path(path)), stop_at, port) for path, stop_at, port in json.loads(jobs.read_text())]
    end_with_launcher(tasks[0][0], StopRequest())
    for job, stop_at, port in tasks:
        os.environ["MASTER_PORT"] = str(port)
        device = initialise(job.device, int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(device.backend)
        if stop_at is None:
            do(job, device, StopRequest())
        else:
            run_until(job, device, stop_at)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()


def run_until(job: Job, device: Device, step: int) -> None:
    """Do a job that is asked to stop in `step`, and see that it did."""
    try:
        do(job, device, StopAtStep(step))
    except StoppedError:
        assert list_checkpoints(job.round_folder / "checkpoint")[-1].name == f"step-{step:08d}"
    else:
        raise AssertionError("nobody stopped")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
