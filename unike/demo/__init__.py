"""A page to try editing on: ask, edit, ask again, undo (``python -m unike.demo``)."""
