"""The embedded example, unpacked: its chips travel as one file."""

import hashlib
import shutil
import tempfile
import zipfile
from pathlib import Path

from helpers import InputError
from helpers.records import ROOT

PACKED = ROOT / "example"
SCENE = PACKED / "scene.tif"  # ground of the test split
CROWNS = PACKED / "crowns.parquet"  # what people drew on it
CACHE = ROOT / "cache"


def unpacked_example() -> Path:
    """Folder with the example's `manifest.csv` and chips; unpacked on first use, whole or not.

    Its name carries a digest of the manifest, which names the digest of every chip: another
    example gets another folder. Raises InputError where the checkout cannot be written to.
    """
    manifest = PACKED / "manifest.csv"
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()[:8]
    folder = CACHE / f"example_{digest}" / "example"
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            part = Path(temporary, "example")
            with zipfile.ZipFile(PACKED / "chips.zip") as archive:
                archive.extractall(part)
            shutil.copy(manifest, part)
            if not folder.exists():  # another process may have been faster
                part.rename(folder)
    except OSError as error:
        if not folder.exists():
            raise InputError(
                f"data_path: the example cannot be unpacked to {folder} ({error.strerror}). Make "
                "room or the folder writable."
            ) from error
    return folder
