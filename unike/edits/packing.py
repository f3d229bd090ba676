"""Routed edits in the plain parts that a file keeps, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from unike.backbones.base import Backbone
from unike.edits.content import ANY, Content
from unike.edits.shares import EditRecord, LayerKnowledge, LayerShare, Routing
from unike.knowledge.patch import KeyValuePatch


def needs_of(routing: Routing, layers: Sequence[int], known: Mapping[int, LayerKnowledge]) -> dict[str, str]:
    """See ``Edit.needs``; empty where what is needed is not there."""
    out = {}
    leans = routing.memory != "edit" or routing.alpha == "adaptive"
    if routing.external == "latent" and leans:
        parts = [(i, known[i].checksum, len(known[i].bank)) for i in layers if i in known]
        whole = len(parts) == len(layers)
        out["knowledge"] = hashlib.sha256(repr(parts).encode()).hexdigest() if whole else ""
    if routing.scope_gate != "none" and routing.scope_measure == "trained":
        first = known.get(layers[0])
        out["scope"] = "" if first is None else first.scope_checksum
    return out


def packed_records(records: Sequence[EditRecord], routing: Routing) -> Content:
    """Of each patch the values with zeta's share in them: what it was trained with isn't needed again."""
    tensors = {}
    for n, record in enumerate(records):
        for index, share in record.layers.items():
            at = f"{n}.{index}"
            tensors[f"{at}.key"], tensors[f"{at}.value"] = share.key, share.value
            if (patch := share.patch) is not None:
                own = {
                    "keys": patch.keys,
                    "up": patch.up,
                    "bias": patch.bias,
                    "values": patch.edited_values,
                }
                tensors |= {f"{at}.patch.{name}": t for name, t in own.items() if t is not None}
        if record.scope_key is not None:
            tensors[f"{n}.scope_key"] = record.scope_key
    values = {
        "routing": asdict(routing),
        "layers": sorted(records[0].layers),
        "records": [record.id for record in records],
        "demonstrations": [record.demonstration for record in records],
    }
    return Content(values, tensors)


def unpacked_records(content: Content, routing: Routing, backbone: Backbone) -> tuple[EditRecord, ...]:
    """Raises as ``Edit.unpacked``."""
    layers, names = content.value("layers", list), content.texts("records")
    if not layers or layers != [i for i in range(len(backbone.layout)) if i in layers]:
        raise ValueError(f"layers: expected ascending numbers below {len(backbone.layout)}")
    shown = content.texts("demonstrations")
    if not names or None in names or len(shown) != len(names):
        raise ValueError("records: expected one or more, and a demonstration or null for each")
    records = [
        EditRecord(
            str(name),
            {i: _share(content, f"{n}.{i}", backbone, i) for i in layers},
            shown[n],
            content.tensor(f"{n}.scope_key", None) if f"{n}.scope_key" in content.tensors else None,
        )
        for n, name in enumerate(names)
    ]
    kinds = {tuple(record.layers[i].kind for i in layers) for record in records}
    measured = routing.scope_gate != "none" and routing.scope_measure == "trained"
    if len(kinds) > 1 or any((record.scope_key is not None) != measured for record in records):
        raise ValueError("records: are of different kinds")
    return tuple(records)


def _share(content: Content, at: str, backbone: Backbone, index: int) -> LayerShare:
    width = backbone.layout.width
    key, value = (content.tensor(f"{at}.{part}", width, dtypes=ANY) for part in ("key", "value"))
    patched = f"{at}.patch.keys" in content.tensors
    return LayerShare(key, value, _patch(content, f"{at}.patch", backbone, index) if patched else None)


def _patch(content: Content, at: str, backbone: Backbone, index: int) -> KeyValuePatch:
    width, site = backbone.layout.width, backbone.layout.ffn(index)
    keys = content.tensor(f"{at}.keys", width, None)
    pairs = keys.shape[1]
    own = {"keys": keys, "values": content.tensor(f"{at}.values", pairs, width)}
    if site.gated:
        own["up"] = content.tensor(f"{at}.up", width, pairs)
    else:
        own["bias"] = content.tensor(f"{at}.bias", pairs)
    # A generator of its own: loading an edit draws nothing from the run's.
    patch = KeyValuePatch(width, pairs, site.activation, site.gated, generator=torch.Generator())
    patch.load_state_dict(own, assign=True)
    return patch.requires_grad_(False)
