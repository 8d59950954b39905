"""Chat messages to prompt text, through the model's own Jinja template."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from dscompile.runtime.errors import UserError
from dscompile.runtime.tokenizer import Tokenizer

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def render_chat(tokenizer: Tokenizer, messages: Seq[Mapping[str, Any]], **variables: Any) -> str:
    """Render messages [{"role": ..., "content": ...}, ...], ending where the assistant's answer begins.

    The template runs in Jinja's sandbox. Raises UserError if there is no template, it refuses, or jinja2 is missing.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError("chat needs jinja2; run: pip install jinja2") from error

    class Generation(Extension):
        """{% generation %} marks the assistant's words for training; here it is its body."""

        tags = {"generation"}  # noqa: RUF012 (the attribute jinja2 asks for)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    config = tokenizer.config()
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    special = {name: _content(config.get(name)) for name in SPECIAL_TOKENS if config.get(name)}
    try:
        template = environment.from_string(chat_template(tokenizer, config))
        # Templates ask `tools is not none`, which an undefined name would pass.
        known = {"tools": None, "documents": None, **special, **variables}
        return template.render(messages=list(messages), add_generation_prompt=True, **known)
    except (TemplateError, TypeError) as error:
        raise UserError(f"the chat template refuses these messages: {error}") from error


def chat_template(tokenizer: Tokenizer, config: Mapping[str, Any]) -> str:
    """The template: chat_template.jinja, else tokenizer_config.json's (the one named "default" of several)."""
    file = tokenizer.path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if not template:
        raise UserError("this model has no chat template; use generate with a plain prompt")
    return template


def _content(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else str(token)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> None:
    raise UserError(f"the chat template refuses these messages: {message}")
