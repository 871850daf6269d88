"""Seconds to a quality: every way trains the same model, and the benchmark runs to its JSON."""

import json

import pandas as pd
import PIL.Image
import pytest
import torch

from benchmarks import hugging_face, time_to_quality
from benchmarks.clock import Clock
from helpers import InputError
from helpers.training import tokens
from tests.models.common import random_chips
from tests.models.parity import tiny_architectures, tiny_classifier


def test_the_trainers_model_is_the_same_function():
    classifier = tiny_classifier(model="dinov2", head_input="cls+mean")
    chips = random_chips(4, size=classifier.config.image_size)
    with torch.no_grad():
        classifier.linear_head.weight.mul_(100)
        expected = classifier(chips)
        model = hugging_face.hugging_face(classifier).eval()
        found = model(pixel_values=classifier.normalize(chips)).logits
    assert expected.std() > 0.1, "logits that differ from each other"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_model_that_the_trainer_does_not_have_is_one_clear_error():
    for model, head_input in (("dinov2_reg4", "cls+mean"), ("dinov2", "cls")):
        with pytest.raises(InputError, match="is no Dinov2ForImageClassification; use a DINOv2"):
            hugging_face.hugging_face(tiny_classifier(model=model, head_input=head_input))


def test_every_second_belongs_to_a_part_and_the_first_epoch_warms_up(monkeypatch):
    now = iter([0.0, 10.0, 14.0, 15.0, 16.0, 17.0, 19.0])
    monkeypatch.setattr("benchmarks.clock.time.perf_counter", lambda: next(now))
    clock = Clock()
    for part, ends in (("once", 0), ("backward", 1), ("checkpoint", 0), ("backward", 1)):
        clock.mark(part)
        if ends:
            clock.epoch(0.5)
    assert [epoch["s"] for epoch in clock.epochs] == [15.0, 19.0]
    assert sum(clock.parts.values()) == 19.0
    assert clock.parts["validation"] == 3.0 and clock.parts["backward"] == 5.0
    assert clock.images_per_s(12) == 12.0


TINY = ["--dry_run", "--backbone", "dinov2_vits14", "--weights", "random", "--adapted_blocks", "2"]


def run(capsys, *arguments):
    """On backbones of five blocks of width 64; the JSON's cases."""
    with tiny_architectures():
        time_to_quality.main([*TINY, *arguments])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["cpu"]
    return said["cases"]


def test_every_way_runs_to_the_json(capsys, tmp_path):
    """Few chips of 28 px, in this process."""
    table, figure = tmp_path / "rows.csv", tmp_path / "epoch.png"
    trial = ("--trial", 'miss={"method": "miss"}')
    said = run(capsys, "--table", str(table), "--figure", str(figure), *trial)[
        "dinov2_vits14 28 px"
    ]
    assert said["epochs"] == 2
    found = said["ways"]
    assert set(found) >= {"plain", "trainer", "all_blocks", "last_2", "miss"}
    for way in found.values():
        parts = sum(way[f"{part}_s"] for part in time_to_quality.PARTS)
        assert parts == pytest.approx(way["total_s"], rel=1e-6)
        assert way["images_per_s"] > 0 and way["share_of_matmul_rate"] > 0
        assert way["peak_memory_bytes"] > 1e7
        assert way["difference_low"] <= way["difference_high"]
    assert found["plain"]["difference"] == 0 and found["plain"]["total_s_to_plain"] == 1
    assert found["plain"]["gflop_per_image"] == found["all_blocks"]["gflop_per_image"]
    assert found["last_2"]["gflop_per_image"] < found["plain"]["gflop_per_image"] * 0.55
    rows = pd.read_csv(table)
    assert rows.way.tolist() == list(found)
    with PIL.Image.open(figure) as picture:
        assert picture.width > 500


def test_a_sweep_reads_one_cache(capsys, monkeypatch):
    computed, compute = [], tokens._Entry.compute

    def counted(entry, *given):
        computed.append(entry.shape)
        compute(entry, *given)

    monkeypatch.setattr(tokens._Entry, "compute", counted)
    found = run(capsys, "--sweep")["dinov2_vits14 28 px"]["ways"]
    assert set(found) == {"plain", "last_2"}
    assert len(computed) == 2, "training and validation chips, for both ranks"
    assert found["plain"]["all_runs_s"] > found["plain"]["total_s"]


def test_speed_alone_is_measured_on_larger_shapes(capsys, monkeypatch):
    shapes = [(backbone, size) for backbone, _, size, _ in time_to_quality.CPU_CASES[1:]]
    assert shapes == [("dinov2_vits14", 224), ("dinov2_vitl14", 196)]
    monkeypatch.setattr(time_to_quality, "CPU_CASES", time_to_quality.CPU_CASES[:2])
    ((name, case),) = run(capsys, "--speed_only").items()
    assert name == "dinov2_vits14 28 px"
    assert set(case["ways"]) >= {"plain", "trainer", "all_blocks", "last_2"}
    for way in case["ways"].values():
        assert way["images_per_s_to_plain"] > 0 and way["share_of_matmul_rate"] > 0
        assert "auroc" not in way and "total_s_to_plain" not in way


def test_only_the_ways_that_are_named_are_trained(capsys):
    assert set(run(capsys, "--ways", "last_2")["dinov2_vits14 28 px"]["ways"]) == {
        "plain",
        "last_2",
    }
    with pytest.raises(InputError, match="ways: last_9 is none of plain, trainer, "):
        run(capsys, "--ways", "last_9")
    with pytest.raises(InputError, match="ways: a sweep has its own two"):
        run(capsys, "--sweep", "--ways", "last_2")


def test_a_trial_does_not_take_the_name_of_a_way():
    with pytest.raises(InputError, match="trial: plain is a way already"):
        time_to_quality.main(["--dry_run", "--trial", "plain={}"])
