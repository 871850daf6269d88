"""Parameters: the same checks and the same messages from a notebook and from the command line."""

from typing import Literal

import pytest
from pydantic import Field, PositiveInt, ValidationError, model_validator

from helpers.config import Config, Places, folder_field
from tests.models.common import refusal


class Parameters(Config):
    data_path: str = Field("example", description="folder")
    epochs: PositiveInt = Field(100, description="passes")
    method: Literal["head_only", "lora"] = Field("head_only", description="head_only or lora")
    learning_rates: tuple[float, ...] = Field((1e-3,), min_length=1, description="of AdamW")
    bands: tuple[int, ...] | None = Field(None, description="zero-based bands")
    augment: bool = Field(False, description="flips and rotations")
    run_name: str | None = Field(None, description="name of the run's files; 100 % yours")
    save_merged: bool | None = Field(None, description="one merged file; where it is small")
    sizes: tuple[PositiveInt, ...] | None = Field(None, description="pixels")
    kinds: tuple[Literal["a", "b"], ...] = Field(("a", "b"), description="to build")


def notebook(injected="", **values):
    """`globals()` of a notebook whose parameters cell, then papermill's, have run."""
    cells = ["", "import helpers", "epochs = 100\nbands = None\nmethod = 'head_only'"]
    if injected:
        cells.append(f"# Parameters\n{injected}")
        exec(injected, values)
    return {"In": [*cells, "RunConfig.from_notebook(globals())"], "numpy": object(), **values}


WRONG_VALUES = {
    "epochs": ["many", 0, -1, 2.5, None, [3]],
    "method": ["dora", "", 3],
    "learning_rates": [[], "fast", [0.1, "fast"], None, float("nan"), [float("inf")]],
    "bands": ["red", [0.5]],
    "augment": ["maybe", 7],
    "data_path": [3, None],
    "run_name": [["a"], "a\0b", "a" * 5000],
    "sizes": [2**70, [1, 2**32]],
}


# --- From code -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in WRONG_VALUES.items() for value in values]
)
def test_a_wrong_value_names_its_parameter_and_shows_itself(name, value):
    message = refusal(Parameters.checked, **{name: value})
    assert message.startswith(f"{name}: ")
    assert "(got " in message


def test_the_choices_stand_in_the_message():
    assert refusal(Parameters.checked, method="dora") == (
        "method: Input should be 'head_only' or 'lora' (got 'dora')"
    )


def test_an_unknown_parameter_lists_the_known_ones():
    assert refusal(Parameters.checked, epoch=3) == (
        "epoch: unknown parameter; the parameters are data_path, epochs, method, learning_rates, "
        "bands, augment, run_name, save_merged, sizes, kinds"
    )


def test_all_wrong_parameters_are_named_at_once_and_each_once():
    message = refusal(Parameters.checked, epochs=0, learning_rates=["a", "b"], foo=1)
    assert [part.split(":")[0] for part in message.split("; ") if ": " in part] == [
        "foo",
        "learning_rates",
        "epochs",
    ]


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("learning_rates", 0.01, (0.01,)),
        ("learning_rates", 1, (1.0,)),
        ("learning_rates", [0.1, 0.2], (0.1, 0.2)),
        ("bands", 3, (3,)),
        ("bands", "3", (3,)),
        ("bands", None, None),
        ("run_name", "a", "a"),
    ],
)
def test_one_value_stands_for_a_list_of_one(name, value, expected):
    assert getattr(Parameters.checked(**{name: value}), name) == expected


class Bounds(Config):
    low: int = Field(0, description="lower")
    high: int = Field(1, description="upper")

    @model_validator(mode="after")
    def _in_order(self):
        if self.low > self.high:
            raise ValueError("low: lies above high")
        return self


def test_parameters_that_do_not_go_together_are_one_clear_error():
    assert refusal(Bounds.checked, low=2) == "low: lies above high"


def test_parameters_do_not_change_afterwards():
    with pytest.raises(ValidationError):
        Parameters.checked().epochs = 3


# --- From a notebook -----------------------------------------------------------------------------


def test_a_notebook_gives_its_names_and_nothing_else():
    config = Parameters.from_notebook(notebook(epochs=3, learning_rates=[0.1], model="other"))
    assert config == Parameters.checked(epochs=3, learning_rates=(0.1,))


def test_a_notebook_with_parameters_of_papermill():
    config = Parameters.from_notebook(notebook('epochs = 3\nbands = [3, 0]\nmethod = "lora"\n'))
    assert config == Parameters.checked(epochs=3, bands=(3, 0), method="lora")


def test_a_parameter_that_the_notebook_does_not_have_is_refused():
    message = refusal(Parameters.from_notebook, notebook("epochs = 3\nfoo = 1\n"))
    assert message.startswith("foo: unknown parameter; the notebook's parameters are ")
    assert "epochs: " not in message


def test_a_wrong_value_from_papermill():
    message = refusal(Parameters.from_notebook, notebook('epochs = "ten"\n'))
    assert message.startswith("epochs: ") and message.endswith("(got 'ten')")


def test_only_papermills_cell_is_searched_for_names():
    config = Parameters.from_notebook({"In": ["", "foo = 1"], "foo": 1, "epochs": 4})
    assert config == Parameters.checked(epochs=4)


def test_names_outside_jupyter():
    assert Parameters.from_notebook({"epochs": 4}).epochs == 4


# --- From the command line -----------------------------------------------------------------------


def test_the_command_line_gives_the_same():
    arguments = ["--epochs", "3", "--bands", "3", "0", "--augment", "--method", "lora"]
    assert Parameters.from_arguments("Train.", arguments) == Parameters.checked(
        epochs=3, bands=(3, 0), augment=True, method="lora"
    )
    assert Parameters.from_arguments("Train.", []) == Parameters.checked()
    assert not Parameters.from_arguments("Train.", ["--no-augment"]).augment


@pytest.mark.parametrize(
    "arguments",
    [["--foo", "1"], ["--epoch", "3"], ["--learning_rate", "0.1"], ["--epochs"], ["stray"]],
)
def test_unknown_and_abbreviated_flags_are_refused(arguments):
    message = refusal(Parameters.from_arguments, "Train.", arguments)
    assert arguments[0] in message and message.endswith("--help lists the parameters")


@pytest.mark.parametrize(
    "arguments, name",
    [
        (["--epochs", "ten"], "epochs"),
        (["--epochs", "0"], "epochs"),
        (["--bands", "0", "red"], "bands"),
        (["--method", "dora"], "method"),
        (["--learning_rates", "nan"], "learning_rates"),
    ],
)
def test_a_wrong_value_on_the_command_line_names_its_parameter(arguments, name):
    message = refusal(Parameters.from_arguments, "Train.", arguments)
    assert message.startswith(f"{name}: ") and f"(got '{arguments[-1]}')" in message


def test_help_shows_every_parameter_with_type_choices_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        Parameters.from_arguments("Train.", ["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for shown in (
        "--data_path str folder (default: example)",
        "--epochs int passes (default: 100)",
        "--method {head_only,lora} head_only or lora (default: head_only)",
        "--learning_rates float [ ...] of AdamW (default: 0.001)",
        "--bands int [ ...] zero-based bands",
        "--augment, --no-augment flips and rotations (default: False)",
        "--run_name str name of the run's files; 100 % yours",
        "--save_merged, --no-save_merged one merged file; where it is small",
        "--sizes int [ ...] pixels",
        "--kinds {a,b} [ ...] to build (default: a b)",
    ):
        assert shown in text


def test_a_switch_may_be_left_open():
    assert Parameters.from_arguments("Train.", []).save_merged is None
    assert Parameters.from_arguments("Train.", ["--no-save_merged"]).save_merged is False


def test_a_long_value_is_shown_shortened():
    message = refusal(Parameters.checked, data_path="a" * 5000)
    assert len(message) < 400 and message.startswith("data_path: holds a NUL character or more")


class Made(Places):
    history_path: str | None = folder_field("history_path", "histories")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("runs", "runs/training_history")),
        ({"output_path": "mine"}, ("mine", "mine/training_history")),
        ({"output_path": "mine", "history_path": None}, ("mine", "mine/training_history")),
        ({"history_path": "there"}, ("runs", "there")),
    ],
)
def test_folders_lie_below_the_output_unless_they_are_given(given, expected):
    made = Made.checked(**given)
    assert (made.output_path, made.history_path) == expected
