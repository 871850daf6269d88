"""From data and a backbone to a trained classifier, its history and its test metrics.

`python -m helpers.finetune --data_path ./data/ --output_path ./models/` does it from the shell.
"""

from accelerate import PartialState

from helpers.console import run_command
from helpers.training.config import RunConfig
from helpers.training.methods import train
from helpers.training.runs import save_run, test_table


def main() -> None:
    """Train from the shell and print the test table."""
    config = RunConfig.from_arguments(main.__doc__)
    run = train(config, config.data())
    if not PartialState().is_main_process:
        return
    files = save_run(config, run)
    print(f"\nTest split, {len(run.predictions)} chips, 95 % bootstrap intervals\n")
    print(test_table(run.record).T.to_string())
    print("\nwrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    run_command(main)
