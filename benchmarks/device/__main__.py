"""`python -m benchmarks.device`: prepares and runs the device check."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Return 0 if the command succeeded and every check passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description="Check a device in ten minutes.")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write the inputs of the check; needs all of Reprise's packages")
    prepare.add_argument(
        "folder", type=Path, help="folder for a corpus, requests and reference losses, a few megabytes"
    )
    run = commands.add_parser("run", help="check the device; needs torch and megatron-core")
    run.add_argument("folder", type=Path, nargs="?", help="prepared folder; if omitted, it is prepared first")
    run.add_argument("--output", type=Path, required=True, help="folder for results.json, summary.md and logs")
    run.add_argument(
        "--device",
        choices=["auto", "cuda", "npu", "cpu"],
        default="auto",
        help="device to check; on cpu, a reduced check",
    )
    run.add_argument("--minutes", type=float, default=10.0, help="total time limit; parts not done by then fail")
    run.add_argument("--only", nargs="+", metavar="PART", help="names of the parts to run, as in the summary")
    arguments = parser.parse_args()
    try:
        if arguments.command == "prepare":
            from benchmarks.device.prepare import prepare as prepare_folder

            prepare_folder(arguments.folder)
            return 0
        from benchmarks.device.run import check_device

        return check_device(
            arguments.folder, arguments.output, arguments.device, 60 * arguments.minutes, arguments.only
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
