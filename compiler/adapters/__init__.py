"""Adapters for models whose attention is hard-coded, one file per model_type, found by file name."""
