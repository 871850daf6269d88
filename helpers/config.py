"""Parameters, declared once: checked, offered as command-line flags and as notebook parameters."""

import argparse
import ast
import itertools
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from helpers import InputError
from helpers.console import report_cells

MAX_NUMBER = 2**32  # of a seed that NumPy takes; no count here comes near it
MAX_TEXT = 4095  # the longest path that Linux takes, in bytes
_INJECTED = "# Parameters"  # how papermill begins the cell that it adds


class Config(BaseModel):
    """Base of all parameter lists; every field needs a description, with unit and choices."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any, info) -> Any:
        """Let a single value stand for a list of one, as in `papermill -p head_inputs cls`."""
        if _is_list(cls.model_fields[info.field_name].annotation):
            return [value] if isinstance(value, str | int | float) else value
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _is_usable(cls, value: Any) -> Any:
        """Refuse numbers and texts that no parameter can mean, before a library trips over them."""
        for item in value if isinstance(value, tuple) else [value]:
            if isinstance(item, int) and abs(item) >= MAX_NUMBER:
                raise ValueError(f"{item} is 2**32 or more")
            if isinstance(item, str) and ("\0" in item or len(item) > MAX_TEXT):
                raise ValueError(f"holds a NUL character or more than {MAX_TEXT} characters")
        return value

    @classmethod
    def checked(cls, **values) -> Self:
        """Return the configuration, or raise InputError naming every wrong parameter."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = {e["loc"][:1]: e for e in reversed(error.errors())}  # one message a parameter
            raise InputError("; ".join(_problem(cls, e) for e in first.values())) from None

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> Self:
        """Read the parameters out of a notebook's `globals()`.

        papermill only warns of a parameter that the notebook does not have; here it is an error.
        From here on a notebook that runs in batch says what it does (`report_cells`).
        """
        report_cells()
        cells = namespace.get("In", [])
        for offered, injected in itertools.pairwise(cells):
            if injected.startswith(_INJECTED):
                unknown = [n for n in _assigned(injected) if n not in _assigned(offered)]
                if unknown:
                    raise InputError(
                        f"{unknown[0]}: unknown parameter; the notebook's parameters are "
                        f"{', '.join(_assigned(offered))}"
                    )
        return cls.checked(**{n: namespace[n] for n in cls.model_fields if n in namespace})

    @classmethod
    def from_arguments(cls, description: str, arguments: list[str] | None = None) -> Self:
        """Read the parameters from the command line: `--name value`, lists as several values.

        argparse only splits the words; values are checked as everywhere, all at once and each in a
        line. pydantic-settings has no `--bands 3 0`; tyro has, and answers each error with a box.
        """
        parser = _Parser(description=description, allow_abbrev=False, usage="%(prog)s [options]")
        for name, field in cls.model_fields.items():
            options = _options(field.annotation)
            options["help"] = f"{field.description}{_default(field.default)}".replace("%", "%%")
            parser.add_argument(f"--{name}", default=argparse.SUPPRESS, **options)
        return cls.checked(**vars(parser.parse_args(arguments)))


# Where results go below `output_path` unless a parameter says otherwise.
FOLDERS = {
    "history_path": "training_history",
    "figures_path": "figures",
    "results_path": "benchmark_results",
    "cache_path": "cache",
}


class Places(Config):
    """Where results go; a class with such a field offers it, and it is never None in use."""

    output_path: str = Field("runs", description="folder for everything that is made")

    @model_validator(mode="before")
    @classmethod
    def _below_the_output(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Put every folder that is not given below `output_path`."""
        output = values.get("output_path", cls.model_fields["output_path"].default)
        given = {name: value for name, value in values.items() if value is not None}
        missing = [name for name in FOLDERS if name in cls.model_fields and name not in given]
        return values | {name: str(Path(str(output), FOLDERS[name])) for name in missing}


def folder_field(name: str, content: str) -> Any:
    """A field of `Places` for one of its folders, None by default."""
    return Field(None, description=f"folder for {content}; {FOLDERS[name]} below output_path")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, not thirty of usage before it."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"{message}; --help lists the parameters")


def _assigned(cell: str) -> list[str]:
    """Names that a cell of plain assignments sets."""
    statements = ast.parse(cell).body
    targets = [s.targets[0] for s in statements if isinstance(s, ast.Assign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _plain(annotation) -> Any:
    """A type without bounds and without None: int of `PositiveInt | None`."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _plain(next(part for part in get_args(annotation) if part is not NoneType))
    return annotation


def _is_list(annotation) -> bool:
    """Whether a field holds several values: `tuple[int, ...]` or `tuple[int, ...] | None`."""
    return get_origin(_plain(annotation)) is tuple


def _options(annotation) -> dict[str, Any]:
    """What argparse is told of a type: a switch, or one or several values and what they may be."""
    plain = _plain(annotation)
    if plain is bool:
        return {"action": argparse.BooleanOptionalAction}
    value = _plain(get_args(plain)[0]) if _is_list(plain) else plain
    choices = "{" + ",".join(map(str, get_args(value))) + "}"
    shown = choices if get_origin(value) is Literal else value.__name__
    return {"metavar": (shown, ""), "nargs": "+"} if _is_list(plain) else {"metavar": shown}


def _default(value) -> str:
    """A default as one would type it; where it is None, the description says what happens."""
    if value is None:
        return ""
    return f" (default: {' '.join(map(str, value)) if isinstance(value, tuple) else value})"


def _problem(cls: type[Config], error) -> str:
    what = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # of parameters together
        return what
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown parameter; the parameters are {', '.join(cls.model_fields)}"
    if error["type"] == "missing":
        return f"{name}: is needed; --help says what it is"
    given = repr(error["input"])
    return f"{name}: {what} (got {given if len(given) <= 200 else given[:200] + ' ...'})"
