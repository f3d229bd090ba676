"""Routed edits as the plain parts that a file keeps, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from unike.backbones.base import Backbone
from unike.edits.content import ANY, Content
from unike.edits.shares import EditRecord, LayerKnowledge, LayerShare, Routing
from unike.knowledge.patch import KeyValuePatch


def list_needs(
    routing: Routing, layers: Sequence[int], known: Mapping[int, LayerKnowledge]
) -> dict[str, str]:
    """The value of ``Edit.needs``; an empty checksum where what is needed is missing."""
    out = {}
    uses_memory = routing.memory != "edit" or routing.alpha == "adaptive"
    if routing.external == "latent" and uses_memory:
        parts = [(i, known[i].checksum, len(known[i].bank)) for i in layers if i in known]
        whole = len(parts) == len(layers)
        out["knowledge"] = hashlib.sha256(repr(parts).encode()).hexdigest() if whole else ""
    if routing.scope_gate != "none" and routing.scope_measure == "trained":
        first = known.get(layers[0])
        out["scope"] = "" if first is None else first.scope_checksum
    return out


def pack_records(records: Sequence[EditRecord], routing: Routing) -> Content:
    """The records' parts; a patch's values include zeta's share, so that zeta itself is not needed."""
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
            if share.inputs is not None:
                tensors[f"{at}.inputs"] = share.inputs
        if record.scope_key is not None:
            tensors[f"{n}.scope_key"] = record.scope_key
    values: dict[str, object] = {
        "routing": asdict(routing),
        "layers": sorted(records[0].layers),
        "records": [record.id for record in records],
        "demonstrations": [record.demonstration for record in records],
    }
    return Content(values, tensors)


def unpack_records(content: Content, routing: Routing, backbone: Backbone) -> tuple[EditRecord, ...]:
    """The records of ``pack_records``; raises as ``Edit.unpack``."""
    layers, names = content.take_value("layers", list), content.take_texts("records")
    if not layers or layers != [i for i in range(len(backbone.layout)) if i in layers]:
        raise ValueError(f"layers: expected ascending numbers below {len(backbone.layout)}")
    shown = content.take_texts("demonstrations")
    if not names or None in names or len(shown) != len(names):
        raise ValueError("records: expected one or more, and a demonstration or null for each")
    records = [
        EditRecord(
            str(name),
            {i: _unpack_share(content, f"{n}.{i}", backbone, i) for i in layers},
            shown[n],
            content.take_tensor(f"{n}.scope_key", None) if f"{n}.scope_key" in content.tensors else None,
        )
        for n, name in enumerate(names)
    ]
    kinds = {tuple(record.layers[i].kind for i in layers) for record in records}
    measured = routing.scope_gate != "none" and routing.scope_measure == "trained"
    if len(kinds) > 1 or any((record.scope_key is not None) != measured for record in records):
        raise ValueError("records: are of different kinds")
    return tuple(records)


def _unpack_share(content: Content, at: str, backbone: Backbone, index: int) -> LayerShare:
    width = backbone.layout.width
    key, value = (content.take_tensor(f"{at}.{part}", width, dtypes=ANY) for part in ("key", "value"))
    patched = f"{at}.patch.keys" in content.tensors
    patch = _unpack_patch(content, f"{at}.patch", backbone, index) if patched else None
    kept = f"{at}.inputs" in content.tensors
    return LayerShare(key, value, patch, content.take_tensor(f"{at}.inputs", None, width) if kept else None)


def _unpack_patch(content: Content, at: str, backbone: Backbone, index: int) -> KeyValuePatch:
    width, site = backbone.layout.width, backbone.layout.ffn(index)
    keys = content.take_tensor(f"{at}.keys", width, None)
    pairs = keys.shape[1]
    own = {"keys": keys, "values": content.take_tensor(f"{at}.values", pairs, width)}
    if site.gated:
        own["up"] = content.take_tensor(f"{at}.up", width, pairs)
    else:
        own["bias"] = content.take_tensor(f"{at}.bias", pairs)
    # A generator of its own: loading an edit draws nothing from the run's.
    patch = KeyValuePatch(width, pairs, site.activation, site.gated, generator=torch.Generator())
    patch.load_state_dict(own, assign=True)
    return patch.requires_grad_(False)
