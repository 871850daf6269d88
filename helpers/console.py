"""What a person at a terminal or in JupyterLab sees: progress bars and one-line errors."""

import os
import sys
from collections.abc import Callable

from tqdm.auto import tqdm

from helpers import InputError


def progress_bar(*iterable, **options) -> tqdm:
    """A tqdm bar where somebody watches: on a terminal or in JupyterLab, never in batch output.

    Jupyter's server names the session in JPY_SESSION_NAME; papermill and nbconvert do not.
    """
    watched = sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ
    return tqdm(*iterable, disable=not watched, **options)


def run_command(main: Callable[[], None]) -> None:
    """Run a command-line entry point; an InputError becomes one line and exit status 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
