"""Training on kept tokens of the frozen blocks: the same run, and a cache that is never stale."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers import InputError
from helpers.models.adapters import PEFT_METHODS, PeftMethod, load_adapter
from helpers.models.classifier import Classifier
from helpers.models.files import load_classifier
from helpers.training import jobs, methods, tokens
from helpers.training.config import RunConfig
from helpers.training.runs import read_run
from helpers.training.setup import tracked_accelerator
from tests.fake_data import manifest_folder
from tests.models.parity import tiny_architectures
from tests.training import short_run
from tests.training.short_run import NUMBERS


@pytest.fixture(scope="module")
def chips_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return manifest_folder(folder, counts={"train": 8, "valid": 4, "test": 4})


@pytest.fixture(autouse=True)
def tiny():
    """Backbones of five blocks."""
    with tiny_architectures():
        yield


@pytest.fixture
def fp32_tokens(monkeypatch):
    monkeypatch.setitem(tokens.TOKEN_DTYPES, "fp32", torch.float32)


@pytest.fixture
def frozen_passes(monkeypatch):
    """A list that grows with every batch that is sent through the frozen blocks."""
    calls, original = [], Classifier.tokens

    def counted(self, chips, block):
        calls.append(block)
        return original(self, chips, block)

    monkeypatch.setattr(Classifier, "tokens", counted)
    return calls


def config_for(data, folder, **parameters):
    defaults = {
        "backbone": "dinov2_vits14_reg",
        "image_size": 28,
        "adapted_blocks": 2,
        "learning_rate": 1e-2,
        "epochs": 3,
        "batch_size": 8,
        "memory_limit_gb": 0.0,
    }
    return short_run.config_for(data, folder, **defaults | parameters)


def run(config, report=lambda line: None):
    return jobs.finished(config, config.data(), report=report)[0]


def without_room(monkeypatch):
    monkeypatch.setattr(tokens, "LARGEST_DISK_SHARE", 0.0)


CASES = {
    "lora": {},
    "dora, augmented, in memory": {"method": "dora", "augment": True, "memory_limit_gb": 1.0},
    "full": {"method": "full", "learning_rate": 1e-3},
    "four CLS tokens": {"adapted_blocks": 4, "head_input": "4xcls+mean"},
    "rotary embedding": {"backbone": "dinov3_vits16", "image_size": 32},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_on_tokens_is_the_run_on_chips(
    case, chips_folder, tmp_path, fp32_tokens, frozen_passes, monkeypatch
):
    """With tokens kept in fp32; dropout included, since frozen blocks draw no random numbers."""
    config = config_for(chips_folder, tmp_path / "tokens", **CASES[case])
    found = run(config)
    views = 8 if config.augment else 1
    assert frozen_passes == [5 - config.adapted_blocks] * (views + 1)  # training and validation
    assert found.record["tokens"]["frozen_blocks"] == 5 - config.adapted_blocks

    without_room(monkeypatch)
    said = []
    plain = config.model_copy(
        update={"output_path": str(tmp_path / "chips"), "cache_path": str(tmp_path / "no")}
    )
    plain = RunConfig.checked(**plain.model_dump(exclude={"history_path"}))
    expected = run(plain, said.append)
    assert "more than half of the" in expected.record["tokens"]["not_kept"]
    assert sum("frozen blocks are computed in every epoch" in line for line in said) == 1
    assert len(frozen_passes) == views + 1
    pd.testing.assert_frame_equal(
        found.history[NUMBERS], expected.history[NUMBERS], rtol=1e-4, atol=1e-5
    )
    before = methods.new_classifier(config, config.data()).state_dict()
    after, other = found.classifier.state_dict(), expected.classifier.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    first = 5 - config.adapted_blocks
    assert {int(key.split(".")[2]) for key in changed if "blocks" in key} == set(range(first, 5))
    assert not any("patch_embed" in key or "token" in key for key in changed)
    assert ("backbone.norm.weight" in changed) == (config.method == "full")
    assert "linear_head.weight" in changed
    assert found.record["parameters"] == expected.record["parameters"]
    if config.method == "full":
        trainable = sum(before[key].numel() for key in changed)
        assert found.record["parameters"]["trainable"] == trainable
    for key in changed:
        torch.testing.assert_close(after[key], other[key], rtol=1e-3, atol=1e-4)


def test_half_precision_moves_the_history_little_and_the_files_are_whole(chips_folder, tmp_path):
    """Loss by rounding: fp16 moves a logit by under 0.1 % of the largest (`test_classifier`)."""
    config = config_for(chips_folder, tmp_path)
    found = run(config)
    entries = list(Path(config.cache_path).glob("tokens_*/*.safetensors"))
    assert len(entries) == 2
    chips = torch.stack([chip for chip, _ in config.data().dataset("test", 28)])
    expected = torch.tensor(found.test_predictions.filter(regex="^p_").to_numpy())
    merged = load_classifier(config.folder / "model_final.safetensors")[0]
    adapter = load_adapter(config.folder / "adapter")[0]
    with torch.inference_mode():
        for model in (merged, adapter):
            torch.testing.assert_close(model(chips).softmax(1), expected, atol=1e-5, rtol=0)


SHARED = {
    "seed, rank and rate": {"lora_rank": 2, "learning_rate": 1e-3, "lora_targets": ("proj",)},
    "method": {"method": "dora"},
    "full": {"method": "full"},
}
CHANGED = {
    "blocks": {"adapted_blocks": 3},
    "size": {"image_size": 42},
    "weights": {"seed": 1},  # of random weights
    "views": {"augment": True},
}


@pytest.fixture(scope="module")
def earlier(chips_folder, tmp_path_factory):
    """What a run of one epoch left; not to be changed."""
    folder = tmp_path_factory.mktemp("earlier")
    with tiny_architectures():
        run(config_for(chips_folder, folder, epochs=1))
    return folder


@pytest.mark.parametrize("change", SHARED | CHANGED)
def test_runs_share_tokens_that_are_the_same_and_no_others(
    change, chips_folder, earlier, tmp_path, frozen_passes
):
    shutil.copytree(earlier / "cache", tmp_path / "cache")
    other = run(config_for(chips_folder, tmp_path, epochs=1, **(SHARED | CHANGED)[change]))
    assert (not frozen_passes) == (change in SHARED)
    assert other.record["tokens"]["was_read"] == (change in SHARED)


def test_runs_side_by_side_compute_each_split_once(
    chips_folder, tmp_path, frozen_passes, monkeypatch
):
    config = config_for(chips_folder, tmp_path).resolved()
    data = config.data()
    model, _, digest = methods.training_setup(config, data)
    computing, compute = threading.Barrier(2), tokens._Entry.compute

    def compute_together(*arguments):
        with suppress(threading.BrokenBarrierError):  # nobody else computes
            computing.wait(timeout=1)
        compute(*arguments)

    monkeypatch.setattr(tokens._Entry, "compute", compute_together)
    with tracked_accelerator(config) as accelerator, ThreadPoolExecutor(2) as pool:
        arguments = (config, data, model, 3, digest, accelerator)
        found = [pool.submit(tokens.cached_tokens, *arguments) for _ in range(2)]
        examples = [run.result()[0] for run in found]
    assert len(frozen_passes) == 2  # training and validation
    for split in ("train", "valid"):
        assert torch.equal(*(example[split].values for example in examples))


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_damaged_tokens_are_computed_again(damage, chips_folder, earlier, tmp_path, frozen_passes):
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    config = config_for(chips_folder, tmp_path, epochs=1)
    expected = read_run(config)
    for file in Path(config.cache_path).glob("tokens_*/*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content if damage == "flipped" else content[:-100])
    again = run(config.model_copy(update={"run_name": "again"}))
    assert len(frozen_passes) == 2
    histories = [run.history[NUMBERS] for run in (again, expected)]
    pd.testing.assert_frame_equal(*histories, check_dtype=False, rtol=1e-8)


@pytest.mark.parametrize("method", [*list(PEFT_METHODS)[2:], "a new one"])  # lora, dora: CASES
def test_one_entry_of_the_table_is_a_method(method, chips_folder, tmp_path, monkeypatch):
    """It trains, is saved, loaded, merged and read without another line anywhere."""
    new = PeftMethod({"init_lora_weights": "gaussian"}, b_rate=2.0)
    monkeypatch.setitem(PEFT_METHODS, "a new one", new)
    config = config_for(chips_folder, tmp_path, epochs=1)
    config = config.model_copy(update={"method": method, "run_name": None, "resume": True})
    found = run(config)
    trained = [p for p in found.adapter.parameters() if p.requires_grad]
    assert found.record["parameters"]["trainable"] == sum(p.numel() for p in trained)
    data = config.data()
    before = methods.new_classifier(config, data).state_dict()
    after = found.classifier.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    qkv = {f"backbone.blocks.{block}.attn.qkv.weight" for block in (3, 4)}
    assert changed == qkv | {"linear_head.weight", "linear_head.bias"}
    chips = torch.stack([chip for chip, _ in data.dataset("test", 28)])
    expected = torch.tensor(found.test_predictions.filter(regex="^p_").to_numpy())
    again, was_read = jobs.finished(config, data, report=lambda line: None)
    assert was_read and again.record["method"] == method
    with torch.inference_mode():
        for model in (again.classifier, again.adapter):
            torch.testing.assert_close(model(chips).softmax(1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["lora", "loraplus"])
def test_a_run_on_tokens_goes_on_from_its_checkpoint(method, chips_folder, tmp_path, monkeypatch):
    expected = run(config_for(chips_folder, tmp_path / "alone", method=method))
    config = config_for(chips_folder, tmp_path / "killed", method=method, resume=True)
    original = methods.Checkpoint.write

    def killed(self, state, processes):
        original(self, state, processes)
        if state["progress"]["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(methods.Checkpoint, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    pd.testing.assert_frame_equal(run(config).history[NUMBERS], expected.history[NUMBERS])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"adapted_blocks": 6}, "adapted_blocks: 6 is not between 1 and 5, the backbone's blocks"),
        ({"method": "head_only"}, "adapted_blocks: head_only trains no block; use lora, dora or"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate: tokens of frozen blocks are kept of all"),
        ({"head_input": "4xcls+mean", "adapted_blocks": 3}, "reads the last four blocks; use 4"),
    ],
)
def test_wrong_numbers_of_blocks_are_one_clear_error(parameters, message, chips_folder, tmp_path):
    with pytest.raises(InputError, match=message):
        run(config_for(chips_folder, tmp_path, **parameters))
    assert list(tmp_path.iterdir()) == []


def test_tokens_beyond_half_precision_are_one_clear_error(chips_folder, tmp_path, monkeypatch):
    original = Classifier.tokens
    monkeypatch.setattr(Classifier, "tokens", lambda *given: original(*given) * 1e6)
    config = config_for(chips_folder, tmp_path)
    with pytest.raises(InputError, match="tokens of chips 0 to 15 are not finite numbers in half"):
        run(config)
    assert not list(Path(config.cache_path).glob("*tokens*"))
