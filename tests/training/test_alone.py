"""A run in a process of its own: the same run, its own memory, and no process left behind."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers import InputError
from helpers.training import examples, jobs
from helpers.training.alone import train_alone
from tests.training.short_run import NUMBERS, config_for


def test_a_run_alone_is_the_same_run_and_its_memory_is_its_own(chips_folder, tmp_path):
    ballast = torch.ones(150_000_000)  # 600 MB, which the notebook of a comparison may well hold
    options = {"method": "head_only", "epochs": 2}
    here, alone = (config_for(chips_folder, tmp_path / name, **options) for name in "ab")
    data, lines = here.data(), []
    runs = [
        jobs.finished(here, data, report=lambda line: None)[0],
        jobs.finished(alone, data, report=lines.append, alone=True)[0],
    ]
    assert ballast.sum() > 0
    pd.testing.assert_frame_equal(*(run.history[NUMBERS] for run in runs), check_dtype=False)
    pd.testing.assert_frame_equal(*(run.predictions for run in runs))
    states = [run.classifier.state_dict() for run in runs]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    peaks = [run.history.peak_memory_bytes.max() for run in runs]
    assert 0 < peaks[1] < peaks[0] - 5e8
    assert lines[0].endswith("chips: computed") and lines[1].startswith("epoch   1/2")
    assert not (alone.folder / "cache").exists() and not Path(alone.cache_path).exists()


def test_an_error_there_is_the_same_error_here(chips_folder, tmp_path):
    config = config_for(chips_folder, tmp_path, learning_rate=1e30)
    with pytest.raises(InputError, match="loss is not finite at epoch 1; lower the learning rate"):
        train_alone(config, config.data(), report=lambda line: None)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("end", "raises", "match"),
    [
        (lambda child: os.kill(child.pid, signal.SIGKILL), InputError, "status -9.* with resume"),
        (lambda child: signal.raise_signal(signal.SIGINT), KeyboardInterrupt, None),
    ],
)
def test_a_process_that_is_ended_leaves_what_a_run_goes_on_from(
    chips_folder, tmp_path, end, raises, match
):
    """Killed from outside, or by Ctrl-C here, at the end of an epoch."""
    config = config_for(chips_folder, tmp_path, epochs=200, patience=200)
    with pytest.raises(raises, match=match):
        train_alone(
            config, config.data(), report=lambda line: end(multiprocessing.active_children()[0])
        )
    assert not multiprocessing.active_children()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in files if ".part" not in path.name] == ["checkpoint.pt"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a fork is not safe")
def test_a_process_of_its_own_does_not_spawn_those_that_decode(chips_folder, tmp_path, monkeypatch):
    """As it would by itself, since it was not forked; they imported PyTorch again, for seconds."""
    monkeypatch.setattr(examples, "_WORKERS_FROM", 1)
    dataset = config_for(chips_folder, tmp_path).data().dataset("train", 28)
    loader = examples.batches(dataset, 2)
    assert loader.num_workers and loader.multiprocessing_context.get_start_method() == "fork"
    assert sum(len(targets) for _, targets in loader) == len(dataset)
