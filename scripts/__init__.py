"""Command-line helpers of the project."""
