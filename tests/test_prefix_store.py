"""States on disk: bit for bit what was computed, found by content, and never trusted when broken."""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from original_files import make_spec
from PIL import Image

from unike.backbones import load_backbone
from unike.backbones.base import encode_queries
from unike.backbones.hooks import transform
from unike.backbones.images import FeatureCache, content_key
from unike.backbones.prefix import PrefixCache, open_prefixes
from unike.backbones.store import RowStore, row_key
from unike.backbones.vlm import VisionLanguageBackbone
from unike.config.hparams import HyperParams
from unike.edits.deltas import WeightDelta
from unike.runs.checks import check_prefix_dir
from unike.types import Query, UserError

FIRST = 4
loaded: dict[str, VisionLanguageBackbone] = {}


@pytest.fixture(params=["float32", "bfloat16"])
def backbone(request) -> VisionLanguageBackbone:
    if request.param not in loaded:
        loaded[request.param] = load_backbone(replace(make_spec("blip2"), dtype=request.param))
    return loaded[request.param]


@pytest.fixture
def plain() -> VisionLanguageBackbone:
    return loaded.setdefault("float32", load_backbone(make_spec("blip2")))


def queries() -> list[Query]:
    teal, navy = (Image.new("RGB", (84, 84), color) for color in ("teal", "navy"))
    return [
        Query(teal, "what is it?", "a fox"),
        Query(navy, "what is it, please?", "two small dogs"),
        Query(None, "where?", None),
    ]


def hparams(folder, **changes) -> HyperParams:
    # Batches, which the uncached path below computes too.
    values = {"model_name": "blip2", "name": "unused", "prefix_dir": str(folder), "batch_invariant": False}
    return HyperParams.from_dict({**values, "eval_batch": 32, **changes})


def fresh(backbone, folder, **changes) -> PrefixCache:
    return open_prefixes(hparams(folder, **changes), backbone, FIRST)


def files(folder):
    return sorted(folder.glob("*/layer-*/rows-*.safetensors"))


def same(one, other) -> bool:
    parts = ("hidden", "labels", "attention_mask", "question_end")
    return one.hidden.dtype == other.hidden.dtype and all(
        torch.equal(getattr(one, p), getattr(other, p)) for p in parts
    )


# ---------------------------------------------------------------- exact


def test_computed_remembered_and_read_states_are_the_same_bits(backbone, tmp_path):
    cache, asked = fresh(backbone, tmp_path), queries()
    computed, remembered = cache.state(asked), cache.state(asked)
    again = fresh(backbone, tmp_path)
    read = again.state(asked)
    assert (cache.computed, again.computed, again.loaded) == (3, 0, 3)
    assert same(computed, remembered)
    assert same(computed, read)
    assert torch.equal(backbone.suffix(computed), backbone.suffix(read))
    turned = again.state(asked[::-1])
    assert not torch.equal(turned.hidden, read.hidden), "other queries have other states"


def test_the_cache_gives_the_bits_of_the_uncached_path(backbone, tmp_path):
    asked = queries()
    straight = backbone.prefix(encode_queries(backbone, asked), FIRST)
    for cache in (fresh(backbone, tmp_path), fresh(backbone, tmp_path)):
        state = cache.state(asked)
        real = state.attention_mask.bool()
        assert torch.equal(state.hidden[real], straight.hidden[real])
        assert torch.equal(backbone.suffix(state)[real], backbone.suffix(straight)[real])
    assert not real.all(), "the batch must hold padding for this to test anything"


def test_over_the_memory_budget_states_come_back_from_disk(backbone, tmp_path):
    asked = queries()
    roomy = PrefixCache(backbone, FIRST).state(asked)
    cache = fresh(backbone, tmp_path, prefix_memory_gb=0)
    first, again = cache.state(asked), cache.state(asked)
    assert len(cache) == 1, "memory holds one row at most"
    assert (cache.computed, cache.loaded) == (3, 2)
    assert same(roomy, first)
    assert same(first, again)


def test_the_least_recently_asked_go_first(plain):
    asked = [replace(queries()[0], prompt=f"what is {word}?") for word in ("red", "big", "old")]
    whole = PrefixCache(plain, FIRST)
    whole.state(asked)
    cache = PrefixCache(plain, FIRST, max_bytes=whole._rows.size - 1)
    cache.state(asked[:2])
    cache.state(asked[:1])
    cache.state(asked[2:])
    cache.state(asked[:1])
    assert cache.computed == 3
    cache.state(asked[1:2])
    assert cache.computed == 4


# ---------------------------------------------------------------- who shares what


def test_layers_precisions_and_weights_do_not_share_states(plain, tmp_path):
    asked = queries()
    fresh(plain, tmp_path).state(asked)
    seen = plain.cache.computed
    lower = open_prefixes(hparams(tmp_path), plain, FIRST - 1)
    lower.state(asked)
    assert lower.computed == len(asked)
    assert plain.cache.computed == seen, "pictures are not seen again for another layer"
    other = load_backbone(replace(make_spec("blip2"), dtype="bfloat16"))
    changed = load_backbone(make_spec("blip2"))
    with torch.no_grad():
        next(changed.model.parameters()).flatten()[0] += 1
    larger = load_backbone(replace(make_spec("blip2"), image_size=56))
    names = {b.identity for b in (plain, other, changed, larger)}
    assert len(names) == 4
    assert load_backbone(make_spec("blip2")).identity == plain.identity
    cache = fresh(changed, tmp_path)
    cache.state(asked)
    assert (cache.computed, cache.loaded) == (len(asked), 0)


def test_a_file_its_copy_and_the_picture_itself_are_seen_once(plain, tmp_path):
    picture = Image.effect_noise((90, 70), 60).convert("RGB")
    picture.save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    cache = PrefixCache(plain, FIRST)
    seen = plain.cache.computed
    forms = (picture, tmp_path / "a.png", str(tmp_path / "b.png"), Image.open(tmp_path / "b.png"))
    cache.state([Query(form, "what?", "noise") for form in forms])
    assert (cache.computed, plain.cache.computed) == (1, seen + 1)
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "b.png")
    cache.state([Query(tmp_path / "b.png", "what?", "noise")])
    assert (cache.computed, plain.cache.computed) == (2, seen + 2)


def test_keys_of_pictures_and_tensors():
    red, tall = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (2, 4), "red")
    assert content_key(red) == content_key(red.copy()) != content_key(tall)
    flat = torch.zeros(3, 2, 4)
    assert content_key(flat) == content_key(flat.clone())
    keys = {content_key(t) for t in (flat, flat.reshape(3, 4, 2), flat.bfloat16(), flat + 1)}
    assert len(keys) == 4


def test_vision_features_stay_within_their_bytes_and_come_from_disk(plain, tmp_path):
    pictures = [Image.new("RGB", (84, 84), (i, 0, 0)) for i in range(3)]
    store = RowStore(tmp_path, "x/vision", 10**9)
    cache = FeatureCache(plain.vision.see, max_bytes=1, store=store)
    first = cache.get(pictures, plain.vision.pixels)
    assert (cache.computed, len(cache._kept)) == (3, 1)
    again = cache.get(pictures, plain.vision.pixels)
    assert (cache.computed, len(cache._kept)) == (3, 1)
    assert all(torch.equal(a["features"], b["features"]) for a, b in zip(first, again, strict=True))
    forgetful = FeatureCache(plain.vision.see, max_bytes=1)
    forgetful.get(pictures, plain.vision.pixels)
    forgetful.get(pictures, plain.vision.pixels)
    assert forgetful.computed > 3


def test_layer_inputs_are_kept_by_mask_and_are_what_the_model_makes(backbone):
    one, other = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
    one[0, 5:], other[1, 4:] = 0, 0
    for mask in (one, other):
        kept, made = backbone.layer_inputs(mask), backbone._read_layer_inputs(mask)
        assert backbone.layer_inputs(mask)["attention_mask"] is kept["attention_mask"]
        assert kept.keys() == made.keys()
        assert torch.equal(kept["attention_mask"], made["attention_mask"])
    masks = [backbone.layer_inputs(mask)["attention_mask"] for mask in (one, other)]
    assert not torch.equal(*masks)


# ---------------------------------------------------------------- an edit must not reach the disk


def test_states_under_an_edit_are_not_written(plain, tmp_path):
    cache, asked = fresh(plain, tmp_path), queries()
    layer = plain.layout.layer(0)
    with transform([(layer, layer, lambda x, y: y + 1)]):
        cache.state(asked[:1])
    name = next(n for n, _ in plain.model.named_parameters() if n.startswith("language_projection"))
    delta = WeightDelta({name: torch.zeros_like(plain.model.get_parameter(name))})
    assert files(tmp_path) == []
    with delta.applied(plain):
        found = cache.state(asked[1:2])
    # What is written are the base model's states: the edit was off while they were computed.
    assert files(tmp_path) != []
    assert same(found, plain.prefix(encode_queries(plain, asked[1:2]), FIRST))
    edited = plain.layout.layer(FIRST)
    with transform([(edited, edited, lambda x, y: y + 1)]):
        cache.state(asked[2:])
    assert len(files(tmp_path)) == 2, "an edit above the door is no hindrance"


# ---------------------------------------------------------------- broken files


def flipped(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not states at all"),
    ],
    ids=["flipped", "truncated", "empty", "text"],
)
def test_a_broken_file_is_left_out_and_computed_again(plain, tmp_path, caplog, damage):
    asked = queries()
    expected = fresh(plain, tmp_path).state(asked)
    (path,) = files(tmp_path)
    damage(path)
    cache = fresh(plain, tmp_path)
    with caplog.at_level(logging.WARNING, "unike"):
        assert same(cache.state(asked), expected)
        cache.state([asked[0]])
    assert (cache.computed, cache.loaded) == (3, 0)
    assert [path.name in r.message for r in caplog.records] == [True]
    healed = fresh(plain, tmp_path)
    assert same(healed.state(asked), expected)
    assert healed.loaded == 3


def test_a_file_that_vanishes_is_computed_again(plain, tmp_path):
    asked = queries()
    writer, reader = fresh(plain, tmp_path), fresh(plain, tmp_path)
    writer.state(asked)
    reader.state(asked[:1])
    assert reader.loaded == 1
    files(tmp_path)[0].unlink()
    reader.state(asked)
    assert reader.computed == 2


def test_what_another_process_writes_is_found(plain, tmp_path):
    asked = queries()
    one, two = fresh(plain, tmp_path), fresh(plain, tmp_path)
    one.state(asked[:1])
    two.state(asked[:2])
    assert (two.computed, two.loaded) == (1, 1)
    one.state(asked[:2])
    assert (one.computed, one.loaded) == (1, 1)


# ---------------------------------------------------------------- the store by itself


def row(value, size=250):
    return {"hidden": torch.full((size,), float(value)), "end": torch.tensor(value)}


def write_many(root: str, start: int) -> int:
    store = RowStore(root, "model/layer-1", 10**9)
    for i in range(start, start + 20):
        store.put({row_key(i): row(i), row_key((i, "beside")): row(-i)})
    return len(store.get([row_key(i) for i in range(60)]))


def test_processes_write_side_by_side(tmp_path):
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        assert min(pool.map(write_many, [str(tmp_path)] * 3, [0, 10, 20])) >= 20
    found = RowStore(tmp_path, "model/layer-1", 10**9).get([row_key(i) for i in range(60)])
    assert len(found) == 40
    assert all(torch.equal(found[row_key(i)]["hidden"], row(i)["hidden"]) for i in range(40))
    assert list(tmp_path.rglob("*.tmp")) == []


def test_old_files_make_room_and_nothing_else_is_touched(tmp_path):
    precious = tmp_path / "model" / "layer-1" / "mine.safetensors"
    old = RowStore(tmp_path, "stale/layer-1", 10**9)
    old.put({"a": row(1)})
    old.put({"b": row(2)})
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"x" * 5000)
    for name, when in zip(("a", "b"), (10, 20), strict=True):
        os.utime(old.folder / old._where[name], (when, when))
    size = (old.folder / old._where["a"]).stat().st_size
    new = RowStore(tmp_path, "model/layer-1", 2 * size + 100)
    new.put({"c": row(3)})
    assert set(RowStore(tmp_path, "stale/layer-1", 10**9).get(["a", "b"])) == {"b"}
    new.put({"d": row(4)})
    assert RowStore(tmp_path, "stale/layer-1", 10**9).get(["a", "b"]) == {}
    assert set(new.get(["c", "d"])) == {"c", "d"}
    assert precious.read_bytes() == b"x" * 5000


def test_a_full_folder_stops_writing_and_says_so_once(tmp_path, caplog):
    store = RowStore(tmp_path, "model/layer-1", 3000)
    with caplog.at_level(logging.WARNING, "unike"):
        for i in range(6):
            store.put({row_key(i): row(i)})
    assert 1 <= len(store.get([row_key(i) for i in range(6)])) < 6
    assert [str(tmp_path) in r.message for r in caplog.records] == [True]


def test_a_disk_that_refuses_ends_writing_not_the_run(plain, tmp_path, caplog):
    (tmp_path / plain.identity).write_text("a file where a folder should be")
    cache = fresh(plain, tmp_path)
    with caplog.at_level(logging.WARNING, "unike"):
        assert same(cache.state(queries()), PrefixCache(plain, FIRST).state(queries()))
    assert caplog.records
    assert cache.loaded == 0


def test_a_tensor_that_lies_across_its_memory_is_kept(tmp_path):
    store, across = RowStore(tmp_path, "model/layer-1", 10**9), torch.arange(6.0).reshape(2, 3).T
    store.put({"a": {"hidden": across}})
    assert torch.equal(store.get(["a"])["a"]["hidden"], across)


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    store = RowStore(tmp_path, "model/layer-1", 10**9)
    store.put({"a": row(1)})
    left, busy = (store.folder / f".rows-{n}.safetensors.1.x.tmp" for n in ("left", "busy"))
    left.touch()
    busy.touch()
    os.utime(left, (10, 10))
    assert set(RowStore(tmp_path, "model/layer-1", 10**9).get(["a"])) == {"a"}
    assert (left.exists(), busy.exists()) == (False, True)


def test_prefix_dir_must_be_able_to_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    check_prefix_dir(hparams(tmp_path / "new" / "folder"))
    check_prefix_dir(hparams(tmp_path, prefix_dir=None))
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"prefix_dir: .*file is a file; expected a folder"):
            check_prefix_dir(hparams(bad))


def test_memory_is_handed_back_after_pictures_are_seen_not_when_they_are_kept(plain, monkeypatch):
    given = []
    monkeypatch.setattr("unike.backbones.images.release_memory", lambda: given.append(1))
    cache, picture = FeatureCache(plain.vision.see), Image.new("RGB", (84, 84), "teal")
    for _ in range(2):
        cache.get([picture], plain.vision.pixels)
    assert given == [1]
