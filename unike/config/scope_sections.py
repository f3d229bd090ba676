"""Options of a gate around edits, and of the trained scope classifier; the others are in ``sections.py``."""

from __future__ import annotations

from dataclasses import dataclass

from unike.config.kinds import choice, nullable, number, switch, text, whole
from unike.config.schema import Section, option
from unike.config.sections import SeedOptions
from unike.types import UserError


@dataclass(frozen=True, kw_only=True)
class OverlapGateOptions(Section):
    """Whether an edit of any method applies to a prompt, by what the unedited model is about to say."""

    scope_overlap: float | None = option(
        nullable(number(low=0, high=1)),
        "least overlap of the unedited model's next tokens at an edit's prompt and at another one at which "
        "the edit applies; null: it is not looked at",
        None,
    )
    scope_overlap_tokens: int = option(
        whole(low=1, high=64), "tokens along the unedited model's answer that are compared", 1
    )
    alpha_overlap: bool = option(
        switch(), "alpha is multiplied by the overlap with the edit's prompt, in a gate around edits", False
    )
    scope_recall: float | None = option(
        nullable(number(low=0, high=1)),
        "share of the held-out prompts in an edit's scope that the scope classifier lets pass, where many "
        "answers are possible; null: its threshold decides best",
        None,
    )
    scope_recall_few: float | None = option(
        nullable(number(low=0, high=1)),
        "the same where few answers are possible, as with yes and no, as far as scope_overlap_tokens go",
        None,
    )
    scope_layer: int | None = option(
        nullable(whole(low=0)),
        "decoder layer whose input the scope classifier of a gate around edits reads; null: the first edited "
        "one",
        None,
    )

    def find_scope_layer(self, count: int, first: int) -> int:
        """``scope_layer`` of a decoder of ``count`` layers; ``first`` where it is null. UserError where the
        decoder has no such layer."""
        if self.scope_layer is None:
            return first
        if self.scope_layer >= count:
            expected = f"expected a number from 0 to {count - 1}"
            raise UserError(f"{self.source}: scope_layer: {self.scope_layer}; {expected}")
        return self.scope_layer


@dataclass(frozen=True, kw_only=True)
class ScopeTrainingOptions(SeedOptions):
    """Training of a scope classifier; with the seed, all options that its weights depend on."""

    scope_width: int | None = option(
        nullable(whole(low=1)), "width of attention; null: the decoder's, at most 512", None
    )
    scope_tokens: int | None = option(
        nullable(whole(low=2)),
        "most states of a prompt that are attended to: its last tokens, and means of groups of those before; "
        "null: all",
        None,
    )
    scope_hidden: int | None = option(
        nullable(whole(low=1)), "hidden width; null: twice the width of attention", None
    )
    scope_dim: int = option(whole(low=1), "output width, in which similarity is computed", 128)
    scope_heads: int = option(whole(low=1), "attention heads over the prompt's tokens", 4)
    scope_records: int = option(whole(low=20), "most train records used", 2000)
    scope_probes: str = option(
        choice("recombined", "hard"),
        "queries of a train record that are compared: recombinations of its own, or also restyled images, "
        "look-alikes and images with half of another one",
        "recombined",
    )
    scope_steps: int = option(whole(low=0), "training steps, with scope_patience at most so many", 1000)
    scope_patience: int | None = option(
        nullable(whole(low=1)),
        "validations without improvement after which training stops; null: it takes scope_steps steps",
        None,
    )
    scope_val_every: int = option(whole(low=1), "training steps between validations", 50)
    scope_batch: int = option(whole(low=2), "records per batch", 64)
    scope_lr: float = option(number(low=0, above=True), "learning rate", 1e-3)
    scope_tau: float = option(number(low=0, above=True), "contrastive temperature", 0.1)


@dataclass(frozen=True, kw_only=True)
class ScopeClassifierOptions(ScopeTrainingOptions):
    """A scope classifier: its training, and where it is kept."""

    scope_dir: str | None = option(nullable(text()), "folder of trained scope classifiers", None)


@dataclass(frozen=True, kw_only=True)
class ScopeStorageOptions(Section):
    """Where the states that a scope classifier is trained on are kept meanwhile."""

    scope_memory_gb: float = option(
        number(low=0, high=1e6), "GB of states kept in memory while a scope classifier is trained", 2.0
    )
    scope_disk_gb: float = option(
        number(low=0, high=1e6), "most GB of states kept in a file in scope_dir beyond those", 20.0
    )
