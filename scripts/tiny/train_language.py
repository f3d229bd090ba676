"""Stage 2 of the toy models: projection and language model, after the frozen vision encoder of stage 1.

    python -m scripts.tiny.train_language --decoder opt --vision work/vision.safetensors \
        --out hugging_cache/tiny-blip2-opt --steps 1600

Plain questions first, then in-context demonstrations in the prompt and, for the last layers, in
latent space. The latent task is close to the method under test (its feature shift, with random
distractors). Without it a model this small does not read knowledge states at all.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessorPil,
    PreTrainedTokenizerFast,
)

from scripts.tiny.curriculum import Curriculum, LatentPair, TrainingExample
from scripts.tiny.scenes import SIZE, Painter, disturb, sample_scene
from scripts.tiny.tokenizer import WRAP, build
from scripts.tiny.train_vision import QUERY_TOKENS, make_qformer_config, make_vision_config, schedule_rate
from unike.backbones.hooks import capture, transform
from unike.backbones.layout import DecoderLayout
from unike.knowledge.adapter import knowledge_attention, shift

EDITED_LAYERS = 4
DISTRACTORS = 24
PLAIN_SHARE = 0.4
CHUNKS = 4


def make_model(decoder: str, tokenizer: PreTrainedTokenizerFast) -> Blip2ForConditionalGeneration:
    text = {
        "model_type": decoder,
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if decoder == "opt":
        text |= {"ffn_dim": 768, "word_embed_proj_dim": 192, "dropout": 0.0, "attention_dropout": 0.0}
    else:
        text |= {"intermediate_size": 512, "num_key_value_heads": 6}
    config = Blip2Config(
        vision_config=make_vision_config().to_dict(),
        qformer_config=make_qformer_config().to_dict(),
        text_config=text,
        num_query_tokens=QUERY_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return Blip2ForConditionalGeneration(config)


def load_vision_encoder(model: Blip2ForConditionalGeneration, path: Path) -> None:
    vision = {k: v for k, v in load_file(path).items() if not k.startswith("heads.")}
    missing = [
        k for k in model.load_state_dict(vision, strict=False).missing_keys if not k.startswith("language")
    ]
    if missing:
        raise SystemExit(f"{path}: lacks {missing[:3]}")
    for part in (model.vision_model, model.qformer):
        part.requires_grad_(False)
    model.query_tokens.requires_grad_(False)


@torch.no_grad()
def encode_scenes(
    model: Blip2ForConditionalGeneration, painter: Painter, scenes: list, batch: int = 256
) -> torch.Tensor:
    """Q-Former states of scenes, ``(N, QUERY_TOKENS, d_q)``: constants of this stage."""
    out = []
    for start in range(0, len(scenes), batch):
        pixels = (painter.draw(scenes[start : start + batch]) - 0.5) / 0.5
        out.append(model.get_image_features(pixels).qformer_outputs.last_hidden_state.half())
    return torch.cat(out)


class Trainer:
    """One language side, trained on a pool of encoded scenes."""

    def __init__(
        self,
        model: Blip2ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        encoded: torch.Tensor,
        wrap: bool,
    ) -> None:
        self.model, self.tokenizer, self.encoded = model, tokenizer, encoded
        self.lm = model.language_model
        self.layout = DecoderLayout(self.lm)
        self.attention = {i: self.layout.attention(i) for i in self.layout.last(EDITED_LAYERS)}
        self._ids: dict[str, list[int]] = {}
        image = [model.config.image_token_id] * QUERY_TOKENS
        self.image = self.tokenize(WRAP[0]) + image + self.tokenize(WRAP[1]) if wrap else image

    def tokenize(self, text: str) -> list[int]:
        if text not in self._ids:
            if len(self._ids) > 200_000:
                self._ids.clear()
            self._ids[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._ids[text]

    def make_batch(self, examples: list[TrainingExample]) -> dict[str, torch.Tensor]:
        rows, lengths = [], []
        for e in examples:
            prompt = (self.image if e.scene is not None else []) + self.tokenize(e.prompt)
            rows.append(prompt + self.tokenize(" " + e.answer) + [self.tokenizer.eos_token_id])
            lengths.append(len(prompt))
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
            labels[i, n : len(row)] = ids[i, n : len(row)]
        embeds = self.lm.get_input_embeddings()(ids)
        scenes = [e.scene for e in examples if e.scene is not None]
        if scenes:
            features = self.model.language_projection(self.encoded[scenes].float())
            where = (ids == self.model.config.image_token_id)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(where, features)
        last = mask.sum(1) - 2
        return {"embeds": embeds, "mask": mask, "labels": labels, "last": last}

    def run_decoder(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        # Right padding and a causal mask: no real token attends to a pad, so no mask is needed.
        backbone = self.lm.model
        return backbone(inputs_embeds=batch["embeds"], use_cache=False).last_hidden_state

    def score_answers(
        self, hidden: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss summed over answer tokens, and per row: share right, all right (without EOS)."""
        states, goal = hidden[:, :-1], labels[:, 1:]
        at = goal != -100
        logits = self.lm.lm_head(states[at])
        loss = F.cross_entropy(logits.float(), goal[at], reduction="sum")
        right = torch.zeros_like(at)
        right[at] = logits.argmax(-1) == goal[at]
        words = at & (goal != self.tokenizer.eos_token_id)
        return loss, (right & words).sum(1) / words.sum(1), (right | ~words).all(1)

    def compute_plain_loss(self, examples: list[TrainingExample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss per answer token; rows are sorted by length to save padding."""
        examples = sorted(
            examples,
            key=lambda e: len(self.tokenize(e.prompt)) + (len(self.image) if e.scene is not None else 0),
        )
        size = -(-len(examples) // CHUNKS)
        total, tokens, exact = torch.zeros(()), 0, []
        for start in range(0, len(examples), size):
            batch = self.make_batch(examples[start : start + size])
            loss, _, right = self.score_answers(self.run_decoder(batch), batch["labels"])
            total, tokens = total + loss, tokens + int((batch["labels"] != -100).sum())
            exact.append(right)
        return total / tokens, torch.cat(exact).float().mean()

    def compute_states(self, examples: list[TrainingExample]) -> dict[int, torch.Tensor]:
        """The input of each edited layer's self-attention at the last answer token, ``(B, d)``."""
        batch = self.make_batch(examples)
        with capture({i: s.module for i, s in self.attention.items()}) as seen:
            self.run_decoder(batch)
        rows = torch.arange(len(examples))
        return {i: x[rows, batch["last"]] for i, x in seen.items()}

    def compute_latent_loss(
        self,
        pairs: list[LatentPair],
        rng: np.random.Generator,
        alpha: float | None = None,
        distractors: int | None = None,
        crowd: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and accuracy of questions with the feature shift, from their own demonstration and random
        others."""
        states = self.compute_states([p.demonstration for p in pairs])
        count = len(pairs)
        width = min(DISTRACTORS, count - 1)
        others = torch.stack(
            [
                torch.from_numpy(rng.permutation([j for j in range(count) if j != i])[:width])
                for i in range(count)
            ]
        )
        choice = torch.cat([others, torch.arange(count)[:, None]], 1)
        kept = (
            torch.from_numpy(rng.integers(0, round(width * crowd) + 1, count))
            if distractors is None
            else torch.full((count,), distractors)
        )
        drop = torch.arange(width)[None] >= kept[:, None]
        offered = torch.tensor([p.offered for p in pairs])
        drop = torch.cat([drop, ~offered[:, None]], 1)
        drop[drop.all(1), 0] = False
        bias = torch.zeros(drop.shape).masked_fill(drop, -torch.inf)
        if alpha is None:
            share = torch.from_numpy(rng.uniform(0.2, 0.7, count)).float()
        else:
            share = torch.full((count,), alpha)
        batch = self.make_batch([p.question for p in pairs])

        def make_shift(index: int):
            knowledge = states[index][choice]
            return lambda x, out: shift(
                out, knowledge_attention(self.attention[index], x, knowledge, bias), share
            )

        with transform([(s.module, s.module, make_shift(i)) for i, s in self.attention.items()]):
            hidden = self.run_decoder(batch)
        loss, _, right = self.score_answers(hidden, batch["labels"])
        return loss / int((batch["labels"] != -100).sum()), right[offered].float().mean()


def make_optimisers(model: Blip2ForConditionalGeneration) -> list[torch.optim.Optimizer]:
    layers = DecoderLayout(model.language_model).layers
    matrices = [p for p in layers.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.05),
    ]


@torch.no_grad()
def evaluate(trainer: Trainer, pool: Curriculum, count: int = 160) -> dict[str, float]:
    """Exact answers on a held-out pool, in percent."""
    rng = np.random.default_rng(0)
    pairs = [p for p in pool.draw_latent(count) if p.offered]
    return {
        "plain": trainer.compute_plain_loss(pool.draw_plain(count))[1].item(),
        "text": trainer.compute_plain_loss(pool.draw_plain_text(count))[1].item(),
        "context": trainer.compute_plain_loss(pool.draw_context(count))[1].item(),
        "context_text": trainer.compute_plain_loss(pool.draw_context_text(count // 2))[1].item(),
        "latent_alone": trainer.compute_latent_loss(pairs, rng, 0.5, 0)[1].item(),
        "latent_crowd": trainer.compute_latent_loss(pairs, rng, 0.5, DISTRACTORS)[1].item(),
    }


def compute_step_loss(
    trainer: Trainer, pool: Curriculum, progress: float, plain_share: float
) -> tuple[torch.Tensor, dict[str, float]]:
    if progress < plain_share:
        image, a = trainer.compute_plain_loss(pool.draw_plain(80))
        text, b = trainer.compute_plain_loss(pool.draw_plain_text(64))
        return image + text, {"plain": a.item(), "text": b.item()}
    image, a = trainer.compute_plain_loss(pool.draw_plain(40) + pool.draw_context(24))
    text, b = trainer.compute_plain_loss(pool.draw_plain_text(24) + pool.draw_context_text(8))
    # Few distractors first: to read one state is learnt before to select it among many.
    crowd = min(1.0, 2.5 * (progress - plain_share) / (1 - plain_share))
    latent, c = trainer.compute_latent_loss(pool.draw_latent(32), pool.rng, crowd=crowd)
    words, d = trainer.compute_latent_loss(pool.draw_latent_text(8), pool.rng, crowd=crowd)
    return image + 0.7 * text + 0.7 * latent + 0.2 * words, {
        "plain": a.item(),
        "text": b.item(),
        "latent": c.item(),
        "latent_text": d.item(),
    }


def train(
    training: tuple[Trainer, Curriculum],
    testing: tuple[Trainer, Curriculum],
    steps: int,
    lr: float,
    plain_share: float,
) -> None:
    trainer, pool = training
    opts = make_optimisers(trainer.model)
    parameters = [p for opt in opts for g in opt.param_groups for p in g["params"]]
    start, running = time.monotonic(), {}
    for step in range(steps):
        progress = step / steps
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr * schedule_rate(progress, step)
        loss, shown = compute_step_loss(trainer, pool, progress, plain_share)
        trainer.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for opt in opts:
            opt.step()
        running = {k: 0.95 * running.get(k, v) + 0.05 * v for k, v in shown.items() if v == v}
        if step % 50 == 49:
            print(
                f"{step + 1} {time.monotonic() - start:.0f}s loss {loss.item():.3f}",
                {k: round(v, 3) for k, v in running.items()},
                flush=True,
            )
        if step % 200 == 199:
            print("held out:", {k: round(100 * v, 1) for k, v in evaluate(*testing).items()}, flush=True)
    print("held out:", {k: round(100 * v, 1) for k, v in evaluate(*testing, 480).items()}, flush=True)


def save(model: nn.Module, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes a Hugging Face folder, weights in fp16."""
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    BlipImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--decoder", choices=["opt", "llama"], required=True)
    parser.add_argument("--vision", "--eye", type=Path, required=True, help="what train_vision wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="a folder that this script wrote, to continue from")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--plain_share", type=float, default=PLAIN_SHARE)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--pool", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--textures", type=Path, default=Path("data/cache/openmoji.safetensors"))
    args = parser.parse_args()
    if args.out.is_file() or (args.out.is_dir() and any(args.out.iterdir())):
        parser.error(f"--out: {args.out} is not empty; name a new folder")
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tokenizer = build()
    model = make_model(args.decoder, tokenizer)
    if args.init is not None:
        model.load_state_dict(Blip2ForConditionalGeneration.from_pretrained(args.init).state_dict())
    load_vision_encoder(model, args.vision)
    scenes = [sample_scene(rng) for _ in range(args.pool)]
    scenes = [disturb(s, rng) if rng.random() < 0.3 else s for s in scenes]
    encoded = encode_scenes(model, Painter(args.textures), scenes)
    held_out = args.pool // 30
    wrap = args.decoder == "llama"
    training = Trainer(model, tokenizer, encoded[held_out:], wrap), Curriculum(scenes[held_out:], args.seed)
    testing = (
        Trainer(model, tokenizer, encoded[:held_out], wrap),
        Curriculum(scenes[:held_out], args.seed + 1),
    )
    train(training, testing, args.steps, args.lr, args.plain_share)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
