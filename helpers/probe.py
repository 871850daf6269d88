"""How good are frozen features? kNN and logistic regression on them: DINOv2's own yardsticks.

`python -m helpers.probe --data_path ./data/ --backbone dinov2_vits14` prints the table.
"""

from helpers.console import run_command
from helpers.data.report import data_warnings
from helpers.evaluation.baselines import ProbeConfig, probe
from helpers.training.processes import processes, said_once


def main() -> None:
    """Probe the frozen features of a backbone on a data set."""
    config = ProbeConfig.from_arguments(main.__doc__)
    data = config.data()
    report = said_once(print, processes(config.run().torch_device))
    for warning in data_warnings(data):
        report(warning)
    report(probe(config, data).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    run_command(main)
