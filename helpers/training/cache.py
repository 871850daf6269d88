"""Folders in the cache, each with one large file and a record of its digest.

An entry's name comes from a key of all that decides its numbers, so a stale one cannot be read by
accident; a damaged one is found out by its digest.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from helpers.training.processes import several

RECORD = "entry.json"


def entry_folder(cache_path: str | Path, kind: str, key: dict[str, Any]) -> Path:
    """Where the entry with this key lies, whether it is there or not."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return Path(cache_path) / f"{kind}_{name}"


@contextmanager
def held(entry: Path) -> Iterator[None]:
    """Keep other runs from an entry, so that of those side by side one computes it and all read it.

    Of several processes of a run the main one holds it for all. It is let go with the process.
    """
    everyone = several()
    if everyone and not everyone.is_main_process:
        yield
        return
    entry.parent.mkdir(parents=True, exist_ok=True)
    file, is_held = entry.with_name(f"{entry.name}.lock"), False
    while not is_held:
        with open(file, "w") as lock:
            with suppress(OSError):  # not every file system has locks; then each computes its own
                fcntl.flock(lock, fcntl.LOCK_EX)
            is_held = os.fstat(lock.fileno()).st_nlink > 0  # else it was removed by who held it
            if is_held:
                try:
                    yield
                finally:
                    file.unlink(missing_ok=True)


def write_record(file: Path, seconds: float) -> None:
    """Write the record beside an entry's complete file, which took so many seconds."""
    record = {"seconds": seconds, "digest": digest(file)}
    file.with_name(RECORD).write_text(json.dumps(record))


def read_seconds(file: Path) -> float | None:
    """What `write_record` was told; None where the entry is not there, or not as it was written."""
    try:
        record = json.loads(file.with_name(RECORD).read_text())
        return float(record["seconds"]) if digest(file) == record["digest"] else None
    except (OSError, ValueError, KeyError, TypeError):  # whatever an odd entry can raise
        return None


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
