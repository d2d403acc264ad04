"""The process that torchrun starts for each rank: `python -m trainer.worker JOB.json`."""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    from trainer.rank import main

    main(Path(sys.argv[1]))
