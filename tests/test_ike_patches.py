"""IKE with trained key-value pairs besides: the paper's TP+IKE and Intrin+IKE."""

from __future__ import annotations

import pytest
import torch
from worlds import BASE, World

from unike.config.hparams import HyperParams
from unike.config.options import BEFORE_OPTIONS
from unike.edits import PromptEdit, RoutedEdit
from unike.methods import resolve_needs
from unike.runs.inspecting import check_effects
from unike.types import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SHOWN = {"ike_retriever": "states", "ike_demonstrations": 2}
BOTH = SHOWN | {"ike_patches": True}


def tensors(edit: RoutedEdit) -> list[torch.Tensor]:
    return [t for _, t in sorted(edit.state_dict().items())]


def split(edit: object) -> tuple[PromptEdit, RoutedEdit]:
    text, pairs = edit.parts  # type: ignore[attr-defined]
    assert isinstance(text, PromptEdit)
    assert isinstance(pairs, RoutedEdit)
    return text, pairs


def test_the_text_is_ikes_own_and_pairs_are_trained_besides(world: World) -> None:
    text, pairs = split(world.edit(("ike", BOTH)))
    alone = world.edit(("ike", SHOWN))
    assert isinstance(alone, PromptEdit), "without the option nothing is trained"
    assert text.facts == alone.facts
    assert len(text.facts[0].demonstrations) == 2
    assert pairs.info["steps"] > 0
    assert any(bool(t.abs().sum() > 0) for t in tensors(pairs))


def test_without_demonstrations_the_pairs_are_those_of_intrin_with_the_fact_in_the_prompt(
    world: World,
) -> None:
    own = {"ike_demonstrations": 0, "ike_retriever": "states", "ike_patches": True}
    _, pairs = split(world.edit(("ike", own)))
    reference = world.edit(("unike", {"external": "prompt", "zeta": "none"}))
    patches = [share.patch for share in pairs.records[0].layers.values()]
    others = [share.patch for share in reference.records[0].layers.values()]
    for patch, other in zip(patches, others, strict=True):
        for one, two in zip(patch.parameters(), other.parameters(), strict=False):
            assert torch.equal(one, two)


def test_what_is_shown_changes_what_is_learnt(world: World) -> None:
    found = [split(world.edit(("ike", BOTH | {"ike_demonstrations": n})))[1] for n in (0, 2)]
    first = [next(iter(e.records[0].layers.values())).patch for e in found]
    assert not all(
        torch.equal(a, b) for a, b in zip(first[0].parameters(), first[1].parameters(), strict=True)
    )


def test_an_option_of_pairs_has_an_effect_with_them_alone() -> None:
    assert BEFORE_OPTIONS["ike_patches"] is False
    given = ("n_keys", "lr", "activation_loss", "key_init")
    check_effects(HyperParams.from_dict({**BASE, "method": "ike", "ike_patches": True}), given)
    with pytest.raises(UserError) as caught:
        check_effects(HyperParams.from_dict({**BASE, "method": "ike"}), given)
    assert len(caught.value.problems) == len(given)


@pytest.mark.parametrize(
    ("patches", "weight", "needed"), [(True, 0.1, True), (True, 0.0, False), (False, 0.1, False)]
)
def test_remembered_queries_are_needed_for_the_memory_loss(
    patches: bool, weight: float, needed: bool
) -> None:
    changes = SHOWN | {"method": "ike", "ike_patches": patches, "memory_loss": weight}
    assert resolve_needs(HyperParams.from_dict(BASE | changes)).knowledge is needed
