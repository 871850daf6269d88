"""Train what the evidence on each task needs, and keep its record: `make evidence`.

Every task is one file of `evidence/`; its chips are put by hand where the file says. Runs that are
finished are read, so that it may be stopped at any moment and started again.
"""

import argparse
from pathlib import Path

from helpers import InputError
from helpers.console import run_command
from helpers.evaluation.evidence import Collection
from helpers.evaluation.evidence_records import PUBLISHED, gather
from helpers.evaluation.task import Task
from helpers.records import ROOT


def main() -> None:
    """Collect the evidence on the tasks that are named, or on all whose data is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", help="names of files in the folder; all by default")
    parser.add_argument("--folder", type=Path, default=ROOT / "evidence", help="of the tasks")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"), help="for the runs")
    parser.add_argument("--records", type=Path, default=PUBLISHED, help="for what is kept")
    arguments = parser.parse_args()
    names = arguments.tasks or sorted(path.stem for path in arguments.folder.glob("*.yaml"))
    tasks = [Task.read(arguments.folder / f"{name}.yaml") for name in names]
    missing = [task for task in tasks if task.missing]
    for task in missing:
        said = f"{task.name}: there is no {task.missing}; the task's file says where it comes from"
        if arguments.tasks:
            raise InputError(said)
        print(f"{said}; left out", flush=True)
    collections = [
        Collection(task, arguments.output, lambda line: print(line, flush=True))
        for task in tasks
        if task not in missing
    ]
    for collection in collections:
        collection.announce()
    for collection in collections:
        collection.collect(lambda done: gather(done, arguments.records))
        print(f"{collection.task.name}: wrote {arguments.records / collection.task.name}.json")


if __name__ == "__main__":
    run_command(main)
