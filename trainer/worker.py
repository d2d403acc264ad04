"""The process that torchrun starts for each rank: `python -m trainer.worker JOB.json`."""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    from data_scoring.base.exits import exit_with
    from trainer.rank import main

    exit_with(lambda: main(Path(sys.argv[1])))
