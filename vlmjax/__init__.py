"""vlmjax: vision-language pretraining in JAX, from a recipe to a Hugging Face folder."""

from vlmjax import hub  # light: its functions load what they need when they are first used

__all__ = ["hub"]

__version__ = "0.1.0"
