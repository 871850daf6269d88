"""Chips of every form to answers, and rules whose error is known from the validation split."""

import numpy as np
import pandas as pd
import pytest
import torch
from rasterio.transform import from_origin
from scipy.special import softmax

from helpers import InputError
from helpers.data.dataset import ChipDataset, load_data
from helpers.deployment.runtimes import load
from helpers.deployment.scoring import (
    PredictConfig,
    answer_rule,
    find_inputs,
    open_model,
    prefetched,
)
from helpers.deployment.variants.build import build_variants
from helpers.deployment.variants.source import Source
from helpers.evaluation.calibration import fit_rule
from helpers.models.adapters import AdapterSettings, add_adapter, save_adapter
from helpers.models.backbones import weights_digest
from helpers.models.classifier import ClassifierConfig, create_classifier
from helpers.models.files import save_classifier
from helpers.predict import predict
from helpers.training.config import RunConfig
from helpers.training.methods import train
from helpers.training.runs import save_run
from tests.evaluation.test_calibration import make_validation
from tests.fake_data import class_folders, make_chip, split_folders, write_chip, write_scene
from tests.fake_weights import lively_classifier, tiny  # noqa: F401  a fixture

SIZE = 28
CLASSES = ("no_tree", "tree")
PROVENANCE = {"run": "fake", "backbone": "example (random)", "config": {}}


pytestmark = pytest.mark.usefixtures("tiny")


def make_classifier(**facts):
    facts = {"chip_size": SIZE, "chip_bands": 3, "chip_dtype": "uint8"} | facts
    config = ClassifierConfig("tiny", "random", SIZE, (2, 0, 1), CLASSES, **facts)
    classifier = lively_classifier(config)
    torch.nn.init.normal_(classifier.linear_head.weight, std=0.2)
    return classifier


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny):  # noqa: F811
    path = tmp_path_factory.mktemp("run") / "model_final.safetensors"
    return save_classifier(make_classifier(), path, PROVENANCE)


@pytest.fixture(scope="module")
def chips(tmp_path_factory):
    """Ten chips of two classes, three of them of another size."""
    root = class_folders(tmp_path_factory.mktemp("chips"), per_class=5)
    for number, size in enumerate((20, 40, 55)):
        write_chip(root / "tree" / f"00{number}.png", make_chip(number, size=size))
    return root


def config(model, given, output, **changes):
    return PredictConfig.checked(
        model_path=str(model), input=str(given), output=str(output), **changes
    )


def answer(model, given, output, **changes):
    files = predict(config(model, given, output, **changes))
    read = pd.read_parquet if files[0].suffix == ".parquet" else pd.read_csv
    return read(files[0]), files


def pixels_of(paths):
    """Chips as training sees them."""
    dataset = ChipDataset(paths, [0] * len(paths), (2, 0, 1), SIZE)
    return torch.stack([chip for chip, _ in dataset])


def expected(paths):
    """Probabilities from the classifier itself."""
    with torch.inference_mode():
        return make_classifier()(pixels_of(paths)).softmax(dim=1).numpy()


def test_a_folder(model, chips, tmp_path):
    table, files = answer(model, chips, tmp_path / "new" / "predictions", batch_size=4)
    paths = sorted(chips.glob("*/*.png"))
    assert [f.name for f in files] == ["predictions.csv"]
    assert list(table) == ["img_path", "label", "p_no_tree", "p_tree", "answer"]
    assert table["img_path"].tolist() == [p.relative_to(chips).as_posix() for p in paths]
    # Rows are rounded to six digits; batches of another size add in another order.
    np.testing.assert_allclose(table.filter(like="p_"), expected(paths), atol=2e-6)
    assert table["label"].tolist() == [CLASSES[i] for i in expected(paths).argmax(axis=1)]
    assert (table["answer"] == table["label"]).all()


def test_order_is_that_of_the_csv(model, chips, tmp_path):
    names = ["tree/002.png", "no_tree/001.png", "tree/002.png"]
    pd.DataFrame({"img_path": names, "other": 1}).to_csv(chips / "list.csv", index=False)
    table, _ = answer(model, chips / "list.csv", tmp_path / "p.parquet")
    assert table["img_path"].tolist() == names
    probabilities = expected([chips / name for name in names])
    np.testing.assert_allclose(table.filter(like="p_"), probabilities, atol=2e-6)
    assert table["p_tree"].dtype == np.float32


def test_one_chip_and_a_glob(model, chips, tmp_path):
    one, _ = answer(model, chips / "tree" / "001.png", tmp_path / "one")
    several, _ = answer(model, chips / "tr*" / "*.png", tmp_path / "several.csv")
    assert one["img_path"].tolist() == ["001.png"]
    assert several["img_path"].tolist() == [f"00{i}.png" for i in range(5)]
    np.testing.assert_allclose(one["p_tree"], several["p_tree"][1:2], atol=2e-6)


def test_unreadable_chips_are_listed(model, chips, tmp_path):
    root = class_folders(tmp_path / "data", per_class=2)
    (root / "tree" / "000.png").write_bytes(b"\x89PNG no more")
    (root / "no_tree" / "001.png").write_bytes(b"")
    table, files = answer(model, root, tmp_path / "p")
    assert table["img_path"].tolist() == ["no_tree/000.png", "tree/001.png"]
    skipped = pd.read_csv(files[1])
    assert skipped["img_path"].tolist() == ["no_tree/001.png", "tree/000.png"]
    assert skipped["reason"].str.contains("empty|damaged").all()
    with pytest.raises(InputError, match=r"001\.png: empty file"):
        answer(model, root, tmp_path / "q", on_unreadable="error")
    assert not list(tmp_path.glob("q*"))
    for path in ("tree/000.png", "no_tree/001.png"):
        write_chip(root / path, make_chip())
    assert len(answer(model, root, tmp_path / "p", overwrite=True)[1]) == 1
    assert not (tmp_path / "p_skipped.csv").exists()


def test_results_are_kept_unless_overwritten(model, chips, tmp_path):
    (tmp_path / "p.csv").write_text("mine")
    with pytest.raises(InputError, match=r"p\.csv is there"):
        answer(model, chips, tmp_path / "p")
    assert (tmp_path / "p.csv").read_text() == "mine"
    assert len(answer(model, chips, tmp_path / "p", overwrite=True)[0]) == 10


def test_an_older_file_checks_what_it_can(chips, tmp_path):
    older = make_classifier(chip_size=None, chip_bands=None, chip_dtype=None)
    path = save_classifier(older, tmp_path / "model_final.safetensors", PROVENANCE)
    scorer = open_model(path)
    assert scorer.chip_size == SIZE
    scorer.check_pixels("chip", 5, "uint8")
    with pytest.raises(InputError, match="bands"):
        scorer.check_pixels("chip", 2, "uint8")


def test_chip_facts_come_from_the_data(tmp_path):
    root = class_folders(tmp_path, per_class=5, size=28)
    for number in range(4):  # four of ten: the median stays
        write_chip(root / "tree" / f"00{number}.png", make_chip(number, size=40))
    facts = load_data(root).chip_facts
    assert facts["chip_size"] == 28
    assert (facts["chip_bands"], facts["chip_dtype"]) == (3, "uint8")
    assert facts["resolution"] is None


@pytest.mark.parametrize(
    "crs, metres", [("EPSG:32615", 0.5), ("EPSG:2277", 0.5 * 1200 / 3937), ("EPSG:4326", None)]
)
def test_resolution_comes_from_the_data(tmp_path, crs, metres):
    for target, name in enumerate(CLASSES):
        for number in range(5):
            chip = make_chip(10 * target + number, size=16)
            apart = from_origin(20 * target, 40 + 8 * number, 0.5, 0.5)  # no ground in common
            write_scene(tmp_path / name / f"{number}.tif", chip, crs=crs, transform=apart)
    resolution = load_data(tmp_path).chip_facts["resolution"]
    assert resolution == (metres and pytest.approx(metres))


def test_every_form_of_a_model(model, chips, tmp_path):
    reference = answer(model, chips, tmp_path / "reference")[0]
    batch = torch.from_numpy(np.stack([make_chip(i) for i in range(16)]))
    examples = (batch, torch.arange(16) % 2)
    source = Source(make_classifier(), examples, examples, batch, tmp_path / "variants")
    names = ("eager_fp32", "onnx_fp32", "openvino_int8")
    built, _, _ = build_variants(source, names, threads=1)
    digests = {open_model(model).digest}
    pixels = pixels_of(sorted(chips.glob("*/*.png")))
    for variant in built.values():
        path = variant.folder / f"{variant.name}.json"
        table = answer(path, chips, tmp_path / variant.name)[0]
        logits = load(variant, threads=1)(pixels.numpy())
        np.testing.assert_allclose(table["p_tree"], softmax(logits, axis=1)[:, 1], atol=1e-5)
        if variant.precision == "fp32":
            np.testing.assert_allclose(table["p_tree"], reference["p_tree"], atol=1e-5)
        digests.add(open_model(path).digest)
    assert len(digests) == 1 + len(built) >= 2


def test_an_adapter_folder(chips, tmp_path):
    config_ = ClassifierConfig("example", "pretrained", SIZE, (2, 0, 1), CLASSES)
    base = create_classifier(config_)
    digest = weights_digest(base.backbone)
    adapted = add_adapter(base, AdapterSettings())
    folder = save_adapter(adapted.eval(), tmp_path / "run" / "adapter", digest, PROVENANCE)
    table = answer(folder, chips, tmp_path / "p")[0]
    with torch.inference_mode():
        logits = adapted(pixels_of(sorted(chips.glob("*/*.png"))))
    np.testing.assert_allclose(table["p_tree"], logits.softmax(dim=1)[:, 1], atol=1e-5)


def test_kinds_are_told_from_the_files(model, tmp_path):
    scorer = open_model(model)

    def kind(given, **changes):
        found = find_inputs(scorer, config(model, given, tmp_path / "out", **changes))
        return found.kind, len(found.paths)

    chip = write_scene(tmp_path / "chips" / "a.tif", make_chip(size=SIZE))
    large = write_scene(tmp_path / "scenes" / "b.tif", make_chip(size=3 * SIZE))
    (tmp_path / "scenes" / ".hidden.tif").write_bytes(b"")
    assert kind(chip) == kind(chip.parent) == ("chips", 1)
    assert kind(large) == kind(large.parent) == kind(tmp_path / "scenes" / "*.tif") == ("scene", 1)
    assert kind(large, kind="chips") == ("chips", 1)
    assert kind(chip, kind="scene") == ("scene", 1)
    with pytest.raises(InputError, match=r"chips \(.*a\.tif\) beside scenes \(.*b\.tif\)"):
        kind(tmp_path)
    with pytest.raises(InputError, match="names no image"):
        kind(tmp_path / "*.jpg")


def test_scenes_of_a_folder_become_a_folder_of_maps(model, tmp_path, monkeypatch):
    for name in ("a", "sub/b"):
        write_scene(tmp_path / "scenes" / f"{name}.tif", make_chip(size=3 * SIZE))
    files = predict(config(model, tmp_path / "scenes", tmp_path / "maps"))
    maps = [f.relative_to(tmp_path).as_posix() for f in files if f.suffix == ".tif"]
    assert maps == ["maps/a.tif", "maps/sub/b.tif"]
    times = [file.stat().st_mtime_ns for file in files]
    scorer = open_model(model)
    monkeypatch.setattr("helpers.predict.open_model", None)  # what is open is not opened again
    assert predict(config(model, tmp_path / "scenes", tmp_path / "maps"), scorer) == files
    assert [file.stat().st_mtime_ns for file in files] == times


def test_prefetching_keeps_order_and_errors():
    def numbers():
        yield from range(20)
        raise ValueError("at the end")

    seen = []
    with pytest.raises(ValueError, match="at the end"):
        for number in prefetched(numbers()):
            seen.append(number)
    assert seen == list(range(20))
    assert list(prefetched(iter([]))) == []


# ---------------------------------------------------------------------- rules of a run


def validation_file(path, targets, logits):
    probabilities = softmax(logits, axis=1).astype(np.float32)
    table = pd.DataFrame({f"p_{c}": probabilities[:, i] for i, c in enumerate(CLASSES)})
    table = table.assign(split="valid", target=targets, img_path="x")
    other = table.assign(split="test", target=1 - targets)  # must not be looked at
    pd.concat([other, table]).to_parquet(path, index=False)


def test_the_rule_comes_from_the_run(model, chips, tmp_path):
    path = tmp_path / "model_final.safetensors"
    path.write_bytes(model.read_bytes())
    plain = answer(path, chips, tmp_path / "plain")[0]
    for changes in ({"error_rate": 0.1}, {"threshold": "f1"}):
        with pytest.raises(InputError, match="needs predictions on the validation split"):
            answer(path, chips, tmp_path / "p", **changes)
    targets, logits = make_validation(sharpness=2)
    validation_file(tmp_path / "predictions.parquet", targets, logits)
    scorer = open_model(path)
    rule = answer_rule(scorer, config(path, chips, "p", error_rate=0.1, threshold="recall=0.9"))
    # The file holds float32.
    again = fit_rule(targets, logits, error_rate=0.1, threshold="recall=0.9")
    assert rule.temperature == pytest.approx(again.temperature, rel=1e-4)
    assert rule.quantile == pytest.approx(again.quantile, rel=1e-3)
    tempered, _ = answer(path, chips, tmp_path / "tempered")
    assert (tempered["label"] == plain["label"]).all()
    assert (tempered.filter(like="p_").max(axis=1) < plain.filter(like="p_").max(axis=1)).all()
    same, _ = answer(path, chips, tmp_path / "same", temperature=1)
    pd.testing.assert_frame_equal(same, plain)
    unsure, _ = answer(path, chips, tmp_path / "unsure", error_rate=0.01)
    assert "unsure" in set(unsure["answer"])


@pytest.mark.parametrize("content", [b"", b"PAR1 no more", None])
def test_damaged_predictions_are_one_error(model, chips, tmp_path, content):
    path = tmp_path / "model_final.safetensors"
    path.write_bytes(model.read_bytes())
    if content is None:
        frame = pd.DataFrame({"split": ["valid"], "target": [0], "p_a": [1.0]})
        frame.to_parquet(tmp_path / "predictions.parquet")
    else:
        (tmp_path / "predictions.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"predictions\.parquet: not the predictions"):
        answer(path, chips, tmp_path / "p")


def test_a_model_that_answers_with_nan(chips, tmp_path):
    broken = make_classifier()
    torch.nn.init.constant_(broken.linear_head.weight, 3e38)
    path = save_classifier(broken, tmp_path / "model_final.safetensors", PROVENANCE)
    with pytest.raises(InputError, match="NaN or infinity"):
        answer(path, chips, tmp_path / "p")
    assert not (tmp_path / "p.csv").exists()


def test_a_run_is_enough_for_answers_with_a_known_error(tmp_path):
    """Training writes the files that predict reads."""
    root = split_folders(tmp_path / "data", counts={"train": 10, "valid": 10, "test": 5})
    settings = RunConfig.checked(
        data_path=str(root), weights="random", image_size=SIZE, head_inputs="cls",
        learning_rates=0.01, weight_decays=0, epochs=20, output_path=str(tmp_path / "runs"),
    )  # fmt: skip
    run = train(settings, settings.data(), report=lambda line: None)
    save_run(settings, run)
    path = settings.folder / "model_final.safetensors"
    scorer = open_model(path)
    assert (scorer.chip_size, scorer.classifier.chip_dtype) == (SIZE, "uint8")
    changes = {"threshold": "recall=0.9", "error_rate": 0.2}
    table, _ = answer(path, root / "test", tmp_path / "p", temperature=1, **changes)
    tested = run.predictions[run.predictions["split"] == "test"]
    order = table["img_path"].radd("test/").tolist()
    expected = tested.set_index("img_path").loc[order]
    np.testing.assert_allclose(table["p_tree"], expected["p_tree"], atol=1e-5)
    rule = answer_rule(scorer, config(path, root, "p", temperature=1, **changes))
    assert ((table["p_tree"] >= rule.threshold) == (table["label"] == "tree")).all()
