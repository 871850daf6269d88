"""Put a run on the Hugging Face Hub: `python -m helpers.publish --model_path M --repo_id R`."""

import tempfile
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from httpx2 import HTTPError
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from pydantic import Field
from yaml import YAMLError

from helpers import InputError
from helpers.config import Config
from helpers.console import run_command
from helpers.evaluation.calibration import read_validation
from helpers.models.files import PREDICTIONS, load_model
from helpers.records import written_whole
from helpers.training.card import CARD, shareable, write_card
from helpers.training.runs import ADAPTER, WEIGHTS

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "classifier.json")
_TOKEN = "log in with `hf auth login`, or set HF_TOKEN"


class PublishConfig(Config):
    """What goes to the hub, and where."""

    model_path: str = Field(
        description="the model_final.safetensors or the adapter folder of a run; both go up"
    )
    repo_id: str = Field(description="repository on the hub: <user or organisation>/<name>")
    licence: str | None = Field(
        None, description="of the classifier, in the hub's words (mit, cc-by-4.0); into its card"
    )


def publish(config: PublishConfig) -> str:
    """Upload what others need of a run; return its address.

    That is the card, the weights, the adapter, and of the predictions those of the validation
    split without file and place names, which `--error_rate` and `--threshold` are found on. A
    checkpoint, variants and whatever else lies in the folder stay here, as do the test split's
    predictions and all names of chips: the licence of the data is not known. A repository that is
    not there yet is made, private; weights of another run in it are replaced.

    Raises:
        InputError: as `load_model` and `read_validation`; files of two runs, a card that cannot be
            read, a name that the hub does not allow, no network, or no permission.
    """
    _check_name(config.repo_id)
    path = Path(config.model_path)
    record = _checked_record(path)
    if not (path.parent / CARD).is_file():
        try:
            write_card(path.parent, shareable(record), path.name)
        except KeyError as error:
            raise InputError(
                f"{path}: its provenance lacks {error}; publish a trained run"
            ) from error
    if config.licence:
        _give_licence(path.parent / CARD, config.licence)
    with tempfile.TemporaryDirectory() as folder:
        _gather(path.parent, Path(folder), record["classifier"]["classes"])
        return _upload(Path(folder), config.repo_id, record["run"])


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"repo_id: {error}") from error
    if "/" not in repo_id:
        raise InputError(f"repo_id: {repo_id!r} names no owner; give <user or organisation>/<name>")


def _checked_record(path: Path) -> dict:
    """Provenance and classifier of a run whose files can all be loaded and belong together."""
    classifier, record, _ = load_model(path)
    if path.name not in (WEIGHTS, ADAPTER):
        raise InputError(f"model_path: {path} is neither {WEIGHTS} nor {ADAPTER}/ of a run")
    other = path.with_name(ADAPTER if path.name == WEIGHTS else WEIGHTS)
    if other.exists() and load_model(other)[1] != record:
        raise InputError(f"{path} and {other} are of two runs; train the run again")
    return record | {"classifier": asdict(classifier.config)}


def _give_licence(path: Path, licence: str) -> None:
    """Write a licence into the metadata of a card."""
    try:
        card = ModelCard.load(path)
    except (ValueError, YAMLError) as error:
        raise InputError(f"{path}: its metadata cannot be read ({error}); mend it") from error
    card.data.license = licence
    with written_whole(path) as part:
        part.write_text(card.content)


def _gather(run: Path, folder: Path, classes: tuple[str, ...]) -> None:
    """Put what goes up into an empty folder: links, and a table without names of chips."""
    (folder / ADAPTER).mkdir()
    for name in (CARD, WEIGHTS, *(f"{ADAPTER}/{file}" for file in _ADAPTER_FILES)):
        if (run / name).is_file():
            (folder / name).symlink_to((run / name).resolve())
    if read_validation(run / PREDICTIONS, classes) is not None:
        columns = ["split", "label", "target", *(f"p_{name}" for name in classes)]
        table = pd.read_parquet(run / PREDICTIONS, columns=columns)
        table[table["split"] == "valid"].to_parquet(folder / PREDICTIONS, index=False)


def _upload(folder: Path, repo_id: str, run: str) -> str:
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=f"Run {run}",
            delete_patterns=[WEIGHTS, f"{ADAPTER}/*", PREDICTIONS],
        )
    except LocalTokenNotFoundError as error:
        raise InputError(f"token: the hub asks for one; {_TOKEN}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        what = error.server_message or f"status {status}"
        if status in (401, 403):
            raise InputError(
                f"token: not allowed to write to {repo_id} ({what}); {_TOKEN}"
            ) from error
        raise InputError(f"repo_id: the hub refuses {repo_id} ({what}); try another") from error
    except (HTTPError, ConnectionError) as error:
        raise InputError(
            f"network: {api.endpoint} cannot be reached ({str(error).splitlines()[0]}); publish "
            "again with a network, and without HF_HUB_OFFLINE"
        ) from error
    return str(url)


def main() -> None:
    """Upload a run to the Hugging Face Hub."""
    url = publish(PublishConfig.from_arguments(main.__doc__))
    print(f"published at {url}; a new repository is private until its settings say otherwise")


if __name__ == "__main__":
    run_command(main)
