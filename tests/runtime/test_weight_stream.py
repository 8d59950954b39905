"""Tensors read from files piece by piece."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from dscompile.runtime import weight_stream
from dscompile.runtime.errors import UserError
from dscompile.runtime.weight_stream import fill, pieces_of
from dscompile.runtime.weights import read_header


def test_pieces_cover_every_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_stream, "PIECE_BYTES", 13)
    path = tmp_path / "x.safetensors"
    stored = {"a": torch.randn(3, 7), "b": torch.randn(5).half(), "empty": torch.empty(0, 4)}
    save_file(stored, path)
    read = {name: torch.full_like(tensor, float("nan")) for name, tensor in stored.items()}
    file = os.open(path, os.O_RDONLY)
    for name, entry in read_header(path).items():
        for piece in pieces_of(path, entry.offset, read[name]):
            assert 0 < len(piece.target) <= 13
            fill(file, piece.offset, piece.target.numpy().data, path)
    os.close(file)
    for name, tensor in stored.items():
        assert torch.equal(read[name], tensor)


def test_a_file_that_ends_early(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"12345")
    file = os.open(path, os.O_RDONLY)
    with pytest.raises(UserError, match="ends too early"):
        fill(file, 3, memoryview(bytearray(8)), path)
    os.close(file)


def test_a_header_that_lies_about_a_tensor(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(4), "b": torch.randn(4)}, path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"data_offsets":[0,16]', b'"data_offsets":[0,12]'))
    with pytest.raises(UserError, match="'a' has 12 bytes"):
        read_header(path)
