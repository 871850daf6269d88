"""From data and a backbone to a trained classifier, its history and its test metrics.

`python -m helpers.finetune --data_path ./data/ --output_path ./models/` does it from the shell.
"""

from helpers import InputError
from helpers.console import run_command
from helpers.data.dataset import DataConfig
from helpers.evaluation.baselines import baselines
from helpers.training.config import RunConfig
from helpers.training.jobs import finished
from helpers.training.processes import processes
from helpers.training.runs import saved_files, test_table


def main() -> None:
    """Train from the shell and print the test table."""
    config = RunConfig.from_arguments(main.__doc__)
    data = DataConfig.data(config)
    run, was_read = finished(config, config.share(data))
    if not processes(config.torch_device).is_main_process:
        return
    entries = baselines(config, data)["test"] | {config.label: run.record["test"]}
    chips = run.record["chips"]["test"]
    print(f"\nTest split, {chips} chips, 95 % bootstrap intervals\n")
    print(test_table(entries).to_string())
    print(f"\n{'read' if was_read else 'wrote'} " + ", ".join(map(str, saved_files(config))))
    if run.record["failure"]:
        raise InputError(f"{config.name}: {run.record['failure']}; lower the learning rate")


if __name__ == "__main__":
    run_command(main)
