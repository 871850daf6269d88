"""The published data sets: their records, read once, and what is computed from them."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from papermill.iorw import read_yaml_file

from helpers.evaluation import comparison
from helpers.evaluation.baselines import read_baselines
from helpers.evaluation.seeds import Draws, draws_of, method_means
from helpers.records import ROOT
from helpers.reporting import answers
from helpers.training.runs import Run

DEPLOYED = "Which form should be deployed?"


@dataclass(frozen=True)
class Published:
    """What is published of one data set.

    Args:
        folder: holds `training_history`, `figures`, `benchmark_results` and the notebooks, relative
            to the project's folder.
        parameters: that finetune_lora.ipynb was run with.
        benchmark: name of the benchmark's results.
    """

    folder: Path
    parameters: dict
    benchmark: str

    @cached_property
    def config(self) -> comparison.CompareConfig:
        """Parameters of the comparison."""
        places = {
            "history_path": str(ROOT / self.folder / "training_history"),
            "output_path": str(ROOT / self.folder / "no_weights"),
        }
        return comparison.CompareConfig.checked(**self.parameters | places)

    @cached_property
    def all_runs(self) -> dict[str, Run]:
        """Every run of the comparison, by name."""
        return comparison.read_runs(self.config)

    @cached_property
    def runs(self) -> dict[tuple[str, int], Run]:
        """The main runs, by method and seed."""
        return comparison.main_runs(self.all_runs, self.config)

    @cached_property
    def draws(self) -> dict[tuple[str, int], Draws]:
        """Bootstrap draws of the test metrics of the main runs."""
        return draws_of(self.runs)

    @cached_property
    def means(self) -> pd.DataFrame:
        """Test accuracy and AUROC of every method, over its seeds."""
        return method_means(self.runs, self.draws, ("accuracy", "auroc"))

    @cached_property
    def baselines(self) -> dict[str, dict]:
        """What knows no shapes, by name."""
        return read_baselines(self.config)["test"]

    def table(self, name: str) -> pd.DataFrame:
        """One of the committed tables, by its path below the folder."""
        return pd.read_csv(ROOT / self.folder / name)

    @cached_property
    def served(self) -> tuple[pd.DataFrame, str]:
        """`served` of the data set's benchmark."""
        return served(self.folder / "benchmark_results" / self.benchmark)

    @cached_property
    def answers(self) -> dict[str, str]:
        """Question -> answer, from the records."""
        shortcuts = self.table("figures/lora_shortcuts.csv")
        by_blocks = comparison.block_runs(self.all_runs, self.config)
        said = answers.comparison_answers(self.config, self.runs, self.draws, shortcuts, by_blocks)
        return said | {DEPLOYED: answers.form_answer(*self.served)}


def served(benchmark: Path) -> tuple[pd.DataFrame, str]:
    """A benchmark's summary by variant, and the variant that it says to deploy.

    From the path of its results without their suffix, relative to the project's folder.
    """
    path = ROOT / benchmark
    record = json.loads(path.with_name(f"{path.name}.json").read_text())
    return pd.read_csv(f"{path}.csv").set_index("variant"), record["decision"]["recommended"]


def published() -> dict[str, Published]:
    """The published data sets by name."""
    harvey = Path("reports/hurricane_harvey")
    parameters = read_yaml_file(str(ROOT / harvey / "parameters.yaml"))
    benchmarked = Path(parameters["benchmark"]["model_path"]).parent.name
    return {
        "hurricane_harvey": Published(
            harvey, parameters["finetune_lora"], f"benchmark_{benchmarked}"
        ),
        "example": Published(Path(), {}, "benchmark_head_only_example_example_seed0"),
    }
