"""Every row of every `rows_<room>.py` here: a fault, and the one line that answers it.

To add a case, add one `Fault` to the ROWS of its room. The commands run in this process.
"""

import hashlib
import importlib
import shlex
import signal
import sys
from pathlib import Path

import pytest

from helpers import console

SECONDS = 120  # a case takes a few; this many is a hang
QUIET = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)

FAULTS = [
    pytest.param(fault, id=fault.name)
    for path in sorted(Path(__file__).parent.glob("rows_*.py"))
    for fault in importlib.import_module(f"tests.faults.{path.stem}").ROWS
]


def digests(folder):
    """Digest of every file in a folder and its sub-folders."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def hangs(*_):
    pytest.fail(f"no answer after {SECONDS} s")


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault, tmp_path, monkeypatch, capfd, recwarn):
    """One line, the right exit status, nothing lost and nothing half-written."""
    if fault.make:
        fault.make(tmp_path)
    before = digests(tmp_path)
    arguments = fault.arguments
    if isinstance(arguments, str):
        arguments = shlex.split(arguments)
    main = importlib.import_module(f"helpers.{arguments[0]}").main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(console, "EVERY", 3600)  # no lines of progress beside the one we look for
    if fault.patch:
        monkeypatch.setattr(*fault.patch)
    capfd.readouterr()
    previous = {
        signal.SIGALRM: signal.signal(signal.SIGALRM, hangs),
        signal.SIGINT: signal.getsignal(signal.SIGINT),  # ignored after an interrupt
    }
    signal.alarm(SECONDS)
    try:
        console.run_command(main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        signal.alarm(0)
        for number, handler in previous.items():
            signal.signal(number, handler)
    out, err = capfd.readouterr()
    assert code == fault.code, out + err
    for words in fault.says:
        assert words in out + err
    if code == 2:
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert not [w.message for w in recwarn if not issubclass(w.category, QUIET)]
    if code:
        after = digests(tmp_path)
        assert {path: after.get(path) for path in before} == before
    assert not (tmp_path / "executed").exists(), "a pickle was executed"
    assert not [path for path in tmp_path.rglob(".*") if ".part" in path.name]
