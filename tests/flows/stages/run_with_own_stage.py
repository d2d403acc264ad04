"""`reprise run CONFIG` with a stage of one's own and ranks that train nothing: `python -m … CONFIG`."""

import sys

import pytest

from flows.cli.main import main
from flows.stages.stage_order import STAGES
from tests.flows.fakes import fake_ranks
from tests.flows.stages.own_stage import CountTokens

if __name__ == "__main__":
    fake_ranks(pytest.MonkeyPatch())
    STAGES.insert([stage.name for stage in STAGES].index("train"), CountTokens())
    sys.exit(main(["run", sys.argv[1]]))
