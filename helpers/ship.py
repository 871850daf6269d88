"""Ship a variant: `python -m helpers.ship --model_path VARIANT.json --output FOLDER`."""

from helpers.console import run_command
from helpers.deployment.shipping import ShipConfig, ship


def main() -> None:
    """Write a variant that the benchmark built as a folder that runs without this project."""
    folder = ship(ShipConfig.from_arguments(main.__doc__))
    print(f"wrote {folder}: " + ", ".join(sorted(file.name for file in folder.iterdir())))


if __name__ == "__main__":
    run_command(main)
