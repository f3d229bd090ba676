"""Damaged inputs for the fuzzer: each is a function of valid content and a random generator."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

LONG = 10 << 20
_BYTES = (b"\0", b"\xff\xfe", b"\x80\x02", b"PK\x03\x04", b"\xf0\x9f\xa6\x8a", b"{{{{", b"]", b'"', b"\n")
_TEXTS = (
    "~", "null", "true", "[]", "{}", "-1", "0", "1e400", ".nan", ".inf", "1:1:1", "0x_", "2024-99-99",
    "2024-01-01", "!!python/object/apply:os.system [id]", "!!binary x", "!!set {a}", "*nothing",
    "&a [*a, *a]", '"\\0"', '"\\ud800"', "'../../../etc/passwd'", "/etc/passwd", "~root", "$HOME",
    "- a\n- b", "? a",
    "|\n  text", "...", "---", "99999999999999999999", "9" * 5000, "[" * 500, "a" * 300, "auto", "adaptive",
    "1_000", "<<: {a: 1}", "%YAML 9.9",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, float("nan"), 10**30, "", " ", "\n", [], {}, [1], {"a": 1}, "a\0b", "\ud800",
    "\u00e9" * 30, "../../../etc/passwd", "/etc/passwd", "..", ".", "/", "outside.png", "deep/../../0.png",
    "x" * 300, "a/" * 3000, "con", "{}", "{0}", "%s", "<ImageHere>", "</s>", "\u202e", "0.png/",
    "http://host/x.png",
)  # fmt: skip


def damage(content: bytes, draw: random.Random) -> bytes:
    """The content with a few bytes changed, removed, repeated, moved or inserted, or with the end cut off."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        at, length = draw.randrange(len(data) + 1), draw.choice((1, 2, 8, 64, 512))
        part = bytes(data[at : at + length])
        how = draw.randrange(6)
        if how == 0:
            data[at : at + length] = draw.randbytes(len(part))
        elif how == 1:
            del data[at : at + length]
        elif how == 2:
            data[at:at] = part * draw.choice((1, 2, 50))
        elif how == 3:
            data[at:at] = draw.choice(_BYTES)
        elif how == 4 and part:
            data[at] ^= 1 << draw.randrange(8)
        else:
            to = draw.randrange(len(data) + 1)
            data[to:to] = part
    if draw.random() < 0.1:
        del data[draw.randrange(len(data) + 1) :]
    return bytes(data)


def damage_yaml(text: str, draw: random.Random) -> bytes:
    """A YAML with lines or values replaced, sometimes with damaged bytes, rarely far too long."""
    if draw.random() < 0.25:
        return damage(text.encode(), draw)
    lines = text.splitlines()
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(lines))
        key, sign, _ = lines[at].partition(":")
        how = draw.randrange(6)
        if how == 0 and sign:
            lines[at] = f"{key}: {draw.choice(_TEXTS)}"
        elif how == 1 and sign:
            lines[at] = f"{damage(key.encode(), draw).decode('utf-8', 'replace')}: 1"
        elif how == 2:
            lines.insert(at, draw.choice(lines))
        elif how == 3:
            del lines[at]
        elif how == 4:
            lines.insert(at, draw.choice(_TEXTS))
        elif sign:
            lines[at] = (
                f"{key}: {draw.choice((draw.randint(-5, 99), draw.uniform(-2, 2), draw.choice(_TEXTS)))}"
            )
        if not lines:
            break
    if draw.random() < 0.002:
        lines.append(draw.choice(("name: ", "# ", "", "data: [")) + draw.choice("a[ -") * LONG)
    if draw.random() < 0.002:
        lines.append(_make_explosion())
    return "\n".join(lines).encode("utf-8", "replace")


def _make_explosion() -> str:
    """Aliases of aliases: a few hundred bytes that mean a billion values."""
    steps = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join(["a0: &a0 [x]", *steps])


def damage_annotations(records: Sequence[dict[str, Any]], draw: random.Random) -> bytes:
    """Annotations with fields replaced, renamed, removed or inserted, or with damaged bytes."""
    if draw.random() < 0.25:
        return damage(json.dumps(records).encode(), draw)
    changed: Any = copy.deepcopy(list(records))
    for _ in range(draw.choice((1, 1, 2, 4))):
        record = draw.choice(changed)
        field = draw.choice(sorted(record)) if record else "src"
        how = draw.randrange(5)
        if how == 0:
            record.pop(field, None)
        elif how == 1:
            record[field + draw.choice("s _")] = record.pop(field, 1)
        elif how == 2:
            record[field] = draw.choice(changed).get(field, 1)
        else:
            record[field] = draw.choice(_VALUES)
        if not record:
            break
    if draw.random() < 0.002:
        draw.choice(changed)["src"] = "w" * LONG
    if draw.random() < 0.02:
        changed = draw.choice(
            (changed[0], {"records": changed}, [changed], "text", None, 7, [None, *changed])
        )
    return json.dumps(changed).encode()


def make_images(draw: random.Random) -> list[tuple[str, bytes]]:
    """Small valid images by format."""
    found = []
    image = Image.frombytes("RGB", (24, 18), draw.randbytes(24 * 18 * 3))
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "tga", "ico", "jpeg2000", "sgi", "pcx"):
        out = io.BytesIO()
        image.save(out, kind)
        found.append((kind, out.getvalue()))
    return found


def make_huge_image(draw: random.Random) -> bytes:
    """An image whose header claims far more pixels than there are."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, draw.choice(("bmp", "png", "gif")))
    data = bytearray(out.getvalue())
    at = {b"BM": 18, b"\x89P": 16, b"GI": 6}[bytes(data[:2])]
    data[at : at + 8] = draw.choice((b"\xff\x7f\0\0", b"\0\0\x7f\xff", b"\xff\xff\xff\x7f")) * 2
    return bytes(data)


class _Code:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').mkdir({self.command!r})",)


def _make_claiming() -> dict[str, torch.Tensor]:
    """A tensor of 10^12 numbers over the storage of one."""
    return {"cls_token": torch.zeros(1).expand(10**6, 10**6)}


def damage_checkpoint(content: bytes, draw: random.Random) -> bytes:
    """A checkpoint with damaged bytes, or a hostile one."""
    if draw.random() < 0.7 or not content.startswith(b"PK"):
        return damage(content, draw)
    makers: tuple[Callable[[], bytes], ...] = (
        lambda: _save({"cls_token": _Code("written-by-a-pickle")}),
        lambda: pickle.dumps(_Code("written-by-a-pickle"), protocol=2),
        lambda: _save(_make_claiming()),
        lambda: _pack_bomb(content, draw),
        lambda: _damage_entries(content, draw),
        lambda: _save({"a": torch.zeros(3).to_sparse(), "b": torch.zeros(2)}),
        lambda: _save({"model": draw.choice(({}, [], {1: torch.ones(2)}, {"a": 1}))}),
    )
    return draw.choice(makers)()


def _save(content: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def _pack_bomb(content: bytes, draw: random.Random) -> bytes:
    """A zip bomb: an entry of zeros, compressed a thousandfold."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        grown = draw.choice(old.namelist())
        for name in old.namelist():
            new.writestr(name, b"\0" * LONG if name == grown else old.read(name))
    return out.getvalue()


def _damage_entries(content: bytes, draw: random.Random) -> bytes:
    """An archive with damaged entries and a valid directory."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        names = old.namelist()
        hit = draw.choice([name for name in names if name.endswith("data.pkl")] + names)
        for name in names:
            if name != hit or draw.random() < 0.8:
                new.writestr(name, damage(old.read(name), draw) if name == hit else old.read(name))
    return out.getvalue()


def change_value(value: Any, draw: random.Random) -> Any:
    """A JSON value with one place in it replaced, removed, repeated or changed by one."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(sorted(value))
        rest = {n: v for n, v in value.items() if n != name}
        how = draw.randrange(12)
        if how == 0:
            return rest
        return {**rest, name + "s" if how == 1 else name: change_value(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        how = draw.randrange(8)
        if how == 0:
            return value[:at] + value[at + 1 :]
        if how == 1:
            return [*value, value[at]]
        return [*value[:at], change_value(value[at], draw), *value[at + 1 :]]
    if type(value) in (int, float) and draw.random() < 0.5:
        return value + draw.choice((-1, 1, 0.5, 1000))
    return draw.choice(_VALUES)


def change_tensors(tensors: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    """The tensors with one of them removed, repeated, or given another shape, type or content."""
    name = draw.choice(sorted(tensors) or ["0.4.key"])
    tensor = tensors.get(name, torch.ones(2))
    makers: tuple[Callable[[], dict[str, torch.Tensor]], ...] = (
        lambda: {n: t for n, t in tensors.items() if n != name},
        lambda: {**tensors, name + "s": tensor.clone()},
        lambda: {**tensors, name: tensor[..., :-1].contiguous()},
        lambda: {**tensors, name: tensor[None]},
        lambda: {**tensors, name: tensor.reshape(-1)},
        lambda: {**tensors, name: tensor.flip(-1).unsqueeze(-1)},
        lambda: {**tensors, name: tensor * float(draw.choice(("nan", "inf")))},
        lambda: {**tensors, name: tensor.to(draw.choice((torch.int8, torch.float64, torch.bool)))},
        lambda: {**tensors, name: tensor.half()},
        lambda: {**tensors, name: torch.zeros(1 << 20)},
        lambda: {**tensors, name: torch.zeros(0)},
        lambda: {**tensors, name: -tensor},
    )
    return draw.choice(makers)()


def require(condition: bool, reason: str) -> None:
    """AssertionError for an input that loads and means something else."""
    if not condition:
        raise AssertionError(f"loaded, but {reason}")
