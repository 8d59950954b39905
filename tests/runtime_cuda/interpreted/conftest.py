"""These tests run in a process of their own, with Triton's interpreter: ../test_interpreted.py starts it."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
