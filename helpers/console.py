"""What a person at a terminal or in JupyterLab sees: progress bars and one-line errors."""

import os
import signal
import sys
from collections.abc import Callable

from safetensors import SafetensorError
from tqdm.auto import tqdm

from helpers import InputError


def progress_bar(*iterable, **options) -> tqdm:
    """A tqdm bar where somebody watches: on a terminal or in JupyterLab, never in batch output.

    Jupyter's server names the session in JPY_SESSION_NAME; papermill and nbconvert do not.
    """
    watched = sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ
    return tqdm(*iterable, disable=not watched, **options)


def run_command(main: Callable[[], None]) -> None:
    """Run a command-line entry point and exit by one rule.

    0: done. 2: what was given cannot be used (`InputError`), or a file or disk refuses (`OSError`,
    `SafetensorError`), with one line on stderr that begins with `error: `. 130: Ctrl-C, one line.
    """
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the clearing up
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError, SafetensorError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def one_line(error: Exception) -> str:
    """An error's message on one printable line, whatever the file names in it hold."""
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    return " ".join("".join(c if c.isprintable() else " " for c in message).split())
