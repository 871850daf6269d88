"""What the tests of models share."""

from dataclasses import replace

import pytest
import torch

from helpers import InputError
from helpers.models.classifier import ClassifierConfig

RGB = (0, 1, 2)
CLASSES = ("no_tree", "tree")


def example_config(**changes):
    return replace(ClassifierConfig("example", "random", 98, RGB, CLASSES), **changes)


def random_chips(n=2, bands=3, size=98, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, bands, size, size), dtype=torch.uint8, generator=generator)


def moved(model, size):
    """The model, in eval mode, after all that it trains has moved away from where it began."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def refusal(function, *arguments, **options):
    """The message of the one InputError that a call ends with."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and "pydantic" not in message
    return message
