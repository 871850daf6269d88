"""Variants: built from one classifier, each checked against it."""

import copy
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from helpers import InputError
from helpers.deployment import runtimes
from helpers.deployment.variants import build
from helpers.deployment.variants.source import calibration_rows
from helpers.models.adapters import AdapterSettings, add_adapter
from tests.deployment.common import KINDS, SIZE, listed, make_classifier, make_source
from tests.fake_weights import tiny  # noqa: F401  a fixture
from tests.models.common import random_chips
from tests.models.parity import tiny_architectures, tiny_classifier

NEEDS_GPU = {"int4_weights", "sparse_2_4"}
MAY_BE_MISSING = NEEDS_GPU | {"openvino_bf16", "openvino_int8_bf16"}  # some CPUs have no bf16
# The other shares differ in a number.
BUILT = (
    *build.DEFAULT,
    "compiled_fp32",
    "compiled_bf16",
    "compiled_int8",
    "openvino_int8_unsmoothed",
    "openvino_int8_bf16",
    "structured_60",
    "structured_40_taylor",
    "structured_40_taylor_recovered",
    "structured_40_taylor_int8",
)
# Mean difference of logits to the reference, relative to their mean size. (The largest of a few
# differences would be one draw: int8's lay between 0.16 and 0.23 with other calibration chips.)
TOLERANCE = {
    "eager_fp32": 0,
    "eager_fp32_again": 0,
    "lora_unmerged": 1e-5,
    "lora_merged": 1e-5,
    "compiled_fp32": 1e-5,
    "compiled_bf16": 5e-2,
    "compiled_int8": 1e-1,
    "onnx_fp32": 1e-5,
    "openvino_fp32": 1e-5,
    "fp16": 5e-3,
    "fp16_autocast": 5e-3,
    "openvino_bf16": 3e-2,
    "bf16": 5e-2,
    "bf16_autocast": 5e-2,
    "int8_weights": 5e-2,
    "int8_dynamic": 1e-1,
    "onnx_int8_dynamic": 2e-1,
    "onnx_int8_static": 2e-1,
    "openvino_int8": 2e-1,
    "openvino_int8_unsmoothed": 2e-1,
    "openvino_int8_bf16": 2e-1,
    "openvino_int4_weights": 5e-1,
}


pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny):  # noqa: F811
    return make_source(tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module")
def built(source):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "NOTICEABLE", float("inf"))  # a busy moment takes nothing out
        variants, _, table = build.build_variants(source, BUILT, 2)
    return variants, table.set_index("variant")


@pytest.fixture(scope="module")
def predicts(built):
    """Every variant, read back from its files."""
    again = [runtimes.Variant.read(v.folder / f"{name}.json") for name, v in built[0].items()]
    return {variant.name: runtimes.load(variant, threads=2) for variant in again}


@pytest.fixture(scope="module")
def logits(source, predicts):
    """Logits of the same chips from every variant."""
    chips = source.train[0].numpy()
    return {name: predict(chips) for name, predict in predicts.items()}


def test_every_variant_is_built_or_listed_with_the_reason(built):
    variants, table = built
    assert tuple(table.index) == BUILT
    missing = set(table.index) - set(variants)
    assert missing >= NEEDS_GPU and missing <= MAY_BE_MISSING
    assert table.unavailable[list(missing)].notna().all()
    assert table.unavailable[list(NEEDS_GPU)].str.contains("GPU").all()
    assert table.mebibytes_on_disk[list(variants)].gt(0).all()


def test_every_variant_says_what_it_classifies(built):
    """Its JSON alone tells classes, bands and image size, whatever serves it."""
    for name, variant in built[0].items():
        config = runtimes.Variant.read(variant.folder / f"{name}.json").options["classifier"]
        assert config["classes"] == ["no_tree", "tree"] and config["image_size"] == SIZE


@pytest.mark.parametrize("name", [n for n in BUILT if n not in NEEDS_GPU])
def test_a_variant_gives_the_logits_of_its_kind(source, logits, name):
    if name not in logits:
        pytest.skip(f"{name} does not run on this machine")
    with torch.inference_mode():
        expected = source.classifier(source.train[0]).numpy()
    found = logits[name]
    assert found.shape == expected.shape and found.dtype == np.float32
    difference = np.abs(found - expected).mean() / np.abs(expected).mean()
    if name in TOLERANCE:
        assert difference <= TOLERANCE[name]
    else:
        assert name.startswith(("pruned", "structured")) and difference > 0


def test_a_chip_gets_the_same_answer_alone_and_beside_any_others(source, built, predicts, logits):
    """Unless the variant says otherwise, and the one that does needs to."""
    chips, changed = source.train[0].numpy(), set()
    among_others = np.concatenate([chips[:8], np.zeros_like(chips[8:])])
    for name, variant in built[0].items():
        half = variant.options.get("precision_hint") == "bf16"
        if half or variant.precision not in ("fp32", "int8"):
            continue  # sums in half precision are rounded in another order
        if not np.allclose(predicts[name](among_others)[:8], logits[name][:8], atol=1e-4):
            changed.add(name)
            continue
        alone = np.concatenate([predicts[name](chip[None]) for chip in chips[:8]])
        # A value on the edge between two steps of int8 may fall either way in another graph.
        step = 0.05 * np.abs(alone).mean() if variant.precision == "int8" else 1e-4
        np.testing.assert_allclose(alone, logits[name][:8], atol=step, rtol=0, err_msg=name)
    assert changed == {n for n, v in built[0].items() if v.options.get("depends_on_batch")}
    assert changed == {"onnx_int8_dynamic"}


def test_what_tells_nothing_of_quality_says_so(built):
    """The reference once more, and adapters without an update."""
    names = {name for name, variant in built[0].items() if "only_timed" in variant.options}
    assert names == {"eager_fp32_again", "lora_unmerged", "lora_merged"}


def test_files_shrink_as_the_precision_says(built):
    size = {name: variant.bytes_on_disk for name, variant in built[0].items()}
    whole = size["eager_fp32"]
    for name in {"bf16", "fp16", "openvino_bf16"} & size.keys():
        assert 0.45 < size[name] / whole < 0.55
    for name in ("onnx_int8_static", "onnx_int8_dynamic", "openvino_int8"):
        assert size[name] / whole < 0.27
    assert size["openvino_int4_weights"] / whole < 0.16
    assert size["pruned_70"] == whole  # zeros are stored


def test_unstructured_pruning_zeroes_the_smallest_weights(source, built):
    for percent in (30, 50, 70):
        path = source.folder / built[0][f"pruned_{percent}"].files[0]
        pruned = load_file(path)
        paths = [f"backbone.{p}.weight" for p in runtimes.block_layers(source.classifier.backbone)]
        before = torch.cat([source.classifier.state_dict()[p].flatten() for p in paths])
        after = torch.cat([pruned[p].flatten() for p in paths])
        assert (after == 0).float().mean().item() == pytest.approx(percent / 100, abs=1e-4)
        assert before[after == 0].abs().max() <= before[after != 0].abs().min()


@pytest.mark.parametrize("kind", KINDS)
def test_variants_of_every_kind_of_block(kind, tmp_path):
    """A trained adapter among them, which is judged by its own logits; PiSSA changes its base."""
    classifier = tiny_classifier(None, kind)
    layers = runtimes.block_layers(classifier.backbone)
    targets = tuple({path.rsplit(".", 1)[1] for path in layers})
    method = "pissa" if kind == "dinov2" else "lora"
    settings = AdapterSettings(targets=targets, method=method)
    adapted = add_adapter(copy.deepcopy(classifier), settings).eval()
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.1)
    chips = random_chips(24, size=classifier.config.image_size)
    source = make_source(tmp_path, classifier=classifier, adapted=adapted)
    source.train = source.valid = (chips, source.train[1])
    names = ("eager_fp32", "lora_unmerged", "lora_merged", "bf16", "pruned_50", "structured_40")
    with tiny_architectures():
        variants, predicts, table = build.build_variants(source, names, 1)
    assert table.unavailable.isna().all(), table.unavailable
    with torch.inference_mode():
        expected, with_update = classifier(chips).numpy(), adapted(chips).numpy()
    found = {name: predict(chips.numpy()) for name, predict in predicts.items()}
    np.testing.assert_array_equal(found["eager_fp32"], expected)
    np.testing.assert_allclose(found["bf16"], expected, atol=0.1 * np.abs(expected).max())
    for name in ("lora_unmerged", "lora_merged"):
        assert "only_timed" not in variants[name].options
        np.testing.assert_allclose(found[name], with_update, atol=1e-5, rtol=1e-4)
    assert np.abs(with_update - expected).max() > 1e-3
    state = load_file(tmp_path / "pruned_50.safetensors")
    zeros = torch.cat([(state[f"backbone.{path}.weight"] == 0).flatten() for path in layers])
    assert zeros.float().mean().item() == pytest.approx(0.5, abs=1e-4)
    assert variants["structured_40"].bytes_on_disk < 0.8 * variants["eager_fp32"].bytes_on_disk


@pytest.mark.parametrize("start", ["structured_40", "structured_40_taylor"])
def test_every_step_of_the_ladder_is_a_form_made_of_the_one_before(start, built, logits):
    """Fewer heads and units, taught again, quantized: each has files and answers of its own."""
    pruned, taught, int8 = (f"{start}{step}" for step in ("", "_recovered", "_int8"))
    assert not np.array_equal(logits[pruned], logits[taught])
    difference = np.abs(logits[int8] - logits[taught]).mean() / np.abs(logits[taught]).mean()
    assert 0 < difference <= TOLERANCE["openvino_int8"]
    variants, table = built
    size = {name: variants[name].bytes_on_disk for name in (pruned, taught, int8)}
    assert size[taught] == size[pruned] > 3 * size[int8]
    assert size[int8] < 0.75 * variants["openvino_int8"].bytes_on_disk
    assert variants[taught].options["costs_as"] == pruned
    assert "1 of 3 heads and 333 of 768 MLP units" in table.made[int8]
    assert "1 epoch of distillation" in table.made[int8]
    assert ("Taylor" in table.made[int8]) == ("taylor" in start)
    assert not np.array_equal(logits["structured_40"], logits["structured_40_taylor"])


def test_int8_without_smoothing_and_with_bf16_are_forms_of_their_own(built, logits):
    variants, _ = built
    smooth, plain = logits["openvino_int8"], logits["openvino_int8_unsmoothed"]
    assert not np.array_equal(smooth, plain)
    if "openvino_int8_bf16" in variants:
        assert variants["openvino_int8_bf16"].files == variants["openvino_int8"].files
        assert not np.array_equal(smooth, logits["openvino_int8_bf16"])


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_batch_laid_out_over_streams_has_the_same_answers_in_order(source, built, count):
    variant, chips = built[0]["openvino_int8"], source.train[0][:count].numpy()
    whole, streams = (
        runtimes.load(replace(variant, options=variant.options | {"batches": hint}), threads=2)
        for hint in runtimes.LAYOUTS["openvino"]
    )
    np.testing.assert_allclose(streams(chips), whole(chips), atol=1e-5)
    np.testing.assert_allclose(streams(chips[::-1].copy()), whole(chips)[::-1], atol=1e-5)


def _signal_after(variant, chips):
    """What a process does: drop two loaded variants in the order of their loading, then signal."""
    first, second = (runtimes.load(variant, threads=1) for _ in range(2))
    first(chips), second(chips)
    del first
    gc.collect()
    del second
    gc.collect()
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)


def test_a_signal_after_variants_are_dropped_does_not_end_the_process(source, built):
    """On CPUs with AVX-512 it did (see `openvino_core`)."""
    arguments = built[0]["openvino_fp32"], source.train[0][:1].numpy()
    process = multiprocessing.get_context("spawn").Process(target=_signal_after, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_the_layout_of_batches_is_the_one_that_answers_soonest_and_is_named(
    tmp_path, monkeypatch, built
):
    def load(variant, threads, device):
        return variant.options.get("batches")

    monkeypatch.setattr(build, "load", load)
    variant = built[0]["openvino_int8"]
    for slower, chosen in (({"LATENCY": 1.2}, "THROUGHPUT"), ({"LATENCY": 1.02}, "LATENCY"),
                           ({"THROUGHPUT": 1.2}, "LATENCY")):  # fmt: skip
        monkeypatch.setattr(build, "_seconds", lambda name, chips, s=slower: s.get(name, 1.0))
        found, predict = build._laid_out(variant, None, 2, "cpu")
        assert found.options["batches"] == predict == chosen
    assert build._laid_out(built[0]["eager_fp32"], None, 2, "cpu")[0] is built[0]["eager_fp32"]
    layouts = built[1].batches.dropna()
    assert set(layouts.index) == {n for n, v in built[0].items() if v.runtime == "openvino"}
    assert set(layouts) <= set(runtimes.LAYOUTS["openvino"])


def test_a_machine_without_a_compiler_lists_the_compiled_variant(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C++ compiler" in listed(make_source(tmp_path), "compiled_fp32")[0]


def test_a_missing_package_is_a_row_that_says_how_to_install_it(source, built, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "pip install openvino" in listed(source, "openvino_fp32")[0]


def test_what_is_built_and_cannot_be_loaded_or_run_is_listed_with_the_reason(tmp_path, monkeypatch):
    def load(variant, threads, device):
        if variant.name == "bf16":
            raise RuntimeError("no such\ninstruction")

        def predict(chips):
            if variant.name == "fp16":
                raise ValueError("overflow")
            return np.full((len(chips), 2), np.nan, np.float32)

        return predict

    monkeypatch.setattr(build, "load", load)
    reasons = listed(make_source(tmp_path), "bf16", "fp16", "pruned_50")
    assert list(reasons) == [
        "RuntimeError: no such instruction",
        "ValueError: overflow",
        "its logits are not finite",
    ]
    with pytest.raises(InputError, match="eager_fp32 cannot serve it: its logits are not finite"):
        listed(make_source(tmp_path), "eager_fp32")


def test_half_precision_normalises_16_bit_chips_in_full_precision(tmp_path):
    """65535 has no value in fp16, and the values of bf16 there lie 256 apart."""
    statistics = {"mean": (21000.0, 22000.0, 23000.0), "std": (90.0, 80.0, 70.0)}
    classifier = make_classifier(**statistics)
    rng = np.random.default_rng(0)
    chips = rng.normal(22000, 80, (8, 3, SIZE, SIZE)).astype(np.float32)
    chips[0, 0, 0, 0] = 65535
    examples = (torch.from_numpy(chips), torch.arange(8) % 2)
    source = make_source(tmp_path, classifier=classifier)
    source.train = examples
    names = ("eager_fp32", "bf16", "fp16")
    _, predicts, _ = build.build_variants(source, names, 1)
    expected = predicts["eager_fp32"](chips)
    for name in ("bf16", "fp16"):
        difference = np.abs(predicts[name](chips) - expected).max() / np.abs(expected).max()
        assert difference <= TOLERANCE[name]


def test_calibration_chips_come_from_every_class_and_group():
    rows = pd.DataFrame(
        {"target": [0] * 90 + [1] * 30, "group": [f"g{i // 10}" for i in range(120)]}
    )
    chosen = rows.loc[calibration_rows(rows, 24, seed=0)]
    assert chosen.target.value_counts().to_dict() == {0: 12, 1: 12}
    assert chosen.group.nunique() == 12 and chosen.index.is_monotonic_increasing
    assert list(calibration_rows(rows, 24, 0)) == list(chosen.index)
    assert list(calibration_rows(rows, 24, 1)) != list(chosen.index)
    assert len(calibration_rows(rows, 500, 0)) == 120


def test_a_comparison_on_a_gpu_leaves_out_what_the_cpu_serves(tmp_path):
    reasons = listed(make_source(tmp_path, device="cuda"), "onnx_fp32", "openvino_int8")
    assert reasons.str.contains("leaves out").all()


def test_a_missing_runtime_is_one_clear_error(built, monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install onnxruntime"):
        runtimes.load(built[0]["onnx_fp32"], threads=1)


def test_chips_that_are_not_8_bit_rule_out_the_exported_graph(tmp_path):
    source = make_source(tmp_path)
    source.train = (source.train[0].float(), source.train[1])
    assert listed(source, "onnx_fp32", "openvino_int8").str.contains("8-bit").all()
