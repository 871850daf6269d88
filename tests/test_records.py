"""Files appear whole or not at all; records carry their provenance and no names of machines."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from helpers import InputError, records
from helpers.records import (
    check_plain_name,
    environment,
    heal,
    write_json,
    written_whole,
    written_whole_folder,
)


def run_python(code, *arguments):
    """Run code in a process of its own; return what it printed and its exit status."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, done.returncode, done.stderr


def in_a_fork(function):
    """Call a function in a fork of this process, which may end at any step; return its status."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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


@pytest.fixture(params=["exchange", "two renames"])
def file_system(request, monkeypatch):
    """One that can exchange two folders in a step, and one that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(records, "_exchange", lambda one, other: False)
    return request.param


def write_folder(folder, text, size=3):
    with written_whole_folder(folder) as part:
        for number in range(size):
            (part / f"{number}.txt").write_text(text)


def texts(folder):
    return {path.read_text() for path in folder.iterdir()}


def test_a_folder_replaces_another_as_a_whole(tmp_path, file_system):
    folder = tmp_path / "new" / "tiles.v1"
    write_folder(folder, "first", size=5)
    write_folder(folder, "second")
    assert texts(folder) == {"second"} and len(list(folder.iterdir())) == 3
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder_and_no_part(error, tmp_path, file_system):
    write_folder(tmp_path / "adapter", "old")
    with pytest.raises(error), written_whole_folder(tmp_path / "adapter") as part:
        (part / "half.txt").write_text("half")
        raise error
    assert texts(tmp_path / "adapter") == {"old"}
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]


@pytest.mark.parametrize("left", ["old", "theirs"])
def test_a_folder_that_cannot_come_leaves_what_is_there(left, tmp_path, monkeypatch):
    """The second of two renames fails; another writer may be first to fill the gap."""
    write_folder(tmp_path / "adapter", "old")
    monkeypatch.setattr(records, "_exchange", lambda one, other: False)
    rename = records.Path.rename

    def refuse(path, target):
        if ".part" in path.name:
            raise PermissionError(13, "Permission denied", str(path))
        if path.name.endswith(".old") and left == "theirs":
            target.mkdir()
            (target / "0.txt").write_text("theirs")
        return rename(path, target)

    monkeypatch.setattr(records.Path, "rename", refuse)
    with pytest.raises(PermissionError):
        write_folder(tmp_path / "adapter", "new")
    assert texts(tmp_path / "adapter") == {left}
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]


def test_a_file_where_a_folder_shall_be_is_left_alone(tmp_path, file_system):
    (tmp_path / "adapter").write_text("a file")
    with pytest.raises(NotADirectoryError, match="adapter"):
        write_folder(tmp_path / "adapter", "new")
    assert (tmp_path / "adapter").read_text() == "a file"
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]


@pytest.mark.parametrize("step", range(1, 9))
@pytest.mark.parametrize("exchange", [True, False])
def test_a_writer_killed_at_any_step_loses_nothing(tmp_path, step, exchange):
    """Killed before each of its calls that change names: one whole folder is there after healing.

    Steps after the last call let the writer finish.
    """
    write_folder(tmp_path / "adapter", "old")

    def write():
        done = 0

        def killed_at(function):
            def call(*arguments, **options):
                nonlocal done
                done += 1
                if done == step:
                    os._exit(9)
                return function(*arguments, **options)

            return call

        if not exchange:
            records._exchange = lambda one, other: False
        for owner, name in ((records, "_exchange"), (records.Path, "rename"),
                            (records.Path, "mkdir"), (shutil, "rmtree")):  # fmt: skip
            setattr(owner, name, killed_at(getattr(owner, name)))
        write_folder(tmp_path / "adapter", "new")

    status = in_a_fork(write)
    assert status in (0, 9)
    if exchange:
        assert (tmp_path / "adapter").is_dir()
    heal(tmp_path)
    assert texts(tmp_path / "adapter") in ({"old"}, {"new"})
    assert status == 9 or texts(tmp_path / "adapter") == {"new"}
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]


def test_the_next_writer_clears_what_a_killed_one_left(tmp_path):
    def write():
        with written_whole(tmp_path / "table.csv") as part:
            part.write_text("half")
            os._exit(9)

    assert in_a_fork(write) == 9
    assert len(list(tmp_path.glob(".table.*.part.csv"))) == 1
    write_json(tmp_path / "other.json", {})
    assert list(tmp_path.iterdir()) == [tmp_path / "other.json"]


def test_healing_leaves_running_and_foreign_writers_alone(tmp_path):
    """A part of this process, one of another machine, and files that only look alike."""
    mine = tmp_path / f".table.{records._system()}-{os.getpid()}-0.part.csv"
    theirs = tmp_path / ".table.00000000-1-0.part.csv"
    others = [tmp_path / ".hidden.part.csv", tmp_path / ".a.1234.old", tmp_path / "a.part"]
    for path in (mine, theirs, *others):
        path.write_text("")
    heal(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, theirs, *others}
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(theirs, (two_days_ago, two_days_ago))
    heal(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, *others}


def test_writers_of_one_folder_do_not_disturb_each_other(tmp_path, file_system):
    """Every look by a reader finds one writer's folder (where the system can exchange them)."""
    folder, errors, looks = tmp_path / "adapter", [], []
    write_folder(folder, "first")

    def write(text):
        try:
            for _ in range(25):
                write_folder(folder, text)
        except Exception as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(f"writer {n}",)) for n in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        looks.append(folder.is_dir())
    for writer in writers:
        writer.join()
    assert not errors
    assert len(texts(folder)) == 1 and list(tmp_path.iterdir()) == [folder]
    assert file_system == "two renames" or all(looks)


@pytest.mark.parametrize("name", ["lora_example_seed0", "tiles.v1..2", "Bäume 5 %", "a" * 150])
def test_plain_names_pass(name):
    assert check_plain_name("run_name", name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/a", "a\\b", "a\0b", "a\nb", "\udc80", "ä" * 76, ".a"]
)
def test_other_names_are_refused_in_one_line(name):
    with pytest.raises(InputError) as error:
        check_plain_name("run_name", name)
    message = str(error.value)
    assert message.startswith("run_name: ") and message.isprintable() and len(message) < 300


def test_records_need_no_torch():
    code = (
        "import sys\n"
        "from helpers.records import peak_memory_bytes, reset_peak_memory\n"
        "reset_peak_memory()\n"
        "print(peak_memory_bytes('cpu') > 0, 'torch' in sys.modules, 'numpy' in sys.modules)\n"
    )
    assert run_python(code) == ("True False False\n", 0, "")


def test_peak_memory_sees_what_was_freed_again():
    """In a process of its own: a long test run's memory rises and falls by more than a block."""
    code = (
        "from helpers.records import peak_memory_bytes, reset_peak_memory\n"
        "reset_peak_memory()\n"
        "before = peak_memory_bytes('cpu')\n"
        "b'x' * 2**28\n"
        "print(peak_memory_bytes('cpu') - before)"
    )
    assert 2**27 < int(run_python(code)[0]) < 2**29
