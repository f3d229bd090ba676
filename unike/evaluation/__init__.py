"""Evaluation before and after an edit: protocols, metrics, records and their summary."""
