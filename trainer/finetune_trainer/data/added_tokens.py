"""Tokens that a model's other files name beside tokenizer.json, by which alone rows are read.

transformers' AutoTokenizer reads those files too and adds what tokenizer.json lacks (PreTrainedTokenizerBase.
_from_pretrained, TokenizersBackend.__init__): with such a token, the rows would be split otherwise than whoever serves
the model splits them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from tokenizers import Tokenizer

from finetune_api.redact import shortened

_CONFIG, _ADDED, _MAP = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
_MAX_TOKEN = 48  # characters of a token that are shown
_REMEDY = "load it with AutoTokenizer and save it again with save_pretrained"


class _Named(NamedTuple):
    """A token as a file names it; number: its id there, None where the file gives none."""

    content: str
    number: str | None
    file: str
    what: str


def problem_of_tokens(
    tokenizer: Tokenizer, config: dict[str, Any], added: dict[str, Any], legacy_map: dict[str, Any]
) -> str | None:
    """Return in words the first token that tokenizer.json does not read as the other files name it; None if all agree.

    tokenizer: that of tokenizer.json; config, added, legacy_map: the contents of tokenizer_config.json,
    added_tokens.json and special_tokens_map.json, {} where there is no such file.
    """
    ids = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    for token in _named(config, added, legacy_map):
        if isinstance(token, str):
            return token
        shown = f"{token.file} names the {token.what} {shortened(repr(token.content), _MAX_TOKEN)}"
        if token.number is not None:
            shown += f" with the id {shortened(token.number, _MAX_TOKEN)}"
        number = ids.get(token.content)
        if number is None:
            number = _as_one_piece(tokenizer, token.content)
        if number is None:
            return f"{shown}, but tokenizer.json does not have it as an added token; {_REMEDY}"
        if token.number not in (None, str(number)):
            again = f"{_REMEDY}, without {_ADDED}" if token.file == _ADDED else _REMEDY
            return f"{shown}, but tokenizer.json gives it the id {number}; {again}"
    return None


def _as_one_piece(tokenizer: Tokenizer, content: str) -> int | None:
    """Return the id of a token of the vocabulary that is read as itself without being an added token, else None."""
    # A lone surrogate cannot be encoded.
    ids = tokenizer.encode(content, add_special_tokens=False).ids if content.isprintable() else []
    return ids[0] if len(ids) == 1 and tokenizer.id_to_token(ids[0]) == content else None


def _named(config: dict[str, Any], added: dict[str, Any], legacy_map: dict[str, Any]) -> Iterator[_Named | str]:
    """Yield what AutoTokenizer would add, or words for what it cannot read.

    It passes added_tokens.json over where tokenizer_config.json has added_tokens_decoder.
    """
    decoder: Any = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for number, entry in cast(dict[str, Any], decoder).items():
            content = _content(entry)
            if content is None:
                shown = shortened(number, _MAX_TOKEN)
                yield f"added_tokens_decoder in {_CONFIG} names no token for the id {shown}; {_REMEDY}"
            else:
                yield _Named(content, number, _CONFIG, "token")
    elif decoder is not None:
        yield f"added_tokens_decoder in {_CONFIG} is no object of ids and tokens; {_REMEDY}"
    else:
        yield from (_Named(content, str(number), _ADDED, "token") for content, number in added.items())
    for name in ("eos_token", "bos_token"):
        for file, source in ((_CONFIG, config), (_MAP, legacy_map)):
            content = _content(source.get(name))
            if content:
                yield _Named(content, None, file, name)
                break
    extra_name = "extra_special_tokens" if config.get("extra_special_tokens") else "additional_special_tokens"
    extra: Any = config.get(extra_name)
    found = list(cast(dict[str, Any], extra).values()) if isinstance(extra, dict) else extra
    for entry in cast(list[Any], found) if isinstance(found, list) else []:
        content = _content(entry)
        if content:
            yield _Named(content, None, _CONFIG, f"token of {extra_name}")


def _content(entry: Any) -> str | None:
    value = cast(dict[str, Any], entry).get("content") if isinstance(entry, dict) else entry
    return value if isinstance(value, str) else None
