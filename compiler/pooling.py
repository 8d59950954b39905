"""How a sentence-transformers model makes a vector of hidden states, from the files beside its weights."""

from __future__ import annotations

from dscompile.compiler.source import ModelSource, read_json
from dscompile.runtime.errors import UserError
from dscompile.runtime.pooling import POOLINGS

MODULES = "modules.json"
TRANSFORMER = "sentence_bert_config.json"
_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}


def read_pooling(source: ModelSource) -> tuple[str, bool]:
    """(pooling, whether vectors are normalised) of a model; mean pooling where it does not say.

    Raises UserError for modules after the encoder that the runtime does not have.
    """
    if not (source.directory / MODULES).is_file():
        return "mean", False
    pooling, normalize = "mean", False
    for module in read_json(source.directory / MODULES, list):
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling_of(source, str(module["path"]))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise UserError(f"{source.name}: its {MODULES} holds {kind}, which dscompile does not compile")
    return pooling, normalize


def read_max_tokens(source: ModelSource) -> int:
    """Tokens, special ones included, to which sentence-transformers cuts a model's texts; 0 where it does not say.

    Raises UserError where it changes texts in another way.
    """
    if not (source.directory / TRANSFORMER).is_file():
        return 0
    config = read_json(source.directory / TRANSFORMER)
    if config.get("do_lower_case"):
        raise UserError(
            f"{source.name}: {TRANSFORMER} lower-cases texts, which dscompile does not do; do so before embed() and "
            f"set do_lower_case to false"
        )
    return int(config.get("max_seq_length") or 0)


def _pooling_of(source: ModelSource, path: str) -> str:
    config = read_json(source.directory / path / "config.json")
    named = config.get("pooling_mode")
    found = [named] if named else [_FLAGS.get(k, k) for k, on in config.items() if k.startswith("pooling_mode") and on]
    if len(found) != 1 or found[0] not in POOLINGS:
        raise UserError(
            f"{source.name}: it pools by {' and '.join(map(str, found)) or 'nothing'}; dscompile has "
            f"{', '.join(POOLINGS)}, one at a time"
        )
    return found[0]
