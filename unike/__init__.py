"""Edit what a multimodal large language model knows (UniKE, Pan et al., NeurIPS 2024)."""

__version__ = "0.1.0"
