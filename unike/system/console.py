"""A terminal whose reader may go away."""

from __future__ import annotations

from rich import console


class Console(console.Console):
    """As rich's, which would end the program with code 1 where nobody reads its output any more."""

    def on_broken_pipe(self) -> None:
        """Leaves the broken pipe to ``run_guarded``."""
        raise BrokenPipeError
