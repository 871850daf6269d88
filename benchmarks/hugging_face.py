"""The same training by Hugging Face's Trainer with PEFT, as PEFT's image classification example.

https://github.com/huggingface/peft/blob/main/examples/image_classification: chips are decoded in
every epoch, which ends with an evaluation and a checkpoint; the best is loaded at the end. Query,
key and value of `Dinov2ForImageClassification` are layers of their own, so that an adapter on qkv
becomes three of the same rank. Needs `benchmarks/requirements.txt`.
"""

import re

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from scipy.special import softmax
from torch.utils.data import default_collate
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.clock import Clock
from benchmarks.ways import auroc, optimizer_and_schedule
from helpers import InputError
from helpers.data.dataset import ChipData
from helpers.models.classifier import Classifier
from helpers.training.config import RunConfig
from helpers.training.setup import new_classifier

# timm's names of parameters, as patterns, -> Hugging Face's.
_NAMES = {
    r"^(cls_token)": r"embeddings.\1",
    r"^pos_embed": "embeddings.position_embeddings",
    r"^patch_embed\.proj": "embeddings.patch_embeddings.projection",
    r"^blocks\.": "encoder.layer.",
    r"^norm\.": "layernorm.",
    r"attn\.proj": "attention.o_proj",
    r"ls(\d)\.gamma": r"layer_scale\1.lambda1",
}
_LAYERS = {"qkv": ("q_proj", "k_proj", "v_proj"), "proj": ("o_proj",)}  # fc1 and fc2 are the same


def hugging_face(classifier: Classifier) -> Dinov2ForImageClassification:
    """The same function of normalised chips, on the same memory.

    Raises:
        InputError: a backbone or head input that is not DINOv2's without registers.
    """
    backbone, config = classifier.backbone, classifier.config
    state = {}
    for name, value in backbone.state_dict().items():
        for pattern, theirs in _NAMES.items():
            name = re.sub(pattern, theirs, name)
        if "attn.qkv" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[f"dinov2.{name.replace('attn.qkv', f'attention.{letter}_proj')}"] = part
        else:
            state[f"dinov2.{name}"] = value
    state |= {f"classifier.{k}": v for k, v in classifier.linear_head.state_dict().items()}
    block = backbone.blocks[0]
    with torch.device("meta"):
        model = Dinov2ForImageClassification(
            Dinov2Config(
                hidden_size=backbone.embed_dim,
                num_hidden_layers=len(backbone.blocks),
                num_attention_heads=block.attn.num_heads,
                image_size=config.image_size,
                patch_size=backbone.patch_embed.patch_size[0],
                num_channels=len(config.bands),
                layer_norm_eps=backbone.norm.eps,
                num_labels=len(config.classes),
                use_mask_token=False,
            )
        )
    expected = {name: value.shape for name, value in model.state_dict().items()}
    if {name: value.shape for name, value in state.items()} != expected:
        raise InputError(
            f"backbone: {config.backbone} with head_input {config.head_input} is no "
            "Dinov2ForImageClassification; use a DINOv2 without registers and cls+mean"
        )
    model.load_state_dict(state, assign=True)
    return model


class _Stamps(TrainerCallback):
    """Tells the clock what the Trainer does."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_epoch_begin(self, *_, **__) -> None:
        self.clock.mark("checkpoint" if self.clock.epochs else "once")

    def on_epoch_end(self, *_, **__) -> None:
        self.clock.mark("backward")

    def on_evaluate(self, *_, metrics: dict, **__) -> None:
        self.clock.epoch(metrics["eval_auroc"])


def trainer(config: RunConfig, data: ChipData, clock: Clock) -> np.ndarray:
    """Train by the Trainer, in the config's precision; returns as `ways.plain`."""
    torch.manual_seed(config.seed)
    classifier = new_classifier(config, data)
    mean, std = classifier.mean, classifier.std
    layers = [name for target in config.lora_targets for name in _LAYERS.get(target, (target,))]
    adapter = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=layers,
        modules_to_save=["classifier"],
        bias="none",
    )
    model = get_peft_model(hugging_face(classifier), adapter)
    del classifier
    splits = {s: data.dataset(s, config.image_size) for s in ("train", "valid", "test")}

    def collated(rows: list) -> dict[str, torch.Tensor]:
        chips, targets = default_collate(rows)
        return {"pixel_values": (chips.float() - mean) / std, "labels": targets}

    def metrics(prediction) -> dict[str, float]:
        return {"auroc": auroc(prediction.label_ids, softmax(prediction.predictions, axis=1))}

    work = Trainer(
        model,
        TrainingArguments(
            output_dir=str(config.folder),
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            num_train_epochs=config.epochs,
            max_grad_norm=config.max_grad_norm,
            bf16=config.mixed_precision == "bf16",
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            remove_unused_columns=False,
            label_names=["labels"],
            seed=config.seed,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=collated,
        train_dataset=splits["train"],
        eval_dataset=splits["valid"],
        compute_metrics=metrics,
        callbacks=[_Stamps(clock)],
        optimizers=optimizer_and_schedule(model, config, len(splits["train"])),
    )
    work.remove_callback(PrinterCallback)
    work.train()
    work.remove_callback(_Stamps)
    return softmax(work.predict(splits["test"]).predictions, axis=1)
