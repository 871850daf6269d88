"""What a person at a terminal, in JupyterLab or of a log sees: progress, and one-line errors."""

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakSet

from safetensors import SafetensorError
from tqdm import tqdm as text_bar
from tqdm.auto import tqdm

from helpers import InputError

EVERY = 8  # seconds between two lines: below the ten we promise, since a busy machine wakes us late
NOTEBOOK = "NOTEBOOK_NAME"  # environment variable: what lines call the notebook they come from


_bars: WeakSet[text_bar] = WeakSet()


def progress_bar(*iterable, **options) -> tqdm:
    """A tqdm bar for every step that may take seconds; it vanishes when it is done.

    On a terminal and in JupyterLab it is drawn; in batch output it is a line every `EVERY` seconds
    (`_Lines`), which papermill does not store in the notebook. Whoever works long tells it here:

    - a loop: `for name in progress_bar(names, desc="building variants"):`
    - batches: `with progress_bar(total=len(chips), desc="features", unit="chip") as bar:` and
      `bar.update(n)`; `bar.set_postfix_str("validation loss 0.31")` adds a message
    - a step that cannot be counted: `with progress_bar(desc="compiling openvino_int8"):`

    Bars may be nested; close or leave them, also when an error passes.
    """
    if not iterable and options.get("total") is None:
        options.setdefault("bar_format", "{desc} {elapsed}")
    if _is_drawn():
        bar = tqdm(*iterable, leave=False, **options)
    else:
        # mininterval 0: iterations count at once
        bar = _SilentBar(*iterable, file=io.StringIO(), mininterval=0, **options)
    with tqdm.get_lock():
        _bars.add(bar)
    return bar


class _SilentBar(text_bar):
    """A bar that only counts; `_Lines` says how far it is."""

    def display(self, *_, **__) -> None:
        """Draw nothing."""


def _is_drawn() -> bool:
    """Whether somebody watches: Jupyter's server sets this variable; papermill does not.

    A process that another one started leaves the drawing to it.
    """
    if multiprocessing.parent_process():
        return False
    return sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ


class _Lines:
    """A line every few seconds of what is being done: where and since when, and every open bar."""

    def start(self) -> None:
        """Begin; what is said goes past a notebook's outputs to the terminal of its kernel."""
        self.done, self.stream = threading.Event(), sys.stderr  # whatever is silenced later
        self.begin()
        threading.Thread(target=self._run, args=(self.done,), daemon=True).start()

    def stop(self) -> None:
        """Say no more."""
        self.done.set()

    def begin(self, *_) -> None:
        """Count the seconds from now on: a cell begins."""
        self.began, self.idle = time.monotonic(), False

    def end(self, *_) -> None:
        """Be quiet until the next cell begins."""
        self.idle = True

    def _run(self, done: threading.Event) -> None:
        while not done.wait(EVERY):
            if self.idle:
                continue
            if self.stream.isatty() and (bars := _open_bars()):
                for bar in bars:
                    bar.refresh()
                continue
            line = f"{_where()}{time.monotonic() - self.began:.0f} s: {doing()}\n"
            with suppress(OSError):  # a kernel's stderr has the number of the terminal behind it
                os.write(self.stream.fileno(), line.encode())


_lines = _Lines()


def _shell():
    """IPython's shell in a notebook, else None."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython else None


def _where() -> str:
    shell = _shell()
    if shell is None:
        return ""
    return f"{os.environ.get(NOTEBOOK, 'notebook')}, cell {len(shell.user_ns['In']) - 1}, "


def _open_bars() -> list[text_bar]:
    with tqdm.get_lock():
        bars = sorted(_bars, key=lambda bar: bar.start_t)
    return [bar for bar in bars if not bar.disable]  # a closed bar is disabled


def doing() -> str:
    """Every open bar of this process in words, from the outermost to the innermost."""
    return " > ".join(map(_described, _open_bars())) or "working"


def _described(bar: text_bar) -> str:
    """A bar in words: `features 640/2644, 213 chip/s, 00:09 left, loss 0.31`."""
    count = f"{bar.n}/{bar.total}" if bar.total else f"{bar.n}" if bar.n else ""
    words = [f"{bar.desc.removesuffix(': ')} {count}".strip()]
    if bar.total and bar.n > bar.initial:
        rate = (bar.n - bar.initial) / bar.format_dict["elapsed"]
        left = text_bar.format_interval((bar.total - bar.n) / rate)
        words += [f"{rate:.3g} {bar.unit}/s", f"{left} left"]
    return ", ".join([*words, bar.postfix] if bar.postfix else words)


def report_cells() -> None:
    """In a notebook that runs in batch, say what its cells do from here on."""
    shell = _shell()
    if shell is None or _is_drawn() or _lines.begin in shell.events.callbacks["pre_run_cell"]:
        return
    shell.events.register("pre_run_cell", _lines.begin)
    shell.events.register("post_run_cell", _lines.end)
    _lines.start()


def run_command(main: Callable[[], None], with_lines: bool = True) -> None:
    """Run a command-line entry point, with lines of progress, and exit by one rule.

    0: done. 2: what was given cannot be used (`InputError`), or a file or disk refuses (`OSError`,
    `SafetensorError`), with one line on stderr that begins with `error: `. 130: Ctrl-C, one line.
    """
    if with_lines:
        _lines.start()
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the clearing up
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError, SafetensorError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    finally:
        if with_lines:
            _lines.stop()


def one_line(error: Exception) -> str:
    """An error's message on one printable line, whatever the file names in it hold."""
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    return " ".join("".join(c if c.isprintable() else " " for c in message).split())
