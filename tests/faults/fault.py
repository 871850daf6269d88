"""One row of the fault table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """What a person may get wrong, and the answer.

    Args:
        name: what is wrong, in words.
        make: fills an empty folder, in which the command then runs; None leaves it empty.
        arguments: what is typed after `python -m helpers.`, or a list where quoting cannot say it.
        says: words that must all stand in the answer.
        code: exit status; with 2, the answer is one line on stderr that begins with `error: `.
        patch: a dotted name and what stands in its place while the command runs: a full disk.
    """

    name: str
    make: Callable[[Path], object] | None
    arguments: str | list[str]
    says: tuple[str, ...]
    code: int = 2
    patch: tuple[str, object] | None = None
