"""A parser of command lines that says which command or option a mistyped one is nearest to, and takes any order."""

import argparse
import difflib
from collections.abc import Iterable
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """As argparse's, whose errors it words otherwise where something known is near; so are those of its commands."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Return the options, and the words that are none. Ends the process if one of these is near an option."""
        options, rest = super().parse_known_args(args, namespace)
        for action in self._get_positional_actions():
            # Argparse takes one that may be left out for left out if an option precedes it.
            is_left_out = action.nargs == "?" and getattr(options, action.dest) is action.default
            if is_left_out and rest and not rest[0].startswith("-"):
                try:
                    setattr(options, action.dest, self._get_values(action, [rest.pop(0)]))
                except argparse.ArgumentError as error:
                    self.error(str(error))
        for word in rest:
            near = _nearest(word.partition("=")[0], self._option_string_actions) if word.startswith("--") else None
            if near is not None:
                self.error(f"unrecognized arguments: {word}; did you mean {near}?")
        return options, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise ArgumentError if the value is none of the action's choices."""
        choices = [each for each in action.choices or () if isinstance(each, str)]
        near = _nearest(value, choices) if isinstance(value, str) and value not in choices else None
        if near is not None:
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; did you mean {near}?")
        super()._check_value(action, value)


def _nearest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, [*known], n=1)), None)
