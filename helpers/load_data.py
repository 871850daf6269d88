"""Check a data set and print its report: `python -m helpers.load_data --data_path ./data/`."""

from helpers.console import run_command
from helpers.data.dataset import DataConfig
from helpers.data.report import data_report


def main() -> None:
    """Print the report on a data set."""
    print(data_report(DataConfig.from_arguments(main.__doc__).data()))


if __name__ == "__main__":
    run_command(main)
