"""SIGKILL at any moment of a run, over another run that had finished: nothing lost, nothing mixed.

`KILLS=13 pytest -s tests/training/test_kills.py` kills each of the four methods 13 times.
"""

import os
import random
import shutil
import signal
from functools import wraps
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers import InputError, records
from helpers.models.adapters import METHODS
from helpers.training import loop
from helpers.training.runs import read_run
from tests.training.short_run import config_for, fresh_processes, history_of, run

KILLS = int(os.environ.get("KILLS", 1))  # drawn of each method
KILLED = METHODS if "KILLS" in os.environ else ("head_only", "lora")

# Where a run may be killed: before each of its steps, and before and after all that publishes,
# moves or removes a file. Moments by the clock would depend on the machine, and miss most of these.
MOMENTS = [
    (loop.Loop, "step"),
    (os, "replace"),
    (records, "_exchange"),
    (Path, "rename"),
    (Path, "unlink"),
]


def train_until(config, kill_at, passed, threads):
    """Run quietly, count the moments in `passed`, and die at one of them; what a process does."""
    torch.set_num_threads(threads)

    def moment():
        passed.value += 1
        if passed.value == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function):
        @wraps(function)
        def call(*arguments, **options):
            moment()
            result = function(*arguments, **options)
            moment()
            return result

        return call

    for owner, name in MOMENTS:
        setattr(owner, name, watched(getattr(owner, name)))
    run(config)


def in_a_process(config, kill_at=0):
    """Train until a moment, 0 for the end; return the exit code and the moments passed."""
    context = fresh_processes()
    passed = context.Value("i", 0)
    arguments = (config, kill_at, passed, torch.get_num_threads())
    process = context.Process(target=train_until, args=arguments)
    process.start()
    process.join()
    return process.exitcode, passed.value


def assert_is(config, predictions):
    """What a person can read of a run is all of it, or one clear error."""
    try:
        found = read_run(config)
    except InputError:
        return
    if found is not None:
        pd.testing.assert_frame_equal(found.predictions, predictions)


@pytest.mark.parametrize("method", KILLED)
def test_killed_at_any_moment_a_run_ends_as_if_left_alone(method, chips_folder, tmp_path):
    options = {"method": method, "epochs": 3, "augment": True}
    before = config_for(chips_folder, tmp_path / "before", **options, seed=1)
    earlier = run(before).predictions
    alone = config_for(chips_folder, tmp_path / "alone", **options)
    shutil.copytree(tmp_path / "before", tmp_path / "alone")
    code, moments = in_a_process(alone.model_copy(update={"overwrite": True}))
    assert code == 0 and moments > 10
    expected = read_run(alone)
    moments_drawn = random.Random(method).sample(range(1, moments + 1), KILLS)
    for kill_at in dict.fromkeys([moments - 1, *moments_drawn]):  # the last is after the record
        folder = tmp_path / f"killed_{kill_at}"
        shutil.copytree(tmp_path / "before", folder)
        killed = config_for(chips_folder, folder, **options, overwrite=True, resume=True)
        assert in_a_process(killed, kill_at) == (-signal.SIGKILL, kill_at)
        assert_is(config_for(chips_folder, folder, **options, seed=1), earlier)
        assert_is(killed, expected.predictions)
        assert in_a_process(killed)[0] == 0
        found = read_run(killed)
        pd.testing.assert_frame_equal(history_of(killed), history_of(alone))
        pd.testing.assert_frame_equal(found.predictions, expected.predictions)
        state = found.classifier.state_dict()
        for key, value in expected.classifier.state_dict().items():
            assert torch.equal(state[key], value), f"{key}, killed at moment {kill_at}"
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        assert not [path for path in files if ".part" in path.name or path.name == "checkpoint.pt"]
        print(f"{method}: killed at moment {kill_at} of {moments}, identical")
