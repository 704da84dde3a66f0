"""The Hugging Face format, read and written by one table per family."""
