"""What UniKE learns once per backbone: knowledge states, memory, the two encoders.

Everything is kept in one folder, under a key of weights, triplets and the hyper-parameters that it
depends on: ``knowledge.safetensors`` and ``knowledge.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from unike.backbones.base import Backbone
from unike.backbones.hooks import capture
from unike.backbones.prefix import PrefixCache, open_prefixes
from unike.config.combined import (
    KnowledgeKeyOptions,
    KnowledgeLoadingOptions,
    KnowledgePreparationOptions,
    KnowledgeTrainingOptions,
)
from unike.config.sections import EncoderOptions
from unike.datasets.answers import normalise_answer
from unike.datasets.triplets import Triplet
from unike.edits import LayerKnowledge
from unike.knowledge.encoders import Disentangler, FitReport, KnowledgeStates, fit
from unike.knowledge.index import open_memory
from unike.system import processes
from unike.system.faults import give_back
from unike.system.files import check_tensors, checksum_in, read_index, write_index
from unike.types import KnowledgeItem, Query, UserError

T = TypeVar("T")
Tick = Callable[[str, int], None]


def silent(what: str, count: int) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True)
class LayerStates:
    """Knowledge states of one layer, the feed-forward inputs at the questions' ends ``(n, d)``, and the
    texts of the ``n`` items, none in folders that were written without them."""

    states: KnowledgeStates
    ffn: torch.Tensor
    items: tuple[KnowledgeItem, ...] = ()


def wrong_answers(
    backbone: Backbone, triplets: Sequence[Triplet], batch: int, tick: Tick = silent
) -> list[str | None]:
    """``A_neg`` of each triplet: its own, or the backbone's greedy answer where that is wrong.

    Several processes share the batches; each gets all answers.
    """
    answers = [None if t.wrong is None else _if_wrong(t.wrong, t) for t in triplets]
    asked = [i for i, t in enumerate(triplets) if t.wrong is None]

    def ask(part: list[int]) -> list[str]:
        queries = [triplets[i].query for i in part]
        return backbone.generate([q.image for q in queries], [q.prompt for q in queries])

    parts = processes.spread(_batches(asked, batch), ask, lambda p: tick("asking for wrong answers", len(p)))
    for i, text in zip(asked, (text for part in parts for text in part), strict=True):
        answers[i] = _if_wrong(text, triplets[i])
    return answers


def _batches(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _if_wrong(answer: str, triplet: Triplet) -> str | None:
    right = normalise_answer(answer) == normalise_answer(str(triplet.query.target))
    return None if right or not answer.strip() else answer


@torch.no_grad()
def extract(
    backbone: Backbone,
    triplets: Sequence[Triplet],
    layers: Sequence[int],
    batch: int = 32,
    tick: Tick = silent,
    prefixes: PrefixCache | None = None,
) -> dict[int, LayerStates]:
    """Knowledge states of all triplets that have a wrong answer, by layer; ``prefixes`` are those of
    the lowest one.

    Several processes share the batches; each gets all states. Raises UserError where none is left.
    """
    wrongs = wrong_answers(backbone, triplets, batch, tick)
    told = [(t, w) for t, w in zip(triplets, wrongs, strict=True) if w]
    pairs = [(t.query, t.negative(w)) for t, w in told]
    if not pairs:
        raise UserError("knowledge triplets: none has a wrong answer (field `pred`); expected at least one")
    prefixes = prefixes or PrefixCache(backbone, min(layers), max_bytes=0)

    def read(part: list[tuple[Query, Query]]) -> dict[int, list[torch.Tensor]]:
        positive = _ends(backbone, prefixes, [p for p, _ in part], layers)
        negative = _ends(backbone, prefixes, [n for _, n in part], layers)
        found = {i: [positive[i][0], positive[i][1], negative[i][1], positive[i][2]] for i in layers}
        # What is sent to other processes would come back on this one's device.
        return {i: [t.cpu() for t in own] for i, own in found.items()} if processes.joined() else found

    parts = processes.spread(
        _batches(pairs, batch), read, lambda part: tick("extracting knowledge states", len(part))
    )
    out, items = {}, tuple(_item(t, w) for t, w in told)
    for i in layers:
        sem, pos, neg, ffn = (
            torch.cat([p[i][j] for p in parts]).to(backbone.device).float() for j in range(4)
        )
        out[i] = LayerStates(KnowledgeStates(sem, pos, neg), ffn, items)
    return out


def _item(triplet: Triplet, wrong: str) -> KnowledgeItem:
    query = triplet.query
    image = Path(query.image).name if isinstance(query.image, (str, Path)) else None
    return KnowledgeItem(query.prompt, str(query.target), wrong, image)


def _ends(
    backbone: Backbone, prefixes: PrefixCache, queries: list[Query], layers: Sequence[int]
) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """By layer: attention's input at the prompt's end and at the last token, FFN's at the prompt's end."""
    state = prefixes.state(queries)
    rows = torch.arange(len(state), device=state.hidden.device)
    last = state.attention_mask.sum(1) - 1
    attention = {i: backbone.layout.attention(i).module for i in layers}
    readers = {i: backbone.layout.ffn(i).keys[0] for i in layers}
    with capture(attention) as x, capture(readers) as y:
        backbone.suffix(state)
    shaped = {i: y[i].reshape(*state.labels.shape, -1) for i in layers}
    return {
        i: (x[i][rows, state.question_end], x[i][rows, last], shaped[i][rows, state.question_end])
        for i in layers
    }


def knowledge_key(backbone: Backbone, triplets: Sequence[Triplet], hparams: KnowledgeKeyOptions) -> str:
    """What the knowledge depends on, as a short checksum."""
    digest = hashlib.sha256(backbone.fingerprint.encode())
    digest.update(repr([("layers", hparams.layers), *_options(hparams).items()]).encode())
    for t in triplets:
        image = Path(t.query.image).name if isinstance(t.query.image, str) else repr(t.query.image)
        digest.update(repr((image, t.query.prompt, t.query.target, t.wrong)).encode())
    return digest.hexdigest()[:16]


def ensure_knowledge(
    backbone: Backbone,
    hparams: KnowledgePreparationOptions,
    layers: Sequence[int],
    triplets: Callable[[], Sequence[Triplet]],
    tick: Tick = silent,
) -> dict[int, LayerKnowledge]:
    """Memory and encoders for a backbone: read where they are kept, built where they are not.

    ``knowledge_dir`` is either such a folder itself (as shipped with the tiny backbones; it must fit
    the weights and options) or the parent of one folder per key. ``triplets`` is only called when
    something must be built or a key be looked up. UserError where ``knowledge_dir`` is not given.
    """
    if hparams.knowledge_dir is None:
        raise UserError(
            f"{hparams.source}: knowledge_dir: missing; expected a folder to keep memory and encoders in"
        )
    folder = Path(hparams.knowledge_dir)
    facts = _facts(backbone, layers, hparams)
    if not processes.first(lambda: _fits(folder, facts)):
        collected = triplets()
        keyed = folder = folder / knowledge_key(backbone, collected, hparams)
        if not processes.first(lambda: _fits(keyed, facts)):
            prefixes = open_prefixes(hparams, backbone, min(layers), memory=False)
            states = extract(backbone, collected, layers, hparams.states_batch, tick, prefixes)
            processes.first(
                lambda: save_knowledge(keyed, states, *fit_encoders(states, hparams, tick), facts)
            )
    return read_knowledge(folder, hparams, backbone.device)


def read_knowledge(
    folder: Path, hparams: KnowledgeLoadingOptions, device: torch.device
) -> dict[int, LayerKnowledge]:
    """What ``save_knowledge`` wrote, as the YAML wants it, by layer. UserError as ``each_layer``."""
    known = {i: _layer(i, s, e, hparams, folder) for i, s, e in each_layer(folder, device)}
    give_back()
    return known


def _options(hparams: KnowledgeKeyOptions) -> dict[str, Any]:
    """The options that knowledge depends on, but for its layers. Checksums hold their order."""
    encoders = hparams.get_values(EncoderOptions)
    return {"triplets": hparams.triplets, **encoders, "seed": hparams.seed}


def _facts(backbone: Backbone, layers: Sequence[int], hparams: KnowledgeKeyOptions) -> dict[str, Any]:
    return {"backbone": backbone.fingerprint, "layers": list(layers), "options": _options(hparams)}


def knowledge_folder(hparams: KnowledgeKeyOptions, backbone: Backbone, triplets: Sequence[Triplet]) -> Path:
    """Where these triplets' knowledge is kept once it is built, or a shipped ``knowledge_dir`` itself."""
    parent = Path(hparams.knowledge_dir or "")
    keyed = parent / knowledge_key(backbone, triplets, hparams)
    return keyed if (keyed / "knowledge.json").is_file() else parent


def _fits(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether a folder's index was written for these weights, layers and options."""
    kept = read_index(folder / "knowledge.json")
    # A method of fewer layers reads what was learnt for more.
    layers = set(facts["layers"]) <= set(kept.get("layers", ()))
    return layers and all(kept.get(name) == value for name, value in facts.items() if name != "layers")


def build_knowledge(
    backbone: Backbone,
    triplets: Sequence[Triplet],
    layers: Sequence[int],
    hparams: KnowledgeTrainingOptions,
    tick: Tick = silent,
) -> tuple[dict[int, LayerStates], dict[int, Disentangler], dict[int, FitReport]]:
    """States and trained encoders of each layer, with a report of each training."""
    prefixes = open_prefixes(hparams, backbone, min(layers), memory=False)
    states = extract(backbone, triplets, layers, hparams.states_batch, tick, prefixes)
    return states, *fit_encoders(states, hparams, tick)


def fit_encoders(
    states: dict[int, LayerStates], hparams: EncoderOptions, tick: Tick = silent
) -> tuple[dict[int, Disentangler], dict[int, FitReport]]:
    """Trained encoders of each layer, with a report of each training."""
    encoders, reports = {}, {}
    for i in states:
        encoders[i], reports[i] = fit(
            states[i].states, hparams.encoder_hidden, hparams.encoder_dim, hparams.encoder_steps,
            hparams.encoder_batch, hparams.encoder_lr, hparams.encoder_tau, hparams.include_anchor,
            seed=hparams.seed, tick=lambda: tick("training encoders", 1),
        )  # fmt: skip
    return encoders, reports


def save_knowledge(
    folder: Path,
    states: dict[int, LayerStates],
    encoders: dict[int, Disentangler],
    reports: dict[int, FitReport],
    meta: dict[str, Any],
) -> None:
    """Writes the folder; states in half precision, encoders in full, the items' texts a line each."""
    tensors: dict[str, torch.Tensor] = {}
    for i, s in states.items():
        parts = {"sem": s.states.sem, "pos": s.states.pos, "neg": s.states.neg, "ffn": s.ffn}
        tensors |= {f"{i}.{name}": t.half().contiguous().cpu() for name, t in parts.items()}
        tensors |= {f"{i}.encoders.{k}": v.contiguous().cpu() for k, v in encoders[i].state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_items(folder, next(iter(states.values())).items)
    fits = {str(i): {k: v for k, v in asdict(r).items() if k != "losses"} for i, r in reports.items()}
    # The index is written last: without it the folder counts as missing.
    path = folder / "knowledge.safetensors"
    save_file(tensors, path)
    write_index(folder / "knowledge.json", {**meta, "fit": fits}, path)


def save_items(folder: Path, items: Sequence[KnowledgeItem]) -> None:
    """``items.jsonl``, or none where nothing is known of the items."""
    path = folder / "items.jsonl"
    path.unlink(missing_ok=True)
    if items:
        lines = (json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
        path.write_text("".join(lines), encoding="utf-8")


def _items(folder: Path, count: int) -> tuple[KnowledgeItem, ...]:
    path = folder / "items.jsonl"
    if not path.is_file():
        return ()
    with path.open(encoding="utf-8") as lines:
        items = tuple(KnowledgeItem(**json.loads(line)) for line in lines)
    if len(items) != count:
        raise ValueError(f"{path.name} has {len(items)} lines for {count} items")
    return items


Learnt = tuple[int, LayerStates, Disentangler]


def each_layer(folder: Path, device: torch.device) -> Iterator[Learnt]:
    """What ``save_knowledge`` wrote, a layer at a time: all of them in full precision may not fit beside a
    model. UserError where a file is missing or not what it should be: another checksum than its index
    has, or tensors that don't fit together."""
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
                encoders = _encoders(own, f"{i}.encoders.").to(device)
                shapes = {tuple(t.shape) for t in (sem, pos, neg)}
                if len(shapes) != 1 or sem.ndim != 2 or not sem.isfinite().all():
                    raise ValueError(f"layer {i}: states {sorted(shapes)} don't fit together")
                items = _items(folder, len(sem)) if items is None else items
                yield i, LayerStates(KnowledgeStates(sem, pos, neg), ffn, items), encoders
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: expected memory and encoders as scripts/prepare.py writes them: {error}"
        ) from error


def load_states(folder: Path, device: torch.device) -> tuple[dict[int, LayerStates], dict[int, Disentangler]]:
    """All layers of ``each_layer``."""
    states, encoders = {}, {}
    for i, s, e in each_layer(folder, device):
        states[i], encoders[i] = s, e
    return states, encoders


def _encoders(tensors: dict[str, torch.Tensor], prefix: str) -> Disentangler:
    own = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    hidden, width = own["semantic.0.weight"].shape
    encoders = Disentangler(width, hidden, own["truthful.2.weight"].shape[0])
    encoders.load_state_dict(own)
    return encoders.requires_grad_(False)


def as_knowledge(
    states: dict[int, LayerStates],
    encoders: dict[int, Disentangler],
    hparams: KnowledgeLoadingOptions,
    folder: Path | None = None,
) -> dict[int, LayerKnowledge]:
    """Banks, encoders and the YAML's kind of zeta, by layer. A bank of many items lies beside the
    ``folder``'s states, with its index, and is mapped."""
    return {i: _layer(i, s, encoders[i], hparams, folder) for i, s in states.items()}


def _layer(
    i: int,
    s: LayerStates,
    encoders: Disentangler,
    hparams: KnowledgeLoadingOptions,
    folder: Path | None,
) -> LayerKnowledge:
    place, origin, checksum = None, "", ""
    if folder is not None:
        checksum = checksum_in(folder / "knowledge.json", folder / "knowledge.safetensors")
        stat = (folder / "knowledge.safetensors").stat()
        place, origin = folder / f"memory-{i}", f"{stat.st_size}-{stat.st_mtime_ns}"
    bank = open_memory(
        s.states.sem, s.states.pos, hparams.retrieval, hparams.retrieval_exact_up_to, place, origin,
        # The precision of the file that they come from.
        torch.float16,
    )  # fmt: skip
    zeta = encoders.zeta(s.states, hparams.zeta, hparams.seed)
    # The truthfulness encoder has said what it is asked for: an edit needs its zeta alone.
    ffn = s.ffn if hparams.memory_loss else s.ffn[:0]
    return LayerKnowledge(bank, encoders.semantic, ffn, zeta, origin=checksum, items=s.items)
