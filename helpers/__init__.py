"""Adapting DINOv2 to overhead imagery, and measuring what the result costs in production."""

import sys


class InputError(ValueError):
    """Something the user gave is wrong: the message names it, says why, and what to do."""


def _interrupted(kind, error, trace) -> None:
    """Ctrl-C while a command's imports run: one line and 130, as later (`console.run_command`)."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr)
    sys.exit(130)


if sys.argv[0] == "-m":  # what Python puts there while it looks for the module of a command
    sys.excepthook = _interrupted
