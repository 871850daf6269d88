"""Variants: built from one classifier, each checked against it."""

import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import InputError
from helpers.deployment import runtimes
from helpers.deployment.variants import build, structure
from helpers.deployment.variants.source import Source
from helpers.models.classifier import ClassifierConfig, create_classifier

SIZE = 28  # pixels: two by two patches
NEEDS_GPU = {"int4_weights", "sparse_2_4"}
# Largest difference of logits to the reference, relative to the largest logit.
TOLERANCE = {
    "eager_fp32": 0,
    "lora_unmerged": 1e-5,
    "lora_merged": 1e-5,
    "compiled_fp32": 1e-5,
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
    "openvino_int4_weights": 5e-1,
}


def make_classifier(seed=0):
    torch.manual_seed(seed)
    config = ClassifierConfig("example", "random", SIZE, (0, 1, 2), ("no_tree", "tree"))
    classifier = create_classifier(config).eval()
    for block in classifier.backbone.blocks:
        # Untrained layer scales are so small that no block would matter.
        torch.nn.init.constant_(block.ls1.gamma, 0.3)
        torch.nn.init.constant_(block.ls2.gamma, 0.3)
    return classifier


def make_source(folder, **options):
    rng = np.random.default_rng(0)
    chips = torch.from_numpy(rng.integers(0, 256, (24, 3, SIZE, SIZE), dtype=np.uint8))
    targets = torch.arange(24) % 2
    examples = (chips, targets)
    return Source(make_classifier(), examples, examples, folder, recovery_epochs=1, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module")
def built(source):
    lines = []
    variants, table = build.build_variants(source, tuple(build.BUILDERS), lines.append)
    return {v.name: v for v in variants}, table.set_index("variant"), lines


@pytest.fixture(scope="module")
def logits(source, built):
    """Logits of the same chips from every variant, read back from its files."""
    chips = source.train[0].numpy()
    result = {}
    for name, variant in built[0].items():
        again = runtimes.Variant.read(variant.folder / f"{name}.json")
        result[name] = runtimes.load(again, threads=2)(chips)
    return result


def test_every_variant_is_built_or_listed_with_the_reason(built):
    variants, table, lines = built
    assert list(table.index) == list(build.BUILDERS) and len(lines) == len(table)
    assert set(table.index) - set(variants) == NEEDS_GPU
    assert table.unavailable[list(NEEDS_GPU)].str.contains("GPU").all()
    assert table.mebibytes_on_disk[list(variants)].gt(0).all()


@pytest.mark.parametrize("name", [n for n in build.BUILDERS if n not in NEEDS_GPU])
def test_a_variant_gives_the_logits_of_its_kind(source, logits, name):
    with torch.inference_mode():
        expected = source.classifier(source.train[0]).numpy()
    found = logits[name]
    assert found.shape == expected.shape and found.dtype == np.float32
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    if name in TOLERANCE:
        assert difference <= TOLERANCE[name]
    else:
        assert name.startswith(("pruned", "structured")) and difference > 0


def test_any_batch_size_gives_the_same_as_one_chip_at_a_time(source, built, logits):
    for name in ("eager_fp32", "compiled_fp32", "onnx_fp32", "openvino_fp32"):
        predict = runtimes.load(built[0][name], threads=2)
        single = np.concatenate([predict(chip[None].numpy()) for chip in source.train[0][:3]])
        assert np.allclose(single, logits[name][:3], atol=1e-4)


def test_files_shrink_as_the_precision_says(built):
    size = {name: variant.bytes_on_disk for name, variant in built[0].items()}
    whole = size["eager_fp32"]
    for name in ("bf16", "fp16", "openvino_bf16"):
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


def test_removing_heads_and_units_that_do_nothing_changes_nothing():
    """The weakest third is found wherever it is, and the rest is put together rightly."""
    classifier = make_classifier(1)
    with torch.no_grad():
        for i, block in enumerate(classifier.backbone.blocks):
            head, width = i % 3, block.attn.head_dim
            block.attn.proj.weight[:, head * width : (head + 1) * width] = 0
            block.mlp.fc2.weight[:, i % 3 :: 3] = 0
    pruned = structure.remove_heads_and_units(classifier, 1 / 3)
    chips = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.allclose(pruned(chips), classifier(chips), atol=1e-5)
    block = pruned.backbone.blocks[0]
    assert (block.attn.num_heads, block.mlp.fc1.out_features) == (2, 512)
    assert classifier.backbone.blocks[0].attn.num_heads == 3  # a copy was pruned


def test_recovery_trains(source, built, logits):
    assert not np.array_equal(logits["structured"], logits["structured_recovered"])
    assert built[0]["structured_recovered"].bytes_on_disk == built[0]["structured"].bytes_on_disk


def test_a_machine_without_a_compiler_lists_the_compiled_variant(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    variants, table = build.build_variants(make_source(tmp_path), ("compiled_fp32",))
    assert not variants and "C++ compiler" in table.unavailable[0]


def test_a_missing_package_is_a_row_that_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    variants, table = build.build_variants(make_source(tmp_path), ("openvino_fp32",))
    assert not variants and "pip install openvino" in table.unavailable[0]


def test_a_missing_runtime_is_one_clear_error(built, monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install onnxruntime"):
        runtimes.load(built[0]["onnx_fp32"], threads=1)


def test_chips_that_are_not_8_bit_rule_out_the_exported_graph(tmp_path):
    source = make_source(tmp_path)
    source.train = (source.train[0].float(), source.train[1])
    variants, table = build.build_variants(source, ("onnx_fp32", "openvino_int8"))
    assert not variants and table.unavailable.str.contains("8-bit").all()
