"""Runs side by side in processes of this machine: the same runs, and none lost without a word."""

import os
import signal
from dataclasses import dataclass, replace

import numpy as np
import pytest

from helpers import InputError
from helpers.training.jobs import FINISHED_BEFORE, Job, in_processes, locally, one_by_one
from helpers.training.processes import torch_threads
from tests.training.short_run import config_for


@pytest.fixture
def two_threads():
    """On a machine of one core, too; there nothing would run side by side."""
    with torch_threads(2):
        yield


def jobs_of(data, folder, kind=Job, **parameters):
    parameters |= {"epochs": 2, "resume": True}
    configs = [
        config_for(data, folder, run_name=f"trial{seed}", seed=seed, **parameters)
        for seed in (0, 1)
    ]
    return [kind(config, config.data(), alone=False) for config in configs]


def test_side_by_side_the_runs_are_those_of_one_after_the_other(
    chips_folder, tmp_path, two_threads
):
    here = list(one_by_one(jobs_of(chips_folder, tmp_path / "here")))
    jobs = jobs_of(chips_folder, tmp_path / "there")
    there = list(in_processes(jobs))
    assert [job for job, _, _ in there] == jobs
    for (_, expected, _), (job, found, took) in zip(here, there, strict=True):
        assert found.record["run"] == job.config.name and took.endswith(" s")
        probabilities = [
            run.predictions.filter(like="p_").to_numpy(np.float64) for run in (expected, found)
        ]
        # One thread may sum in another order than two; on models as small as this it does not.
        np.testing.assert_allclose(*probabilities, atol=1e-4)
    assert [took for _, _, took in in_processes(jobs)] == [FINISHED_BEFORE] * 2


@dataclass(frozen=True)
class Told(Job):
    """One that trains nothing, and says where it would."""

    def finished(self):
        """The process, and whether it would start one of its own."""
        return os.getpid(), self.alone


def test_here_the_measured_runs_come_first_and_alone(chips_folder, tmp_path, two_threads):
    """A run of a method after the other's measured one must not train beside it."""
    first, second = jobs_of(chips_folder, tmp_path, kind=Told)
    measured = replace(second, alone=True)
    expected = [(measured, os.getpid(), True), (first, os.getpid(), False)]
    assert list(locally([first, measured])) == expected


def test_an_error_of_a_run_is_that_error_here(chips_folder, tmp_path, two_threads):
    with pytest.raises(InputError, match="loss is not finite at epoch 1; lower the learning rate"):
        list(in_processes(jobs_of(chips_folder, tmp_path, learning_rate=1e30)))


@dataclass(frozen=True)
class Killed(Job):
    """One that the system ends."""

    def finished(self):
        """As if memory had run out."""
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_named(chips_folder, tmp_path, two_threads):
    with pytest.raises(InputError, match=r"trial0 or a run beside it.*with resume"):
        list(in_processes(jobs_of(chips_folder, tmp_path, kind=Killed)))
