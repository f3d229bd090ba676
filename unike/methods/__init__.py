"""Editing methods; importing this package registers all of them."""

from unike.methods import ft, mend, unike
from unike.methods.base import EditMethod, build, methods, needs_knowledge, register

__all__ = ["EditMethod", "build", "ft", "mend", "methods", "needs_knowledge", "register", "unike"]
