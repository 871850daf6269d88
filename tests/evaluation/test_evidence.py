"""The evidence on a task: its plan, its learning rates, going on, and what is kept of it."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml

from helpers import InputError
from helpers.evaluation import evidence, evidence_records
from helpers.evaluation.matching import imbalance, matched_pairs
from helpers.evaluation.task import Task, Trial, grid, planned, run_config
from helpers.records import ROOT
from helpers.training import jobs
from helpers.training.methods import train
from helpers.training.runs import Run, save_run
from tests.evidence_numbers import check_numbers
from tests.fake_data import manifest_rows
from tests.models.common import refusal
from tools import evidence as command

TASK = {
    "title": "bright noise or dark",
    "seen": False,
    "seen_note": "nothing of it",
    "citation": "made here",
    "licence": "none",
    "training": {"image_size": 28, "epochs": 2, "patience": 2, "batch_size": 16, "device": "cpu"},
    "methods": {
        "head_only": {"method": "head_only", "learning_rates": [0.01, 0.03, 0.1]},
        "lora_last1": {
            "method": "lora",
            "learning_rates": [0.0003, 0.001, 0.003],
            "changes": {"adapted_blocks": 1},
            "seeds": 1,
        },
    },
    "seeds": [0, 1],
    "fractions": [0.5],
    "fraction_methods": ["head_only", "lora_last1"],
    "random_split_methods": ["head_only"],
    "shapes": {"rank1": {"of": "lora_last1", "changes": {"lora_rank": 1}, "seeds": 1}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise that is hard to tell apart, in six places a split."""
    folder = tmp_path_factory.mktemp("evidence")
    rows = manifest_rows(folder / "noise", counts={"train": 12, "valid": 6, "test": 12})
    rows["group"] = rows.split + "_" + (rows.groupby("split").cumcount() % 6).astype(str)
    rows = rows.assign(longitude=rows.groupby("split").cumcount() / 10.0, latitude=30.0)
    rows.to_csv(folder / "noise" / "manifest.csv", index=False)
    return folder


def task_of(folder, **changes):
    training = TASK["training"] | {"data_path": str(folder / "noise")}
    return Task.checked(**TASK | {"name": "noise", "training": training} | changes)


@pytest.fixture(scope="module")
def in_this_process():
    """Runs of other processes train here: to start one takes seconds."""

    def alone(config, data, report):
        save_run(config, jobs.train(config, data, report))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "train_alone", alone)
        patch.setattr(jobs, "in_processes", jobs.one_by_one)
        yield


def collected(task, folder, name):
    """What a collection says and leaves behind."""
    lines = []
    collection = evidence.Collection(task, folder / "runs", lines.append)
    collection.announce()
    collection.collect(lambda done: evidence_records.gather(done, folder / name))
    return lines, evidence_records.read_evidence("noise", folder / name)


@pytest.fixture(scope="module")
def stopped_once(folder, in_this_process):
    """What a collection leaves that was stopped in its eleventh training and went on."""
    task, count = task_of(folder), itertools.count(1)

    def stopped(*arguments, **options):
        if next(count) == 11:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            collected(task, folder, "records")
    record = evidence_records.read_evidence("noise", folder / "records").record
    assert {run["method"] for run in record["runs"]} == {"head_only"} == set(record["choices"])
    return collected(task, folder, "records")


def test_it_goes_on_where_it_was_stopped(stopped_once):
    lines, found = stopped_once
    before = [line.split()[1] for line in lines if "finished before" in line]
    assert len(before) == 10
    assert lines[0].startswith("noise: 13 runs planned on 24 training, 12 validation and 24 test")
    assert lines[0].endswith("on this machine, less what is finished already")
    done = sum(line.startswith("[") for line in lines)
    assert lines[-1].startswith(f"[{done}/{done}] rank1_") and done >= 13
    assert {entry["run"] + ":" for entry in found.record["runs"]} & set(before)


def test_every_number_of_the_record_comes_from_the_predictions(stopped_once):
    found = stopped_once[1]
    check_numbers(found)
    entry = found.record["runs"][0]
    entry["test"]["auroc"]["value"] += 0.01
    with pytest.raises(AssertionError):
        check_numbers(found)
    entry["test"]["auroc"]["value"] -= 0.01


def test_the_record_holds_every_planned_run_and_the_chosen_rates(stopped_once):
    record = stopped_once[1].record
    rates = {method: choice["rate"] for method, choice in record["choices"].items()}
    for run in record["runs"]:
        assert run["learning_rate"] == rates[run["method"]]
    chosen = [(t["method"], t["learning_rate"]) for t in record["trials"] if t["chosen"]]
    assert dict(chosen) == rates and len(chosen) == len(rates)
    for method, rate in rates.items():
        losses = {
            t["learning_rate"]: t["valid_loss"] for t in record["trials"] if t["method"] == method
        }
        assert min(losses, key=losses.get) == rate and len(losses) >= 3
    kinds = [(r["method"], r["train_fraction"], r["random_split"]) for r in record["runs"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        ("head_only", 1.0, False): 2, ("lora_last1", 1.0, False): 1,
        ("head_only", 0.5, False): 2, ("lora_last1", 0.5, False): 1, ("head_only", 1.0, True): 2,
    }  # fmt: skip
    assert record["missing"] == 0
    measured = [run["run"] for run in record["runs"] if run["memory_bytes"]]
    assert [name.split("_lr")[0] for name in measured] == ["head_only", "lora_last1"]
    assert {run["train_chips"] for run in record["runs"]} == {12, 24}


def test_shapes_take_the_rate_of_their_row_and_stay_out_of_its_table(stopped_once):
    record = stopped_once[1].record
    (run,) = record["shapes"]
    (row,) = [r for r in record["runs"] if r["method"] == "lora_last1" and r["train_fraction"] == 1]
    assert (run["method"], run["rank"], run["k"], row["rank"]) == ("rank1", 1, 1, 4)
    assert run["learning_rate"] == row["learning_rate"] == record["choices"]["lora_last1"]["rate"]
    assert run["trained_parameters"] < row["trained_parameters"] and run["memory_bytes"]
    summary = record["summary"]
    (gain,) = summary["shape_gains"]
    assert (gain["first"], gain["second"], gain["metric"]) == ("lora_last1", "rank1", "auroc")
    aurocs = [entry["test"]["auroc"]["value"] for entry in (run, row)]
    assert gain["value"] == pytest.approx(aurocs[0] - aurocs[1], abs=5e-6)
    assert [r["metric"] for r in summary["shapes"]] == ["accuracy", "auroc"]
    for name in ("means", "gains", "validation", "where"):
        assert not any("rank1" in one.values() for one in summary[name]), name


def test_a_training_takes_its_frozen_part_and_its_epochs():
    history = pd.DataFrame({"seconds": [2.0, 3.0]})
    chips = {"chips": {"train": 30, "valid": 10, "test": 5}}
    records = ({"tokens": None}, {"tokens": {"seconds": 4.0}}, chips | {"features_per_second": 8})
    runs = [Run(None, None, history, pd.DataFrame(), record) for record in records]
    assert [evidence_records.training_seconds(run) for run in runs] == [5, 9, 10]


def test_the_summary_has_a_row_for_every_question(stopped_once):
    summary = stopped_once[1].record["summary"]
    assert {row["unit"] for row in summary["means"]} == {"places"}
    shares = [(row["fraction"], row["train_chips"], row["second"]) for row in summary["shares"]]
    assert shares == [(0.5, 12, "lora_last1"), (1.0, 24, "lora_last1")]
    (mixed,) = summary["random_split"]
    assert mixed["value"] == pytest.approx(mixed["mixed_value"] - mixed["held_out_value"], abs=5e-6)
    assert len(summary["where"]) == 2 * 6 and sum(r["chips"] for r in summary["where"]) == 2 * 24
    assert summary["matched"] == []


def test_a_random_split_mixes_places_and_keeps_the_counts(folder):
    data = evidence.DataConfig.checked(data_path=str(folder / "noise")).data()
    mixed, other, same = (evidence.random_split(data, seed) for seed in (0, 1, 0))
    counts = [d.manifest.groupby(["split", "target"]).size().to_dict() for d in (data, mixed)]
    assert counts[0] == counts[1]
    places = data.manifest.group.groupby(mixed.manifest.split.to_numpy()).apply(set)
    assert places["train"] & places["test"]
    assert (mixed.manifest.group == "").all() and mixed.leaks and not data.leaks
    assert mixed.fingerprint == same.fingerprint
    assert len({data.fingerprint, mixed.fingerprint, other.fingerprint}) == 3


@pytest.fixture
def tuned(folder, monkeypatch):
    """Chooses a rate of head_only where validation losses are those of a function."""

    def choose(loss):
        def finished(config, *_, **__):
            value = loss(config.learning_rates[0])
            if isinstance(value, str):
                raise InputError(value)
            candidate = {"valid_loss": value, "valid_auroc": 0.5, "best_epoch": 1}
            record = {"candidates": [candidate], "best_epoch": 1, "epochs_trained": 2}
            record |= {"failure": ""}
            return Run(None, None, pd.DataFrame(), pd.DataFrame(), record), False

        monkeypatch.setattr(jobs, "finished", finished)
        collection = evidence.Collection(task_of(folder), folder / "tuned", lambda line: None)
        return collection.choose("head_only"), collection

    return choose


def test_the_best_rate_inside_the_grid_is_taken(tuned):
    choice, collection = tuned(lambda rate: abs(np.log(rate / 0.03)))
    assert choice == evidence.Choice(0.03, extended=0, on_edge=False)
    assert [row["learning_rate"] for row in collection.trials] == [0.01, 0.03, 0.1]


@pytest.mark.parametrize(
    "best, tried, choice",
    [
        (0.3, [0.01, 0.03, 0.1, 0.316, 0.999], (0.316, 2, False)),
        (0.01, [0.01, 0.03, 0.1, 0.00316], (0.01, 1, False)),
        (9.0, [0.01, 0.03, 0.1, 0.316, 0.999], (0.999, 2, True)),
    ],
)
def test_a_grid_is_extended_twice_at_most_where_the_best_lies_on_its_edge(
    tuned, best, tried, choice
):
    chosen, collection = tuned(lambda rate: abs(np.log(rate / best)))
    assert [row["learning_rate"] for row in collection.trials] == tried
    assert chosen == evidence.Choice(*choice)


def test_a_rate_that_diverges_is_not_taken_and_another_error_is_one(tuned):
    diverged = "the training loss is not finite at epoch 2, batch 1; lower the learning rate"
    choice, collection = tuned(lambda rate: diverged if rate > 0.05 else -rate)
    assert choice.rate == 0.03 and collection.trials[2]["failure"] == diverged
    with pytest.raises(InputError, match="head_only: no learning rate trains"):
        tuned(lambda rate: diverged)
    with pytest.raises(InputError, match="was it killed"):
        tuned(lambda rate: "was it killed")


def test_pairs_have_a_like_acquisition_and_what_is_on_the_ground_is_left():
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 2, 600)
    haze = generator.normal(0, 1, (600, 6)) + 1.2 * targets[:, None] * [1, 0, 0, 0, 0, 0]
    pairs = matched_pairs(targets, haze)
    chosen = pairs >= 0
    counts = np.unique(pairs[chosen], return_counts=True)[1]
    assert (counts == 2).all() and 100 < len(counts) < 290
    for number in range(len(counts)):
        assert sorted(targets[pairs == number]) == [0, 1]
    assert imbalance(targets, haze) > 1 and imbalance(targets[chosen], haze[chosen]) < 0.15
    with pytest.raises(InputError, match="across two classes"):
        matched_pairs(targets * 0, haze)


def test_matching_is_part_of_a_record_and_of_its_summary(stopped_once):
    found = stopped_once[1]
    test = found.predictions.split == "test"
    chips = found.predictions.img_path.where(test).map({p: i for i, p in enumerate(
        found.predictions[test].img_path.unique())})  # fmt: skip
    pairs = chips.map(lambda number: -1 if pd.isna(number) or number >= 20 else number // 2)
    record = found.record | {"matching": {"pairs": 10}}
    matched = evidence_records.Evidence(record, found.predictions.assign(pair=pairs))
    rows = evidence_records.summarise(matched)["matched"]
    assert [row["method"] for row in rows] == ["head_only", "lora_last1", "acquisition statistics"]
    assert rows[0]["seeds"] == 2


def write(folder, text):
    path = folder / "task.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seedz": [0]}, "seedz: Extra inputs"),
        ({"methods": {"x": {"method": "lora", "learning_rates": [1, 2, 3]}}}, "no row head_only"),
        ({"methods": TASK["methods"] | {"x": {"method": "lora", "learning_rates": [1, 2, 3, 4]}}},
         "equally many learning rates"),
        ({"methods": {"head_only": {"method": "head_only", "learning_rates": [1, 2]}}},
         "methods.head_only.learning_rates"),
        ({"random_split_methods": ["dora"]}, "no row dora"),
        ({"fraction_methods": ["lora_last1"]}, "fraction_methods need head_only"),
        ({"shapes": {"x": {"of": "dora"}}}, "no row dora"),
        ({"shapes": {"lora_last1": {"of": "head_only"}}}, "lora_last1 stands in methods and in"),
        ({"shapes": {"x": {"of": "head_only", "learning_rates": [1]}}}, "x.learning_rates: Extra"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_name(tmp_path, changes, words):
    path = write(tmp_path, yaml.safe_dump(TASK | changes))
    message = refusal(Task.read, path)
    assert message.startswith(f"{path}: ") and words in message


@pytest.mark.parametrize("text", ["a: [", "- a\n", "", "\x00"])
def test_what_is_no_yaml_is_refused(tmp_path, text):
    assert refusal(Task.read, write(tmp_path, text)).startswith(str(tmp_path))


def test_a_wrong_parameter_of_a_row_is_named_before_anything_is_trained(folder):
    methods = TASK["methods"] | {
        "dora": {"method": "dora", "learning_rates": [1, 2, 3], "changes": {"lora_rang": 3}}
    }
    with pytest.raises(InputError, match="noise, dora: lora_rang: unknown parameter"):
        evidence.Collection(task_of(folder, methods=methods), folder / "wrong")
    shapes = {"deep": {"of": "lora_last1", "changes": {"adapted_blocks": 99}}}
    with pytest.raises(InputError, match="adapted_blocks: 99 is not between 1 and 12"):
        evidence.Collection(task_of(folder, shapes=shapes), folder / "wrong")


@pytest.mark.parametrize("path", sorted((ROOT / "evidence").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_committed_task_can_be_planned(path, tmp_path):
    task = Task.read(path)
    trials = grid(task) + [trial for stage in planned(task).values() for trial in stage]
    trials = [replace(trial, rate=trial.rate or 0.001) for trial in trials]
    assert len({trial.name for trial in trials}) == len(trials)
    for trial in trials:
        config = run_config(task, trial, tmp_path)
        share = task.training.get("train_fraction", 1) * trial.fraction
        assert config.seed == trial.seed and config.train_fraction == share
        rates = config.learning_rates if config.method == "head_only" else [config.learning_rate]
        assert list(rates) == [trial.rate]
    if task.name not in ("more_bands", "more_bands_rsscn7", "hurricane_harvey_unseen"):
        assert set(task.methods) == {
            "head_only", "lora_last6", "lora", "dora", "full", "random_lora"
        }  # fmt: skip
        assert len(task.seeds) == 5 and len(task.seeds_of("full")) == 3


def test_the_command_leaves_out_a_task_whose_chips_are_not_there(tmp_path, monkeypatch, capsys):
    training = TASK["training"] | {"data_path": str(tmp_path / "nowhere")}
    path = write(tmp_path, yaml.safe_dump(TASK | {"training": training}))
    monkeypatch.setattr("sys.argv", ["evidence", "--folder", str(tmp_path)])
    command.main()
    said = f"task: there is no {tmp_path / 'nowhere'}; the task's file says where it comes from"
    assert capsys.readouterr().out == f"{said}; left out\n"
    monkeypatch.setattr("sys.argv", ["evidence", "task", "--folder", str(path.parent)])
    assert refusal(command.main) == said


def test_a_task_without_its_weights_is_left_out_too(folder, tmp_path):
    weights, task = tmp_path / "unseen.safetensors", task_of(folder)
    rows = TASK["methods"]
    rows = rows | {"lora_last1": rows["lora_last1"] | {"changes": {"weights": str(weights)}}}
    by_row, by_task = task_of(folder, methods=rows), replaced_training(task, weights=str(weights))
    assert task.missing is None and by_row.missing == by_task.missing == str(weights)
    weights.touch()
    assert by_row.missing is by_task.missing is None
    assert replaced_training(task, weights="random").missing is None
    record = run_config(by_row, Trial("lora_last1", 0, 0.1), tmp_path)
    assert record.label == "ViT-Ti/14, weights from unseen.safetensors"


def replaced_training(task, **changes):
    return task.model_copy(update={"training": task.training | changes})


def test_rows_may_differ_in_their_bands(folder, in_this_process):
    head = TASK["methods"]["head_only"]
    rows = {"head_only": head, "grey": head | {"changes": {"bands": [0, 0, 0]}}}
    few = {"seeds": [0], "fractions": [], "fraction_methods": [], "random_split_methods": []}
    few |= {"shapes": {}}
    task = task_of(folder, methods=rows, **few)
    collection = evidence.Collection(task, folder / "bands", lambda line: None)
    collection.collect(lambda done: evidence_records.gather(done, folder / "bands"))
    found = evidence_records.read_evidence("noise", folder / "bands")
    one, other = found.record["runs"]
    assert one["data_fingerprint"] == collection.data.fingerprint != other["data_fingerprint"]
    bands = {t.method: r.record["classifier"]["bands"] for t, r in collection.runs.items()}
    assert [list(bands[name]) for name in rows] == [[0, 1, 2], [0, 0, 0]]
    check_numbers(found)
    rows = {"head_only": head, "grey": head | {"changes": {"bands": [0, 3]}}}
    with pytest.raises(InputError, match=r"bands: \[3\] out of range"):
        evidence.Collection(task_of(folder, methods=rows, **few), folder / "wrong")


def test_durations_are_said_in_the_unit_of_a_person():
    assert [evidence.spoken(s) for s in (59, 600, 36_000)] == [
        "59 seconds", "10.0 minutes", "10.0 hours",
    ]  # fmt: skip


def test_the_name_of_a_run_says_what_it_is():
    assert Trial("lora", 1, 0.001).name == "lora_lr0.001_seed1"
    assert Trial("lora", 1, 3e-5, 0.25).name == "lora_lr3e-05_seed1_fraction0.25"
    assert Trial("full", 0, 1e-4, random_split=True).name == "full_lr0.0001_seed0_random_split"
