"""What a command line asks for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from unike.config.hparams import HyperParams
from unike.methods.registry import MethodNeeds, resolve_needs_if_valid
from unike.runs.drawing import (
    choose_splits,
    get_drawing_folder,
    get_drawn_file,
    list_missing_splits,
    wants_drawing,
)
from unike.runs.folders import choose_directory
from unike.runs.inputs import list_parts, open_datasets
from unike.runs.inspecting import list_option_names
from unike.system import processes
from unike.system.findings import collect_problems
from unike.types import Case, UserError


@dataclass(frozen=True)
class RunRequest:
    """A YAML with its overrides, and the arguments of ``run_edit.py`` with it."""

    hparams: HyperParams
    task: str = "vqa"
    size: int | None = None
    skip_broken: bool = False
    output: str | None = None
    resume: bool = False
    save_edits: str | None = None
    num_processes: int | None = None
    generated: bool = True
    # Options that the command line names.
    given: tuple[str, ...] = ()

    @classmethod
    def from_arguments(cls, hparams: HyperParams, args: argparse.Namespace) -> RunRequest:
        """The request of a parsed command line. Without a task, E-VQA, or both for cross-task sequences."""
        own = {"hparams", "given"}
        named = {field.name: getattr(args, field.name) for field in fields(cls) if field.name not in own}
        named["given"] = list_option_names([*args.overrides, *args.named])
        task = args.task or ("cross" if hparams.protocol == "cross_task" else "vqa")
        return cls(hparams, **(named | {"task": task}))

    @cached_property
    def needs(self) -> MethodNeeds:
        """What the method needs; nothing where the YAML's is not valid."""
        return resolve_needs_if_valid(self.hparams)

    @cached_property
    def cases(self) -> Sequence[Case]:
        """The eval cases, read once. UserError as ``open_datasets``."""
        return open_datasets(self.hparams, self.task, self.size, self.skip_broken)

    @property
    def are_cases_there(self) -> bool:
        """Whether the eval cases can be read now; where not, the check of the eval data says why."""
        return not self.is_eval_undrawn and not collect_problems(lambda: self.cases)

    def choose_directory(self) -> Path:
        """The folder of the run. UserError as the function of this name."""
        return choose_directory(self.hparams, self.task, self.output, self.resume)

    @property
    def process_count(self) -> int:
        """How many processes share the run."""
        planned = processes.count_planned()
        return planned if planned > 1 else self.num_processes or 1

    # ------------------------------------------------------------ the bundled benchmark

    @cached_property
    def is_drawn(self) -> bool:
        """Whether what is missing of the bundled benchmark is drawn."""
        return wants_drawing(self.hparams)

    @property
    def undrawn_splits(self) -> list[str]:
        """The splits of the bundled benchmark that are drawn when the run starts."""
        if not self.is_drawn or self.hparams.image_root is None:
            return []
        try:
            splits = choose_splits(self.hparams)
        except UserError:
            # The checks of the method and its folders say why.
            splits = ("train", "eval")
        return list_missing_splits(get_drawing_folder(self.hparams), splits)

    def is_undrawn(self, part: str, split: str) -> bool:
        """Whether the annotations under ``data.<part>.<split>`` are drawn when the run starts."""
        path = (self.hparams.data.get(part) or {}).get(split)
        if path is None or split not in self.undrawn_splits:
            return False
        drawn = get_drawn_file(get_drawing_folder(self.hparams), part, split)
        return os.path.abspath(path) == os.path.abspath(drawn)

    @property
    def is_eval_undrawn(self) -> bool:
        """Whether eval cases can be read only once the benchmark is drawn."""
        return any(self.is_undrawn(part, "eval") for part in list_parts(self.task))

    @property
    def is_train_undrawn(self) -> bool:
        """Whether train records can be read only once the benchmark is drawn."""
        return any(self.is_undrawn(part, "train") for part in self.hparams.data)
