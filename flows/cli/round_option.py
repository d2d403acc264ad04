"""The option --round of commands that use the models of rounds."""

from shlex import quote

from flows.run.folder import Run
from flows.stages.stage_order import is_complete


def trained_rounds(run: Run, wanted: str) -> list[int]:
    """Return the numbers of the rounds that `--round` names: a number, last, or all.

    Raises ValueError if one has no model.
    """
    trained = [number for number in range(1, run.config.rounds.num_rounds + 1) if is_complete(run, "train", number)]
    if not trained:
        raise ValueError(f"{run.folder}: no round has been trained; `reprise run {quote(str(run.folder))}` trains them")
    if wanted in ("last", "all"):
        return trained if wanted == "all" else trained[-1:]
    if not wanted.isdecimal() or int(wanted) not in trained:
        places = ", ".join(map(str, trained))
        raise ValueError(f"--round: {wanted!r} is not a trained round of {run.folder}; choose from {places}")
    return [int(wanted)]
