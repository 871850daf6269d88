"""Percentiles, the gate, limits, the decision, and what stops a benchmark."""

import json
import sys
import time
import types

import numpy as np
import pandas as pd
import pytest

from helpers import InputError, production_benchmarking
from helpers.benchmarking import decision, limits, memory, quality
from helpers.benchmarking.bench import BenchmarkConfig, open_bench, with_control
from helpers.deployment import runtimes
from helpers.deployment.runtimes import Variant
from helpers.models.classifier import ClassifierConfig, create_classifier
from helpers.reporting import answers
from helpers.reporting.benchmark_plots import captioned
from helpers.training.config import RunConfig
from helpers.training.methods import train
from helpers.training.runs import save_run
from tests.fake_data import CLASSES, class_folders, manifest_folder

SIZE = 32  # of two by two patches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set and a classifier trained on it."""
    root = tmp_path_factory.mktemp("bench")
    manifest_folder(root / "data", counts={"train": 12, "valid": 4, "test": 10})
    config = RunConfig(
        data_path=str(root / "data"),
        backbone="timm:test_vit",  # six blocks of width 64
        weights="random",
        image_size=SIZE,
        epochs=20,
        output_path=str(root / "models"),
        history_path=str(root / "history"),
        cache_path=str(root / "cache"),
        run_name="tiny",
    )
    save_run(config, train(config, config.data()))
    return root


def configured(folder, **options):
    given = {
        "model_path": str(folder / "models/tiny/model_final.safetensors"),
        "data_path": str(folder / "data"),
        "variants": ("eager_fp32",),
        "output_path": str(folder / "variants"),
        "results_path": str(folder / "results"),
        "percentiles": (50,),
        "batch_sizes": (1, 4),
        "latency_samples": (6, 5),
        "load_seconds": 0.2,
        "threads": 1,
    }
    return BenchmarkConfig.checked(**given | options)


# --- Quality -------------------------------------------------------------------------------------


def answering(bench, valid, test=None):
    """A predict function that knows the logits of the validation and of the test chips."""
    test = np.eye(2, dtype=np.float32)[bench.targets] if test is None else test
    rows = np.concatenate([valid, test])
    chips = np.concatenate([bench.split("valid")[0], bench.chips])
    position = {chip.tobytes(): row for chip, row in zip(chips, rows, strict=True)}
    return lambda chips: np.stack([position[chip.tobytes()] for chip in chips])


def test_the_validation_split_decides_who_passes_and_the_test_split_is_told_of_those(folder):
    bench = open_bench(configured(folder))
    right = np.eye(2, dtype=np.float32)[bench.split("valid")[1]]
    tested = np.eye(2, dtype=np.float32)[bench.targets]
    wrong, other = right.copy(), tested.copy()
    wrong[0] = wrong[0][::-1]  # one of eight chips: 12.5 points
    other[0] = other[0][::-1]  # one of twenty: 5 points, which chooses nothing
    infinite = np.full_like(right, np.inf)
    alone, together = answering(bench, wrong), answering(bench, right)
    predicts = {
        "eager_fp32": answering(bench, right),
        "same": answering(bench, 2 * right),
        "worse": answering(bench, wrong),
        "alone": lambda chips: (alone if len(chips) == 1 else together)(chips),
        "broken": answering(bench, infinite),
        "worse_in_test": answering(bench, right, other),
        "broken_in_test": answering(bench, right, np.full_like(tested, np.nan)),
        "again": None,
    }
    options = {"alone": {"depends_on_batch": True}, "again": {"only_timed": True}}
    variants = {
        name: Variant(name, "", "torch", folder, (), options.get(name, {})) for name in predicts
    }
    found = quality.measure_quality(bench, variants, predicts)
    assert list(zip(found.split, found.variant, found.batch_size, strict=True)) == [
        ("valid", "eager_fp32", 8), ("valid", "same", 8), ("valid", "worse", 8),
        ("valid", "alone", 1), ("valid", "alone", 8), ("valid", "broken", 8),
        ("valid", "worse_in_test", 8), ("valid", "broken_in_test", 8), ("test", "eager_fp32", 8),
        ("test", "same", 8), ("test", "worse_in_test", 8), ("test", "broken_in_test", 8),
    ]  # fmt: skip
    assert quality.passing(found) == ["eager_fp32", "same", "worse_in_test"]
    valid = quality.worst_rows(found, "valid").set_index("variant")
    assert valid.batch_size["alone"] == 1 and np.isnan(valid.accuracy["broken"])
    assert valid.accuracy_loss_points["worse"] == pytest.approx(12.5)
    assert valid.accuracy_loss_points_low["worse"] == 0 < valid.accuracy_loss_points_high["worse"]
    assert valid.agreement["worse"] == pytest.approx(7 / 8)
    assert valid.max_logit_difference["same"] == 1
    assert valid.accuracy_loss_points_high["same"] == 0  # paired: no difference in any draw
    test = quality.worst_rows(found, "test").set_index("variant")
    assert test.accuracy_loss_points["worse_in_test"] == pytest.approx(5)
    assert np.isnan(test.accuracy["broken_in_test"])


def test_a_form_passes_by_the_upper_end_of_its_interval_and_groups_are_drawn_whole(folder):
    """Two chips lost and two won: none on average, but not with certainty."""
    bench = open_bench(configured(folder, gate_points=10))
    targets = bench.split("valid")[1]
    rows = np.eye(2, dtype=np.float32)[targets]
    eager, form = rows.copy(), rows.copy()
    eager[:2], form[2:4] = rows[:2, ::-1], rows[2:4, ::-1]
    variants = {name: Variant(name, "", "torch", folder, (), {}) for name in ("eager_fp32", "form")}
    predicts = {"eager_fp32": answering(bench, eager), "form": answering(bench, form)}

    def judged():
        found = quality.measure_quality(bench, variants, predicts)
        return found[(found.split == "valid") & (found.variant == "form")].iloc[0]

    alone = judged()
    assert alone.accuracy_loss_points == 0
    assert alone.accuracy_loss_points_high > 10 and not alone.passes_gate
    manifest = bench.data.manifest
    valid = np.flatnonzero(manifest.split == "valid")
    manifest.loc[manifest.index[valid], "group"] = ["a", "b", "a", "b", *"cdef"]
    together = judged()  # every place loses as many chips as it wins
    assert together.accuracy_loss_points_high == pytest.approx(0) and together.passes_gate


def test_the_gate_says_what_so_few_chips_can_certify(folder):
    said = answers.gate_sentence(open_bench(configured(folder)))
    assert "on the 8 validation chips" in said and "is 12.50 points" in said
    assert "may still lose 31.23 points" in said and "cannot certify it" in said
    said = answers.gate_sentence(open_bench(configured(folder, gate_points=40)))
    assert "no more than the gate allows" in said and "can certify it" in said


def test_an_answer_calls_nothing_faster_that_the_control_could_be_too():
    rows = {"eager_fp32": (10.0, 100.0, 8.0), "eager_fp32_again": (12.0, 101.0, 8.0),
            "form": (8.5, 150.0, 2.0)}  # fmt: skip
    table = pd.DataFrame(rows, index=["p50_ms", "images_per_s", "mebibytes_on_disk"]).T
    for end, points in (("", 0.1), ("_low", -0.2), ("_high", 0.4)):
        table[f"accuracy_loss_points{end}"] = points
    assert answers.form_answer(table, "form") == (
        "`form`: +0.10 points of accuracy lost [-0.20, +0.40], as fast within the noise for one "
        "chip, 1.5 times as fast in batches, 0.25 of the file."
    )


# --- Limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backbone", "depth", "width"), [("example", 12, 192)])
@pytest.mark.parametrize("size", [28, 98])
def test_counted_operations_are_those_of_the_hand_formula(backbone, depth, width, size):
    config = ClassifierConfig(backbone, "random", size, (0, 1, 2), CLASSES)
    patches = (size // 14) ** 2
    tokens = patches + 1
    block = 2 * tokens * width * (3 * width + width + 4 * width + 4 * width)
    attention = 2 * 2 * tokens**2 * width
    stem, head = 2 * patches * (3 * 14 * 14) * width, 2 * width * 2
    expected = depth * (block + attention) + stem + head
    assert limits.flops_per_image(create_classifier(config)) == expected


def test_machine_limits_are_positive_rates():
    rates = limits.machine_limits("cpu", 1, sides=(128, 256))
    assert set(rates) == {"fp32", "bf16", "int8", "bytes_per_s"}
    assert all(rate > 1e6 for rate in rates.values())
    assert min(rates["bf16"], rates["int8"]) >= rates["fp32"]


def test_energy_counts_on_where_the_counter_of_a_package_begins_again(tmp_path, monkeypatch):
    for package, limit in (("0", 262_143_000_000), ("1", 262_143_000_000)):
        folder = tmp_path / f"intel-rapl:{package}"
        folder.mkdir()
        (folder / "max_energy_range_uj").write_text(f"{limit}\n")
        (folder / "energy_uj").write_text("262142000000\n")
    monkeypatch.setattr(limits, "_RAPL", tmp_path)
    name, joules = limits.energy_meter("cpu")
    (tmp_path / "intel-rapl:0/energy_uj").write_text("9000000\n")
    assert name == "RAPL, 2 CPU package(s)" and joules() == pytest.approx(10)
    (tmp_path / "intel-rapl:0/energy_uj").write_text("12000000\n")
    assert joules() == pytest.approx(3)


def test_a_gpu_is_metered_by_nvml_though_rapl_is_readable(tmp_path, monkeypatch):
    """The GPU is found by its UUID, since NVML counts also those that are hidden from torch."""
    millijoules = iter([1000, 4000])
    found = []
    monkeypatch.setattr(limits.torch.cuda, "get_device_properties",
                        lambda index: types.SimpleNamespace(uuid="12-34"))  # fmt: skip
    monkeypatch.setattr(limits.torch.cuda, "get_device_name", lambda index: "a GPU")
    fake = types.SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=found.append,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(millijoules),
    )
    monkeypatch.setattr(limits, "pynvml", fake)
    monkeypatch.setattr(limits, "_RAPL", tmp_path)
    name, joules = limits.energy_meter("cuda")
    assert name == "NVML, a GPU" and joules() == 3 and found == ["GPU-12-34"]
    assert limits.energy_meter("cpu") is None


# --- Decision ------------------------------------------------------------------------------------


def test_the_reference_is_recommended_where_others_are_ahead_by_noise():
    summary = pd.DataFrame(
        {
            "variant": ["eager_fp32", "eager_fp32_again", "onnx_fp32"],
            "passes_gate": [True, False, True],
            "p50_ms": [10.0, 7.5, 8.0],
            "images_per_s": [100.0, 100.0, 130.0],
            "peak_mib": [500.0, 505.0, 490.0],
        }
    )
    assert decision.decide(summary) == {
        "lowest latency": "eager_fp32",  # the control was 1.33 times as fast
        "highest throughput": "onnx_fp32",
        "smallest memory": "eager_fp32",
        "recommended": "eager_fp32",
    }


def test_only_variants_within_the_gate_are_recommended():
    summary = pd.DataFrame(
        {
            "variant": ["eager_fp32", "fast_but_wrong", "good", "small"],
            "passes_gate": [True, False, True, True],
            "p50_ms": [10.0, 1.0, 3.0, 4.0],
            "images_per_s": [100.0, 900.0, 300.0, 200.0],
            "peak_mib": [500.0, 50.0, 200.0, 100.0],
        }
    )
    assert decision.decide(summary) == {
        "lowest latency": "good",
        "highest throughput": "good",
        "smallest memory": "small",
        "recommended": "good",
    }


# --- From the shell ------------------------------------------------------------------------------


def test_the_command_leaves_tables_and_a_record(folder, monkeypatch, capsys):
    """The notebook's test has fresh processes, competing ones and several for one variant."""

    def footprint(bench, chips, variant):
        arguments = (bench.chips[:2], bench.config.batch_sizes, 1, "cpu", time.time())
        return {"variant": variant.name} | runtimes.footprint(variant, *arguments)

    monkeypatch.setattr(memory, "_footprint", footprint)
    arguments = ["--variants", "pruned_50", "eager_fp32", "lora_merged", "onnx_fp32",
                 "onnx_int8_dynamic", "sparse_2_4", "--run_name", "mine",
                 "--load_variants", "onnx_fp32", "--load_fractions", "0.5",
                 "--competing", "0", "--processes", "1", "--max_batch", "2"]  # fmt: skip
    for name in ("model_path", "data_path", "output_path", "results_path", "load_seconds"):
        arguments += [f"--{name}", str(getattr(configured(folder), name))]
    arguments += ["--percentiles", "50", "--batch_sizes", "1", "4", "--latency_samples", "6", "5"]
    arguments += ["--latency_bound_ms", "1000", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["production_benchmarking", *arguments])
    production_benchmarking.main()
    printed = capsys.readouterr().out
    assert "Deploy " in printed and "Not an MLPerf submission" in printed
    record = json.loads((folder / "results/mine.json").read_text())
    assert record["mlperf_submission"] is False
    assert record["config"]["max_batch"] == 2
    assert record["environment"]["packages"]["onnxruntime"]
    assert len(record["calibration"]) == 24 and record["calibration"][0].startswith("train/")
    assert sorted(path.name for path in (folder / "results").iterdir()) == [
        "mine.csv", "mine.json", "mine_latency.parquet"
    ]  # fmt: skip
    table = pd.read_csv(folder / "results/mine.csv").set_index("variant")
    assert list(table.index) == ["pruned_50", "eager_fp32", "eager_fp32_again", "lora_merged",
                                 "onnx_fp32", "onnx_int8_dynamic", "sparse_2_4"]  # fmt: skip
    assert "GPU" in table.unavailable["sparse_2_4"]
    assert table.costs_as.dropna().to_dict() == {"pruned_50": "eager_fp32"}
    assert table.p50_ms["pruned_50"] == table.p50_ms["eager_fp32"]
    control = table.loc["eager_fp32_again"]  # its accuracy would show nothing
    assert np.isnan(control.accuracy) and control.p50_ms > 0
    expected = pd.DataFrame(record["tables"]["expectations"]).set_index("what").measured
    assert expected.filter(like="merged LoRA").gt(0).sum() == 1
    assert 0 < expected["file of onnx_int8_dynamic, relative"] < 1
    [scaling] = record["tables"]["scaling"]
    assert scaling["processes"] == 1 and scaling["efficiency"] == 1


def test_the_reference_is_never_measured_without_its_control():
    assert with_control(("onnx_fp32", "eager_fp32", "bf16")) == (
        "onnx_fp32", "eager_fp32", "eager_fp32_again", "bf16"
    )  # fmt: skip
    assert with_control(("onnx_fp32",)) == ("onnx_fp32",)


def test_names_in_tables_are_text(folder):
    table = pd.DataFrame({"variant": ["<img src=x onerror=alert(1)>"], "<b>": [1.5]})
    page = captioned(table, "weights<script>alert(2)</script>").to_html()
    assert not any(tag in page for tag in ("<img", "<b>", "<script>"))


# --- What stops a benchmark, beside the rows of tests/faults -------------------------------------


def test_data_with_other_classes_are_refused(folder, tmp_path):
    class_folders(tmp_path, classes=("house", "road"))
    with pytest.raises(InputError, match=r"classes house, road.*trained on no_tree, tree"):
        open_bench(configured(folder, data_path=str(tmp_path)))
