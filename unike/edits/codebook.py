"""GRACE's edits: a codebook of keys and values at one layer's feed-forward network (Hartvigsen et al. 2023).

A key is what enters the network's last projection at the end of an edit's prompt, its value what leaves it
there instead. A prompt whose state lies within the radius of the nearest key gets that key's value; at all
others the layer is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import torch
from torch import nn

from unike.backbones.base import Backbone
from unike.backbones.hooks import transform, watch
from unike.edits.activity import UNKNOWN, Activity, Decisions
from unike.edits.base import Edit, EditBatch, Inspection
from unike.edits.content import Content
from unike.edits.shares import Shared

# From states at the prompts' ends, ``(R, w)``: which rows get a value, ``(R)``, and the values, ``(R, d)``.
Choose = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class CodebookEntry:
    """One edit as it was made: ``key (w)``, ``value (d)``, the ``radius`` that it starts with, and its
    ``target``, by which two edits agree or not."""

    id: str
    target: str
    key: torch.Tensor
    value: torch.Tensor
    radius: float


@dataclass(frozen=True)
class Ball:
    """A key of the codebook with its value and its radius now, and the places of the entries in it."""

    key: torch.Tensor
    value: torch.Tensor
    radius: float
    target: str
    places: tuple[int, ...]


def add_entry(balls: Sequence[Ball], entry: CodebookEntry, place: int) -> tuple[Ball, ...]:
    """The codebook with one more entry.

    Where its ball does not meet that of the nearest key, it is a key of its own. If the targets agree, the
    nearest ball expands to the new key and takes its value; if not, both radii become half the distance.
    """
    new = Ball(entry.key, entry.value, entry.radius, entry.target, (place,))
    if not balls:
        return (new,)
    distances = measure_distances(entry.key[None], torch.stack([ball.key for ball in balls]))[0]
    nearest = int(find_nearest(distances[None])[0])
    ball, distance = balls[nearest], distances[nearest].item()
    rest = list(balls)
    if distance > entry.radius + ball.radius:
        return (*rest, new)
    if ball.target == entry.target:
        radius, places = max(ball.radius, distance), (*ball.places, place)
        rest[nearest] = replace(ball, value=entry.value, radius=radius, places=places)
        return tuple(rest)
    rest[nearest] = replace(ball, radius=distance / 2)
    return (*rest, replace(new, radius=distance / 2))


def measure_distances(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Euclidean distances, ``(R, w), (K, w) -> (R, K)``, without the rounding of squares."""
    return torch.cdist(queries.float(), keys.float(), compute_mode="donot_use_mm_for_euclid_dist")


def find_nearest(distances: torch.Tensor) -> torch.Tensor:
    """The nearest key of each row, ``(R, K) -> (R)``; of equally near ones the newest."""
    return distances.shape[1] - 1 - distances.flip(1).argmin(1)


@contextmanager
def replace_outputs(backbone: Backbone, layer: int, choose: Choose) -> Iterator[None]:
    """Inside the block the layer's feed-forward network gives, at the last token of each prompt, the value
    that ``choose`` has for it. UserError where the model is called by itself."""
    prompt, shape = backbone.prompt, list[int]()

    def see(hidden: torch.Tensor) -> None:
        shape[:] = hidden.shape[:2]

    def write(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        rows, length = shape
        asked = prompt.spread(rows)
        if length < asked.attention_mask.shape[1]:
            # Further tokens of an answer: its prompt has passed.
            return output
        ends = asked.question_end
        # OPT hands its feed-forward network all rows' tokens in one dimension.
        states = x.reshape(rows, length, -1)[torch.arange(rows, device=x.device), ends]
        chosen, values = choose(states.detach().float())
        at = (torch.arange(length, device=x.device) == ends[:, None]) & chosen[:, None]
        whole = output.reshape(rows, length, -1)
        return torch.where(at[..., None], values[:, None].to(output.dtype), whole).reshape(output.shape)

    module = cast(nn.Linear, backbone.layout.ffn(layer).value)
    with watch(backbone.layout.layer(layer), see), transform([(module, module, write)]):
        yield


@dataclass
class CodebookEdit(Edit):
    """GRACE's edits at one ``layer``, in order. After a forward pass ``distances (R, K)`` are those of the
    last prompts from the keys of ``balls``, and ``chosen (R)`` says which key each of them got, -1 for none.
    """

    kind = "codebook"
    entries: tuple[CodebookEntry, ...]
    layer: int
    info: dict[str, object] = field(default_factory=dict)
    distances: torch.Tensor | None = field(default=None, repr=False)
    chosen: torch.Tensor | None = field(default=None, repr=False)

    @cached_property
    def balls(self) -> tuple[Ball, ...]:
        """The codebook that the entries make in their order."""
        balls: tuple[Ball, ...] = ()
        for place, entry in enumerate(self.entries):
            balls = add_entry(balls, entry, place)
        return balls

    def choose(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest key's value, where the state is within its radius."""
        keys = torch.stack([ball.key for ball in self.balls])
        radii = keys.new_tensor([ball.radius for ball in self.balls])
        self.distances = measure_distances(states, keys)
        nearest = find_nearest(self.distances)
        inside = self.distances.gather(1, nearest[:, None])[:, 0] <= radii[nearest]
        self.chosen = torch.where(inside, nearest, -1)
        return inside, torch.stack([ball.value for ball in self.balls])[nearest]

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[None]:
        with replace_outputs(backbone, self.layer, self.choose):
            yield

    def changes_prefix(self, backbone: Backbone, first: int) -> bool:
        return self.layer < first

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {f"{n}.{part}": getattr(e, part) for n, e in enumerate(self.entries) for part in _TENSORS}

    def pack(self) -> Content:
        values: dict[str, object] = {
            "entries": [entry.id for entry in self.entries],
            "targets": [entry.target for entry in self.entries],
            "radii": [entry.radius for entry in self.entries],
            "layer": self.layer,
        }
        return Content(values, self.state_dict())

    @classmethod
    def unpack(cls, content: Content, backbone: Backbone, shared: Shared) -> CodebookEdit:
        layer, names = content.take_value("layer", int), content.take_texts("entries")
        targets, radii = content.take_texts("targets"), content.take_value("radii", list)
        if not 0 <= layer < len(backbone.layout):
            raise ValueError(f"layer: expected a number below {len(backbone.layout)}")
        if not names or not len(names) == len(targets) == len(radii):
            raise ValueError("entries: expected one or more, with as many targets and radii")
        if not all(isinstance(radius, float) and radius >= 0 for radius in radii):
            raise ValueError("radii: expected numbers of at least 0")
        module = cast(nn.Linear, backbone.layout.ffn(layer).value)
        entries = [
            CodebookEntry(
                str(name),
                str(targets[n]),
                content.take_tensor(f"{n}.key", module.in_features),
                content.take_tensor(f"{n}.value", module.out_features),
                radii[n],
            )
            for n, name in enumerate(names)
        ]
        return cls(tuple(entries), layer)

    @property
    def units(self) -> tuple[CodebookEntry, ...]:
        return self.entries

    def keep_units(self, units: Sequence[CodebookEntry]) -> Edit | None:
        return CodebookEdit(tuple(units), self.layer, self.info)

    def describe_prompt(self, inspection: Inspection) -> tuple[Activity, ...]:
        return tuple(_describe_entry(*inspection.locate(entry)) for entry in self.entries)

    def explain(self) -> Decisions:
        """The ``distance`` from the nearest key."""
        return {} if self.distances is None else {"distance": self.distances.amin(1).tolist()}

    def batch(self, edits: Sequence[Edit]) -> EditBatch | None:
        same = [e for e in edits if isinstance(e, CodebookEdit) and len(e.entries) == 1]
        if len(same) < len(edits) or any(e.layer != self.layer for e in same):
            return None
        return _CodebookBatch([e.entries[0] for e in same], self.layer)

    def join(self, other: Edit) -> Edit | None:
        if not isinstance(other, CodebookEdit) or other.layer != self.layer:
            return None
        out = CodebookEdit(self.entries + other.entries, self.layer, self.info | other.info)
        balls = self.balls
        for place, entry in enumerate(other.entries, len(self.entries)):
            balls = add_entry(balls, entry, place)
        # What is worked out already is not worked out again.
        vars(out)["balls"] = balls
        return out


_TENSORS = ("key", "value")


class _CodebookBatch(EditBatch):
    """Independent edits of one entry each: a row is compared with its own edit's key only."""

    def __init__(self, entries: Sequence[CodebookEntry], layer: int) -> None:
        self.layer = layer
        self.keys = torch.stack([entry.key for entry in entries])
        self.values = torch.stack([entry.value for entry in entries])
        self.radii = self.keys.new_tensor([entry.radius for entry in entries])
        self.distances: torch.Tensor | None = None

    @contextmanager
    def applied(self, backbone: Backbone, owners: torch.Tensor) -> Iterator[None]:
        def choose(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            own = owners.repeat_interleave(len(states) // len(owners))
            # As one row with one key, so that the rounding is that of an edit alone.
            pairs = zip(states, self.keys[own], strict=True)
            self.distances = torch.cat([measure_distances(s[None], k[None]) for s, k in pairs])
            return self.distances[:, 0] <= self.radii[own], self.values[own]

        with replace_outputs(backbone, self.layer, choose):
            yield

    def explain(self) -> Decisions:
        return {} if self.distances is None else {"distance": self.distances[:, 0].tolist()}


def _describe_entry(whole: Edit, place: int) -> Activity:
    assert isinstance(whole, CodebookEdit)
    if whole.chosen is None or whole.distances is None:
        return UNKNOWN
    number = next(n for n, ball in enumerate(whole.balls) if place in ball.places)
    distance, radius = whole.distances[0, number].item(), whole.balls[number].radius
    note = f"the prompt's state is {distance:.3g} from the key, whose radius is {radius:.3g}"
    return Activity(int(whole.chosen[0]) == number, notes=(note,))
