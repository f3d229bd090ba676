"""Whether an edit did what it should: one definition of each metric, on token ids and on text.

Two evaluation modes, never mixed: teacher-forced (argmax at each answer position, one forward pass
over prompt and answer) and generated (greedy decoding from the prompt).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from unike.datasets.answers import normalise_answer
from unike.evaluation.resampling import resample_strata
from unike.types import Probe

_BLOCK = 1_000_000
FLUENCY = (
    "mean over generated answers of (2/3 H2 + 4/3 H3) / 2, n-gram entropies in bits, as ROME and MEMIT "
    "(kmeng01/rome, experiments/py/eval_utils_counterfact.py) have it for texts of 100 tokens; answers of "
    "one or two words have none"
)
# Under this name records keep, in addition to the presets, how De-VQA scores its own cells.
DE_VQA = "de_vqa"
# How many of the most probable tokens the widest of the presets compares.
RANKS = 10


@dataclass(frozen=True)
class Preset:
    """How others measure locality: one rule for probes without an image, one for the rest.

    ``answer_top1`` compares the argmax at the answer's positions, ``all_top1`` the most probable
    token at every position, image and prompt included, ``all_top10`` the ten most probable ones
    rank by rank. Reliability and generality are top-1 on the answer's tokens in all presets.
    """

    text: str
    image: str
    provenance: str


PRESETS = {
    "paper": Preset(
        "answer_top1",
        "answer_top1",
        "UniKE (arXiv 2409.19872), T-Locality and M-Locality as its equations state them: share of answer "
        "tokens whose argmax is the pre-edit model's",
    ),
    "easyedit": Preset(
        "all_top1",
        "all_top10",
        "zjunlp/EasyEdit 45814b8c, easyeditor/trainer/MultimodalTrainer.py, edit_step (FT, KE, MEND, SERAC): "
        "topk of the softmax over all positions, k=1 for loc/acc and k=10, compared rank by rank, for "
        "image_loc/acc",
    ),
    "easyedit_icl": Preset(
        "all_top10",
        "all_top10",
        "zjunlp/EasyEdit and beepkh/UniKE 120cf267, easyeditor/editors/multimodal_editor.py, the IKE branch: "
        "topk of the softmax, k=10, rank by rank, over all positions, aligned at the end where the prompts "
        "differ in length",
    ),
    "release": Preset(
        "answer_top1",
        "answer_top1",
        "beepkh/UniKE 120cf267, easyeditor/editors/multimodal_editor.py, edit_dataset, the UNIKE branch with "
        "easyeditor/evaluate/evaluate.py, compute_multimodal_edit_quality: argmax at the last len(answer) "
        "positions before the final one, np.mean(np.equal); the same as `paper` for an answer that keeps its "
        "tokens behind the prompt. Its trainer scores the other methods by `easyedit`, its IKE branch by "
        "`easyedit_icl`",
    ),
}


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for one probe.

    ``predicted_ids`` holds the argmax at the position of each of the answer's ``target_ids``,
    ``generated`` the greedily decoded text in that evaluation mode. ``best (positions)`` and
    ``ranked (positions, RANKS)`` hold the most probable tokens at every position, where a preset needs
    them. ``edited`` has no default: the caller knows whether an edit was applied.
    """

    target_ids: tuple[int, ...]
    predicted_ids: tuple[int, ...]
    generated: str | None = None
    edited: bool = field(kw_only=True)
    best: np.ndarray | None = field(default=None, compare=False, repr=False)
    ranked: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("target_ids", "predicted_ids"):
            object.__setattr__(self, name, tuple(int(token) for token in getattr(self, name)))
        _same_length(self.predicted_ids, self.target_ids)


def token_accuracy(predicted: Sequence[int], target: Sequence[int]) -> float:
    """Share of the answer's tokens that are predicted."""
    _same_length(predicted, target)
    return float(np.mean(np.asarray(predicted) == np.asarray(target)))


def agreement(before: Sequence[int], after: Sequence[int]) -> float:
    """Share of answer positions whose argmax is the pre-edit model's."""
    return token_accuracy(after, before)


def score(probe: Probe, before: Prediction, after: Prediction) -> float:
    """Teacher-forced value of a probe after an edit, in [0, 1].

    Probes that expect the target measure ``token_accuracy``: reliability, Eq. (11), T-generality,
    Eq. (14), and M-generality, Eq. (15). Probes that expect no change measure ``agreement``:
    T-locality, Eq. (12), and M-locality, Eq. (13). The hard probes are one or the other.
    """
    _check_pair(before, after)
    if probe.expect == "target":
        return token_accuracy(after.predicted_ids, after.target_ids)
    return agreement(before.predicted_ids, after.predicted_ids)


def preset_score(name: str, probe: Probe, before: Prediction, after: Prediction) -> float:
    """Teacher-forced value of a probe after an edit as the preset's owner computes it, in [0, 1]."""
    preset = PRESETS[name]
    rule = preset.text if probe.query.image is None else preset.image
    if probe.expect == "target" or rule == "answer_top1":
        return score(probe, before, after)
    _check_pair(before, after)
    if rule == "all_top1":
        return _aligned_agreement(before.best, after.best)
    return _aligned_agreement(before.ranked, after.ranked)


def needs_ranks(names: Sequence[str]) -> bool:
    """Whether any of the presets looks beyond the answer's tokens."""
    return any(rule != "answer_top1" for n in names for rule in (PRESETS[n].text, PRESETS[n].image))


def score_generated(probe: Probe, before: Prediction, after: Prediction) -> float:
    """Generated value of a probe after an edit, 0 or 1: equal after ``normalise_answer``.

    The decoded text is compared with the target and the probe's aliases, or, where no change is expected,
    with what the unedited model generated.
    """
    _check_pair(before, after)
    return (
        right_text(probe, after)
        if probe.expect == "target"
        else _same_text(after.generated, before.generated)
    )


def miss_target(after: Prediction) -> float:
    """Teacher-forced share of an edit's target that is *not* predicted after the edit, in [0, 1].

    De-VQA's locality (arXiv 2511.13243, its equations): 1 minus the accuracy of the edit's target, asked
    where the edit does not apply. Its release prints the share of answers that changed, which is another
    number. Where the base model itself answers with the target, keeping that answer costs here.
    """
    if not after.edited:
        raise ValueError("the prediction after the edit comes from the unedited model")
    return 1.0 - token_accuracy(after.predicted_ids, after.target_ids)


def base_score(probe: Probe, before: Prediction) -> float:
    """Teacher-forced value of the unedited model; it leaves everything unchanged."""
    _check_base(before)
    if probe.expect == "target":
        return token_accuracy(before.predicted_ids, before.target_ids)
    return 1.0


def base_score_generated(probe: Probe, before: Prediction) -> float:
    """Generated value of the unedited model; it leaves everything unchanged."""
    _check_base(before)
    return right_text(probe, before) if probe.expect == "target" else 1.0


def right_everywhere(prediction: Prediction) -> float:
    """1 where every token of the answer is predicted, else 0."""
    return float(prediction.predicted_ids == prediction.target_ids)


def right_text(probe: Probe, prediction: Prediction) -> float:
    """1 where the generated text is the probe's own answer or an alias, else 0. By a probe's ``match``
    ``contains`` it has one of them in it: MC-MKE's definition (reroze/MC-MKE, test/single_match.py)."""
    answers = (_target(probe), *probe.aliases)
    if probe.match == "contains" and prediction.generated is not None:
        said = prediction.generated.lower()
        return float(any(answer.lower().strip() in said for answer in answers if answer.strip()))
    return max(_same_text(prediction.generated, answer) for answer in answers)


def holds_old(probe: Probe, prediction: Prediction) -> float:
    """1 where the generated text is the probe's ``implied`` answer, else 0."""
    return _same_text(prediction.generated, probe.implied)


def bootstrap_means(
    values: Sequence[float],
    seed: int,
    samples: int = 2000,
    groups: Sequence[int | None] | None = None,
    strata: Sequence[int] | None = None,
) -> np.ndarray:
    """``samples`` means of resampled values. With ``groups``, whole groups are drawn: values of one
    sequence of edits depend on each other. With several ``strata`` (seeds of the whole pipeline), each
    resample draws as many strata as there are, and within each of these its values or groups."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError("a bootstrap needs at least one value")
    if strata is not None and len(set(strata)) > 1:
        return resample_strata(array, strata, seed, samples, groups)
    parts = np.arange(array.size) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.bincount(parts, weights=array)
    sizes = np.bincount(parts, weights=np.ones_like(array))
    generator = np.random.default_rng(seed)
    # Blocks bound the memory: 2000 resamples of a whole benchmark are some 100 MB at once.
    rows = max(1, _BLOCK // sums.size)
    means = []
    for start in range(0, samples, rows):
        drawn = generator.integers(0, sums.size, (min(rows, samples - start), sums.size))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)


def bootstrap_interval(
    values: Sequence[float],
    seed: int,
    samples: int = 2000,
    level: float = 0.95,
    groups: Sequence[int | None] | None = None,
    strata: Sequence[int] | None = None,
) -> tuple[float, float, float]:
    """Mean with its percentile bootstrap interval: ``(mean, low, high)``, the same for a seed."""
    means = bootstrap_means(values, seed, samples, groups, strata)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean(np.asarray(values, dtype=np.float64))), float(low), float(high)


def paired_difference(
    one: Sequence[Sequence[float]],
    other: Sequence[Sequence[float]],
    seed: int,
    of: Callable[[Sequence[float]], float],
    samples: int = 2000,
    groups: Sequence[int | None] | None = None,
    strata: Sequence[int] | None = None,
) -> tuple[float, float, float]:
    """How much more ``one`` has than ``other`` of a number ``of`` the means of their columns, with its
    95% percentile bootstrap interval: ``(difference, low, high)``.

    A column holds a metric's values, ``(records,)``, of the same records in the same order in both: each
    resample draws records (or ``groups`` of them, in ``strata``) once for both. ValueError for columns
    unlike in length.
    """
    columns = [np.asarray(column, dtype=np.float64) for column in (*one, *other)]
    if len({column.shape for column in columns}) != 1 or not one or not other:
        raise ValueError("a paired bootstrap needs columns of the same records")
    # One seed draws the same records for every column.
    drawn = np.stack(
        [bootstrap_means(column.tolist(), seed, samples, groups, strata) for column in columns]
    ).T
    resampled = [of(row[: len(one)]) - of(row[len(one) :]) for row in drawn.tolist()]
    whole = [float(column.mean()) for column in columns]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return of(whole[: len(one)]) - of(whole[len(one) :]), float(low), float(high)


def mean_of(values: Sequence[float]) -> float:
    """Arithmetic mean as a plain number."""
    return sum(values) / len(values)


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of values from 0 on; one zero makes it zero."""
    if not values or min(values) < 0:
        raise ValueError("a harmonic mean needs values, none of them negative")
    return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)


def ngram_entropy(text: str) -> float:
    """Fluency of a text as ROME and MEMIT measure it (Meng et al. 2022, ``compute_n_gram_entropy`` in
    ``experiments/py/eval_utils_counterfact.py``): the mean of 2/3 of its 2-gram and 4/3 of its 3-gram
    entropy, in bits. They take NLTK's words of 100 generated tokens; here, words and punctuation marks
    of whatever was generated. A text without such n-grams has none.
    """
    words = re.findall(r"\w+(?:['\u2019]\w+)*|[^\w\s]", text)
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()
        whole = sum(counts)
        total += weight * sum(-c / whole * math.log2(c / whole) for c in counts)
    return total / 2


def _aligned_agreement(before: np.ndarray | None, after: np.ndarray | None) -> float:
    """Share of equal entries. Where the prompts differ in length, the ends are compared."""
    if before is None or after is None:
        raise ValueError("the prediction holds no ranks; name the preset when the reader is made")
    shared = min(len(before), len(after))
    return float(np.mean(np.asarray(before)[-shared:] == np.asarray(after)[-shared:]))


def _same_length(one: Sequence[int], other: Sequence[int]) -> None:
    if len(one) != len(other) or len(one) == 0:
        raise ValueError(f"expected as many predictions as answer tokens, got {len(one)} and {len(other)}")


def _check_base(before: Prediction) -> None:
    if before.edited:
        raise ValueError("the prediction before the edit comes from an edited model")


def _check_pair(before: Prediction, after: Prediction) -> None:
    _check_base(before)
    if not after.edited:
        raise ValueError("the prediction after the edit comes from the unedited model")
    if before.target_ids != after.target_ids:
        raise ValueError("the predictions before and after are of different answers")


def _target(probe: Probe) -> str:
    if probe.query.target is None:
        raise ValueError(f"probe {probe.name} expects a target and has none")
    return probe.query.target


def _same_text(generated: str | None, expected: str | None) -> float:
    if generated is None or expected is None:
        raise ValueError("the prediction holds no generated text")
    return float(normalise_answer(generated) == normalise_answer(expected))
