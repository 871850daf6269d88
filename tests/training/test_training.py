"""LoRA, DoRA and full runs: precision, batches, and processes."""

import json
import os
import re
import socket
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import nn

from helpers import InputError, finetune
from helpers.data.dataset import ChipDataset
from helpers.models.files import load_classifier
from helpers.training import methods, setup
from helpers.training.examples import ChipExamples, decoded, dihedral
from helpers.training.loop import FitSettings, Loop, fit
from helpers.training.processes import fresh_accelerator
from tests.models.parity import tiny_architectures
from tests.training.short_run import NUMBERS, config_for, fresh_processes, history_of, run


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_every_method_trains_only_what_it_should_and_saves_it(chips_folder, tmp_path, method):
    """Also after training in bf16: predictions and files are fp32."""
    low = torch.cpu.get_capabilities().get("avx512_bf16") and method != "dora"
    config = config_for(
        chips_folder, tmp_path, method=method, learning_rate=1e-3, augment=True,
        precision="bf16" if low else "fp32",
    )  # fmt: skip
    finished = run(config)
    before = setup.new_classifier(config, config.data()).state_dict()
    after = finished.classifier.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    if method == "full":
        assert len(changed) == len(before)
        assert finished.adapter is None
    else:
        expected = {f"backbone.blocks.{i}.attn.qkv.weight" for i in range(6)}
        assert changed == expected | {"linear_head.weight", "linear_head.bias"}
        assert (config.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert finished.history.epoch.tolist() == [1, 2, 3, 4]
    record = json.loads((tmp_path / "history" / "trial.json").read_text())
    assert record["method"] == method
    assert record["parameters"] == finished.record["parameters"]
    classifier, _ = load_classifier(config.folder / "model_final.safetensors")
    chips = torch.stack([chip for chip, _ in config.data().dataset("test", 32)])
    with torch.inference_mode():
        for model in (classifier, finished.classifier):
            probabilities = model(chips).softmax(1).numpy()
            expected = finished.test_predictions.filter(regex="^p_").to_numpy()
            np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_bf16_trains_close_to_fp32_and_saves_fp32(chips_folder, tmp_path):
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        pytest.skip("this CPU has no bf16")
    exact = run(config_for(chips_folder, tmp_path, lora_dropout=0.0, run_name="fp32"))
    config = config_for(chips_folder, tmp_path, lora_dropout=0.0, precision="bf16", run_name="bf16")
    low = run(config)
    assert (exact.history.train_loss - low.history.train_loss).abs().max() < 0.05
    state = load_file(config.folder / "model_final.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_bf16_on_a_cpu_without_it_is_one_clear_error(chips_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(InputError, match="precision: this cpu has no bf16; use fp32 or auto"):
        run(config_for(chips_folder, tmp_path, precision="bf16"))
    auto = config_for(chips_folder, tmp_path, precision="auto")
    assert auto.mixed_precision == "no" and not Path(auto.cache_path).exists()


def test_a_fraction_is_stratified_and_a_subset_of_a_larger_one(chips_folder, tmp_path):
    half, quarter = (
        config_for(chips_folder, tmp_path, train_fraction=f).data().manifest for f in (0.5, 0.25)
    )
    for table, expected in ((half, 8), (quarter, 4)):
        counts = table[table.split == "train"].target.value_counts()
        assert counts.tolist() == [expected, expected]
        assert (table.split == "test").sum() == 16
    assert set(quarter.img_path) < set(half.img_path)


def test_decoded_chips_are_the_same_in_memory_and_mapped(chips_folder, tmp_path):
    dataset = config_for(chips_folder, tmp_path).data().dataset("train", 32)
    path = tmp_path / "cache" / "chips.bin"
    in_memory = decoded(dataset, 1e9, path)
    assert not path.exists()
    mapped = decoded(dataset, 10, path)
    assert path.stat().st_size == in_memory.numel()
    assert torch.equal(mapped, in_memory)
    assert torch.equal(in_memory[5], dataset[5][0])


def test_augmented_chips_are_views_of_their_own_and_leave_the_originals():
    chips = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    examples = ChipExamples(chips, torch.tensor([0, 1]), views=8)
    taken = examples.take(torch.tensor([1, 0]), torch.tensor([3, 6]))
    assert torch.equal(taken, torch.stack([dihedral(chips[1], 3), dihedral(chips[0], 6)]))
    assert torch.equal(chips.flatten(), torch.arange(96, dtype=torch.uint8))


# --- Batches and memory --------------------------------------------------------------------------


class Linear(nn.Module):
    """A model on chips that runs out of memory above a number of images."""

    def __init__(self, limit=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 4 * 4, 2)
        self.limit = limit
        self.largest = 0

    def forward(self, chips):
        if self.limit and len(chips) > self.limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 TiB")
        self.largest = max(self.largest, len(chips))
        return self.layer(chips.flatten(1).float() / 255)


def fake_chips(n, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % 3 // 2  # two of class 0 for one of class 1
    chips = torch.randint(160, (n, 3, 4, 4), generator=generator) + 60 * targets.view(-1, 1, 1, 1)
    return ChipExamples(chips.byte(), targets)


def fit_linear(model, **settings):
    progress = fit(
        model,
        [{"params": list(model.parameters()), "lr": 0.01, "weight_decay": 0.0}],
        fake_chips(50, 0),
        fake_chips(20, 1),
        FitSettings(**{"epochs": 3, "patience": 3, "batch_size": 16} | settings),
        accelerator=fresh_accelerator("cpu"),
        report=lambda line: None,
    )
    return progress.history(0)


def test_running_out_of_memory_reduces_the_share_and_gives_the_same_history():
    whole, reduced = Linear(), Linear(limit=5)
    expected, history = fit_linear(whole), fit_linear(reduced)
    assert whole.largest == 16 and reduced.largest <= 5
    pd.testing.assert_frame_equal(history[NUMBERS], expected[NUMBERS], rtol=1e-5)


def test_an_attempt_that_ran_out_of_memory_leaves_no_gradients():
    """The second half of the first batch breaks, after the first half gave gradients."""

    class BreaksOnce(Linear):
        calls = 0

        def forward(self, chips):
            BreaksOnce.calls += self.training
            if BreaksOnce.calls == 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 TiB")
            return super().forward(chips)

    alone, broken = Linear(limit=8), BreaksOnce(limit=8)
    pd.testing.assert_frame_equal(
        fit_linear(broken)[NUMBERS], fit_linear(alone)[NUMBERS], rtol=1e-5
    )


def test_balanced_weights_choose_the_epoch_by_the_mean_of_the_classes_losses():
    model = Linear()
    history = fit_linear(model, epochs=1, patience=1, class_weights=(0.75, 1.5))
    valid = fake_chips(20, 1)
    losses = nn.functional.cross_entropy(model(valid.values), valid.targets, reduction="none")
    expected = np.mean([losses[valid.targets == c].mean().item() for c in (0, 1)])
    assert history.valid_loss[0] == pytest.approx(expected, rel=1e-5)
    assert abs(losses.mean().item() - expected) > 1e-3


def test_class_weights_weigh_the_loss_that_is_minimised():
    model = Linear()
    examples = fake_chips(50, 0)
    weights = (0.75, 1.5)
    logits = model(examples.values)
    loss = nn.functional.cross_entropy(logits, examples.targets, torch.tensor(weights))
    expected = torch.autograd.grad(loss, model.layer.weight)[0]
    seen = []
    model.layer.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    fit_linear(model, epochs=1, batch_size=50, class_weights=weights)
    torch.testing.assert_close(seen[0], expected)


def test_gradients_are_clipped():
    free, clipped = Linear(), Linear()
    fit_linear(free, epochs=1, max_grad_norm=None)
    fit_linear(clipped, epochs=1, max_grad_norm=1e-12)
    torch.manual_seed(0)
    start = Linear().layer.weight
    assert (free.layer.weight - start).abs().max() > 1e-3
    assert (clipped.layer.weight - start).abs().max() < (free.layer.weight - start).abs().max()


@pytest.mark.parametrize(("backbone", "size"), [("dinov2_vits14_reg", 56), ("dinov3_vits16", 64)])
def test_layers_have_rates_of_their_own_and_patches_are_left_out(
    backbone, size, chips_folder, tmp_path, monkeypatch
):
    options = {"backbone": backbone, "weights": "random", "image_size": size, "epochs": 1}
    options |= {"method": "full", "layer_decay": 0.5, "patch_drop_rate": 0.5}
    config = config_for(chips_folder, tmp_path, **options)
    seen, forward = [], nn.Linear.forward

    def counted(layer, inputs):
        if inputs.ndim == 3:
            seen.append((layer.training, inputs.shape[1]))
        return forward(layer, inputs)

    with tiny_architectures():
        model, group, _ = methods.training_setup(config, config.data())
        monkeypatch.setattr(nn.Linear, "forward", counted)
        run(config)
    names = {p: name for name, p in model.named_parameters()}
    rates = {names[p]: f for p, f in zip(group["params"], group["factors"], strict=True)}
    assert rates["backbone.patch_embed.proj.weight"] == 0.5**5
    assert [rates[f"backbone.blocks.{i}.mlp.fc1.weight"] for i in (0, 4)] == [0.5**4, 1]
    assert rates["backbone.norm.weight"] == rates["linear_head.weight"] == 1
    assert set(seen) == {(True, 5 + 8), (False, 5 + 16)}  # CLS, registers and patches


# --- Processes -----------------------------------------------------------------------------------


def one_of_two(rank, port, arguments, folder):
    """What each of two processes does, with what torchrun sets; counts chips and batches."""
    os.environ |= {"ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    reading, backward, chips, short = ChipDataset.__getitem__, Loop._backward, [], []

    def counted(dataset, index):
        chips.append(index)
        return reading(dataset, index)

    def short_of_memory(loop, rows, *rest):
        if rank == 1 and len(rows) > 4:
            short.append(len(rows))
            raise RuntimeError("CUDA out of memory.")
        return backward(loop, rows, *rest)

    ChipDataset.__getitem__, Loop._backward = counted, short_of_memory
    with open(folder / f"said_{rank}", "w") as said, redirect_stdout(said):
        sys.argv = ["finetune", *arguments]
        finetune.main()
        print("processes:", PartialState().num_processes)
        first = len(chips)
        sys.argv += ["--method", "head_only", "--run_name", "head", "--learning_rates", "0.001"]
        finetune.main()
        (folder / f"counted_{rank}").write_text(f"{first} {len(chips) - first} {short}")
        sys.argv += ["--method", "lora", "--run_name", "tokens", "--adapted_blocks", "2"]
        finetune.main()


def test_two_processes_give_the_history_of_one(chips_folder, tmp_path):
    """Same global batch, gloo on the CPU; dropout off, since processes draw their own."""
    options = {"epochs": 3, "lora_dropout": 0.0, "batch_size": 10, "augment": True}
    on_tokens = {"run_name": "tokens", "adapted_blocks": 2}
    alone = [config_for(chips_folder, tmp_path / "one", **options | o) for o in ({}, on_tokens)]
    for config in alone:
        run(config)
    both = config_for(chips_folder, tmp_path / "two", **options)
    arguments = []
    for name, value in both.model_dump(exclude_defaults=True).items():
        arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [(rank, port, arguments, tmp_path) for rank in range(2)]
    context = fresh_processes()
    two = [context.Process(target=one_of_two, args=arguments) for arguments in given]
    for process in two:
        process.start()
    for process in two:
        process.join()
    assert [process.exitcode for process in two] == [0, 0]
    said = [(tmp_path / f"said_{rank}").read_text() for rank in range(2)]
    assert all("processes: 2\n" in text for text in said), "there must be two"
    assert [text.count("Test split") for text in said] == [3, 0], "only the main process reports"
    assert said[0].count("tokens of 4 frozen blocks") == 1
    # Of three splits one process decodes a chip each, for its shape; then half of those that
    # features are computed of. It lacks memory for five chips of a batch of ten, twice.
    assert re.fullmatch(r"\d{3} 32 \[\]", (tmp_path / "counted_0").read_text())
    assert re.fullmatch(r"\d 32 \[5, 5\]", (tmp_path / "counted_1").read_text())
    for config in alone:
        same = both.model_copy(update={"run_name": config.run_name})
        pd.testing.assert_frame_equal(history_of(same), history_of(config), rtol=1e-4, atol=1e-5)
