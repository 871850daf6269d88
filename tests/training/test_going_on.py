"""Going on from a checkpoint, and what a finished run leaves to the next."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import InputError
from helpers.models.backbones import create_backbone
from helpers.training import jobs, methods
from tests.training.short_run import NUMBERS, config_for, run


def test_a_finished_run_is_read_and_its_checkpoint_is_gone(chips_folder, tmp_path):
    config = config_for(chips_folder, tmp_path)
    first, _ = jobs.finished(config, config.data(), report=lambda line: None)
    assert not (config.folder / "checkpoint.pt").exists()
    resumed = config.model_copy(update={"resume": True})
    again, was_read = jobs.finished(resumed, config.data(), report=lambda line: None)
    assert was_read
    pd.testing.assert_frame_equal(first.history[NUMBERS], again.history[NUMBERS], check_dtype=False)
    pd.testing.assert_frame_equal(first.predictions, again.predictions)


@pytest.fixture(scope="module")
def killed(chips_folder, tmp_path_factory):
    """A run that was killed before it was saved: all of its epochs are in the checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    config = config_for(chips_folder, folder, epochs=1)
    methods.train(config, config.data(), report=lambda line: None)
    return folder


@pytest.fixture
def checkpointed(killed, chips_folder, tmp_path):
    """A copy of it."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    return config_for(chips_folder, tmp_path, epochs=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 8}, "is of another run: lora_rank was 4 and is 8"),
        ({"precision": "bf16"}, "precision was 'fp32' and is 'bf16'"),
        ({"seed": 1}, "seed was 0 and is 1; weights_digest was"),
        ({"epochs": 2, "batch_size": 8}, "batch_size was 16 and is 8; epochs was 1 and is 2"),
    ],
)
def test_resuming_with_another_configuration_says_what_differs(
    checkpointed, changes, message, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    changed = checkpointed.model_copy(update={"resume": True} | changes)
    with pytest.raises(InputError, match=message):
        run(changed)


def rewritten(**changes):
    def damage(path):
        state = torch.load(path, weights_only=True)
        torch.save(
            {key: value for key, value in (state | changes).items() if value != "gone"}, path
        )

    return damage


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "a flipped bit": flip_a_bit,
    "empty": lambda path: path.write_bytes(b""),
    "no progress": rewritten(progress="gone"),
    "odd progress": rewritten(progress={"epoch": "one"}),
    "no values": rewritten(values="gone"),
    "fewer values": rewritten(values=[]),
    "other shapes": rewritten(values=[[torch.zeros(1)]]),
    "odd optimizer": rewritten(optimizer={}),
    "no random state": rewritten(random=[]),
    "odd identity": rewritten(identity=3),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_clear_error(checkpointed, damage):
    path = checkpointed.folder / "checkpoint.pt"
    DAMAGES[damage](path)
    with pytest.raises(InputError, match=r"checkpoint.pt is truncated or not a checkpoint"):
        run(checkpointed.model_copy(update={"resume": True}))


def test_a_finished_run_with_other_parameters_data_or_weights_is_not_replaced(
    chips_folder, tmp_path
):
    weights = tmp_path / "weights.safetensors"
    backbone = create_backbone("timm:test_vit", "random", 32)
    save_file(backbone.state_dict(), weights)
    config = config_for(chips_folder, tmp_path, method="head_only", weights=str(weights))
    first = run(config)
    run(config)  # the same again is the same run
    other = config.model_copy(update={"learning_rates": (0.3,)})
    with pytest.raises(InputError, match=r"run_name: trial is a finished run .*learning_rates was"):
        run(other)
    with torch.no_grad():
        backbone.norm.bias[0] += 1
    save_file(backbone.state_dict(), weights)
    with pytest.raises(InputError, match=r"weights_digest was '\w+' and is '\w+'"):
        run(config.model_copy(update={"resume": True}))
    again = run(config.model_copy(update={"overwrite": True}))
    assert again.record["weights_digest"] != first.record["weights_digest"]


def test_a_run_that_learned_nothing_says_so(chips_folder, tmp_path):
    still = {"method": "head_only", "learning_rates": (1e-30,), "weight_decays": (0.0,)}
    finished = run(config_for(chips_folder, tmp_path, **still))
    assert finished.record["failure"].startswith("no better than chance: the lowest validation")
    options = {"method": "head_only", "epochs": 15, "run_name": "good"}
    good = run(config_for(chips_folder, tmp_path, **options))
    assert good.record["failure"] == ""


def test_every_route_says_and_records_what_splits_share(chips_folder, tmp_path):
    data = replace(config_for(chips_folder, tmp_path).data(), leaks=["1 image in two splits"])
    lines = []
    config = config_for(chips_folder, tmp_path, method="head_only")
    finished, _ = jobs.finished(config, data, report=lines.append)
    assert lines[0] == "WARNING: leakage: 1 image in two splits"
    assert finished.record["leaks"] == ["1 image in two splits"]


def test_tensorboard_receives_every_epoch(chips_folder, tmp_path):
    config = config_for(chips_folder, tmp_path, tracker="tensorboard", epochs=2)
    history = run(config).history
    (folder,) = {file.parent for file in (tmp_path / "models").rglob("events.*")} & {
        tmp_path / "models" / "tracking" / "trial"
    }
    events = EventAccumulator(str(folder)).Reload()
    values = [event.value for event in events.Scalars("valid_loss")]
    np.testing.assert_allclose(values, history.valid_loss, rtol=1e-6)


def test_without_resume_a_run_starts_anew(checkpointed):
    finished = run(checkpointed.model_copy(update={"lora_rank": 2}))
    assert finished.history.epoch.tolist() == [1]
