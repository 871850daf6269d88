"""Tokens of the frozen blocks before the adapted ones: computed once, kept on disk, shared.

A run that adapts the last blocks sends the same chips through the same frozen blocks in every
epoch. What comes out of them depends on chips, weights, precision and the number of blocks alone,
so runs that differ in seed, rank, method, layers or learning rate read one file.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from helpers import InputError
from helpers.console import progress_bar
from helpers.data.dataset import ChipData
from helpers.models.classifier import Classifier
from helpers.records import written_whole_folder
from helpers.training.cache import entry_folder, held, read_seconds, write_record
from helpers.training.config import RunConfig
from helpers.training.examples import DIHEDRAL_VIEWS, ChipExamples, FeatureExamples
from helpers.training.features import evaluated_on
from helpers.training.setup import split_chips

if TYPE_CHECKING:
    from peft import PeftModel

# Precision of the blocks -> that of their tokens on disk. Of the two of 16 bits fp16 rounds eight
# times finer; what blocks in bf16 compute is bf16 already.
TOKEN_DTYPES = {"fp32": torch.float16, "bf16": torch.bfloat16, "fp16": torch.float16}

# Of the free disk; the rest is for checkpoints and for whatever else is written meanwhile.
LARGEST_DISK_SHARE = 0.5

_WORDS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}  # safetensors'
_NAME = "tokens"


class FromTokens(nn.Module):
    """A classifier, adapted or not, that is given the tokens of its first blocks, not chips."""

    def __init__(self, model: Classifier | PeftModel, block: int):
        """Go on after the first `block` blocks."""
        super().__init__()
        self.model, self.block = model, block

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T, width) -> logits (N, classes)."""
        return bare(self.model).forward_from(tokens, self.block)


def bare(model: Classifier | PeftModel) -> Classifier:
    """The classifier under an adapter, with the adapter's layers in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def cached_tokens(
    config: RunConfig,
    data: ChipData,
    model: Classifier | PeftModel,
    block: int,
    digest: str,
    accelerator: Accelerator,
    splits: tuple[str, ...] = ("train", "valid"),
) -> tuple[dict[str, FeatureExamples] | None, dict[str, Any]]:
    """What the first `block` blocks make of the chips, from the cache where it is there already.

    The main process computes and writes what is missing. A split above `memory_limit_gb` is
    memory-mapped; with `augment` all eight views of the training chips are kept.

    The model is on the CPU, its at least one frozen block in the precision that it is used in;
    `digest` is of the backbone's weights in fp32.

    Returns:
        Examples (views, N, T, width) in half precision by split, or None where the disk does not
        hold them; and, for the record, `frozen_blocks` with `bytes`, `seconds` and `was_read`, or
        with `not_kept`, the reason.

    Raises:
        InputError: a token is not a finite number in half precision.
    """
    entries = {split: _entry(config, data, bare(model), block, digest, split) for split in splits}
    missing = sum(entry.bytes for entry in entries.values() if not entry.file.exists())
    folder = next(path for path in entries[splits[0]].file.absolute().parents if path.exists())
    free = shutil.disk_usage(folder).free
    fits = missing <= LARGEST_DISK_SHARE * free
    record: dict[str, Any] = {"frozen_blocks": block}
    if not broadcast_object_list([fits])[0]:
        reason = (
            f"{missing / 1e9:.3g} GB of tokens are more than half of the {free / 1e9:.3g} GB free"
        )
        return None, record | {"not_kept": reason}
    examples, seconds, was_read = {}, 0.0, True
    mapped_above = config.memory_limit_gb * 1e9
    for split, entry in entries.items():
        with held(entry.file.parent):
            found = entry.read(mapped_above)
            if not all(gather_object([found is not None])):
                was_read = False
                chips = split_chips(config, data, split)  # which processes make together
                if accelerator.is_main_process:
                    entry.compute(bare(model), block, chips, accelerator)
                accelerator.wait_for_everyone()
                found = entry.read(mapped_above)
        values, took = found
        examples[split] = FeatureExamples(values, data.dataset(split, config.image_size).targets)
        seconds += took
    size = sum(entry.bytes for entry in entries.values())
    return examples, record | {"bytes": size, "seconds": seconds, "was_read": was_read}


@dataclass(frozen=True)
class _Entry:
    """The tokens of one split on disk: where, and what is expected there."""

    file: Path
    shape: tuple[int, int, int, int]  # views, chips, tokens, width
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, mapped_above: float) -> tuple[Tensor, float] | None:
        """The tokens and the seconds they took; None where they are not there, or damaged."""
        if (seconds := read_seconds(self.file)) is None:
            return None
        try:
            with safe_open(self.file, "pt") as opened:
                values = opened.get_tensor(_NAME)  # mapped until it is copied
        except (SafetensorError, OSError):
            return None
        if (values.shape, values.dtype) != (self.shape, self.dtype):
            return None
        return (values if self.bytes > mapped_above else values.clone()), seconds

    @torch.inference_mode()
    def compute(
        self, classifier: Classifier, block: int, chips: ChipExamples, accelerator: Accelerator
    ) -> None:
        """Send the chips through the frozen blocks, and write the entry view after view."""
        start = time.perf_counter()
        if self.file.parent.is_file():
            self.file.parent.unlink()
        header = {"dtype": _WORDS[self.dtype], "shape": self.shape, "data_offsets": [0, self.bytes]}
        # https://huggingface.co/docs/safetensors/index#format; its own writer wants all at once.
        text = json.dumps({_NAME: header}).encode()
        text += b" " * (-len(text) % 8)
        bar = progress_bar(total=self.shape[0] * self.shape[1], desc="tokens", unit="chip")
        with (
            written_whole_folder(self.file.parent) as part,
            bar,
            evaluated_on(classifier, accelerator.device),
            accelerator.autocast(),
        ):
            with open(part / self.file.name, "wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                for view in range(self.shape[0]):
                    for rows in torch.arange(self.shape[1]).split(64):
                        views = torch.full_like(rows, view)
                        inputs = chips.take(rows, views, accelerator.device)
                        tokens = classifier.tokens(inputs, block)
                        tokens = tokens.to(self.dtype).cpu()
                        _check_finite(tokens, rows)
                        file.write(tokens.contiguous().view(torch.uint8).numpy())
                        bar.update(len(rows))
            write_record(part / self.file.name, time.perf_counter() - start)


def _check_finite(tokens: Tensor, rows: Tensor) -> None:
    if not tokens.isfinite().all():
        raise InputError(
            f"adapted_blocks: tokens of chips {rows[0]} to {rows[-1]} are not finite numbers in "
            "half precision; check the weights of the backbone and the values of these chips, or "
            "leave adapted_blocks out"
        )


def _entry(
    config: RunConfig,
    data: ChipData,
    classifier: Classifier,
    block: int,
    digest: str,
    split: str,
) -> _Entry:
    dtype = TOKEN_DTYPES[config.precision]
    views = DIHEDRAL_VIEWS if config.augment and split == "train" else 1
    key = {
        "data": data.split_fingerprint(split),
        "split": split,
        "backbone": digest,
        "blocks": block,
        "image_size": config.image_size,
        "precision": config.precision,
        "device": config.torch_device,  # a GPU multiplies fp32 in TF32
        "dtype": str(dtype),
        "mean": classifier.config.mean,
        "std": classifier.config.std,
        "views": views,
    }
    backbone = classifier.backbone
    tokens = backbone.num_prefix_tokens + backbone.patch_embed.num_patches
    chips = int((data.manifest.split == split).sum())
    return _Entry(
        entry_folder(config.cache_path, "tokens", key) / "tokens.safetensors",
        (views, chips, tokens, backbone.embed_dim),
        dtype,
    )
