"""Pages to send: a run, or two runs side by side, as one HTML file that needs nothing else."""

from unike.report.run import where, write_report

__all__ = ["where", "write_report"]
