"""`precision: auto` takes what a few timed steps show to be faster."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from helpers import InputError
from helpers.training import jobs, precision
from helpers.training.config import RunConfig
from helpers.training.precision import Fp32Attention, LoraStep, fastest, measured, step_seconds
from tests.training.short_run import config_for, run

STEP, PRECISIONS = LoraStep("example", 28, 3, ("qkv",), 4, "cpu"), ["fp32", "bf16"]


class FakeSteps:
    """Steps on a clock of its own; the first in a precision takes longer."""

    def __init__(self, **seconds):
        self.seconds, self.now, self.steps = seconds, 0.0, []

    def __call__(self, precision):
        first = precision not in self.steps
        self.steps.append(precision)
        self.now += self.seconds[precision] * (1.5 if first else 1)

    def measured(self):
        return measured(self, list(self.seconds), clock=lambda: self.now)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"fp32": 0.05, "bf16": 0.03}, "bf16"),
        ({"fp32": 0.05, "bf16": 0.06}, "fp32"),
        ({"fp32": 0.05, "bf16": 0.049}, "fp32"),  # noise
        ({"fp32": 0.05, "bf16": 0.03, "fp16": 0.02}, "fp16"),
        ({"fp32": 0.05}, "fp32"),
    ],
)
def test_the_faster_is_taken(seconds, expected):
    steps = FakeSteps(**seconds)
    found = steps.measured()
    assert found == pytest.approx(seconds)
    assert fastest(found) == expected
    assert steps.now < 1.5


def test_a_precision_that_is_emulated_is_given_up_after_one_step():
    steps = FakeSteps(fp32=0.05, bf16=1.0)
    assert steps.measured() == pytest.approx({"fp32": 0.05})
    assert steps.steps.count("bf16") == 1


def test_slow_steps_end_after_one_round():
    steps = FakeSteps(fp32=2.0, bf16=3.0)
    assert set(steps.measured()) == {"fp32", "bf16"}
    assert len(steps.steps) == 5


def test_the_measurement_is_kept_by_machine_and_size(tmp_path, monkeypatch):
    calls = []

    def fake(step, precisions):
        step("fp32")
        step("bf16")
        calls.append(precisions)
        return {"fp32": 2.0, "bf16": 1.0}

    monkeypatch.setattr(precision, "measured", fake)
    state = torch.random.get_rng_state()
    for _ in range(2):
        assert step_seconds(STEP, PRECISIONS, str(tmp_path)) == {"fp32": 2.0, "bf16": 1.0}
    assert len(calls) == 1 and torch.equal(torch.random.get_rng_state(), state)
    step_seconds(replace(STEP, image_size=42), PRECISIONS, str(tmp_path))
    assert len(calls) == 2 and len(json.loads((tmp_path / "precision.json").read_text())) == 2
    (tmp_path / "precision.json").write_text('{"a": 1}')
    step_seconds(STEP, PRECISIONS, str(tmp_path))
    assert len(calls) == 3


def test_auto_is_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    config = RunConfig.checked(method="lora", device="cpu", cache_path=str(tmp_path))
    for seconds, expected in ((1.0, "bf16"), (3.0, "fp32")):
        monkeypatch.setattr(precision, "measured", lambda *_, s=seconds: {"fp32": 2.0, "bf16": s})
        assert config.resolved().precision == expected
        (tmp_path / "precision.json").unlink()


class AttentionDtypes(TorchFunctionMode):
    """What attention is asked to compute with, of inputs that need a gradient."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention and torch.is_grad_enabled():
            self.found |= {tensor.dtype for tensor in args}
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_trains_in_fp32(chips_folder, tmp_path, precision):
    with AttentionDtypes() as dtypes:
        run(config_for(chips_folder, tmp_path, precision=precision, epochs=1))
    assert dtypes.found == {torch.float32}


def test_attention_in_fp32_is_that_of_fp32_in_the_precision_of_its_inputs():
    inputs = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), Fp32Attention():
        found = functional.scaled_dot_product_attention(*inputs, scale=0.3)
    expected = functional.scaled_dot_product_attention(*inputs.float(), scale=0.3)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())


def test_a_finished_run_stays_finished_when_another_precision_is_measured(
    chips_folder, tmp_path, monkeypatch
):
    def measures(bf16):
        monkeypatch.setattr(RunConfig, "precision_seconds", lambda _: {"fp32": 1.0, "bf16": bf16})

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    measures(2.0)
    config = config_for(chips_folder, tmp_path, precision="auto", epochs=1)
    data = config.data()
    assert run(config).record["config"]["precision"] == "fp32"
    measures(0.5)
    assert config.resolved().precision == "bf16"
    jobs.check_ready(config, data)
    resumed = config.model_copy(update={"resume": True})
    assert jobs.finished(resumed, data, report=lambda line: None)[1], "it was read"
    with pytest.raises(InputError, match="precision was 'fp32' and is 'bf16'"):
        jobs.check_ready(config.model_copy(update={"precision": "bf16"}), data)
