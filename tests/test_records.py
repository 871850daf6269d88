"""Files appear whole or not at all; records carry their provenance and no names of machines."""

import json
import platform
import socket
import subprocess
import sys

import psutil
import pytest
import torch

from helpers.records import environment, write_json, written_whole


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "folder" / "table.csv"
    with written_whole(path) as part:
        part.write_text("a,b\n")
        assert part.parent == path.parent  # the same file system, so that renaming is atomic
        assert part.suffix == ".csv"
        assert not path.exists()
    assert path.read_text() == "a,b\n"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_part(error, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(error), written_whole(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_before_the_first_byte_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no table"), written_whole(tmp_path / "table.csv"):
        raise ValueError("no table")
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_wrote_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "table.csv"):
        pass


def test_json_is_readable_and_whole(tmp_path):
    record = {"epochs": 3, "test": {"accuracy": 0.875}, "failure": None}
    write_json(tmp_path / "run.json", record)
    text = (tmp_path / "run.json").read_text()
    assert json.loads(text) == record
    assert text.startswith('{\n  "epochs": 3,\n') and text.endswith("}\n")


def test_a_record_that_is_no_json_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "run.json", {"epochs": 3})
    with pytest.raises(TypeError):
        write_json(tmp_path / "run.json", {"epochs": object()})
    assert json.loads((tmp_path / "run.json").read_text()) == {"epochs": 3}
    assert len(list(tmp_path.iterdir())) == 1


def test_the_environment_has_what_a_reader_needs():
    found = environment()
    assert found.keys() == {"python", "packages", "git_commit", "machine"}
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    machine = found["machine"]
    assert machine.keys() == {"cpu", "cpu_cores", "torch_threads", "memory_bytes", "gpu"}
    assert machine["memory_bytes"] == psutil.virtual_memory().total
    assert json.loads(json.dumps(found)) == found


def test_the_environment_does_not_name_the_machine(monkeypatch):
    uname = platform.uname()._replace(node="name-of-the-machine")
    monkeypatch.setattr(platform, "uname", lambda: uname)
    monkeypatch.setattr(socket, "gethostname", lambda: "name-of-the-machine")
    assert platform.node() == "name-of-the-machine"
    assert "name-of-the-machine" not in json.dumps(environment())


def test_peak_memory_sees_what_was_freed_again():
    """In a process of its own: a long test run's memory rises and falls by more than a block."""
    code = (
        "import numpy as np, torch\n"
        "from helpers.records import peak_memory_bytes, reset_peak_memory\n"
        "reset_peak_memory()\n"
        "before = peak_memory_bytes(torch.device('cpu'))\n"
        "np.ones(2**28, dtype=np.uint8)\n"
        "print(peak_memory_bytes(torch.device('cpu')) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert 2**27 < int(done.stdout) < 2**29
