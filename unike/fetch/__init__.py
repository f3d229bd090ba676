"""Models and benchmarks from the Hugging Face hub, Google Drive and their owners' servers."""

from unike.fetch.command import run

__all__ = ["run"]
