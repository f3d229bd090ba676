"""The paper's tables and figures: ours, with the published numbers."""
