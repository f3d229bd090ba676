"""Editing methods; importing this package registers all of them."""

from unike.methods import ft, ike, tpatcher, unike
from unike.methods.base import EditMethod, build, methods, needs_cases, needs_knowledge, register

__all__ = [
    "EditMethod", "build", "ft", "ike", "methods", "needs_cases", "needs_knowledge", "register", "tpatcher",
    "unike",
]  # fmt: skip
