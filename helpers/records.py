"""Files that appear whole or not at all, and the provenance that every record carries."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

_PACKAGES = ("torch", "torchvision", "timm", "peft", "accelerate", "numpy", "scikit-learn")
ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` on success and is removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, since writers choose the format by it.
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    part.touch()
    mode = part.stat().st_mode
    part.unlink()
    try:
        yield part
        part.chmod(mode)  # safetensors writes files that only their owner may read
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def written_whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a new folder to fill; it replaces `folder` on success and is removed on failure."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{s}") for s in ("part", "old"))
    part.mkdir()
    try:
        yield part
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | Path, record: dict) -> None:
    """Write a record as indented JSON, whole or not at all."""
    with written_whole(path) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")


def environment() -> dict:
    """Versions, commit and machine of this process: what a number's reader needs to judge it."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "machine": {
            "cpu": _cpu_name(),
            "cpu_cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _git_commit() -> str | None:
    """Commit of the project's checkout; None outside one."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def reset_peak_memory() -> None:
    """Start a new measurement for `peak_memory_bytes`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    clear = Path("/proc/self/clear_refs")
    if clear.is_file():
        with suppress(OSError):  # not every container lets a process reset its own mark
            clear.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use since `reset_peak_memory`: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return psutil.Process().memory_info().rss
