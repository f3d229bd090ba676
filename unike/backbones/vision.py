"""The vision side of a backbone: from an image to its tokens in the decoder.

There are three steps, so that an image is encoded once and projected each time. ``pixels`` reads it; ``see``
computes what no edit changes, which is cached; ``tokens`` projects that into the decoder. An edit of the
projection changes the last step, and a gradient reaches it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from unike.backbones.hooks import inputs_of, transform
from unike.backbones.images import Parts, is_pixels, load_image_processor, normalise
from unike.datasets.images import open_image
from unike.types import ImageLike, UserError


class Vision(ABC):
    """What every vision side offers; ``processor`` is the image processor of ``transformers``.

    ``tower_path`` and ``projection_path`` are the paths in the model of what reads the pixels, and of what
    projects the vision side's states into the decoder.
    """

    tower_path: ClassVar[str]
    projection_path: ClassVar[str]

    def __init__(self, model: PreTrainedModel, folder: str | None, image_size: int | None = None) -> None:
        self.model: Any = model
        self.image_size = image_size
        self.processor: Any = self._processor(folder, image_size)

    def _processor(self, folder: str | None, size: int | None) -> Any:
        # Pillow's, whatever else is installed: pixels must not depend on that.
        return AutoImageProcessor.from_pretrained(folder, backend="pil")

    @property
    def tower(self) -> Any:
        """What reads the pixels."""
        return self.model.get_submodule(self.tower_path)

    @property
    def projection(self) -> nn.Module:
        """What projects the vision side's states into the decoder."""
        module: nn.Module = self.model.get_submodule(self.projection_path)
        return module

    @property
    def settings(self) -> str:
        """All that an image's tokens depend on, besides weights and configuration."""
        return f"{self.processor.to_json_string()} {self.image_size}"

    @abstractmethod
    def pixels(self, image: ImageLike) -> Parts:
        """An image as the model takes it; UserError where it cannot be read."""

    @abstractmethod
    def see(self, shown: Sequence[Parts]) -> list[Parts]:
        """For each image what ``tokens`` needs; ``features`` is what the projection receives."""

    def tokens(self, seen: Parts, prompt: str) -> torch.Tensor:
        """``(n, d)``: the image's tokens in the decoder, which may depend on the prompt."""
        return self.projection(seen["features"])

    def positions(self, before: int, seen: Parts | None, after: int) -> torch.Tensor | None:
        """``(3, s)``: positions in time, height and width of ``before`` text tokens, the image's tokens, and
        ``after`` text tokens. None for decoders that count their tokens."""
        return None


class FixedVision(Vision):
    """A vision side that takes all images at one size."""

    def read(self, image: Image.Image) -> torch.Tensor:
        """``(3, H, W)`` as the processor makes it."""
        pixels: torch.Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def pixels(self, image: ImageLike) -> Parts:
        pixels = normalise(image, self.read)
        self._require_size(image, pixels)
        return {"pixel_values": pixels}

    def _require_size(self, image: ImageLike, pixels: torch.Tensor) -> None:
        """UserError for a tensor that is not of the size at which the processor makes images."""
        if is_pixels(image):
            shape = tuple(self.read(Image.new("RGB", (1, 1))).shape)
            if tuple(pixels.shape) != shape:
                raise UserError(
                    f"image tensor: expected {shape}, as the model takes images, got {tuple(pixels.shape)}"
                )

    def stack(self, shown: Sequence[Parts]) -> torch.Tensor:
        """The images ``(b, 3, H, W)``, on the tower's device and in its type."""
        return torch.stack([parts["pixel_values"] for parts in shown]).to(next(self.tower.parameters()))


class Blip2Vision(FixedVision):
    """Vision tower and Q-Former, at any size: positions are resized to it."""

    tower_path = "vision_model"
    projection_path = "language_projection"

    def __init__(self, model: PreTrainedModel, folder: str | None, image_size: int | None = None) -> None:
        self._trained: int = model.config.vision_config.image_size
        super().__init__(model, folder, image_size or self._trained)

    def _processor(self, folder: str | None, size: int | None) -> Any:
        return load_image_processor(folder, size or self._trained)

    @torch.no_grad()
    def see(self, shown: Sequence[Parts]) -> list[Parts]:
        """The Q-Former's output, in the vision tower's precision."""
        given = self.stack(shown)
        seen = self.model.get_image_features(given, interpolate_pos_encoding=self.image_size != self._trained)
        return [{"features": state} for state in seen.qformer_outputs[0].to(given.dtype)]


class ProjectorVision(FixedVision):
    """Vision tower and projector of the LLaVA models."""

    tower_path = "model.vision_tower"
    projection_path = "model.multi_modal_projector"

    @torch.no_grad()
    def see(self, shown: Sequence[Parts]) -> list[Parts]:
        """The states of the tower's chosen layer, ``(patches, d)``."""
        given = self.stack(shown)
        args, _ = inputs_of(self.projection, lambda: self.model.get_image_features(given))
        return [{"features": state} for state in args[0]]


class PooledVision(FixedVision):
    """Convolutional tower and projector of smol."""

    tower_path = "vision_tower"
    projection_path = "multi_modal_projector"

    @torch.no_grad()
    def see(self, shown: Sequence[Parts]) -> list[Parts]:
        """``(1 + cells, d)`` of each image: the mean of the tower's map, and of its cells."""
        return [{"features": cells} for cells in self.tower(self.stack(shown))]


class SplitVision(ProjectorVision):
    """An image is encoded as a whole and in tiles, whose number depends on its shape (LLaVA-OneVision)."""

    def pixels(self, image: ImageLike) -> Parts:
        return _cut(image, self.processor)

    @torch.no_grad()
    def see(self, shown: Sequence[Parts]) -> list[Parts]:
        """``(tiles, patches, d)`` of each image, with its ``image_sizes``."""
        return [self._see(parts["pixel_values"], parts["image_sizes"]) for parts in shown]

    def _see(self, tiles: torch.Tensor, sizes: torch.Tensor) -> Parts:
        given = tiles.to(self.tower.device, self.tower.dtype)
        args, _ = inputs_of(self.projection, lambda: self.model.get_image_features(given, sizes))
        return {"features": args[0], "image_sizes": sizes}

    def tokens(self, seen: Parts, prompt: str) -> torch.Tensor:
        """The whole image's tokens, then its tiles' without their padding, row by row."""
        model = self.model.model
        tiles = self.projection(seen["features"])
        packed, _ = model.pack_image_features(
            [tiles],
            seen["image_sizes"],
            image_newline=model.image_newline,
            vision_aspect_ratio=self.model.config.vision_aspect_ratio,
        )
        return packed[0]


class GridVision(Vision):
    """Qwen's vision tower: as many patches as the image's size gives, merged by four, placed in a grid."""

    tower_path = "model.visual"
    projection_path = "model.visual.merger"

    def pixels(self, image: ImageLike) -> Parts:
        return _cut(image, self.processor)

    @torch.no_grad()
    def see(self, shown: Sequence[Parts]) -> list[Parts]:
        """``(n, merged patches, d)`` of each image in reading order, with its ``image_grid_thw``."""
        return [self._see(parts["pixel_values"], parts["image_grid_thw"]) for parts in shown]

    def _see(self, patches: torch.Tensor, grid: torch.Tensor) -> Parts:
        received: list[torch.Tensor] = []

        def number(hidden: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
            received.append(hidden)
            return torch.arange(len(merged), device=merged.device)[:, None]

        given, grid = patches.to(self.tower.device, self.tower.dtype), grid.to(self.tower.device)
        with transform([(self.projection, self.projection, number)]):
            order = torch.cat(self.model.get_image_features(given, grid).pooler_output)[:, 0]
        # A tower with windows merges patches window by window, and reorders the result.
        return {"features": received[0].unflatten(0, (len(order), -1))[order], "image_grid_thw": grid}

    def tokens(self, seen: Parts, prompt: str) -> torch.Tensor:
        return self.projection(seen["features"].flatten(0, 1))

    def positions(self, before: int, seen: Parts | None, after: int) -> torch.Tensor:
        """The model's own: an image's tokens share a point in time, and text continues after its longer
        side."""
        n, grid = (0, None) if seen is None else (len(seen["features"]), seen["image_grid_thw"])
        kinds = torch.tensor([[0] * before + [1] * n + [0] * after], device=self.tower.device)
        placed, _ = self.model.model.get_rope_index(kinds, mm_token_type_ids=kinds, image_grid_thw=grid)
        return placed[:, 0]


class InstructVision(FixedVision):
    """InstructBLIP: the Q-Former reads the prompt, so that only the tower's output depends on the image
    alone."""

    tower_path = "vision_model"
    projection_path = "language_projection"

    def __init__(self, model: PreTrainedModel, folder: str | None, image_size: int | None = None) -> None:
        super().__init__(model, folder, image_size)
        self.reader = AutoTokenizer.from_pretrained(
            folder, subfolder="qformer_tokenizer", truncation_side="left"
        )

    @property
    def settings(self) -> str:
        return f"{super().settings} {self.reader.backend_tokenizer.to_str()}"

    @torch.no_grad()
    def see(self, shown: Sequence[Parts]) -> list[Parts]:
        """The tower's output, ``(patches, d)``."""
        given = self.stack(shown)
        return [{"features": state} for state in self.model.vision_model(given).last_hidden_state]

    def tokens(self, seen: Parts, prompt: str) -> torch.Tensor:
        with torch.no_grad():
            queries = self._ask(seen["features"][None], prompt)
        return self.projection(queries.to(self.tower.dtype))[0]

    def _ask(self, patches: torch.Tensor, prompt: str) -> torch.Tensor:
        """The Q-Former's output for one image and prompt; it reads the last tokens of the prompt that fit."""
        model, limit = self.model, self.model.config.qformer_config.max_position_embeddings
        read = self.reader(prompt, truncation=True, max_length=limit, return_tensors="pt")
        ids, queries = read.input_ids.to(patches.device), model.query_tokens
        out = model.qformer(
            input_ids=ids,
            query_embeds=queries,
            encoder_hidden_states=patches,
            attention_mask=ids.new_ones(1, queries.shape[1] + ids.shape[1]),
            encoder_attention_mask=ids.new_ones(patches.shape[:2]),
        )
        return out.last_hidden_state[:, : queries.shape[1]]


def _cut(image: ImageLike, processor: Any) -> Parts:
    """The output for one image of an image processor that cuts images by their shape."""
    if is_pixels(image):
        raise UserError("image tensor: this backbone cuts images itself; expected a path or a PIL image")
    try:
        made = processor(open_image(image), return_tensors="pt")
    except ValueError as error:
        raise UserError(f"image: {error}") from error
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
