"""Progress as bars or as lines, and how a command ends."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr

import nbformat
import pytest

from helpers import InputError, console
from helpers.console import one_line, progress_bar, run_command
from helpers.records import ROOT


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(console, "EVERY", 0.05)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)


def test_a_command_says_what_it_does(often, capfd):
    """A line with every open bar, outermost first; nothing once they are closed."""

    def main():
        for seed in progress_bar(range(3), desc="seed"):
            with progress_bar(total=640, desc="features", unit="chip") as bar:
                bar.set_postfix_str("loss 0.3")
                bar.update(64)
                time.sleep(0.2 if seed == 1 else 0)
        with progress_bar(desc="compiling"):
            time.sleep(0.2)
        time.sleep(0.2)

    run_command(main)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    said = [line.split(" s: ")[1] for line in lines]
    rate = r", [\d.e+]+ \w+/s, [\d:]+ left"
    assert any(re.search(f"features 64/640{rate}, loss 0.3$", words) for words in said)
    said = [re.sub(rate, "", words) for words in said]
    long = ["seed 1/3 > features 64/640, loss 0.3", "compiling", "working"]
    assert list(dict.fromkeys(words for words in said if words in long)) == long


def test_a_command_is_silent_afterwards(often, capfd):
    run_command(lambda: None)
    time.sleep(0.2)
    assert capfd.readouterr() == ("", "")


def test_a_tool_that_is_silenced_does_not_silence_the_lines(often, capfd):
    def main():
        with open(os.devnull, "w") as nothing, redirect_stderr(nothing):
            time.sleep(0.3)

    run_command(main)
    assert ": working" in capfd.readouterr().err


def test_bars_on_a_terminal_vanish(monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in progress_bar(range(3), desc="features", mininterval=0):
        pass
    drawn = capfd.readouterr().err
    assert "features:  33%" in drawn and "\n" not in drawn
    assert drawn.endswith("\r") and drawn.split("\r")[-2].strip() == ""


def run_notebook(folder, *cells, **environment):
    """Execute cells by papermill's command; return the notebook and what the terminal showed."""
    cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebook.ipynb")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "-k", "python3"]
    command += ["--cwd", ROOT]
    # ipykernel leaves stderr alone where it sees pytest.
    variables = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | environment
    done = subprocess.run(
        [*command, folder / "notebook.ipynb", folder / "executed.ipynb"],
        env=variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return nbformat.read(folder / "executed.ipynb", as_version=4), done.stderr


def test_a_notebook_in_batch_says_what_it_does_and_stores_none_of_it(tmp_path):
    notebook, shown = run_notebook(
        tmp_path,
        "seed = 0",
        "import time\n"
        "from helpers import config, console\n"
        "console.EVERY = 0.2\n"
        "config.Config.from_notebook(globals())\n"
        "time.sleep(0.5)",
        "for _ in console.progress_bar(range(2), desc='training'):\n    time.sleep(0.5)",
        NOTEBOOK_NAME="lora.ipynb",
    )
    assert [cell.outputs for cell in notebook.cells if cell.source.startswith("for")] == [[]]
    assert "lora.ipynb, cell 2, 0 s: working\n" in shown
    assert "lora.ipynb, cell 3, 0 s: training 0/2\n" in shown


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("data_path: a\nb does not exist"), "data_path: a b does not exist"),
        (
            FileNotFoundError(2, "No such file or directory", "a\nb"),
            "a b: No such file or directory",
        ),
        (OSError("disk \x1b[31mfull"), "disk [31mfull"),
    ],
)
def test_an_error_is_one_printable_line(error, line, capfd):
    def main():
        raise error

    assert one_line(error).isprintable()
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    assert capfd.readouterr().err == f"error: {line}\n"


def test_other_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "helpers.load_data"],  # while its imports run
        ["-c", "import helpers.console as c, pydantic; c.run_command(pydantic.wait)"],
    ],
)
def test_ctrl_c_is_one_line_at_any_moment(command, tmp_path):
    """A real process, which waits where it imports a fake library, or in its main function."""
    waits = "import time\n\ndef wait():\n    print('here', flush=True)\n    time.sleep(60)\n\n"
    (tmp_path / "pydantic.py").write_text(waits + ("wait()" if command[0] == "-m" else ""))
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 130
