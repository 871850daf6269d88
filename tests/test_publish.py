"""What goes up to the hub, with the hub's own client up to the point where it would connect."""

from pathlib import Path

import pandas as pd
import pytest
from huggingface_hub import ModelCard

from helpers import InputError, publish
from helpers.deployment.scoring import open_model
from helpers.evaluation.calibration import read_validation
from helpers.models.files import load_model
from helpers.publish import PublishConfig
from tests.fake_run import CONFIG, run_folder


class Hub:
    """In the place of HfApi: keeps what it is given."""

    endpoint = "https://huggingface.co"
    repositories, uploads, folder = [], [], None

    def create_repo(self, repo_id, **options):
        self.repositories.append((repo_id, options))
        return f"{self.endpoint}/{repo_id}"

    def upload_folder(self, folder_path, **options):
        self.uploads.append(options)
        for path in Path(folder_path).rglob("*"):
            if path.is_file():
                target = self.folder / path.relative_to(folder_path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "HfApi", Hub)
    monkeypatch.setattr(Hub, "folder", tmp_path / "hub")
    monkeypatch.setattr(Hub, "repositories", [])
    monkeypatch.setattr(Hub, "uploads", [])
    return Hub


def run_publish(path, **changes):
    return publish.publish(
        PublishConfig.checked(model_path=str(path), repo_id="somebody/trees", **changes)
    )


def names(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_what_others_need_goes_up_and_nothing_besides(tmp_path, hub):
    run = tmp_path / "run"
    run.mkdir()
    run_folder(run, adapter=True)
    for name in ("checkpoint.pt", "openvino_int8.bin", "notes.txt", "adapter/optimizer.pt"):
        (run / name).write_text("mine")
    address = run_publish(run / "adapter")
    assert address == "https://huggingface.co/somebody/trees"
    assert hub.repositories == [("somebody/trees", {"private": True, "exist_ok": True})]
    assert names(hub.folder) == {
        "README.md", "model_final.safetensors", "predictions.parquet",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "adapter/classifier.json",
    }  # fmt: skip
    (options,) = hub.uploads
    assert options["repo_id"] == "somebody/trees"
    assert set(options["delete_patterns"]) == {
        "model_final.safetensors", "adapter/*", "predictions.parquet",
    }  # fmt: skip
    for path in hub.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"secret" not in content and str(tmp_path).encode() not in content, path


def test_what_went_up_works_as_the_run_does(tmp_path, hub):
    run = run_folder(tmp_path)
    run_publish(run / "model_final.safetensors")
    scorer = open_model(hub.folder / "model_final.safetensors", threads=1)
    assert scorer.classifier.classes == CONFIG.classes
    ours, theirs = (
        read_validation(folder / "predictions.parquet", CONFIG.classes)
        for folder in (run, hub.folder)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.tolist() == other.tolist()
    table = pd.read_parquet(hub.folder / "predictions.parquet")
    assert set(table["split"]) == {"valid"} and len(table) == 2
    card = ModelCard.load(hub.folder / "README.md")
    assert card.data.license == "unknown" and 'load_model("model_final.safetensors")' in card.text
    assert load_model(hub.folder / "model_final.safetensors")[1]["run"] in card.text


def test_a_card_is_made_where_there_is_none_and_otherwise_kept(tmp_path, hub):
    run = run_folder(tmp_path)
    (run / "README.md").unlink()
    run_publish(run / "model_final.safetensors", licence="mit")
    written = (run / "README.md").read_text()
    assert ModelCard(written).data.license == "mit"
    assert (hub.folder / "README.md").read_text() == written
    (run / "README.md").write_text(written + "\nAsk us about it.\n")
    run_publish(run / "model_final.safetensors", licence="cc-by-4.0")
    again = (hub.folder / "README.md").read_text()
    assert again == (run / "README.md").read_text()
    assert again.endswith("Ask us about it.\n") and ModelCard(again).data.license == "cc-by-4.0"


def test_files_of_two_runs_are_not_published(tmp_path, hub):
    run_folder(tmp_path, adapter=True)
    run_folder(tmp_path, run="another")
    with pytest.raises(InputError, match="are of two runs"):
        run_publish(tmp_path / "model_final.safetensors")
    assert not hub.repositories


@pytest.mark.parametrize("status, says", [(401, "token: "), (403, "HF_TOKEN"), (400, "repo_id: ")])
def test_what_the_hub_refuses_is_one_clear_error(tmp_path, monkeypatch, status, says):
    from httpx2 import Request, Response
    from huggingface_hub.errors import HfHubHTTPError

    def refuses(*_, **__):
        response = Response(status, request=Request("POST", "https://huggingface.co/api"))
        raise HfHubHTTPError("refused", response=response, server_message="not for you")

    run_folder(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuses)
    with pytest.raises(InputError, match=says) as caught:
        run_publish(tmp_path / "model_final.safetensors")
    assert "not for you" in str(caught.value)
