"""Editing methods; importing this package registers all of them."""

from unike.methods import ft, ke, mend, serac, unike
from unike.methods.base import EditMethod, build, methods, needs_knowledge, register

__all__ = [
    "EditMethod",
    "build",
    "ft",
    "ke",
    "mend",
    "methods",
    "needs_knowledge",
    "register",
    "serac",
    "unike",
]
