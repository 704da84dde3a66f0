"""vlmjax: vision-language pretraining in JAX, from a recipe to a Hugging Face folder."""

__version__ = "0.1.0"
