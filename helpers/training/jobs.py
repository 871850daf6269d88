"""The whole job of a run: check first, train, test, save; the same for notebooks and commands."""

import errno
import tempfile
from contextlib import suppress
from pathlib import Path

from helpers import InputError
from helpers.data.dataset import ChipData
from helpers.data.report import data_warnings
from helpers.training.alone import train_alone
from helpers.training.config import RunConfig
from helpers.training.methods import train
from helpers.training.processes import processes, said_once
from helpers.training.runs import (
    Run,
    checkpoint_path,
    differences,
    read_record,
    read_run,
    save_run,
)


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
