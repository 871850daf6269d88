"""The state of a training run on disk, from which it goes on after it was killed."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from helpers import InputError
from helpers.records import written_whole


@dataclass(frozen=True)
class Checkpoint:
    """The state of a fit on disk, written whole after every epoch."""

    path: Path
    identity: dict  # what must be equal for a fit to go on (configuration, data, weights)
    resume: bool  # whether to go on from the file if there is one

    def write(self, state: dict, processes: int) -> None:
        """Replace the file by this state."""
        with written_whole(self.path) as part:
            torch.save({"identity": self.identity | {"processes": processes}, **state}, part)

    def read(self, processes: int) -> dict | None:
        """Return the state to go on from, None to start anew.

        Raises:
            InputError: the file is damaged, or of a run with another identity.
        """
        if not (self.resume and self.path.exists()):
            return None
        try:
            # torch writes a CRC-32 of every tensor into the archive and does not look at it.
            with zipfile.ZipFile(self.path) as archive:
                if archive.testzip():
                    raise ValueError("its contents are not those that were written")
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            found = dict(state["identity"])
        except Exception as error:  # zip and pickle readers each raise their own
            raise self.damaged(error) from error
        wanted = self.identity | {"processes": processes}
        differences = [
            f"{key} was {found.get(key)!r} and is {wanted.get(key)!r}"
            for key in sorted(found.keys() | wanted.keys(), key=str)
            if found.get(key) != wanted.get(key)
        ]
        if differences:
            raise InputError(
                f"resume: {self.path} is of another run: {'; '.join(differences)}. "
                "Use the same configuration, or start anew without resume"
            )
        return state

    def damaged(self, error: Exception) -> InputError:
        """What to raise where reading the file raised this."""
        return InputError(
            f"resume: {self.path} is truncated or not a checkpoint of this project "
            f"({type(error).__name__}); delete it, or start anew without resume"
        )
