"""Faults in how a run is put on the hub."""

from httpx2 import ConnectError

from tests.fake_run import run_folder
from tests.faults.fault import Fault
from tests.faults.rows_predict import model

PUBLISH = "publish --model_path model_final.safetensors --repo_id somebody/trees"


def unreachable(*_, **__):
    raise ConnectError("Name or service not known")


def renamed(folder):
    run_folder(folder)
    (folder / "model_final.safetensors").rename(folder / "model.safetensors")


def with_card(text):
    def make(folder):
        run_folder(folder)
        (folder / "README.md").write_text(text)

    return make


def minimal(folder):
    model(folder)
    (folder / "model.safetensors").rename(folder / "model_final.safetensors")


ROWS = [
    Fault("publish without parameters", None, "publish", ("model_path: is needed", "repo_id")),
    Fault("publish no model", None, PUBLISH, ("model_path: no such file",)),
    Fault(
        "publish under a name with a space",
        run_folder,
        ["publish", *PUBLISH.split()[1:4], "some body/trees"],
        ("repo_id: ", "some body/trees"),
    ),
    Fault(
        "publish under a name without an owner",
        run_folder,
        PUBLISH.replace("somebody/", ""),
        ("repo_id: 'trees' names no owner",),
    ),
    Fault(
        "publish under a web address",
        run_folder,
        PUBLISH.replace("somebody/", "https://huggingface.co/somebody/"),
        ("repo_id: ",),
    ),
    Fault(
        "publish a file of another name",
        renamed,
        PUBLISH.replace("model_final", "model"),
        ("model_path: model.safetensors is neither",),
    ),
    Fault("publish a model without test metrics", minimal, PUBLISH, ("provenance lacks 'leaks'",)),
    Fault(
        "publish without a network",
        run_folder,
        PUBLISH,
        ("network: ", "cannot be reached", "Name or service not known"),
        patch=("huggingface_hub.HfApi.create_repo", unreachable),
    ),
    Fault(
        "publish where the hub is switched off",
        run_folder,
        PUBLISH,
        ("network: ", "cannot be reached", "HF_HUB_OFFLINE"),
        patch=("huggingface_hub.constants.HF_HUB_OFFLINE", True),
    ),
    Fault(
        "publish with a card that is none",
        with_card("---\nlicense: [mit\n---\nmine\n"),
        f"{PUBLISH} --licence mit",
        ("README.md: its metadata cannot be read",),
    ),
]
