"""Files that appear whole or not at all, and the provenance that every record carries.

Imports neither torch nor numpy, since a process that only serves a classifier needs neither.
"""

import ctypes
import errno
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import psutil

from helpers import InputError

_PACKAGES = ("torch", "torchvision", "timm", "peft", "accelerate", "numpy", "scikit-learn")
ROOT = Path(__file__).resolve().parent.parent

MAX_NAME_BYTES = 150  # file systems allow 255, and we put dates, endings and parts around it
_DAY = 24 * 3600  # seconds
# What an interrupted process leaves: `.name.<system>-<process>-<number>.part.csv`, or `.old`.
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<system>[0-9a-f]{8})-(?P<pid>\d+)-\d+\.(part|old)\b")
_numbers = itertools.count()


def check_plain_name(parameter: str, name: str) -> str:
    """Return a name from outside that is safe to put into a path.

    Raises:
        InputError: it is empty, longer than 150 bytes, begins with a dot (`..` does), or holds a
            separator or a character that cannot be printed; the message begins with `parameter`.
    """
    if not name.isprintable() or any(separator in name for separator in "/\\"):
        wrong = "holds a separator or a character that cannot be printed"
    elif not name or name.startswith("."):
        wrong = "is empty or begins with a dot"
    elif len(name.encode()) > MAX_NAME_BYTES:
        wrong = f"is longer than {MAX_NAME_BYTES} bytes"
    else:
        return name
    raise InputError(f"{parameter}: {name[:80]!r} {wrong}; use a plain file name")


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` on success and is removed on failure."""
    path = Path(path)
    part = _beside(path, "part")
    part.touch()
    mode = part.stat().st_mode
    part.unlink()
    try:
        yield part
        part.chmod(mode)  # safetensors writes files that only their owner may read
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def written_whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a new folder to fill; it replaces `folder` on success and is removed on failure.

    At any moment `folder` is the old one or the new one; where the file system cannot exchange
    two folders in one step, a crash may leave it away until `heal` is called on its parent.
    """
    folder = Path(folder).resolve()
    if folder.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "is a file where a folder shall be", str(folder))
    part = _beside(folder, "part")
    part.mkdir()
    try:
        yield part
        for path in [*part.rglob("*"), part]:
            _sync(path)
        _publish(part, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def heal(folder: str | Path) -> None:
    """Mend what crashed writers left in a folder.

    Their unfinished files and folders are removed; a folder that was moved aside when its
    replacement did not come is moved back. Every writer does this first; who reads a folder made
    by `written_whole_folder` calls it on the parent. Nothing of a running process is touched.
    """
    for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
        found = _LEFTOVER.match(path.name)
        with suppress(OSError):  # another process heals the same, or the file is another user's
            if not found or _is_in_use(path, found):
                continue
            if found[4] == "old" and not path.with_name(found["name"]).exists():
                path.rename(path.with_name(found["name"]))
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_in_use(path: Path, found: re.Match) -> bool:
    """Whether its process may be alive: it runs here, or was started elsewhere within a day."""
    if found["system"] == _system():
        return psutil.pid_exists(int(found["pid"]))
    return time.time() - path.stat().st_mtime < _DAY


@cache
def _system() -> str:
    """Eight letters that stand for the machine or container whose process numbers these are."""
    marks = [platform.node()]
    with suppress(OSError):
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        marks.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("".join(marks).encode()).hexdigest()[:8]


def _beside(path: Path, kind: str) -> Path:
    """A new hidden path in a healed folder; its suffix is that of `path`: writers go by it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    heal(path.parent)
    stem, suffix = (path.stem, path.suffix) if kind == "part" else (path.name, "")
    number = next(_numbers)
    return path.with_name(f".{stem}.{_system()}-{os.getpid()}-{number}.{kind}{suffix}")


def _publish(part: Path, folder: Path) -> None:
    """Put a folder in the place of another, whoever else does so at the same time."""
    old = _beside(folder, "old")
    try:
        while part.exists():
            try:
                if not folder.exists():
                    part.rename(folder)
                elif _exchange(part, folder):
                    return
                else:
                    shutil.rmtree(old, ignore_errors=True)
                    folder.rename(old)
            except OSError as error:  # another writer came between the look and the step
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                    raise
    finally:
        came = not part.exists()
        if not came:
            with suppress(OSError):  # nothing was moved aside, or another writer's folder came
                old.rename(folder)
        if came or folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system or the file system cannot.

    https://man7.org/linux/man-pages/man2/rename.2.html
    """
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names, before we go on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, record: dict) -> None:
    """Write a record as indented JSON, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")


def environment() -> dict:
    """Versions, commit and machine of this process: what a number's reader needs to judge it."""
    import torch

    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "machine": {
            "cpu": cpu_name(),
            "cpu_cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            # Of a process that uses one: to ask for the name takes 500 MB of a GPU's memory.
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        },
    }


def _git_commit() -> str | None:
    """Commit of the project's checkout; None outside one."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    """What the machine calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def reset_peak_memory() -> None:
    """Start a new measurement for `peak_memory_bytes`, of this process and of its GPU."""
    torch = sys.modules.get("torch")  # a process without it has allocated nothing through it
    if torch and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    clear = Path("/proc/self/clear_refs")
    if clear.is_file():
        with suppress(OSError):  # not every container lets a process reset its own mark
            clear.write_text("5")


def peak_memory_bytes(device) -> int:
    """Most memory in use since `reset_peak_memory`: allocated by torch on a GPU, else resident."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return psutil.Process().memory_info().rss
