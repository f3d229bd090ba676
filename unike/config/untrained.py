"""The options of an edit that needs no data: nothing in it is learnt from a train split."""

from __future__ import annotations

from unike.config.hparams import HyperParams

# UniKE without what is trained beforehand: the edit's own state is all that its memory holds, no direction is
# added to its values, and alpha is a number, weighed by the overlap that the gate measures.
UNTRAINED: dict[str, object] = {
    "method": "unike",
    "layers": 4,
    "n_keys": 10,
    "key_init": "query",
    "memory": "edit",
    "zeta": "none",
    "alpha": 0.2,
    "alpha_overlap": True,
    "scope_gate": "nearest",
    "scope_measure": "overlap",
    "scope_overlap": 0.3,
    "scope_overlap_tokens": 16,
    "max_new_tokens": 32,
}


def make_untrained(source: str, **values: object) -> HyperParams:
    """Hyper-parameters of such edits, with ``values`` of the model's own and of whoever wants others; errors
    are named by ``source``. UserError for unknown names, and for values that do not fit."""
    return HyperParams.from_dict(UNTRAINED | values, source)
