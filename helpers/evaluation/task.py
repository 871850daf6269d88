"""What is asked of one task, from its configuration file to the plan of its runs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from helpers import InputError
from helpers.config import Config
from helpers.console import one_line
from helpers.training.config import RunConfig

REFERENCE = "head_only"  # the row that every other one is compared with


class MethodRow(Config):
    """How one row of the table is trained."""

    method: str = Field(description="head_only, or another method of a run")
    learning_rates: tuple[PositiveFloat, ...] = Field(
        min_length=3, description="grid that is tried with the first seed"
    )
    seeds: PositiveInt | None = Field(
        None, description="how many of the task's seeds it gets, all by default"
    )
    changes: dict[str, Any] = Field({}, description="other parameters of its runs")


class Shape(Config):
    """A row with other ranks, layers or blocks, trained with the learning rate of that row."""

    of: str = Field(description="the row of `methods` that it changes")
    method: str | None = Field(None, description="that of the row by default")
    changes: dict[str, Any] = Field({}, description="parameters beside those of the row")
    seeds: PositiveInt = Field(3, description="how many of the task's seeds it gets")


class Task(Config):
    """What `evidence/<task>.yaml` says."""

    name: str = Field(description="of the file")
    title: str = Field(description="what is told apart, in a few words")
    seen: bool = Field(description="whether the backbone has seen training chips, unlabelled")
    seen_note: str = Field(description="what it has seen, in words")
    citation: str = Field(description="of the data")
    licence: str = Field(description="of the data")
    training: dict[str, Any] = Field(description="parameters of every run")
    methods: dict[str, MethodRow] = Field(description="rows of the table")
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1, description="the first one tunes")
    fractions: tuple[float, ...] = Field((), description="smaller shares of the training chips")
    fraction_methods: tuple[str, ...] = Field((), description="rows trained on those")
    random_split_methods: tuple[str, ...] = Field(
        (), description="rows trained once more on splits that mix places"
    )
    shapes: dict[str, Shape] = Field({}, description="ranks and layers, a table of their own")
    match_acquisition: bool = Field(
        False, description="also test on pairs whose acquisition is alike"
    )

    @model_validator(mode="after")
    def _rows_agree(self) -> Self:
        if REFERENCE not in self.methods:
            raise ValueError(f"there is no row {REFERENCE}, which the others are compared with")
        if len({len(row.learning_rates) for row in self.methods.values()}) > 1:
            raise ValueError("every method gets equally many learning rates")
        changed = [shape.of for shape in self.shapes.values()]
        for name in (*self.fraction_methods, *self.random_split_methods, *changed):
            if name not in self.methods:
                raise ValueError(f"there is no row {name} in methods")
        if both := self.methods.keys() & self.shapes.keys():
            raise ValueError(f"{', '.join(sorted(both))} stands in methods and in shapes")
        if self.fractions and REFERENCE not in self.fraction_methods:
            raise ValueError(f"fraction_methods need {REFERENCE}")
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a task's file.

        Raises:
            InputError: it is no YAML file with these fields.
        """
        try:
            values = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{path}: is not a readable YAML file ({one_line(error)})") from error
        if not isinstance(values, dict):
            raise InputError(f"{path}: holds no parameters; see the other files of its folder")
        try:
            return cls.model_validate(values | {"name": path.stem})
        except ValidationError as error:
            wrong = [
                ".".join([*map(str, problem["loc"])]) + f": {problem['msg']}"
                for problem in error.errors()
            ]
            raise InputError(f"{path}: {'; '.join(wrong).removeprefix(': ')}") from None

    @property
    def data_path(self) -> str:
        """Where the chips are looked for."""
        return str(self.training.get("data_path", "example"))

    @property
    def missing(self) -> str | None:
        """The path of the chips, or of weights, that is not there; None where all are."""
        rows = [*self.methods.values(), *self.shapes.values()]
        parameters = [self.training, *(row.changes for row in rows)]
        places = [self.data_path, *(p["weights"] for p in parameters if "weights" in p)]
        words = ("example", "pretrained", "random")
        return next((p for p in places if p not in words and not Path(p).exists()), None)

    def row(self, name: str) -> MethodRow:
        """How a row of `methods`, or of `shapes`, is trained."""
        if name in self.methods:
            return self.methods[name]
        shape = self.shapes[name]
        row = self.methods[shape.of]
        changes = {"method": shape.method or row.method, "changes": row.changes | shape.changes}
        return row.model_copy(update=changes | {"seeds": shape.seeds})

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """The seeds of a row or shape."""
        return self.seeds[: self.row(name).seeds]


@dataclass(frozen=True)
class Trial:
    """One run: a row or a shape, its seed and learning rate, and what it is trained on.

    `rate` is None in a plan, until the row's learning rate is chosen.
    """

    method: str
    seed: int
    rate: float | None = None
    fraction: float = 1.0
    random_split: bool = False

    @property
    def name(self) -> str:
        """Name of the run's files."""
        share = f"_fraction{self.fraction:g}" if self.fraction < 1 else ""
        mixed = "_random_split" if self.random_split else ""
        return f"{self.method}_lr{self.rate:g}_seed{self.seed}{share}{mixed}"


def grid(task: Task) -> list[Trial]:
    """The trials of every row's learning rates, with the first seed."""
    return [
        Trial(method, task.seeds[0], rate)
        for method, row in task.methods.items()
        for rate in sorted(row.learning_rates)
    ]


def planned(task: Task) -> dict[str, list[Trial]]:
    """What is trained once the learning rates are chosen, in stages, without those rates.

    First a stage for every method, by its name, whose learning rate is chosen before.
    """
    return {
        **{method: _planned_of(task, method) for method in task.methods},
        "ranks and layers": [
            Trial(name, seed) for name in task.shapes for seed in task.seeds_of(name)
        ],
    }


def _planned_of(task: Task, method: str) -> list[Trial]:
    """The other seeds of a method, then shares of the training chips and splits that mix places."""
    seeds = task.seeds_of(method)
    shares = task.fractions if method in task.fraction_methods else ()
    mixed = method in task.random_split_methods
    return [
        *(Trial(method, seed) for seed in seeds[1:]),
        *(Trial(method, seed, fraction=share) for share in shares for seed in seeds),
        *(Trial(method, seed, random_split=True) for seed in seeds if mixed),
    ]


def run_config(task: Task, trial: Trial, folder: Path) -> RunConfig:
    """Parameters of a run, everything below a folder.

    Raises:
        InputError: one is wrong.
    """
    row = task.row(trial.method)
    rate = trial.rate or row.learning_rates[0]
    values = task.training | row.changes
    share = task.training.get("train_fraction", 1) * trial.fraction
    values |= {"method": row.method, "seed": trial.seed, "train_fraction": share}
    values |= {"output_path": str(folder), "run_name": replace(trial, rate=rate).name}
    values |= {"resume": True, "save_merged": False, "learning_rate": rate}
    if row.method == "head_only":  # one head a run: as many trials as the other methods have
        fields = RunConfig.model_fields
        head = {n: values.get(n, fields[n].default) for n in ("head_input", "weight_decay")}
        values |= {
            "head_inputs": (head["head_input"],),
            "weight_decays": (head["weight_decay"],),
            "learning_rates": (values.pop("learning_rate"),),
        }
    try:
        return RunConfig.checked(**values)
    except InputError as error:
        raise InputError(f"{task.name}, {trial.method}: {error}") from None
