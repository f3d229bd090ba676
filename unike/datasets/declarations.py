"""The metrics that datasets declare: what a good edit does to each, its group, and who defined it.

Those of MMEdit, of the hard and derived probes, and of the benchmarks that are read by name stand here. A
dataset of your own declares others with ``declare_metric``, or in its file of probes (``metrics`` in
docs/derived_probes.md). Tables, comparisons and reports show every metric that a run has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

from unike.types import (
    DERIVED_METRICS,
    FIVE_METRICS,
    FURTHER_METRICS,
    IMAGE_STYLES,
    METRICS,
    Expectation,
    UserError,
)

# What a metric says of an edit. Portability: the edit's consequences are known, too. Consistency: the edit
# holds however it is asked.
MetricGroup = Literal["reliability", "generality", "locality", "portability", "consistency"]
GROUPS: tuple[str, ...] = get_args(MetricGroup)
EXPECTATIONS: tuple[str, ...] = get_args(Expectation)
NAME_LENGTH, TITLE_LENGTH = 60, 60


@dataclass(frozen=True)
class MetricDeclaration:
    """A metric: ``name`` is its probe's, ``title`` and ``short`` are what tables call it.

    ``expect`` says what a good edit does to the probe: gives the ``target``, or leaves it ``unchanged``.
    ``source`` names the publication or file that defines it. A metric with ``mean_of`` is no probe: it is the
    mean of those metrics, in records that have them all.

    Raises:
        UserError: with a line for each field that is not as said.
    """

    name: str
    title: str
    short: str
    expect: Expectation
    group: MetricGroup
    source: str = ""
    mean_of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at = f"metric {self.name!r}"
        wrong = []
        if not isinstance(self.name, str) or not self.name.isidentifier() or len(self.name) > NAME_LENGTH:
            wrong.append(f"{at}: expected a name of letters, digits and _, of at most {NAME_LENGTH}")
        for field in ("title", "short"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value.strip() or len(value) > TITLE_LENGTH:
                wrong.append(f"{at}: {field}: expected a text of at most {TITLE_LENGTH} characters")
        if self.expect not in EXPECTATIONS:
            wrong.append(f"{at}: expect: expected {' or '.join(EXPECTATIONS)}, got {self.expect!r}")
        if self.group not in GROUPS:
            wrong.append(f"{at}: group: expected {', '.join(GROUPS)}, got {self.group!r}")
        if not isinstance(self.source, str):
            wrong.append(f"{at}: source: expected a text")
        if not isinstance(self.mean_of, (tuple, list)) or not all(isinstance(n, str) for n in self.mean_of):
            wrong.append(f"{at}: mean_of: expected names of metrics")
        if wrong:
            raise UserError(*wrong)
        object.__setattr__(self, "mean_of", tuple(self.mean_of))


_MMEDIT = "MMEdit (Cheng et al., 2023), the paper's Equations 12 to 20"
_OURS = "unike, docs/results/how_it_is_measured.md"
_DEVQA = "De-VQA (arXiv 2511.13243)"
_VLKEB = "VLKEB (Huang et al., NeurIPS 2024)"
_CCKEB = "CCKEB, of MemEIC (NeurIPS 2025)"
_MMKE = "MMKE-Bench (Du et al., ICLR 2025), its release's loader"
_MCMKE = "MC-MKE (ACL 2025 Findings), its release's files and matcher"
_COMPREHEND = "ComprehendEdit (AAAI 2025), its release's trainer"
_FGVEDIT = "FGVEdit (Zeng et al., ICCV 2025), its release's editor"
_CONSISTENCY = "unike, docs/consistency_probes.md"
# Names of the probes that are made of a record's own question, target and old answer, with their titles.
CONSISTENCY_METRICS = (
    ("affirmed_new", "target affirmed", "Aff new"),
    ("affirmed_old", "old answer denied", "Aff old"),
    ("negated_new", "negated target denied", "Neg new"),
    ("negated_old", "negated old answer affirmed", "Neg old"),
    ("negated_question", "negated yes/no question", "Neg Q"),
    ("choice", "new or old answer", "Choice"),
    ("choice_neither", "new or old answer, or neither", "Choice of 3"),
)
# Hops of VLKEB's multi-hop questions.
HOPS = (1, 2, 3, 4)
PORTABILITY_METRICS = tuple(f"portability_{hops}_hop" for hops in HOPS)

_BUILT_IN = (
    MetricDeclaration("reliability", "Reliability", "Rel", "target", "reliability", _MMEDIT),
    MetricDeclaration("t_generality", "T-Generality", "T-Gen", "target", "generality", _MMEDIT),
    MetricDeclaration("m_generality", "M-Generality", "M-Gen", "target", "generality", _MMEDIT),
    MetricDeclaration("t_locality", "T-Locality", "T-Loc", "unchanged", "locality", _MMEDIT),
    MetricDeclaration("m_locality", "M-Locality", "M-Loc", "unchanged", "locality", _MMEDIT),
    MetricDeclaration("same_question", "same question", "same Q", "unchanged", "locality", _OURS),
    MetricDeclaration("same_image", "same image", "same I", "unchanged", "locality", _OURS),
    MetricDeclaration("joint", "joint", "joint", "target", "generality", _OURS),
    *(
        MetricDeclaration(name, title, name.upper().replace("_", ""), "unchanged", "locality", _DEVQA)
        for name, title in zip(
            DERIVED_METRICS,
            (
                "edit's question, unrelated image",
                "unrelated question, edit's image",
                "edit's question, no image",
                "confusable question, no image",
                "edit's question, confusable image",
                "confusable question, edit's image",
                "confusable question and image",
            ),
            strict=True,
        )
    ),
    MetricDeclaration(
        "minimal_pair", "same question, minimal pair", "min. pair", "unchanged", "locality", _OURS
    ),
    MetricDeclaration("same_object", "same object", "same O", "unchanged", "locality", _OURS),
    *(
        MetricDeclaration(
            f"m_generality_{style}",
            f"M-Generality, {style.replace('_', ' ')}",
            f"M-Gen {style.replace('_', ' ')}",
            "target",
            "generality",
            _OURS,
        )
        for style in IMAGE_STYLES
    ),
    *(
        MetricDeclaration(
            name,
            f"portability, {hops} hop{'s' * (hops > 1)}",
            f"Port {hops}",
            "target",
            "portability",
            _VLKEB,
        )
        for hops, name in zip(HOPS, PORTABILITY_METRICS, strict=True)
    ),
    MetricDeclaration(
        "second_reliability", "reliability of the second edit", "Rel 2", "target", "reliability", _VLKEB
    ),
    MetricDeclaration(
        "second_generality", "generality of the second edit", "Gen 2", "target", "generality", _CCKEB
    ),
    MetricDeclaration(
        "second_locality", "locality of the second edit", "Loc 2", "unchanged", "locality", _CCKEB
    ),
    MetricDeclaration(
        "compositional_reliability", "compositional reliability", "CompRel", "target", "portability", _CCKEB
    ),
    MetricDeclaration("text_reliability", "text reliability", "T-Rel", "target", "reliability", _MMKE),
    MetricDeclaration("image_reliability", "image reliability", "I-Rel", "target", "reliability", _MMKE),
    MetricDeclaration("image_generality", "image generality", "I-Gen", "target", "generality", _MMKE),
    MetricDeclaration("consistency", "consistency", "Cons", "target", "portability", _MCMKE),
    MetricDeclaration("kgi", "knowledge generalization", "KGI", "target", "generality", _COMPREHEND),
    MetricDeclaration("kpi", "knowledge preservation", "KPI", "unchanged", "locality", _COMPREHEND),
    MetricDeclaration(
        "fine_generality", "fine-grained generality", "Fine Gen", "target", "generality", _FGVEDIT
    ),
    MetricDeclaration(
        "fine_locality", "fine-grained locality", "Fine Loc", "unchanged", "locality", _FGVEDIT
    ),
    MetricDeclaration(
        "specificity",
        "specificity",
        "Spec",
        "target",
        "generality",
        _FGVEDIT,
        mean_of=("fine_generality", "fine_locality"),
    ),
    *(
        MetricDeclaration(name, title, short, "target", "consistency", _CONSISTENCY)
        for name, title, short in CONSISTENCY_METRICS
    ),
)
_DECLARED: dict[str, MetricDeclaration] = {metric.name: metric for metric in _BUILT_IN}
assert set(METRICS) | set(FURTHER_METRICS) <= _DECLARED.keys()
assert tuple(_DECLARED)[: len(METRICS)] == METRICS
assert METRICS[: len(FIVE_METRICS)] == FIVE_METRICS


def declare_metric(metric: MetricDeclaration) -> None:
    """Makes a metric known to tables, comparisons and reports of this process.

    Raises:
        UserError: if another one of that name is known. To declare the same again does nothing.
    """
    known = _DECLARED.setdefault(metric.name, metric)
    if known != metric:
        raise UserError(
            f"metric {metric.name!r}: is declared already, as {known.title!r}, with other words; expected a "
            f"name of its own"
        )


def declare_metrics(values: object, at: str) -> None:
    """Declares what a file lists: a list of objects with the fields of ``MetricDeclaration``.

    Raises:
        UserError: a line for the first one that is no such object, beginning with ``at``.
    """
    if not isinstance(values, list):
        raise UserError(f"{at}: metrics: expected a list of objects")
    known = {field.name for field in fields(MetricDeclaration)}
    needed = known - {"source", "mean_of"}
    for i, value in enumerate(values):
        if not isinstance(value, dict) or not needed <= set(value) <= known:
            raise UserError(f"{at}: metrics: number {i}: expected an object with {', '.join(sorted(known))}")
        try:
            declare_metric(MetricDeclaration(**value))
        except UserError as error:
            raise UserError(*(f"{at}: {problem}" for problem in error.problems)) from None


def describe_declared() -> list[dict[str, object]]:
    """The metrics that were declared in this process, as ``declare_metrics`` reads them."""
    return [asdict(metric) for metric in _DECLARED.values() if not is_built_in(metric.name)]


def find_metric(name: str) -> MetricDeclaration | None:
    """The declared metric of that name."""
    return _DECLARED.get(name)


def list_group(group: MetricGroup) -> list[str]:
    """Names of the declared metrics of a group, in the order of the tables."""
    return [metric.name for metric in _DECLARED.values() if metric.group == group]


def is_built_in(name: str) -> bool:
    """Whether the metric is known without being declared."""
    return any(metric.name == name for metric in _BUILT_IN)


def list_metrics() -> list[MetricDeclaration]:
    """All declared metrics: the eight first, in the order of the tables."""
    return list(_DECLARED.values())


def get_expectation(name: str) -> Expectation:
    """What a good edit does to the probe of that name; one that nobody declared counts as within scope."""
    metric = find_metric(name)
    return "target" if metric is None else metric.expect


class MetricTitles(Mapping[str, str]):
    """Titles of all declared metrics by name, as they are now: a view, not a copy. ``own`` has titles of
    further names, and other ones of some metrics."""

    def __init__(self, own: Mapping[str, str] | None = None, is_short: bool = False) -> None:
        self._own, self._is_short = dict(own or {}), is_short

    def __getitem__(self, name: str) -> str:
        if name in self._own:
            return self._own[name]
        metric = _DECLARED[name]
        return metric.short if self._is_short else metric.title

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*_DECLARED, *self._own]))

    def __len__(self) -> int:
        return len(_DECLARED.keys() | self._own.keys())
