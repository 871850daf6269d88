"""From logits to an answer whose error is known from the validation split.

Temperature scaling (Guo et al. 2017, arXiv:1706.04599), a threshold of the positive class, and
split-conformal sets (Vovk et al. 2005; Angelopoulos and Bates 2021, arXiv:2107.07511). What they
promise holds for chips drawn like those of the validation split, so not for another place. That
split has also chosen the epoch and the head, which makes it a little too favourable.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import precision_recall_curve

from helpers import InputError

UNSURE = "unsure"

# A validation split without an error fits any small temperature alike; it may change logits by
# this factor at most.
_LARGEST_TEMPERATURE = 4.0
_SMALLEST_PROBABILITY = 1e-12  # float32 rounds to zero what was not; its logarithm must be finite


@dataclass(frozen=True)
class AnswerRule:
    """How logits become answers; the default is the most probable class, and never unsure.

    A class belongs to the conformal set if 1 minus its probability is at most `quantile`; None for
    no sets.
    """

    temperature: float = 1.0  # logits are divided by it
    threshold: float = 0.5  # of two classes: from which probability the second is the answer
    quantile: float | None = None

    def __call__(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits (N, classes) -> probabilities (N, classes) float32, class (N,), unsure (N,).

        An answer is unsure where the conformal set is anything but that class alone.
        """
        exact = self.calibrated(logits)
        classes = exact.argmax(axis=1)
        if self.threshold != 0.5:
            classes = (exact[:, 1] >= self.threshold).astype(classes.dtype)
        unsure = np.zeros(len(logits), bool)
        if self.quantile is not None:
            members = 1 - exact <= self.quantile
            unsure = (members.sum(axis=1) != 1) | ~members[np.arange(len(logits)), classes]
        return exact.astype(np.float32), classes, unsure

    def calibrated(self, logits: np.ndarray) -> np.ndarray:
        """Logits (N, classes) -> probabilities (N, classes) float64, before any rounding."""
        return softmax(logits.astype(np.float64) / self.temperature, axis=1)


def read_validation(path: Path, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """Targets (N,) and logits (N, classes) of the validation split, from a run's predictions.

    None where there is no such file, or it holds no validation split.

    Raises:
        InputError: the file is damaged or of other classes.
    """
    if not path.is_file():
        return None
    columns = [f"p_{name}" for name in classes]
    try:
        table = pd.read_parquet(path, columns=["split", "target", *columns])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: not the predictions of a run with the classes {', '.join(classes)} "
            f"({str(error).splitlines()[0]}); restore it or train again"
        ) from error
    table = table[table["split"] == "valid"]
    if table.empty:
        return None
    return table["target"].to_numpy(), logits_from(table[columns].to_numpy())


def logits_from(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities (N, classes) -> logits (N, classes) float64 that have them as their softmax."""
    return np.log(probabilities.astype(np.float64).clip(_SMALLEST_PROBABILITY))


def fit_rule(
    targets: np.ndarray,
    logits: np.ndarray,
    *,
    temperature: float | None = None,
    threshold: str = "0.5",
    error_rate: float | None = None,
) -> AnswerRule:
    """Find the rule for new chips on a validation split.

    Args:
        targets: (N,) class indices.
        logits: (N, classes).
        temperature: None takes the one with the least cross-entropy.
        threshold: as `check_threshold` allows.
        error_rate: how often the true class may be missing from the conformal set; None for
            answers that are never unsure.

    Raises:
        InputError: an error rate too small for so few chips, or no positive chip.
    """
    if temperature is None:
        temperature = _best_temperature(targets, logits)
    probabilities = softmax(logits / temperature, axis=1)
    quantile = None
    if error_rate is not None:
        scores = np.sort(1 - probabilities[np.arange(len(targets)), targets])
        rank = math.ceil((len(scores) + 1) * (1 - error_rate))
        if rank > len(scores):
            raise InputError(
                f"error_rate: {error_rate:g} needs at least {math.ceil(1 / error_rate) - 1} "
                f"validation chips, the run has {len(scores)}; give a larger one"
            )
        quantile = float(scores[rank - 1])
    return AnswerRule(temperature, _threshold(threshold, targets, probabilities), quantile)


def check_threshold(threshold: str, classes: int) -> bool:
    """Whether a threshold needs a validation split: a number does not, `f1` and `recall=R` do.

    Raises:
        InputError: it is none of these, or out of (0, 1), or there are not two classes.
    """
    match = re.fullmatch(r"f1|(recall=)?(0?\.[0-9]+)", threshold)
    if not match or (match[2] and float(match[2]) == 0):
        raise InputError(
            f"threshold: '{threshold}' is not a number between 0 and 1, `f1`, or `recall=0.95`"
        )
    needed = match[1] is not None or threshold == "f1"
    if classes != 2 and (needed or float(threshold) != 0.5):
        raise InputError(f"threshold: {threshold} is for two classes, the model has {classes}")
    return needed


def _best_temperature(targets: np.ndarray, logits: np.ndarray) -> float:
    def cross_entropy(log_temperature: float) -> float:
        scaled = log_softmax(logits / math.exp(log_temperature), axis=1)
        return -scaled[np.arange(len(targets)), targets].mean()

    bound = math.log(_LARGEST_TEMPERATURE)
    best = minimize_scalar(cross_entropy, bounds=(-bound, bound), method="bounded")
    return float(math.exp(best.x))


def _threshold(threshold: str, targets: np.ndarray, probabilities: np.ndarray) -> float:
    if not check_threshold(threshold, probabilities.shape[1]):
        return float(threshold)
    if not (targets == 1).any():
        raise InputError(f"threshold: {threshold} needs positive chips in the validation split")
    precision, recall, thresholds = precision_recall_curve(targets, probabilities[:, 1])
    precision, recall = precision[:-1], recall[:-1]  # the last point has no threshold
    if threshold == "f1":
        sums = np.maximum(precision + recall, _SMALLEST_PROBABILITY)
        return float(thresholds[np.argmax(2 * precision * recall / sums)])
    return float(thresholds[recall >= float(threshold.partition("=")[2])].max())
