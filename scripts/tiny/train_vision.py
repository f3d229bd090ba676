"""Stage 1 of the toy models: vision tower and Q-Former, shared by both.

    python -m scripts.tiny.train_vision --out work/vision.safetensors --minutes 12

Auxiliary heads predict the left object, the right object and the background's colour from three query
tokens, and the object of every patch. The heads are discarded afterwards.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import Blip2QFormerConfig, Blip2VisionConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2VisionModel

from scripts.tiny.scenes import COLOR_NAMES, OBJECTS, SIZE, Painter, Scene, disturb, sample_scene

PATCH = 8
QUERY_TOKENS = 8
NOTHING = len(OBJECTS)
# The share of an object's size within which the centre of a patch counts as on the object.
PATCH_REACH = 0.42


def make_vision_config() -> Blip2VisionConfig:
    # The default initializer_range of 1e-10 leaves the tower without a signal to learn from.
    return Blip2VisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        initializer_range=0.02,
    )


def make_qformer_config() -> Blip2QFormerConfig:
    return Blip2QFormerConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        encoder_hidden_size=128,
        vocab_size=8,
        cross_attention_frequency=1,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


class VisionEncoder(nn.Module):
    """Vision tower, Q-Former and query tokens, with the auxiliary heads."""

    def __init__(self) -> None:
        super().__init__()
        vision, qformer = make_vision_config(), make_qformer_config()
        self.vision_model = Blip2VisionModel(vision)
        self.qformer = Blip2QFormerModel(qformer)
        # Query tokens that start equal stay equal: break the symmetry.
        self.query_tokens = nn.Parameter(torch.randn(1, QUERY_TOKENS, qformer.hidden_size))
        self.heads = nn.ModuleDict(
            {
                "object": nn.Linear(qformer.hidden_size, NOTHING + 1),
                "color": nn.Linear(qformer.hidden_size, len(COLOR_NAMES)),
                "patch": nn.Linear(vision.hidden_size, NOTHING + 1),
            }
        )

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch states ``(B, 1 + patches, d)`` and query states ``(B, QUERY_TOKENS, d_q)``."""
        patches = self.vision_model(pixel_values=(images - 0.5) / 0.5).last_hidden_state
        queries = self.query_tokens.expand(len(images), -1, -1)
        return patches, self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        patches, queries = self.encode(images)
        name = self.heads["object"]
        return [
            name(queries[:, 0]),
            name(queries[:, 1]),
            self.heads["color"](queries[:, 2]),
            self.heads["patch"](patches[:, 1:]),
        ]


def list_targets(scenes: list[Scene]) -> list[torch.Tensor]:
    """Left object, right object (``NOTHING`` if none), colour, and object per patch."""
    centre = torch.arange(0, SIZE, PATCH) + PATCH / 2
    ys, xs = torch.meshgrid(centre, centre, indexing="ij")
    grid = torch.full((len(scenes), SIZE // PATCH, SIZE // PATCH), NOTHING)
    for i, scene in enumerate(scenes):
        for index, p in zip(scene.objects, scene.placements, strict=True):
            grid[i][(xs - p.x) ** 2 + (ys - p.y) ** 2 < (p.size * PATCH_REACH) ** 2] = index
    return [
        torch.tensor([s.objects[0] for s in scenes]),
        torch.tensor([s.objects[1] if len(s.objects) > 1 else NOTHING for s in scenes]),
        torch.tensor([s.background for s in scenes]),
        grid.flatten(1),
    ]


def make_optimisers(encoder: VisionEncoder, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of both encoders, AdamW for all other parameters."""
    towers = (encoder.vision_model.encoder, encoder.qformer.encoder)
    matrices = [p for tower in towers for p in tower.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in encoder.parameters() if id(p) not in taken and p.requires_grad]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.05),
    ]


def schedule_rate(progress: float, step: int, warmup: int = 100) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine to 2%."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


def train(minutes: float, batch: int, lr: float, seed: int, cache: Path) -> VisionEncoder:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    painter, encoder = Painter(cache), VisionEncoder()
    opts = make_optimisers(encoder, lr)
    start, step, running = time.monotonic(), 0, torch.zeros(4)
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr * schedule_rate(progress, step)
        scenes = [sample_scene(rng) for _ in range(batch)]
        scenes = [disturb(s, rng) if rng.random() < 0.3 else s for s in scenes]
        goal = list_targets(scenes)
        guess = encoder(painter.draw(scenes))
        losses = [
            F.cross_entropy(g.float().flatten(0, -2), t.flatten()) for g, t in zip(guess, goal, strict=True)
        ]
        loss = losses[0] + losses[1] + 0.5 * losses[2] + 2 * losses[3]
        encoder.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        for opt in opts:
            opt.step()
        seen = [t < NOTHING for t in goal]
        right = [(g.argmax(-1) == t)[k].float().mean() for g, t, k in zip(guess, goal, seen, strict=True)]
        running = 0.97 * running + 0.03 * torch.stack(right)
        step += 1
        if step % 100 == 0:
            shown = " ".join(
                f"{n} {v:.3f}" for n, v in zip(("left", "right", "color", "patch"), running, strict=True)
            )
            print(f"{step} {time.monotonic() - start:.0f}s loss {loss.item():.3f} {shown}", flush=True)
    return encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--textures", type=Path, default=Path("data/cache/openmoji.safetensors"))
    args = parser.parse_args()
    if args.out.exists() or args.out.is_symlink():
        parser.error(f"--out: {args.out} is there already; name a new file")
    encoder = train(args.minutes, args.batch, args.lr, args.seed, args.textures)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in encoder.state_dict().items()}, args.out)


if __name__ == "__main__":
    main()
