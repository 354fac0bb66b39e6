"""alignjax: align language models in JAX, from a base model to an assistant that reasons."""

__version__ = "0.1.0"
