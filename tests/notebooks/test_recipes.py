"""The published commands for real weights and data, as far as a machine without them reaches.

Every command is read from `docs/weights.md`. Its parameters must be the notebook's, and it is run
with random weights in the published layouts, fake chips in the data's layout, at a small size.
"""

import re
import shlex

import huggingface_hub.constants
import pytest
import torch
import yaml

from helpers.evaluation.comparison import CompareConfig
from helpers.models.architectures import ARCHITECTURES, IMAGENET_MEAN
from helpers.models.backbones import build_backbone, create_backbone
from helpers.models.export import count_parameters
from helpers.records import ROOT
from helpers.training.config import NotebookConfig, RunConfig
from helpers.training.methods import train
from tests.fake_data import class_folders, manifest_rows
from tests.fake_weights import hub_cache, hub_layout, published_state_dict
from tests.models.parity import published, tiny_architectures

EUROSAT = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture",
    "PermanentCrop", "Residential", "River", "SeaLake",
)  # fmt: skip
CONFIGS = {"setup_finetune": NotebookConfig, "finetune_lora": CompareConfig}
SMALL = {"epochs": 1, "device": "cpu"}


def recipes():
    """The commands of the section on real weights, by the comment above each."""
    section = (ROOT / "docs/weights.md").read_text().split("## Real weights")[1]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)[1].replace("\\\n", " ")
    lines = [line for line in block.splitlines() if line.strip()]
    return dict(zip((line.lstrip("# ") for line in lines[::2]), lines[1::2], strict=True))


def parameters_of(command):
    """The notebook that a papermill command names, and its parameters."""
    program, notebook, _, *words = shlex.split(command)
    assert program.endswith("papermill") and notebook.endswith(".ipynb")
    parameters = {}
    while words:
        flag, *words = words
        if flag == "-p":
            name, value, *words = words
            parameters[name] = yaml.safe_load(value)
        else:
            assert flag == "-y"
            parameters |= yaml.safe_load(words.pop(0))
    return notebook.removesuffix(".ipynb"), parameters


def lay_out(parameters):
    """Fake data and weights where a recipe looks for them, below the working folder."""
    data_path = parameters["data_path"]
    if data_path == "eurosat":
        class_folders("data/eurosat/2750", per_class=12, classes=EUROSAT, suffix=".jpg")
    elif data_path == "./geotiffs":
        class_folders(data_path, per_class=10, suffix=".tif", bands=4, dtype="uint16")
    else:
        rows = manifest_rows(data_path, suffix=".npy")
        for split, of_split in rows.groupby("split"):
            of_split.to_csv(f"{data_path}/{split}_clean.csv", index=False)
    chosen = ARCHITECTURES[parameters["backbone"]]
    state = published("dinov3_sat" if chosen.patch == 16 else "dinov2")
    weights = parameters.get("weights", "pretrained")
    if weights == "pretrained":
        hub_cache("hub", chosen.timm_name, hub_layout(state))
    else:
        torch.save(state, weights)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("name", recipes())
def test_a_recipe_runs(name, tmp_path, monkeypatch):
    """At width 64 and with 5 blocks; files of ViT-S and ViT-L in full have tests of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    notebook, parameters = parameters_of(recipes()[name])
    config = CONFIGS[notebook].checked(**parameters)
    chosen = ARCHITECTURES[config.backbone]
    assert config.image_size % chosen.patch == 0
    lay_out(parameters)
    small = SMALL | {"image_size": 2 * chosen.patch}
    if notebook == "finetune_lora":
        run_config = config.model_copy(update=small | {"adapted_blocks": 3}).run("lora", 0)
    else:
        run_config = RunConfig.checked(**parameters | small)
    with tiny_architectures():
        run = train(run_config, run_config.data(), report=lambda line: None)
    local = parameters.get("weights")
    name = f"{chosen.label}, weights from {local[2:]}" if local else chosen.pretrained_label
    assert run.record["backbone"] == name
    assert run.record["licence"] == chosen.licence
    classifier = run.record["classifier"]
    expected = {"eurosat": EUROSAT, "./geotiffs": ("no_tree", "tree")}
    if "positive_class" in parameters:
        assert classifier["classes"] == ("rest", parameters["positive_class"])
    else:
        classes = expected.get(parameters["data_path"], ("no_tree", "tree"))
        assert classifier["classes"] == classes
    assert classifier["bands"] == tuple(parameters.get("bands", (0, 1, 2)))
    if parameters["data_path"] == "eurosat":  # 8-bit RGB
        assert (classifier["mean"], classifier["std"]) == (chosen.mean, chosen.std)


def test_there_is_a_recipe_for_every_kind_of_weights_and_data():
    found = [parameters_of(command)[1] for command in recipes().values()]
    backbones = {(p["backbone"], p.get("weights", "hub")) for p in found}
    assert backbones >= {
        ("dinov2_vits14", "hub"),
        ("dinov2_vitl14", "hub"),
        ("dinov2_vitl14", "./dinov2_vitl14_pretrain.pth"),
        ("dinov3_vitl16_sat", "hub"),
        ("dinov3_vitl16_sat", "./dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"),
    }
    assert {p["data_path"] for p in found} == {"eurosat", "./data", "./geotiffs"}


def test_a_published_file_of_vit_large_loads(tmp_path):
    """Every tensor must arrive."""
    state = published_state_dict(width=1024, depth=24, registers=0)
    path = tmp_path / "dinov2_vitl14_pretrain.pth"
    torch.save(state, path)
    filled = create_backbone("dinov2_vitl14", str(path), image_size=28).state_dict()
    assert len(filled) == len(state) - 1  # all but the mask token
    for key in ("blocks.23.mlp.fc2.weight", "blocks.0.attn.qkv.bias", "norm.weight"):
        assert torch.equal(filled[key], state[key]), key


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not name.endswith("_reg")])
def test_the_table_of_backbones_is_right(name):
    chosen = ARCHITECTURES[name]
    with torch.device("meta"):
        millions = count_parameters(build_backbone(name))["total"] / 1e6
    rows = [line.split(" | ") for line in (ROOT / "docs/weights.md").read_text().splitlines()]
    row = next(row for row in rows if row[0] == f"| `{name}`")
    assert row[1:3] == [f"{millions:,.1f}", str(chosen.patch)]
    statistics = [f"{value / 255:.3f}" for value in (*chosen.mean, *chosen.std)]
    assert (
        row[3] == "ImageNet"
        if chosen.mean == IMAGENET_MEAN
        else re.split(",? ", row[3]) == statistics
    )
    assert all(part in row[4] for part in chosen.licence.split(", "))
    assert row[5] == f"{chosen.pretraining} |"
