import math

import pytest
import torch
from torch import nn

from helpers import InputError
from helpers.training.config import RunConfig
from helpers.training.examples import FeatureExamples
from helpers.training.features import Features
from helpers.training.heads import HeadSweep, fit_heads, sweep
from helpers.training.loop import FitSettings, fit
from helpers.training.processes import fresh_accelerator
from helpers.training.progress import HISTORY_COLUMNS

WIDTH = 4  # of the fake backbone: features have five times as many columns


def fake_examples(n, seed, noise=1.0, views=1):
    """Features of two classes that overlap a little."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % 2
    values = noise * torch.randn(views, n, 5 * WIDTH, generator=generator)
    values += 0.7 * (2 * targets[None, :, None] - 1)
    return values, targets


def fake_features(n, seed, **options):
    return Features(*fake_examples(n, seed, **options), 0.0, False)


def fit_one(learning_rate=0.01, train=None, valid=None, **settings):
    """Fit one linear layer; return it with the progress."""
    torch.manual_seed(0)
    head = nn.Linear(5 * WIDTH, 2)
    progress = fit(
        head,
        [{"params": list(head.parameters()), "lr": learning_rate, "weight_decay": 0.0}],
        train or FeatureExamples(*fake_examples(90, 0)),
        valid or FeatureExamples(*fake_examples(40, 1)),
        FitSettings(**{"epochs": 12, "patience": 12, "batch_size": 32} | settings),
        accelerator=fresh_accelerator("cpu"),
        report=lambda line: None,
    )
    return head, progress


def test_history_has_one_row_per_epoch_and_learns():
    _, progress = fit_one()
    history = progress.history(0)
    assert tuple(history.columns) == HISTORY_COLUMNS
    assert history.epoch.tolist() == list(range(1, 13))
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]
    assert history.valid_auroc.max() > 0.9


def test_losses_are_means_over_images_also_with_a_short_last_batch():
    """With a learning rate of zero the epoch's loss is the loss of the initial weights."""
    train = FeatureExamples(*fake_examples(90, 0))
    head, progress = fit_one(learning_rate=0.0, train=train, epochs=1, batch_size=32)
    expected = nn.functional.cross_entropy(head(train.values[0]), train.targets)
    assert progress.history(0).train_loss[0] == pytest.approx(expected.item(), rel=1e-6)
    right = (head(train.values[0]).argmax(1) == train.targets).double().mean()
    assert progress.history(0).train_acc[0] == pytest.approx(right.item())


def test_best_epoch_is_what_the_model_holds():
    """A learning rate that is far too high makes late epochs worse than the best one."""
    head, progress = fit_one(learning_rate=3.0, epochs=30, patience=30, warmup_fraction=0.5)
    history = progress.history(0)
    assert progress.best_epoch[0] == history.epoch[history.valid_loss.idxmin()]
    assert progress.best_epoch[0] < 30
    valid = FeatureExamples(*fake_examples(40, 1))
    loss = nn.functional.cross_entropy(head(valid.values[0]), valid.targets)
    assert loss.item() == pytest.approx(history.valid_loss.min(), rel=1e-5)


def test_early_stopping_stops():
    _, progress = fit_one(learning_rate=3.0, epochs=200, patience=3, warmup_fraction=0.5)
    assert progress.stopped == [True]
    assert len(progress.history(0)) == progress.best_epoch[0] + 3 < 200


def test_learning_rate_rises_and_then_falls():
    _, progress = fit_one(learning_rate=0.1, epochs=20, patience=20, warmup_fraction=0.25)
    rates = progress.history(0).learning_rate
    assert rates.idxmax() == 4 and rates.max() == pytest.approx(0.1)
    assert rates[:5].is_monotonic_increasing and rates[4:].is_monotonic_decreasing
    assert rates.iloc[-1] < 0.001


def test_equal_seeds_give_equal_histories_and_another_seed_another():
    values = ["train_loss", "valid_loss", "valid_auroc"]
    first, again, other = (fit_one(seed=seed)[1].history(0)[values] for seed in (3, 3, 4))
    assert first.equals(again)
    assert not first.equals(other)


def test_views_are_drawn_per_image_and_epoch():
    values, targets = fake_examples(64, 0, views=8)
    seen = []

    class Recorded(FeatureExamples):
        def take(self, rows, views, device):
            seen.append(views.clone())
            return super().take(rows, views, device)

    fit_one(train=Recorded(values, targets), epochs=2, patience=2, batch_size=64)
    training = [v for v in seen if len(v) == 64]
    assert set(training[0].tolist()) == set(range(8))
    assert not torch.equal(*training)


def test_a_loss_that_breaks_later_is_an_error_all_the_same():
    values, targets = fake_examples(90, 0)

    class BreaksLater(FeatureExamples):
        calls = 0

        def take(self, rows, views, device):
            BreaksLater.calls += 1
            return super().take(rows, views, device) * (math.nan if BreaksLater.calls > 5 else 1)

    with pytest.raises(InputError, match="training loss is not finite at epoch 2, batch 3; lower"):
        fit_one(train=BreaksLater(values, targets))


def test_a_validation_loss_that_is_not_finite_is_an_error():
    values, targets = fake_examples(40, 1)
    values[0, 5] = math.nan
    with pytest.raises(InputError, match="the validation loss is not finite at epoch 1; lower"):
        fit_one(valid=FeatureExamples(values, targets))


def test_one_candidate_that_breaks_leaves_the_others_alone():
    config = RunConfig(
        learning_rates=(1e-2, 1e30), head_inputs=("cls",), weight_decays=(0.0,), epochs=5
    )
    train, valid = fake_features(64, 0), fake_features(32, 1)
    _, both = fit_heads(config, train, valid, 2, report=lambda line: None)
    alone = config.model_copy(update={"learning_rates": (1e-2,)})
    _, one = fit_heads(alone, train, valid, 2, report=lambda line: None)
    assert both.best == 0
    # Two heads are one wider matrix product, which a CPU may add up in another order: the losses
    # differ by 6e-8 on one machine and not at all on another. A few units of fp32's last place.
    assert both.best_loss[0] == pytest.approx(one.best_loss[0], rel=1e-6)


def test_a_sweep_gives_each_head_what_it_gets_alone():
    """Side by side or alone must not matter: same start, same order of images."""
    config = RunConfig(learning_rates=(1e-3, 1e-2), weight_decays=(0.0, 0.1), epochs=15, patience=4)
    train, valid = fake_features(70, 0), fake_features(30, 1)
    together, progress = fit_heads(config, train, valid, 2, report=lambda line: None)
    candidates = sweep(config)
    for i, row in enumerate(candidates.itertuples()):
        single = HeadSweep(candidates.iloc[[i]], WIDTH, 2)
        own = fit(
            single,
            [
                {
                    "params": list(single.parameters()),
                    "lr": row.learning_rate,
                    "weight_decay": row.weight_decay,
                }
            ],
            train,
            valid,
            FitSettings(config.epochs, config.patience, config.batch_size, seed=config.seed),
            accelerator=fresh_accelerator("cpu"),
            report=lambda line: None,
        )
        assert own.best_epoch[0] == progress.best_epoch[i]
        torch.testing.assert_close(single.heads[0].weight, together.heads[i].weight)
