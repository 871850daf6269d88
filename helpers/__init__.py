"""Adapting DINOv2 to overhead imagery, and measuring what the result costs in production."""


class InputError(ValueError):
    """Something the user gave is wrong: the message names it, says why, and what to do."""
