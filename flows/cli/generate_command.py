"""`reprise generate`: a model's continuations of prompts."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.json_output import print_json
from flows.cli.options import count, path
from flows.cli.round_option import trained_rounds
from flows.run.folder import Run, read_run
from flows.stages.stage_order import stages_of

if TYPE_CHECKING:
    from flows.display.terminal_progress import TerminalProgress
    from flows.generation.continuations import Continuer
    from trainer.sampling import Sampling

_KEPT = "\n\t"


def add_generate(commands: Any) -> None:
    """Add the command to the parser's `commands`."""
    command = commands.add_parser(
        "generate",
        help="continue prompts with the model of a round",
        description="Continue prompts with the model of a round. Without --prompt and --prompts, they are the lines of "
        "standard input; on a terminal, you are asked for one after the other.",
    )
    command.add_argument("run", type=path, metavar="RUN", help="run folder")
    command.add_argument("--round", type=int, metavar="N", help="round whose model is used (default: the last trained)")
    command.add_argument(
        "--prompt", action="append", metavar="TEXT", help='text to continue; may be repeated; "": begin a text'
    )
    command.add_argument("--prompts", type=path, metavar="FILE", help="file with a prompt on each line")
    command.add_argument(
        "--max-tokens", type=count, default=100, metavar="N", help="largest number of new tokens (default: 100)"
    )
    command.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: always the most probable token (default: 0)"
    )
    command.add_argument("--top-k", type=count, metavar="K", help="draw from the K most probable tokens only")
    command.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the fewest tokens with a probability of P together"
    )
    command.add_argument("--seed", type=count, default=0, metavar="N", help="seed of the draws (default: 0)")
    command.add_argument(
        "--samples", type=count, default=1, metavar="N", help="continuations of each prompt (default: 1)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON document instead, a list of continuations")
    command.set_defaults(command=_generate, is_resumable=False)


def _generate(options: argparse.Namespace) -> None:
    sampling = _sampling(options)
    # Before standard input is read.
    run = read_run(options.run)
    [number] = trained_rounds(run, "last" if options.round is None else str(options.round))
    prompts = _prompts(options)
    if prompts is None:
        _converse(run, number, options, sampling)
    else:
        _continue_all(run, number, options, sampling, prompts)


def _sampling(options: argparse.Namespace) -> "Sampling":
    """Return how tokens are chosen. Raises ValueError for options that are out of bounds or have no effect."""
    from trainer.sampling import Sampling

    for name in ("max_tokens", "samples"):
        if (number := getattr(options, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {number} is less than 1; raise it")
    bounds = {
        "temperature": (0 <= options.temperature < float("inf"), "0 or more"),
        "top_k": (options.top_k is None or options.top_k >= 1, "1 or more"),
        "top_p": (options.top_p is None or 0 < options.top_p <= 1, "above 0 and at most 1"),
        "seed": (options.seed >= 0, "0 or more"),
    }
    for name, (is_within, wanted) in bounds.items():
        if not is_within:
            raise ValueError(f"--{name.replace('_', '-')}: {getattr(options, name)} is not {wanted}; change it")
    if options.temperature == 0:
        useless = {"top-k": options.top_k, "top-p": options.top_p, "samples": options.samples > 1 or None}
        for name, value in useless.items():
            if value is not None:
                raise ValueError(
                    f"--{name}: has no effect with temperature 0, which always takes the most probable token; "
                    "add --temperature 1, or omit it"
                )
    return Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)


def _prompts(options: argparse.Namespace) -> list[str] | None:
    """Return the prompts, or None if they are asked for. Raises ValueError if there are none."""
    prompts = list(options.prompt or [])
    place: str | Path = "standard input"
    if options.prompts is not None:
        place = options.prompts
        try:
            content = options.prompts.read_bytes()
        except OSError as error:
            raise ValueError(f"--prompts {place}: cannot be read ({error.strerror}); correct the path") from None
        prompts += _lines(content, place)
    elif not prompts:
        if sys.stdin.isatty():
            return None
        prompts = _lines(sys.stdin.buffer.read(), place)
    if not prompts:
        raise ValueError(f"{place}: holds no prompt; write one on each line, or give --prompt TEXT")
    for number, prompt in enumerate(prompts, start=1):
        if not _is_text(prompt):
            raise ValueError(f"prompt {number}: not UTF-8; give text in UTF-8")
    return prompts


def _lines(content: bytes, place: str | Path) -> list[str]:
    """Return the lines that are not blank."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{place}: line {line} is not UTF-8; write the prompts in UTF-8") from None
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def _is_text(prompt: str) -> bool:
    """Return whether the prompt has no bytes that Python could not decode from the command line."""
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in prompt)


def _continue_all(run: Run, number: int, options: argparse.Namespace, sampling: "Sampling", prompts: list[str]) -> None:
    from flows.generation.continuations import Continuer

    stages_of(run).verify()
    bar = _Bar()
    with Continuer(run, number, bar) as continuer:
        continuer.encode(prompts)
        with bar:
            _continue(continuer, options, sampling, prompts, bar)


def _converse(run: Run, number: int, options: argparse.Namespace, sampling: "Sampling") -> None:
    """Continue the prompts that the user types, until the end of input; the model stays loaded."""
    import readline  # noqa: F401 - `input` then edits lines

    from flows.generation.continuations import Continuer
    from flows.launch.launcher import KeptRanks

    stages_of(run).verify()
    bar = _Bar()
    with Continuer(run, number, bar, KeptRanks()) as continuer:
        print("Type the beginning of a text; Ctrl-D ends.", file=sys.stderr)
        while True:
            try:
                prompt = input("> ")
            except EOFError:
                print(file=sys.stderr)
                return
            if not prompt.strip():
                continue
            try:
                continuer.encode([prompt])
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                continue
            with bar:
                _continue(continuer, options, sampling, [prompt], bar)


def _continue(
    continuer: "Continuer", options: argparse.Namespace, sampling: "Sampling", prompts: list[str], bar: "_Bar"
) -> None:
    """Print the continuations of prompts: as they come, or as JSON."""
    screen = _Screen([prompt for prompt in prompts for _ in range(options.samples)], bar)

    def ignore(number: int, text: str, is_over: bool) -> None:
        pass

    show = ignore if options.json else screen.show
    found = continuer.continue_prompts(prompts, options.samples, options.max_tokens, sampling, show)
    bar.end()
    if options.json:
        print_json(found)
    num_cut = sum(each.ended_by == "model length" for each in found)
    if num_cut:
        which = "the continuation" if len(found) == 1 else f"{num_cut} of {len(found)} continuations"
        print(f"note: {which} ended at the model's length (corpus.seq_length)", file=sys.stderr)


class _Bar:
    """A progress callback with a bar, until the first text is printed, over which it would be drawn.

    A context manager, which can be entered again.
    """

    def __init__(self) -> None:
        self._progress: TerminalProgress | None = None

    def __enter__(self) -> "_Bar":
        from flows.display.terminal_progress import TerminalProgress

        self._progress = TerminalProgress().__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.end()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """Show progress; see `TerminalProgress`."""
        if self._progress is not None:
            self._progress(what, done, total)

    def end(self) -> None:
        """Leave the screen to text."""
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.__exit__(None, None, None)


class _Screen:
    """Prints prompts with their continuations, one after the other, the current one as it comes."""

    def __init__(self, prompts: Sequence[str], bar: _Bar) -> None:
        self._prompts, self._bar = prompts, bar
        self._waiting: list[list[str]] = [[] for _ in prompts]
        self._are_over = [False] * len(prompts)
        self._current = 0
        self._is_begun = False
        self._is_bold = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def show(self, number: int, text: str, is_over: bool) -> None:
        """Print `text`, which was added to a continuation, once those before it are over."""
        self._waiting[number].append(text)
        self._are_over[number] = is_over
        while self._current < len(self._prompts):
            self._print("".join(self._waiting[self._current]))
            self._waiting[self._current].clear()
            if not self._are_over[self._current]:
                break
            print(flush=True)
            self._current += 1
            self._is_begun = False

    def _print(self, text: str) -> None:
        from flows.display.visible_text import visible

        if not self._is_begun:
            self._bar.end()
            prompt = visible(self._prompts[self._current], _KEPT)
            print(end="\n" if self._current else "")
            print(f"\x1b[1m{prompt}\x1b[0m" if self._is_bold and prompt else prompt, end="")
            self._is_begun = True
        print(visible(text, _KEPT), end="", flush=True)
