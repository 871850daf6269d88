"""The state of a training on disk, to go on from after it was killed."""

from dataclasses import dataclass
from pathlib import Path

import torch

from helpers import InputError
from helpers.records import written_whole


@dataclass(frozen=True)
class Checkpoint:
    """The state of a fit on disk, written whole after every epoch.

    Args:
        path: the file.
        identity: what must be equal for a fit to go on from it (configuration, data, weights).
        resume: whether to go on from the file if there is one.
    """

    path: Path
    identity: dict
    resume: bool

    def write(self, state: dict, processes: int) -> None:
        """Replace the file by this state."""
        with written_whole(self.path) as part:
            torch.save({"identity": self.identity | {"processes": processes}, **state}, part)

    def read(self, processes: int) -> dict | None:
        """Return the state to go on from, None to start anew.

        Raises:
            InputError: the file is damaged, or of a run with another identity.
        """
        if not (self.resume and self.path.is_file()):
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            found = state["identity"]
        except Exception as error:  # zip and pickle readers each raise their own
            raise InputError(
                f"resume: {self.path} is truncated or not a checkpoint of this project; "
                "delete it, or start anew without resume"
            ) from error
        wanted = self.identity | {"processes": processes}
        differences = [
            f"{key} was {found.get(key)!r} and is {wanted.get(key)!r}"
            for key in sorted(found.keys() | wanted.keys())
            if found.get(key) != wanted.get(key)
        ]
        if differences:
            raise InputError(
                f"resume: {self.path} is of another run: {'; '.join(differences)}. "
                "Use the same configuration, or start anew without resume"
            )
        return state
