"""Kernels of attention over the paged cache."""

from __future__ import annotations


def attention_program(spec, operands, context):
    raise NotImplementedError
