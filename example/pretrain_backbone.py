"""Distil the example backbone, a ViT-Ti/14, from the image trunk of SAM 2 Hiera-Tiny.

    python -m example.pretrain_backbone --teacher sam2_hiera_tiny_trunk.safetensors \\
        --images hurricane_harvey/manifest.csv neon_ground/ eurosat_rgb_sample/

`BACKBONE_CARD.md` says where these come from. Of a CSV manifest only the rows of the training split
are read, of a folder every image. The teacher runs once over all chips; the student then learns to
predict its half-whitened features. Killed at any moment, the same command continues where it
stopped.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from helpers.models.architectures import IMAGENET_MEAN, IMAGENET_STD
from helpers.models.backbones import EXAMPLE_WEIGHTS, build_backbone
from helpers.records import written_whole

TEACHER_SIZE, STUDENT_SIZE, GRID = 128, 98, 7  # pixels, pixels, patches along one side
WINDOWS = {98: 49, 140: 63, 196: 98, 294: 98}  # side: step, pixels; how larger images are cut
TARGET_WIDTH = 256  # principal components kept of the teacher's 1152 channels
CHUNK = 512  # chips in one file of teacher features
KEPT_PATCHES = 24  # of 49 that the student sees: half the compute, and a harder task
WHOLE = 0.15  # last share of the training, on whole chips
WARM_UP_STEPS = 100
DECAY = 0.3  # last share of the training, over which the learning rate falls to zero
PEAK_LEARNING_RATE, WEIGHT_DECAY, BATCH = 1e-3, 0.05, 64
CHECKPOINT_STEPS = 100


def find_images(source: Path) -> list[Path]:
    """Images of a folder, or of the training split of a CSV manifest (img_path, split)."""
    if source.suffix == ".csv":
        manifest = pd.read_csv(source)
        return [source.parent / p for p in manifest.img_path[manifest.split == "train"]]
    return sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))


def cut(image: Image.Image) -> list[np.ndarray]:
    """Chips (TEACHER_SIZE, TEACHER_SIZE, 3) of an image: the whole, or windows of a larger one."""
    width, height = image.size
    boxes = [
        (x, y, x + side, y + side)
        for side, step in WINDOWS.items()
        for y in range(0, height - side + 1, step)
        for x in range(0, width - side + 1, step)
    ]
    if max(width, height) < 2 * STUDENT_SIZE:
        boxes = [(0, 0, width, height)]
    size = (TEACHER_SIZE, TEACHER_SIZE)
    return [np.asarray(image.crop(b).resize(size, Image.Resampling.BICUBIC)) for b in boxes]


def normalise(chips: Tensor) -> Tensor:
    """Chips (N, 3, S, S) uint8 -> float with ImageNet's mean and standard deviation removed."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (chips - mean) / std


@torch.inference_mode()
def teacher_tokens(chips: Tensor, weights: Path, folder: Path) -> Tensor:
    """Teacher features of (N, 3, 128, 128) uint8 chips on the student's grid: (N, 49, 1152) fp16.

    The maps of stride 16 (384 channels) and 32 (768), resampled to 7x7. Kept in `folder` in chunks.
    """
    teacher = timm.create_model("sam2_hiera_tiny", num_classes=0).eval()
    teacher.load_state_dict(load_file(weights), strict=False)  # the trunk has no head.norm
    tokens = []
    for number, chunk in enumerate(tqdm(chips.split(CHUNK), desc="teacher", unit="chunk")):
        path = folder / f"teacher_{number:03d}.safetensors"
        if not path.is_file():
            rows = []
            for batch in chunk.split(16):
                maps = teacher.forward_intermediates(
                    normalise(batch), indices=2, intermediates_only=True
                )
                maps = [functional.interpolate(m, (GRID, GRID), mode="bilinear") for m in maps]
                rows.append(torch.cat(maps, 1).flatten(2).transpose(1, 2).half())
            with written_whole(path) as part:
                save_file({"tokens": torch.cat(rows)}, part)
        tokens.append(load_file(path)["tokens"])
    return torch.cat(tokens)


def half_whiten(features: Tensor, sample: Tensor) -> Tensor:
    """Features (..., F) on the principal axes of `sample` (M, F), large variances damped.

    Dividing by the fourth root of the variance is half-way to whitening: a cosine loss then sees
    beyond the few largest directions, without counting noise as much as signal.
    """
    sample = sample.float()
    mean, std = sample.mean(0), sample.std(0)
    scaled = (sample - mean) / std
    variances, axes = torch.linalg.eigh((scaled.T @ scaled / len(scaled)).double())
    variances, axes = variances.flip(0)[:TARGET_WIDTH], axes.flip(1)[:, :TARGET_WIDTH]
    projection = (axes / variances**0.25).float()
    return torch.cat(
        [((f.float() - mean) / std @ projection).half() for f in features.split(CHUNK)]
    )


def factors(identity: float, noise: float, size: int) -> tuple[Tensor, Tensor]:
    """Square A and B with A @ B = identity * I + noise * Z, the leading rank first."""
    matrix = identity * torch.eye(size) + noise * torch.randn(size, size) / size**0.5
    left, scale, right = torch.linalg.svd(matrix)
    return left * scale.sqrt(), scale.sqrt()[:, None] * right


@torch.no_grad()
def initialise(vit: nn.Module) -> None:
    """Mimetic initialisation (Trockman & Kolter 2023, arXiv:2305.09828), LayerScale at 1.

    Query times key begins near +I, value times projection near -I, and position embeddings as
    sines and cosines: attention is local from the first step.
    """
    width = vit.embed_dim
    for block in vit.blocks:
        nn.init.ones_(block.ls1.gamma)
        nn.init.ones_(block.ls2.gamma)
        query, key, value = block.attn.qkv.weight.chunk(3)
        for rows in torch.arange(width).chunk(block.attn.num_heads):
            left, right = factors(0.7, 0.7, width)
            query[rows], key[rows] = left.T[: len(rows)], right[: len(rows)]
        left, right = factors(-0.4, 0.4, width)
        value.copy_(left.T)
        block.attn.proj.weight.copy_(right.T)
    angles = torch.arange(GRID)[:, None] / 10_000 ** torch.linspace(0, 1, width // 4 + 1)[:-1]
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = waves[:, None].expand(-1, GRID, -1), waves[None].expand(GRID, -1, -1)
    vit.pos_embed[:, 1:] = 0.5 * torch.cat([rows, columns], 2).flatten(0, 1)


class Student(nn.Module):
    """The backbone with three linear heads that predict the teacher: patches, CLS, mean patch."""

    def __init__(self):
        """Start from weights that imitate a trained transformer."""
        super().__init__()
        self.backbone = build_backbone("example", STUDENT_SIZE)
        initialise(self.backbone)
        width = self.backbone.embed_dim
        self.heads = nn.ModuleList(nn.Linear(width, TARGET_WIDTH) for _ in range(3))

    def loss(self, chips: Tensor, patches: Tensor, pooled: Tensor, kept: Tensor) -> Tensor:
        """Sum of three mean cosine distances to the teacher.

        Args:
            chips: (N, 3, 98, 98) normalised.
            patches: (N, 49, TARGET_WIDTH) targets of the patch tokens.
            pooled: (N, TARGET_WIDTH) target of the CLS and the mean patch token.
            kept: (N, K) indices of the patches that the student sees.
        """
        vit = self.backbone
        tokens = vit.patch_embed(chips) + vit.pos_embed[:, 1:]
        tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
        patches = patches.gather(1, kept[..., None].expand(-1, -1, TARGET_WIDTH))
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(chips), -1, -1)
        tokens = vit.norm(vit.blocks(torch.cat([cls, tokens], 1)))
        pairs = [(tokens[:, 1:], patches), (tokens[:, 0], pooled), (tokens[:, 1:].mean(1), pooled)]
        return sum(
            1 - functional.cosine_similarity(head(token), target, dim=-1).mean()
            for head, (token, target) in zip(self.heads, pairs, strict=True)
        )


def optimisers(student: Student) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for p in student.backbone.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in student.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=WEIGHT_DECAY),
    ]


def turn(grid: Tensor, view: int) -> Tensor:
    """One of the eight flips and rotations of (..., S, S)."""
    turned = torch.rot90(grid, view % 4, (-2, -1))
    return turned.flip(-1) if view >= 4 else turned


def train(chips: Tensor, patches: Tensor, pooled: Tensor, steps: int, folder: Path) -> Student:
    """Train for `steps` batches, from the checkpoint in `folder` if there is one.

    Every draw of a step comes from a generator seeded with the step, so that a resumed training
    sees what an uninterrupted one would have seen.
    """
    torch.manual_seed(0)
    student = Student()
    optims = optimisers(student)
    checkpoint, start = folder / "checkpoint.pt", 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        start = state["step"]
        student.load_state_dict(state["student"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
    order = torch.cat([torch.randperm(len(chips)) for _ in range(steps * BATCH // len(chips) + 1)])
    positions = torch.arange(GRID * GRID).view(GRID, GRID)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="student", unit="step")
    for step in bar:
        generator = torch.Generator().manual_seed(step)
        rows = order[step * BATCH : (step + 1) * BATCH]
        view = int(torch.randint(8, (), generator=generator))
        n_kept = KEPT_PATCHES if step < (1 - WHOLE) * steps else GRID * GRID
        kept = torch.rand(BATCH, GRID * GRID, generator=generator).argsort(1)[:, :n_kept]
        loss = student.loss(
            normalise(turn(chips[rows], view)),
            patches[rows][:, turn(positions, view).flatten()].float(),
            pooled[rows].float(),
            kept,
        )
        rate = PEAK_LEARNING_RATE * min(
            (step + 1) / WARM_UP_STEPS, 1, (steps - step) / (DECAY * steps)
        )
        for optim in optims:
            optim.param_groups[0]["lr"] = rate
            optim.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        for optim in optims:
            optim.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % CHECKPOINT_STEPS == 0:
            state = {"step": step + 1, "student": student.state_dict()}
            with written_whole(checkpoint) as part:
                torch.save(state | {"optims": [o.state_dict() for o in optims]}, part)
    return student


def main():
    """Run the three stages: chips, teacher features, training."""
    parser = argparse.ArgumentParser(description="Distil the example backbone")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="folders, manifests")
    parser.add_argument("--teacher", type=Path, required=True, help="SAM 2 Hiera-Tiny trunk")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the chips")
    parser.add_argument(
        "--work_path", type=Path, default="runs/pretrain", help="intermediate files"
    )
    parser.add_argument("--output", type=Path, default=EXAMPLE_WEIGHTS)
    arguments = parser.parse_args()

    paths = [path for source in arguments.images for path in find_images(source)]
    chips = [
        chip for path in tqdm(paths, desc="chips") for chip in cut(Image.open(path).convert("RGB"))
    ]
    chips = torch.from_numpy(np.stack(chips)).permute(0, 3, 1, 2)
    tokens = teacher_tokens(chips, arguments.teacher, arguments.work_path)
    torch.manual_seed(0)
    some = tokens.flatten(0, 1)[torch.randperm(tokens.shape[0] * tokens.shape[1])[:60_000]]
    patches = half_whiten(tokens, some)
    pooled = tokens.float().mean(1)
    pooled = half_whiten(pooled, pooled)
    del tokens
    size = (STUDENT_SIZE, STUDENT_SIZE)
    chips = functional.interpolate(chips, size, mode="bicubic", antialias=True)
    steps = arguments.epochs * len(chips) // BATCH
    student = train(chips, patches, pooled, steps, arguments.work_path)

    weights = {k: v.half().contiguous() for k, v in student.backbone.state_dict().items()}
    metadata = {
        "name": "example (ViT-Ti/14, distilled)",
        "teacher": "SAM 2 Hiera-Tiny image trunk, Meta, Apache-2.0",
        "licence": "Apache-2.0",
        "recipe": f"{arguments.epochs} passes over {len(chips)} chips; see BACKBONE_CARD.md",
    }
    with written_whole(arguments.output) as part:
        save_file(weights, part, metadata=metadata)


if __name__ == "__main__":
    main()
