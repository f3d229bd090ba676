"""Editing methods. All are registered here; none is imported before it is made."""

from typing import TYPE_CHECKING, Any

from unike.methods.registry import (
    MethodNeeds,
    check_method,
    list_methods,
    register,
    resolve_needs,
    resolve_needs_if_valid,
)
from unike.system.lazy import load_attribute

if TYPE_CHECKING:
    from unike.methods.base import EditMethod, build, resolve_layers
    from unike.methods.meta_training import TrainableMethod

__all__ = [
    "EditMethod",
    "MethodNeeds",
    "TrainableMethod",
    "build",
    "check_method",
    "list_methods",
    "register",
    "resolve_layers",
    "resolve_needs",
    "resolve_needs_if_valid",
]

_HOMES = {
    **dict.fromkeys(("EditMethod", "build", "resolve_layers"), "unike.methods.base"),
    "TrainableMethod": "unike.methods.meta_training",
}


def __getattr__(name: str) -> Any:
    # On first use: torch takes seconds, and an unknown method should not.
    return load_attribute(__name__, name, _HOMES)
