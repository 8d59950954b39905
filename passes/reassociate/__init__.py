"""Exact algebra that moves rounding."""
