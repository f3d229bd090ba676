"""Tables and pages of runs: one run, or two compared."""

from unike.report.run_page import show, write_report

__all__ = ["show", "write_report"]
