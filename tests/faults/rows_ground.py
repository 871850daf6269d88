"""Faults in parameters, whichever command they are given to, and disks that refuse."""

from tests.fake_data import manifest_folder
from tests.faults.fault import Fault


def chips(folder):
    manifest_folder(folder / "data")


def a_file_for_a_folder(folder):
    chips(folder)
    (folder / "taken").write_text("a file")


F = "finetune --data_path data --image_size 28 --head_inputs cls --learning_rates 0.01"

ROWS = [
    Fault("unknown flag", None, "finetune --epoch 3", ("--epoch",)),
    Fault("number out of range", None, "probe --neighbours 0", ("neighbours: ", "'0'")),
    Fault("unknown choice", None, "finetune --method dOra", ("method: ", "'dora'", "'dOra'")),
    Fault("seed too large", None, f"finetune --seed {2**32}", ("seed: ", "2**32")),
    Fault("batch too large", None, f"finetune --batch_size {2**70}", ("batch_size: ",)),
    Fault("NUL in a path", None, ["load_data", "--data_path", "a\0b"], ("data_path: ", "NUL")),
    Fault("path too long", None, f"load_data --data_path {'a' * 5000}", ("data_path: ", "4095")),
    Fault("name too long", None, f"load_data --data_path {'a' * 300}", ("File name too long",)),
    Fault("line break in a name", None, ["load_data", "--data_path", "a\nb"], ("data_path",)),
    Fault("help", None, "finetune --help", ("--epochs int", "{head_only,lora,dora,"), 0),
    Fault(
        "two wrong parameters",
        None,
        "production_benchmarking --batch_sizes 0 --threads x",
        ("batch_sizes: ", "threads: "),
    ),
    Fault(
        "history below a file", a_file_for_a_folder, f"{F} --history_path taken/history", ("taken",)
    ),
    Fault("cache below a file", a_file_for_a_folder, f"{F} --cache_path taken/cache", ("taken",)),
    Fault("output below a file", a_file_for_a_folder, f"{F} --output_path taken/out", ("taken",)),
]
