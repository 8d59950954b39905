"""Loading and generating need nothing but torch, numpy, safetensors and tokenizers."""

import subprocess
import sys

from tests.runtime.artifacts import write_artifact
from tests.runtime.models import make_model

FORBIDDEN = ("transformers", "triton", "jinja2", "onnx", "dscompile.compiler", "dscompile.passes", "dscompile.codegen")

PROGRAM = """
import sys
from dscompile.runtime import load
engine = load({out!r}, device="cpu")
engine.generate(["Hi"], max_new_tokens=3)
list(engine.stream("Hi", max_new_tokens=3, temperature=1.0))
engine.logits([[1, 2, 3]])
print([m for m in {forbidden!r} if m in sys.modules])
"""


def test_load_and_generate_import_nothing_of_the_compiler(tmp_path):
    out = write_artifact(tmp_path / "out", make_model(vocab=257), tokenizer=True)
    program = PROGRAM.format(out=str(out), forbidden=FORBIDDEN)
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_reading_files_needs_no_torch():
    program = "import sys, dscompile.runtime.manifest, dscompile.runtime.plan; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
