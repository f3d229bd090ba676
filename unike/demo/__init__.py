"""A web page to try editing: ask, edit, ask again, undo (``python -m unike.demo``)."""
