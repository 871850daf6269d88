"""What a model says of examples, and how good its answers are."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from helpers.metrics import weighted_metrics


def by_candidate(logits: Tensor) -> Tensor:
    """Logits (candidates, N, classes) in fp32, also of a model without candidates."""
    return (logits if logits.ndim == 3 else logits[None]).float()


def candidate_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy per candidate and image, (candidates, N)."""
    return functional.cross_entropy(
        logits.movedim(2, 1), targets.expand(len(logits), -1), reduction="none"
    )


@torch.inference_mode()
def predict(model: nn.Module, examples, batch_size: int, accelerator: Accelerator) -> Tensor:
    """Class probabilities on the CPU, (candidates, N, classes) float32, the same on every process.

    Each process computes its part; the parts are then added up into one table.
    """
    model.eval()
    n = len(examples.targets)
    here = torch.arange(n).tensor_split(accelerator.num_processes)[accelerator.process_index]
    parts = []
    for chunk in here.split(batch_size):
        inputs = examples.take(chunk, torch.zeros_like(chunk), accelerator.device)
        parts.append(by_candidate(model(inputs)).softmax(dim=2))
    rows = torch.cat(parts, dim=1)
    table = rows.new_zeros(len(rows), n, rows.shape[2])
    table[:, here] = rows
    return accelerator.reduce(table).cpu()


def validated(probabilities: Tensor, targets: Tensor, balanced: bool) -> dict:
    """Validation loss, accuracy and AUROC per candidate; balanced: the mean of classes' losses."""
    weights = 1 / targets.bincount()[targets] if balanced else torch.ones(len(targets))
    picked = probabilities[:, torch.arange(len(targets)), targets]
    losses = -picked.clamp_min(1e-12).log() @ (weights / weights.sum())
    rows = [
        weighted_metrics(targets.numpy(), candidate.nan_to_num().numpy())
        for candidate in probabilities
    ]
    return {
        "valid_loss": losses.tolist(),
        "valid_acc": [float(row["accuracy"][0]) for row in rows],
        "valid_auroc": [float(row["auroc"][0]) for row in rows],
    }
