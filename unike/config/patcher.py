"""The options of T-Patcher as published, which no other method has."""

from __future__ import annotations

from dataclasses import dataclass

from unike.config.kinds import number, whole
from unike.config.schema import Section, option


@dataclass(frozen=True, kw_only=True)
class NeuronOptions(Section):
    """T-Patcher as published: its neurons, and what its training has of its own."""

    patcher_neurons: int = option(whole(low=1), "most neurons of an edit, one for each wrong token", 5)
    patcher_amplify: float = option(
        number(low=0, above=True), "factor of a neuron's random first values, trained with them", 10.0
    )
    patcher_margin: float = option(
        number(low=0, high=50), "by how much a neuron's score on remembered queries must be lower", 3.0
    )
    patcher_top: int = option(whole(low=1), "largest terms of the memory loss that are averaged", 1000)
    patcher_smoothing: float = option(number(low=0, high=0.9), "label smoothing of the answer's loss", 0.1)
    patcher_weight_decay: float = option(number(low=0), "weight decay of the neurons", 0.01)
    patcher_min_steps: int = option(whole(low=0), "steps before training may stop", 100)
    patcher_check_every: int = option(whole(low=1), "training steps between validations of an edit", 25)
    patcher_patience: int = option(
        whole(low=1), "validations of an edit without improvement after which it stops", 1
    )
