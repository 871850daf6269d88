"""A DINOv3 classifier goes the whole way: trained, saved, loaded, predicting."""

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.deployment.scoring import PredictConfig
from helpers.models.architectures import IMAGENET_MEAN, IMAGENET_STD
from helpers.models.backbones import create_backbone
from helpers.predict import predict
from helpers.training.config import RunConfig
from helpers.training.methods import train
from helpers.training.runs import save_run
from tests.fake_data import manifest_folder
from tests.models.parity import TINY, meta_outputs, published, tiny_architectures


@pytest.mark.parametrize("method", ["head_only", "lora"])
def test_a_dinov3_classifier_is_trained_and_predicts(tmp_path, method):
    manifest_folder(tmp_path / "data", counts={"train": 8, "valid": 4, "test": 4}, size=32)
    weights = tmp_path / "dinov3_vits16.pth"
    torch.save(published("dinov3"), weights)
    config = RunConfig.checked(
        data_path=str(tmp_path / "data"), backbone="dinov3_vits16", weights=str(weights),
        image_size=32, method=method, epochs=1, head_inputs="cls", device="cpu", precision="fp32",
        output_path=str(tmp_path / "runs"),
    )  # fmt: skip
    with tiny_architectures():
        data = config.data()
        run = train(config, data, report=lambda line: None)
        save_run(config, run)
        model = config.folder / ("adapter" if method == "lora" else "model_final.safetensors")
        csv, *_ = predict(
            PredictConfig.checked(
                model_path=str(model), input=str(tmp_path / "data"), output=str(tmp_path / "out")
            )
        )
    table = pd.read_csv(csv).set_index("img_path")
    of_test = run.test_predictions.set_index("img_path")
    positive = f"p_{run.classifier.config.classes[1]}"
    names = [name for name in table.index if name in of_test.index]
    assert len(names) == len(of_test) == 8
    # Temperature changes how sure an answer is, and not which of two chips is surer.
    order = np.argsort(of_test.loc[names, positive], kind="stable")
    assert table.loc[names, positive].iloc[order].is_monotonic_increasing


def test_a_model_of_timm_with_its_own_biases_reads_metas_file(tmp_path):
    """`_qkvb` has q and v biases apart from qkv; they must not be lost on the way."""
    weights = tmp_path / "meta.pth"
    torch.save(published("dinov3"), weights)
    outputs, name = meta_outputs("dinov3"), TINY["timm_eva"]
    with tiny_architectures():
        backbone = create_backbone(name, weights=str(weights), image_size=96).eval()
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        tokens = backbone.forward_features((outputs["image_96"] - mean) / std)
    # timm computes RoPE's periods itself, in fp32.
    np.testing.assert_allclose(tokens[:, 0], outputs["cls_fp32periods_96"], atol=1e-4)
    np.testing.assert_allclose(tokens[:, 5:], outputs["patches_fp32periods_96"], atol=1e-4)
