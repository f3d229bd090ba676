"""Commands of a checkout."""
