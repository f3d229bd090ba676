"""Command lines on which an option has one value."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unike.system.text import one_line
from unike.types import UserError


class _StoreOnce(argparse.Action):
    """Stores a value. UserError where the option is given again with another one."""

    former: Any = None
    is_given = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.option_strings and self.is_given and values != self.former:
            name = self.option_strings[0]
            raise UserError(f"{name}: given twice: {one_line(self.former, 80)} and {one_line(values, 80)}")
        self.former, self.is_given = values, True
        setattr(namespace, self.dest, values)


# How the next parser is called in its help, where that is not its own name.
_names: list[str] = []


@contextmanager
def called_as(name: str) -> Iterator[None]:
    """The first parser that is made inside the block has this name in its help and messages, such as
    ``unike report`` in place of ``python -m unike.report``."""
    _names[:] = [name]
    try:
        yield
    finally:
        _names.clear()


class ArgumentParser(argparse.ArgumentParser):
    """As argparse's; an option that is given twice with different values is a UserError. Parse where
    ``run_guarded`` reports it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if _names:
            self.prog = _names.pop()
        self.register("action", None, _StoreOnce)
        self.register("action", "store", _StoreOnce)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's, which says the nearest choice from Python 3.14 on alone."""
        choices = action.choices
        if choices is not None and value not in choices:
            names = [str(name) for name in choices]
            near = difflib.get_close_matches(str(value), names, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            expected = ", ".join(map(repr, names))
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}, expected one of {expected}{hint}"
            )
