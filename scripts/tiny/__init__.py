"""Training and data of the two bundled toy models."""
