"""Strict hyper-parameters: one flat YAML file, one dataclass that is every section at once."""

from __future__ import annotations

import copy
import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unike.config import combined, easyedit, probe_sections, release, rivals, scope_sections, sections
from unike.config.locating import locate_paths
from unike.config.options import OPTIONS
from unike.config.sections import SPEED
from unike.config.shipped_yamls import find_yaml, suggest_name
from unike.config.yaml_reader import parse_yaml, read_yaml
from unike.system.text import shorten
from unike.types import UserError

logger = logging.getLogger("unike")


@dataclass(frozen=True, kw_only=True)
class HyperParams(
    combined.LoadingOptions,
    combined.KnowledgeUseOptions,
    combined.FreshPatchOptions,
    combined.NeuronTrainingOptions,
    combined.AdapterOptions,
    combined.SideMemoryTrainingOptions,
    rivals.CodebookOptions,
    combined.KnowledgePreparationOptions,
    combined.ScopePreparationOptions,
    combined.EditorPreparationOptions,
    combined.TrainedPartsOptions,
    scope_sections.OverlapGateOptions,
    sections.FineTuningOptions,
    sections.IKEOptions,
    combined.TrainSplitOptions,
    combined.RunFolderOptions,
    sections.EvaluationOptions,
    probe_sections.FurtherEvaluationOptions,
    sections.EditBatchOptions,
):
    """All options of a run, one attribute for each key of the YAML (see the page on hyper-parameters).

    Values are checked however the object is made: UserError with a line for each unknown key, wrong type and
    value out of range. Objects are frozen; ``replace`` gives a changed copy.
    """

    # Keys of the release's file that have no counterpart.
    ignored: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        checked, problems = _check_values({name: getattr(self, name) for name in OPTIONS}, {}, self.source)
        if problems:
            raise UserError(*problems)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def decisive(self) -> dict[str, object]:
        """Of ``to_dict`` the options that results depend on: without those of speed, of folders that are
        written, and of logging."""
        without = {"results_dir", "log_to", *(("eval_batch",) if self.batch_invariant else ())}
        return {
            name: value
            for name, value in self.to_dict().items()
            if OPTIONS[name].group != SPEED and name not in without
        }

    def to_dict(self) -> dict[str, object]:
        """All options as plain values, by key, as ``from_dict`` and a YAML file take them."""
        values = {name: copy.deepcopy(getattr(self, name)) for name in OPTIONS}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def from_hparams(
        cls, path: str | os.PathLike[str], overrides: Sequence[str] = (), legacy: bool = False
    ) -> HyperParams:
        """The options of a YAML file, or of a shipped one by its name (``scoped/tiny_blip2``).

        ``overrides`` are texts ``key=value``, as on the command line. ``legacy=True`` reads the YAML of
        UniKE's release.

        EasyEdit's YAMLs of MEND, SERAC, IKE and FT are known by their keys, with ``legacy`` or without.
        Relative paths of the file are looked for in its folder, in its project, in the working folder, and
        among the files that come with this code; those of ``overrides`` in the working folder alone. All
        problems of the file and the overrides are raised together, as one ``UserError``.
        """
        source = find_yaml(_check_path(path))
        if not os.path.lexists(source) and (near := suggest_name(source)) is not None:
            raise UserError(
                f"{shorten(source)}: no such file, nor a shipped YAML; the nearest one is {near} (unike list)"
            )
        values, where, problems = read_yaml(source)
        return cls._build(values, source, where, [] if legacy else problems, overrides, legacy)

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, object],
        source: str = "hparams",
        overrides: Sequence[str] = (),
        legacy: bool = False,
    ) -> HyperParams:
        """Like ``from_hparams``, from values; ``source`` names them in error messages."""
        if not isinstance(values, Mapping):
            raise UserError(f"{source}: expected a mapping of options, got {type(values).__name__}")
        return cls._build(dict(values.items()), source, {}, [], overrides, legacy)

    def replace(self, **changes: object) -> HyperParams:
        """These values with some of them changed; UserError for unknown names and for values that do not
        fit."""
        return HyperParams.from_dict(self.to_dict() | changes, self.source)

    @classmethod
    def _build(
        cls,
        values: dict[object, object],
        source: str,
        where: dict[object, str],
        problems: list[str],
        overrides: Sequence[str],
        legacy: bool,
    ) -> HyperParams:
        ignored: tuple[str, ...] = ()
        ours = frozenset(OPTIONS) | frozenset(_ALIASES)
        if easyedit.find_algorithm(values) is not None:
            values, ignored = easyedit.translate(values, ours, source)
            renamed: dict[object, str] = dict(easyedit.RENAMED[str(values["method"])].items())
        elif legacy:
            values, ignored = release.translate(values, ours)
            renamed = release.RENAMED
        else:
            renamed = {}
        if renamed:
            where = {renamed.get(key, key): at for key, at in where.items() if key not in ignored}
        values, found = _rename_aliases(values, where, source)
        where = {_resolve_alias(key): at for key, at in where.items()}
        values = locate_paths(values, source)
        values, changed, more = _apply_overrides(values, overrides, source)
        where = where | dict.fromkeys(changed, f"{source} (override)")
        checked, wrong = _check_values(values, where, source)
        problems = [*problems, *found, *more, *wrong]
        if problems:
            raise UserError(*problems)
        if ignored:
            logger.warning("%s: no counterpart, ignored: %s", source, ", ".join(ignored))
        return cls(**checked, ignored=ignored, source=source)


def _check_path(path: object) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"hparams: expected the path of a YAML file, got {type(path).__name__}")
    return os.fsdecode(path)


def _replace_entry(base: object, keys: Sequence[str], value: object) -> object:
    """``base`` with the entry under ``keys`` replaced."""
    if not keys:
        return value
    copied = dict(base) if isinstance(base, Mapping) else {}
    copied[keys[0]] = _replace_entry(copied.get(keys[0]), keys[1:], value)
    return copied


def _apply_overrides(
    values: dict[object, object], overrides: Sequence[str], source: str
) -> tuple[dict[object, object], list[object], list[str]]:
    """``values`` after ``key=value`` and ``key.entry=value``, the keys changed, and the problems."""
    values, problems = dict(values), list[str]()
    changed: list[object] = []
    given: dict[tuple[str, ...], tuple[object, str]] = {}
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        raise UserError(f"{source}: overrides: expected a list of key=value, got {type(overrides).__name__}")
    for text in overrides:
        if not isinstance(text, str):
            problems.append(f"{source}: overrides: expected key=value, got {type(text).__name__}")
            continue
        key, sign, raw = text.partition("=")
        if not sign or not key.strip():
            problems.append(f"{source}: {shorten(text)}: expected key=value")
            continue
        try:
            value, _, repeated = parse_yaml(raw, f"{source}: {shorten(key)}")
        except UserError as fault:
            problems.extend(fault.problems)
            continue
        problems.extend(repeated)
        first, *rest = key.strip().split(".")
        first = _ALIASES.get(first, first)
        path = (first, *rest)
        if former := _find_conflict(given, path, value):
            problems.append(f"{source}: {shorten(key)}: given twice: {shorten(former)} and {shorten(text)}")
        given[path] = (value, text)
        values[first] = _replace_entry(values.get(first), rest, value)
        changed.append(first)
    return values, changed, problems


def _find_conflict(
    given: Mapping[tuple[str, ...], tuple[object, str]], path: tuple[str, ...], value: object
) -> str | None:
    """The text of a former override of the same entry, or of one within or around it, with another value."""
    for other, (former, text) in given.items():
        shared = min(len(other), len(path))
        if other[:shared] == path[:shared] and (other != path or former != value):
            return text
    return None


def _resolve_alias(key: object) -> object:
    return _ALIASES.get(key, key) if isinstance(key, str) else key


def _rename_aliases(
    values: Mapping[object, object], where: Mapping[object, str], source: str
) -> tuple[dict[object, object], list[str]]:
    renamed: dict[object, object] = {}
    problems = []
    for key, value in values.items():
        name = _resolve_alias(key)
        if name in renamed:
            problems.append(
                f"{where.get(key, source)}: {shorten(key)}: another name of {name}, which is given too"
            )
        renamed[name] = value
    return renamed, problems


def _check_values(
    values: Mapping[object, object], where: Mapping[object, str], source: str
) -> tuple[dict[str, Any], list[str]]:
    """The values in their own types, and every problem, one line each."""
    checked: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in values.items():
        at = f"{where.get(key, source)}: {shorten(key)}"
        if key not in OPTIONS:
            problems.append(f"{at}: unknown key; {_suggest_key(shorten(key))}")
            continue
        try:
            checked[key] = OPTIONS[key].read(value, at)
        except UserError as fault:
            problems += fault.problems
    missing = (option for option in OPTIONS.values() if option.required and option.name not in values)
    problems += [f"{source}: {o.name}: missing; expected {o.kind.words} ({o.help})" for o in missing]
    plain = {"method": "unike", "intrinsic": True, "external": "latent"} | checked
    if (plain["method"], plain["intrinsic"], plain["external"]) == ("unike", False, "none"):
        problems.append(f"{source}: intrinsic: false together with `external: none` edits nothing")
    return checked, problems


def _suggest_key(key: str) -> str:
    if key in release.RELEASE_ONLY:
        return (
            "it belongs to the UniKE release's own file, which Python reads: "
            "HyperParams.from_hparams(file, legacy=True)"
        )
    nearest = difflib.get_close_matches(key, [*OPTIONS, *_ALIASES], n=1, cutoff=0.0)
    return f"the nearest known key is {nearest[0]}"


_ALIASES = {alias: option.name for option in OPTIONS.values() for alias in option.aliases}
UniKEHyperParams = HyperParams
"""``HyperParams`` under a name like those of EasyEdit's classes."""
