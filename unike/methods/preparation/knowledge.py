"""What UniKE prepares once per backbone: knowledge states, the knowledge memory, the two encoders.

Everything is saved in one folder, ``knowledge.safetensors`` and ``knowledge.json``. The folder's name is a
checksum of the weights, the triplets and the options that the content depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from unike.backbones.base import Backbone
from unike.backbones.hooks import capture
from unike.backbones.prefix import PrefixCache
from unike.config.combined import (
    KnowledgeKeyOptions,
    KnowledgeLoadingOptions,
    KnowledgePreparationOptions,
    KnowledgeTrainingOptions,
)
from unike.config.sections import EncoderOptions
from unike.datasets.triplets import Triplet
from unike.edits import LayerKnowledge
from unike.knowledge.encoders import Disentangler, FitReport, KnowledgeStates, fit
from unike.knowledge.index import open_memory
from unike.methods.preparation.batches import group_by_length, open_preparation
from unike.methods.preparation.folders import Facts, choose_place, require_own_files
from unike.methods.preparation.wrong_answers import FILE, collect_wrong_answers, count_sources
from unike.system import processes
from unike.system.faults import release_memory
from unike.system.files import (
    check_tensors,
    read_checksum,
    read_index,
    replace_atomically,
    write_index,
)
from unike.system.progress import Tick, ignore_progress
from unike.types import KnowledgeItem, Query, UserError


@dataclass(frozen=True)
class LayerStates:
    """What is kept of ``n`` triplets in one layer.

    ``states`` are their knowledge states, ``ffn (n, d)`` the feed-forward inputs at the questions' ends.
    ``items`` are their texts, empty where a folder was written without them. ``sources`` counts where their
    wrong answers are from, once the states are read.
    """

    states: KnowledgeStates
    ffn: torch.Tensor
    items: tuple[KnowledgeItem, ...] = ()
    sources: Mapping[str, int] = field(default_factory=dict)


@torch.no_grad()
def extract_states(
    backbone: Backbone,
    triplets: Sequence[Triplet],
    layers: Sequence[int],
    batch: int = 32,
    tick: Tick = ignore_progress,
    prefixes: PrefixCache | None = None,
    a_neg: str = FILE,
) -> dict[int, LayerStates]:
    """Knowledge states of all triplets that have a wrong answer, by layer.

    ``prefixes`` cache what enters the lowest layer; ``a_neg`` as in the YAML. Several processes share the
    batches; each gets all states. UserError where no triplet has a wrong answer.
    """
    wrongs = collect_wrong_answers(backbone, triplets, batch, tick, a_neg)
    usable = [(t, w.text) for t, w in zip(triplets, wrongs, strict=True) if w is not None]
    pairs = [(t.query, t.negative(w)) for t, w in usable]
    if not pairs:
        raise UserError("knowledge triplets: none has a wrong answer (field `pred`); expected at least one")
    prefixes = prefixes or PrefixCache(backbone, min(layers), max_bytes=0)

    # The right answers' queries first, then the wrong ones'.
    queries = [query for kind in zip(*pairs, strict=True) for query in kind]
    batches = group_by_length(backbone, queries, batch)

    def read(part: list[int]) -> dict[int, list[torch.Tensor]]:
        found = _read_ends(backbone, prefixes, [queries[i] for i in part], layers)
        # What is sent to other processes would come back on this one's device.
        return {i: [t.cpu() if processes.has_joined() else t for t in own] for i, own in found.items()}

    def notify(part: list[int]) -> None:
        tick("extracting knowledge states", sum(i < len(pairs) for i in part))

    parts = processes.spread(batches, read, notify)
    order = torch.tensor([i for part in batches for i in part]).argsort()
    out, items = {}, tuple(_make_item(t, w) for t, w in usable)
    sources = count_sources(wrongs)
    for i in layers:
        prompts, ends, ffn = (
            torch.cat([p[i][j] for p in parts])[order].to(backbone.device).float() for j in range(3)
        )
        pos, neg = ends.chunk(2)
        kept = KnowledgeStates(prompts[: len(pairs)], pos, neg)
        out[i] = LayerStates(kept, ffn[: len(pairs)], items, sources)
    return out


def _make_item(triplet: Triplet, wrong: str) -> KnowledgeItem:
    query = triplet.query
    image = Path(query.image).name if isinstance(query.image, (str, Path)) else None
    return KnowledgeItem(query.prompt, str(query.target), wrong, image)


def _read_ends(
    backbone: Backbone, prefixes: PrefixCache, queries: list[Query], layers: Sequence[int]
) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """By layer, each ``(b, d)``: the attention's input at the prompt's end and at the last token, and the
    feed-forward network's at the prompt's end."""
    state = prefixes.state(queries)
    rows = torch.arange(len(state), device=state.hidden.device)
    last = state.attention_mask.sum(1) - 1
    attention = {i: backbone.layout.attention(i).module for i in layers}
    readers = {i: backbone.layout.ffn(i).keys[0] for i in layers}
    with capture(attention) as x, capture(readers) as y:
        backbone.suffix_hidden(state)
    shaped = {i: y[i].reshape(*state.labels.shape, -1) for i in layers}
    return {
        i: (x[i][rows, state.question_end], x[i][rows, last], shaped[i][rows, state.question_end])
        for i in layers
    }


def compute_knowledge_key(
    backbone: Backbone, triplets: Sequence[Triplet], hparams: KnowledgeKeyOptions
) -> str:
    """A checksum of weights, triplets and options, 16 hexadecimal digits."""
    digest = hashlib.sha256(backbone.fingerprint.encode())
    digest.update(repr([("layers", hparams.layers), *_list_options(hparams).items()]).encode())
    for t in triplets:
        image = Path(t.query.image).name if isinstance(t.query.image, str) else repr(t.query.image)
        digest.update(repr((image, t.query.prompt, t.query.target, t.wrong)).encode())
    return digest.hexdigest()[:16]


def ensure_knowledge(
    backbone: Backbone,
    hparams: KnowledgePreparationOptions,
    layers: Sequence[int],
    triplets: Callable[[], Sequence[Triplet]],
    tick: Tick = ignore_progress,
) -> dict[int, LayerKnowledge]:
    """Memory and encoders for a backbone, by layer: read where they are saved, else built and saved.

    ``knowledge_dir`` is such a folder itself, as shipped with the toy backbones, or the parent of one
    folder per key. ``triplets`` is only called where the first is not the case. UserError where
    ``knowledge_dir`` is not given.
    """
    if hparams.knowledge_dir is None:
        raise UserError(
            f"{hparams.source}: knowledge_dir: missing; expected a folder to keep memory and encoders in"
        )
    folder = Path(hparams.knowledge_dir)
    facts = _describe_knowledge(backbone, layers, hparams)
    if not processes.run_once(lambda: _fits(folder, facts, layers)):
        collected = triplets()
        if len(collected) < 2:
            raise UserError(
                f"train data: {len(collected)} distinct questions; expected two or more to train encoders on"
            )
        key = compute_knowledge_key(backbone, collected, hparams)
        places = dict.fromkeys((folder / key, choose_place(folder) / key))
        keyed = folder = next((p for p in places if (p / "knowledge.json").is_file()), list(places)[-1])
        if not processes.run_once(lambda: _fits(keyed, facts, layers)):
            require_own_files(keyed, "knowledge.safetensors", "knowledge.json", "items.jsonl")
            states = _extract(backbone, collected, layers, hparams, tick)
            processes.run_once(
                lambda: save_knowledge(keyed, states, *fit_encoders(states, hparams, tick), facts)
            )
    return read_knowledge(folder, hparams, backbone.device)


def read_knowledge(
    folder: Path, hparams: KnowledgeLoadingOptions, device: torch.device
) -> dict[int, LayerKnowledge]:
    """What ``save_knowledge`` wrote, with the YAML's kind of zeta, by layer. UserError as
    ``iterate_layers``."""
    known = {i: _make_layer(i, s, e, hparams, folder) for i, s, e in iterate_layers(folder, device)}
    release_memory()
    return known


def _list_options(hparams: KnowledgeKeyOptions) -> Facts:
    """The options that knowledge depends on, without ``layers``. Their order is part of the checksum."""
    encoders = hparams.get_values(EncoderOptions)
    # Where it says what always was done, it is no part of the key: what is shipped stays valid.
    chosen = {} if hparams.a_neg == FILE else {"a_neg": hparams.a_neg}
    return {"triplets": hparams.triplets, **encoders, "seed": hparams.seed, **chosen}


def _describe_knowledge(backbone: Backbone, layers: Sequence[int], hparams: KnowledgeKeyOptions) -> Facts:
    return {"backbone": backbone.fingerprint, "layers": list(layers), "options": _list_options(hparams)}


def find_knowledge(hparams: KnowledgeKeyOptions, backbone: Backbone, triplets: Sequence[Triplet]) -> Path:
    """The folder of these triplets' knowledge, or ``knowledge_dir`` itself where there is none."""
    parent = Path(hparams.knowledge_dir or "")
    key = compute_knowledge_key(backbone, triplets, hparams)
    places = (parent / key, choose_place(parent) / key)
    return next((keyed for keyed in places if (keyed / "knowledge.json").is_file()), parent)


def _fits(folder: Path, facts: Facts, layers: Sequence[int]) -> bool:
    """Whether a folder's index was written for these weights and options, and for these layers or more."""
    kept = read_index(folder / "knowledge.json")
    # A method that edits fewer layers can read what was prepared for more.
    covered = set(layers) <= set(kept.get("layers", ()))
    return covered and all(kept.get(name) == value for name, value in facts.items() if name != "layers")


def build_knowledge(
    backbone: Backbone,
    triplets: Sequence[Triplet],
    layers: Sequence[int],
    hparams: KnowledgeTrainingOptions,
    tick: Tick = ignore_progress,
) -> tuple[dict[int, LayerStates], dict[int, Disentangler], dict[int, FitReport]]:
    """States and trained encoders by layer, with a report of each training."""
    states = _extract(backbone, triplets, layers, hparams, tick)
    return states, *fit_encoders(states, hparams, tick)


def _extract(
    backbone: Backbone,
    triplets: Sequence[Triplet],
    layers: Sequence[int],
    hparams: KnowledgeTrainingOptions,
    tick: Tick,
) -> dict[int, LayerStates]:
    with open_preparation(hparams, backbone, min(layers)) as prefixes:
        return extract_states(backbone, triplets, layers, hparams.states_batch, tick, prefixes, hparams.a_neg)


def fit_encoders(
    states: dict[int, LayerStates], hparams: EncoderOptions, tick: Tick = ignore_progress
) -> tuple[dict[int, Disentangler], dict[int, FitReport]]:
    """Trained encoders by layer, with a report of each training."""
    encoders, reports = {}, {}
    for i in states:
        encoders[i], reports[i] = fit(
            states[i].states,
            hparams.encoder_hidden,
            hparams.encoder_dim,
            hparams.encoder_steps,
            hparams.encoder_batch,
            hparams.encoder_lr,
            hparams.encoder_tau,
            hparams.include_anchor,
            seed=hparams.seed,
            tick=lambda: tick("training encoders", 1),
        )
    return encoders, reports


def save_knowledge(
    folder: Path,
    states: dict[int, LayerStates],
    encoders: dict[int, Disentangler],
    reports: dict[int, FitReport],
    meta: Facts,
) -> None:
    """Writes the folder: states in half precision, encoders in full, and the items' texts.

    ``meta`` goes into the index.
    """
    tensors: dict[str, torch.Tensor] = {}
    for i, s in states.items():
        parts = {"sem": s.states.sem, "pos": s.states.pos, "neg": s.states.neg, "ffn": s.ffn}
        tensors |= {f"{i}.{name}": t.half().contiguous().cpu() for name, t in parts.items()}
        tensors |= {f"{i}.encoders.{k}": v.contiguous().cpu() for k, v in encoders[i].state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_items(folder, next(iter(states.values())).items)
    fits = {str(i): {k: v for k, v in asdict(r).items() if k != "losses"} for i, r in reports.items()}
    sources = next(iter(states.values())).sources
    # The index is written last: without it the folder counts as missing.
    path = folder / "knowledge.safetensors"
    with replace_atomically(path) as temporary:
        save_file(tensors, temporary)
    counted = {"a_neg": sources} if sources else {}
    write_index(folder / "knowledge.json", {**meta, **counted, "fit": fits}, path)


def save_items(folder: Path, items: Sequence[KnowledgeItem]) -> None:
    """Writes ``items.jsonl``, a line per item; deletes it where there are no items."""
    path = folder / "items.jsonl"
    path.unlink(missing_ok=True)
    if items:
        lines = (json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
        path.write_text("".join(lines), encoding="utf-8")


def _read_items(folder: Path, count: int) -> tuple[KnowledgeItem, ...]:
    path = folder / "items.jsonl"
    if not path.is_file():
        return ()
    with path.open(encoding="utf-8") as lines:
        items = tuple(KnowledgeItem(**json.loads(line)) for line in lines)
    if len(items) != count:
        raise ValueError(f"{path.name} has {len(items)} lines for {count} items")
    return items


LearnedLayer = tuple[int, LayerStates, Disentangler]


def iterate_layers(folder: Path, device: torch.device) -> Iterator[LearnedLayer]:
    """What ``save_knowledge`` wrote, one layer at a time: all layers in full precision may not fit into
    memory together with the model.

    UserError where a file is missing, has another checksum than its index says, or has tensors that do
    not fit together.
    """
    path = folder / "knowledge.safetensors"
    try:
        check_tensors(folder / "knowledge.json", path)
        with safe_open(path, framework="pt", device=str(device)) as file:
            names, items = list(file.keys()), None
            for i in sorted({int(name.split(".")[0]) for name in names}):
                sem, pos, neg, ffn = (
                    file.get_tensor(f"{i}.{n}").float() for n in ("sem", "pos", "neg", "ffn")
                )
                own = {n: file.get_tensor(n) for n in names if n.startswith(f"{i}.encoders.")}
                encoders = _build_encoders(own, f"{i}.encoders.").to(device)
                shapes = {tuple(t.shape) for t in (sem, pos, neg)}
                if len(shapes) != 1 or sem.ndim != 2 or not sem.isfinite().all():
                    raise ValueError(f"layer {i}: states {sorted(shapes)} don't fit together")
                items = _read_items(folder, len(sem)) if items is None else items
                yield i, LayerStates(KnowledgeStates(sem, pos, neg), ffn, items), encoders
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: expected memory and encoders as scripts/prepare.py writes them: {error}"
        ) from error


def load_states(folder: Path, device: torch.device) -> tuple[dict[int, LayerStates], dict[int, Disentangler]]:
    """All layers of ``iterate_layers``."""
    states, encoders = {}, {}
    for i, s, e in iterate_layers(folder, device):
        states[i], encoders[i] = s, e
    return states, encoders


def _build_encoders(tensors: dict[str, torch.Tensor], prefix: str) -> Disentangler:
    own = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    hidden, width = own["semantic.0.weight"].shape
    encoders = Disentangler(width, hidden, own["truthful.2.weight"].shape[0])
    encoders.load_state_dict(own)
    return encoders.requires_grad_(False)


def make_knowledge(
    states: dict[int, LayerStates],
    encoders: dict[int, Disentangler],
    hparams: KnowledgeLoadingOptions,
    folder: Path | None = None,
) -> dict[int, LayerKnowledge]:
    """Knowledge memories, encoders and the YAML's kind of zeta, by layer.

    A memory of many items is written into ``folder``, with its index, and mapped from there.
    """
    return {i: _make_layer(i, s, encoders[i], hparams, folder) for i, s in states.items()}


def _make_layer(
    i: int,
    s: LayerStates,
    encoders: Disentangler,
    hparams: KnowledgeLoadingOptions,
    folder: Path | None,
) -> LayerKnowledge:
    place, origin, checksum = None, "", ""
    if folder is not None:
        checksum = read_checksum(folder / "knowledge.json", folder / "knowledge.safetensors")
        stat = (folder / "knowledge.safetensors").stat()
        place, origin = choose_place(folder) / f"memory-{i}", f"{stat.st_size}-{stat.st_mtime_ns}"
    bank = open_memory(
        s.states.sem,
        s.states.pos,
        hparams.retrieval,
        hparams.retrieval_exact_up_to,
        place,
        origin,
        # The precision of the file that they come from.
        torch.float16,
    )
    zeta = encoders.compute_zeta(s.states, hparams.zeta, hparams.seed)
    # Of the truthfulness encoder, an edit needs zeta alone.
    ffn = s.ffn if hparams.memory_loss else s.ffn[:0]
    return LayerKnowledge(bank, encoders.semantic, ffn, zeta, origin=checksum, items=s.items)
