"""What metrics are called, in full and in the head of a column."""

from __future__ import annotations

from unike.datasets.declarations import MetricTitles as MetricTitles

TITLES = MetricTitles()
SHORT_TITLES = MetricTitles(is_short=True)
