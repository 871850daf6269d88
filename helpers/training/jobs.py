"""The whole job of a run: check first, train, test, save; the same for notebooks and commands."""

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError

from helpers import InputError
from helpers.cluster import as_they_end, cluster, workers_of
from helpers.console import progress_bar
from helpers.data.dataset import ChipData
from helpers.data.report import data_warnings
from helpers.training.alone import train_alone
from helpers.training.config import RunConfig
from helpers.training.methods import train
from helpers.training.processes import processes, said_once, several
from helpers.training.runs import (
    Run,
    checkpoint_path,
    differences,
    read_record,
    read_run,
    save_run,
)

# Two processes of one thread train 1.4 times as many chips per second as one process of two, since
# between the products of a small model threads wait (reports/log.md, 2026-11-30).
SIDE_BY_SIDE = 2
FINISHED_BEFORE = "finished before"  # what a run took that was read


def finished(
    config: RunConfig, data: ChipData, report=print, alone: bool = False
) -> tuple[Run, bool]:
    """The whole job: check, warn, train, test and save; with `resume`, read what is finished.

    Args:
        config: of the run.
        data: from `config.data()`.
        report: receives warnings about the data, then the progress.
        alone: train in a fresh process, for what a run costs (`alone.train_alone`); not where
            several processes train.

    Returns:
        The run, and whether it was read. A run that failed is saved all the same; its record says
        why in `failure`.

    Raises:
        InputError: as `check_ready` and `train`.
    """
    check_ready(config, data)
    everyone = processes(config.torch_device)
    report = said_once(report, everyone)
    for warning in data_warnings(data):
        report(warning)
    if config.resume:
        with suppress(InputError):  # files of two runs, since publishing was interrupted
            run = read_run(config)
            if run is not None and run.classifier is not None:
                # It may have been killed between its record and this.
                checkpoint_path(config).unlink(missing_ok=True)
                return run, True
    if alone and everyone.num_processes == 1:
        train_alone(config, data, report)
        return read_run(config), False
    run = train(config, data, report)
    if everyone.is_main_process:
        save_run(config, run)
    everyone.wait_for_everyone()
    return run, False


@dataclass(frozen=True)
class Job:
    """One of several runs; arguments as those of `finished`."""

    config: RunConfig
    data: ChipData
    alone: bool

    def finished(self) -> tuple[Run, str]:
        """The whole job without a word; the run, and what it took."""
        start = time.perf_counter()
        run, was_read = finished(self.config, self.data, lambda line: None, self.alone)
        return run, FINISHED_BEFORE if was_read else f"{time.perf_counter() - start:.0f} s"


def locally(jobs: list[Job]) -> Iterator[tuple[Job, Run, str]]:
    """Each job, its run, and what it took: first those that train alone, then the others together.

    Raises:
        InputError: as `finished` and `in_processes`.
    """
    yield from one_by_one([job for job in jobs if job.alone])
    yield from in_processes([job for job in jobs if not job.alone])


def one_by_one(jobs: list[Job]) -> Iterator[tuple[Job, Run, str]]:
    """Each job, its run, and what it took; they are done here."""
    for job in jobs:
        yield job, *job.finished()


def in_processes(jobs: list[Job]) -> Iterator[tuple[Job, Run, str]]:
    """The same, by processes of this machine that share its threads.

    For runs of which nobody asks what one costs. On a GPU, with one thread, and where processes
    train one run together, as `one_by_one`.

    Raises:
        InputError: as `finished`; or the system ended a process.
    """
    threads = torch.get_num_threads() // SIDE_BY_SIDE
    if len(jobs) < 2 or not threads or several() or jobs[0].config.torch_device != "cpu":
        yield from one_by_one(jobs)
        return
    start = delayed(_in_a_worker)
    took = Parallel(n_jobs=SIDE_BY_SIDE, return_as="generator")(
        start(os.getcwd(), threads, "cpu", job) for job in jobs
    )
    with progress_bar(total=len(jobs), desc="runs side by side", unit="run") as bar:
        try:
            for job, said in zip(jobs, took, strict=True):
                yield job, read_run(job.config), said
                bar.update()
        except TerminatedWorkerError:
            raise InputError(
                f"{jobs[bar.n].config.name} or a run beside it: its process ended with no word; "
                "was it killed, perhaps for want of memory? It goes on with resume"
            ) from None


def side_by_side(
    jobs: list[Job], ray_address: str | None, report=print
) -> Iterator[tuple[Job, Run, str]]:
    """The same, done by the workers of a Ray cluster, in whatever order they end.

    A worker has as many threads as this process, so that the numbers are those of one run after
    the other, or one GPU. Data and folders lie under the same paths on every machine. A run whose
    worker dies is done again.

    Args:
        jobs: of one device.
        ray_address: of the cluster; None to start one here.
        report: receives how many workers there are.

    Raises:
        InputError: as `finished`, or a run that is not to be found here.
        OSError: no cluster, one that is too small, or one that loses a run again and again.
    """
    threads = torch.get_num_threads()
    with cluster(ray_address) as ray:
        gpus, workers = workers_of(ray, threads, jobs[0].config.device)
        of_each = "a GPU" if gpus else f"{threads} threads (OMP_NUM_THREADS)"
        report(f"{min(workers, len(jobs))} runs side by side, each with {of_each}")
        task = ray.remote(num_cpus=1 if gpus else threads, num_gpus=gpus)(_in_a_worker)
        start = partial(task.remote, os.getcwd(), threads, "cuda" if gpus else "cpu")
        with progress_bar(total=len(jobs), desc="runs side by side", unit="run") as bar:
            for job, took in as_they_end(ray, start, jobs, workers):
                run = read_run(job.config)
                if run is None:
                    raise InputError(
                        f"history_path: {job.config.history_path} has no {job.config.name}, which "
                        "a worker trained; give folders that all machines of the cluster share"
                    )
                yield job, run, took
                bar.update()


def _in_a_worker(folder: str, threads: int, device: str, job: Job) -> str:
    """What a job took, in a worker's process; paths of the job are relative to a folder."""
    os.chdir(folder)
    torch.set_num_threads(threads)
    config = job.config.model_copy(update={"device": device})
    return replace(job, config=config).finished()[1]


def check_ready(config: RunConfig, data: ChipData) -> None:
    """Find what would stop a run after hours, before they are spent.

    Raises:
        InputError: a name, device or precision that cannot be used, or a finished run of this name
            with other parameters, data or weights, unless `overwrite`.
        OSError: a folder cannot be written.
    """
    config.resolved()
    for folder in (config.folder, Path(config.history_path), Path(config.cache_path)):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", str(existing))
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"0")
    if checkpoint_path(config).is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(checkpoint_path(config)))
    record = read_record(config)
    if record is None or config.overwrite:
        return
    if found := differences(config, record, data):
        raise InputError(
            f"run_name: {config.name} is a finished run in {config.history_path} with other "
            f"parameters or data ({'; '.join(found)}); choose another run_name or output_path, or "
            "replace it with overwrite"
        )
