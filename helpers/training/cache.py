"""Folders in the cache, each with one large file and a record of its digest.

An entry's name comes from a key of all that decides its numbers, so a stale one cannot be read by
accident; a damaged one is found out by its digest.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

RECORD = "entry.json"


def entry_folder(cache_path: str | Path, kind: str, key: dict[str, Any]) -> Path:
    """Where the entry with this key lies, whether it is there or not."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return Path(cache_path) / f"{kind}_{name}"


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
