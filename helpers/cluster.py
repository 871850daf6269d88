"""Ray, where it is asked for: a cluster to connect to or to start, and tasks of its workers."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from types import ModuleType
from typing import Any, TypeVar

from helpers import InputError
from helpers.records import ROOT

T = TypeVar("T")
OBJECT_STORE_BYTES = 100 * 2**20  # of a Ray that is started here: what goes through it is small


def require_ray() -> None:
    """Raise InputError, saying how to install it, if Ray is missing."""
    if find_spec("ray") is None:
        raise InputError(
            "engine: ray is not installed; pip install -r requirements-ray.txt, or take local"
        )


@contextmanager
def cluster(address: str | None) -> Iterator[ModuleType]:
    """Connect to a Ray cluster, or start one on this machine; leave it afterwards.

    Yields:
        The module `ray`, which takes a second to import.

    Raises:
        OSError: no cluster, or one that loses a task again and again; or a task raised it.
        InputError: a task raised it.
    """
    import ray

    in_a_notebook = ray.is_initialized()
    if not in_a_notebook:
        _connect(ray, address)
    try:
        yield ray
    except ray.exceptions.RayTaskError as error:
        expected = isinstance(error.cause, InputError | OSError)
        raise error.cause if expected else error from None
    except ray.exceptions.RayError as error:
        raise ConnectionError(f"ray: {error}") from error
    finally:
        if not in_a_notebook:
            ray.shutdown()


def _connect(ray: ModuleType, address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    if address:  # other machines need not have this project; its requirements they must
        options = {"runtime_env": {"py_modules": [str(ROOT / "helpers")]}}
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        ray.init(address or "local", **options, **quiet)
    except Exception as error:  # Ray raises whatever fits
        problem = "cannot be started here"
        if address:
            problem = f"cannot be reached at {address}; a cluster may want RAY_AUTH_MODE=token"
        raise ConnectionError(f"ray: {problem} ({error})") from error


def workers_of(ray: ModuleType, threads: int, device: str) -> tuple[int, int]:
    """GPUs of a worker, 0 or 1, and how many workers the cluster has room for.

    Args:
        ray: connected.
        threads: of a worker.
        device: auto, cpu or cuda.

    Raises:
        OSError: it has room for none.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = 0 if device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
    if device == "cuda" and not gpus:
        raise ConnectionError("ray: device cuda was asked for and the cluster has no GPU")
    workers = gpus or int(sum(node.get("CPU", 0) // threads for node in nodes))
    if not workers:
        raise ConnectionError(f"ray: no machine of the cluster has {threads} cores free (threads)")
    return min(gpus, 1), workers


def as_they_end(
    ray: ModuleType, start: Callable[[T], Any], items: Iterable[T], most: int
) -> Iterator[tuple[T, Any]]:
    """Each item and what its task returned, in whatever order they end.

    Args:
        ray: connected.
        start: hands an item to a worker and returns Ray's reference to the answer.
        items: one a task.
        most: tasks that are handed out at once.
    """
    waiting, running = iter(items), {}
    while True:
        for item in islice(waiting, most - len(running)):
            running[start(item)] = item
        if not running:
            return
        (done,), _ = ray.wait(list(running))
        yield running.pop(done), ray.get(done)
