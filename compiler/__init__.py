"""The compiler: the only package that knows Hugging Face."""
