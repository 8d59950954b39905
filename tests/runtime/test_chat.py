"""Chat templates render as transformers renders them."""

import json

import pytest

from dscompile.runtime.chat import render_chat
from dscompile.runtime.errors import UserError
from dscompile.runtime.tokenizer import Tokenizer
from tests.runtime.artifacts import write_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Say "é" <b>'},
    {"role": "assistant", "content": "é"},
    {"role": "user", "content": "Again"},
]

CHATML = """{%- if tools is not none %}{{ tools | tojson }}{% endif -%}
{{- bos_token }}
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
    {%- else %}{{ message.content | tojson }}{% endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    config = {"bos_token": "<end>", "eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(tmp_path)


def test_renders_as_transformers(tokenizer):
    transformers = pytest.importorskip("transformers")
    (tokenizer.path / "chat_template.jinja").write_text(CHATML)
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.path)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert render_chat(tokenizer, MESSAGES) == expected
    assert "<|im_start|>assistant\né<|im_end|>" in expected


def test_template_may_refuse(tokenizer):
    (tokenizer.path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="roles must alternate"):
        render_chat(tokenizer, MESSAGES)


def test_no_template(tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        render_chat(tokenizer, MESSAGES)


def test_broken_template(tokenizer):
    (tokenizer.path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match="chat template"):
        render_chat(tokenizer, MESSAGES)


def test_named_templates(tokenizer):
    config = json.loads((tokenizer.path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    (tokenizer.path / "tokenizer_config.json").write_text(json.dumps(config))
    assert render_chat(tokenizer, MESSAGES) == "yes"
