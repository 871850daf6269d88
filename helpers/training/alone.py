"""A training run in a process of its own, so that what it needs is measured beside nothing else."""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors import SafetensorError

from helpers import InputError
from helpers.console import doing, one_line, progress_bar
from helpers.data.dataset import ChipData
from helpers.training.config import RunConfig
from helpers.training.methods import train
from helpers.training.precision import MEASUREMENTS
from helpers.training.runs import save_run

_SECONDS_TO_END = 20  # for a process that was told to, before it is killed


def train_alone(config: RunConfig, data: ChipData, report: Callable[[str], None] = print) -> None:
    """Train, test and save a run in a fresh process, from an empty cache.

    Its history then holds the peak memory of the whole process, Python and libraries included, and
    seconds that share nothing with other runs. It ends when this one does, and with whatever is
    raised here. It does not read the manifest again.

    Raises:
        InputError: what was wrong in the process, in one line; or the system ended it.
        RuntimeError: a fault of this project, with the process's traceback.
    """
    # A fork of this process would begin with its memory; one of a server that has only imported
    # what training needs spares every process after the first the ten seconds of doing so.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "peft"])
    receiver, sender = context.Pipe(duplex=False)
    cache = config.folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    config.resolved()  # measures `precision: auto` where it must be, so that all methods share it
    measurements = Path(config.cache_path, MEASUREMENTS)
    if measurements.is_file():
        cache.mkdir(parents=True)
        shutil.copy(measurements, cache)
    arguments = (sender, config.model_copy(update={"cache_path": str(cache)}), data)
    process = context.Process(target=_train, args=(*arguments, torch.get_num_threads()))
    failure = None
    try:
        process.start()
        sender.close()
        with progress_bar(desc=config.name) as bar, suppress(EOFError):
            while True:
                kind, said = receiver.recv()
                if kind == "line":
                    report(said)
                elif kind == "doing":
                    bar.set_postfix_str(said)
                else:
                    failure = said
        process.join()
    finally:
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)  # as Ctrl-C, so that it clears up
            process.join(_SECONDS_TO_END)
            process.kill()
            process.join()
        shutil.rmtree(cache, ignore_errors=True)
    if failure:
        raise failure
    if process.exitcode:
        raise InputError(
            f"{config.name}: its process ended with status {process.exitcode} and no word; was it "
            "killed, perhaps for want of memory? It goes on with resume"
        )


def _train(sender: Connection, config: RunConfig, data: ChipData, threads: int) -> None:
    """What the process does; all it has to say goes through the pipe."""
    os.setsid()  # Ctrl-C at the terminal is for the process that waits for this one
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    torch.set_num_threads(threads)
    lock, done = threading.Lock(), threading.Event()

    def say(kind: str, said: str | Exception) -> None:
        with lock, suppress(OSError):  # nobody may listen any more
            sender.send((kind, said))

    def say_how_far() -> None:
        while not done.wait(1):
            say("doing", doing())
            if not multiprocessing.parent_process().is_alive():
                os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=say_how_far, daemon=True).start()
    try:
        save_run(config, train(config, data, lambda line: say("line", line)))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(130)
    except (InputError, OSError, SafetensorError) as error:
        say("failure", InputError(one_line(error)))
    except Exception:
        say("failure", RuntimeError(f"{config.name} failed:\n{traceback.format_exc()}"))
    finally:
        done.set()
