"""Adds to a tokenizer the tokens that a model's other files name and tokenizer.json lacks, as transformers does.

AutoTokenizer reads those files too: what tokenizer.json lacks gets the next ids, in a fixed order and with the flags
that are named there (PreTrainedTokenizerBase._from_pretrained, TokenizersBackend.__init__). The same is done here, step
by step: else the rows would be split otherwise than whoever serves the model splits them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from tokenizers import AddedToken, Tokenizer

from finetune_api.redact import shortened
from finetune_trainer.data.tokens import SPECIAL_TOKEN_NAMES

NAMING_FILES = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
_CONFIG, _ADDED, _MAP = NAMING_FILES
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_MAX_TOKEN = 48  # characters of a token that are shown
_MAX_ID_DIGITS = 9
_SAVE_AGAIN = "load it with AutoTokenizer and save it again with save_pretrained"
_COPY_AGAIN = "copy the file again from where the model comes from"


class TokenNamesError(Exception):
    """The files name a token that cannot be read, or by an id that it does not get. The message says which."""


class _Listed(NamedTuple):
    """A token that a file lists with its id."""

    number: int
    token: AddedToken
    file: str


class _Special(NamedTuple):
    """Special tokens in the order in which they are added. named: by name, such as eos_token; others: without one.

    texts: of those that are no objects where added_tokens.json is read, by which alone its tokens are special."""

    named: Mapping[str, AddedToken]
    others: Sequence[AddedToken]
    texts: frozenset[str]


def add_named_tokens(
    tokenizer: Tokenizer, config: dict[str, Any], added: dict[str, Any], legacy_map: dict[str, Any]
) -> bool:
    """Add what tokenizer.json lacks; return whether anything was.

    tokenizer: that of tokenizer.json; config, added, legacy_map: the contents of tokenizer_config.json,
    added_tokens.json and special_tokens_map.json, {} where there is no such file. Raises TokenNamesError."""
    decoder: Any = config.get("added_tokens_decoder")
    known = tokenizer.get_added_tokens_decoder()
    if decoder is not None:
        special = _special(config, {})
        listed = news = _of_decoder(decoder)
        flagged = {each.token.content: each.token for each in listed}
    else:  # only then does it read the other two files, which are of older releases
        special = _special(config, legacy_map)
        listed = _of_added(added, special.texts)
        news = [each for each in listed if each.number not in known]
        flagged = {each.token.content: each.token for each in listed}
        flagged |= {token.content: token for token in known.values()}
    wanted = _wanted(list(known.values()), [each.token for each in news], special, flagged)
    before = {number: repr(token) for number, token in known.items()}
    if wanted:
        tokenizer.add_tokens(wanted)
    for each in listed:
        _require_id(tokenizer, each, {token.content for token in known.values()})
    return {number: repr(token) for number, token in tokenizer.get_added_tokens_decoder().items()} != before


def _wanted(
    known: Sequence[AddedToken], listed: Sequence[AddedToken], special: _Special, flagged: Mapping[str, AddedToken]
) -> list[AddedToken]:
    """Return the tokens that transformers hands to the tokenizer, in its order.

    known: those of tokenizer.json; flagged: by text, tokens whose flags win over those of a special token."""
    named = [
        flagged.get(token.content, token) if name in SPECIAL_TOKEN_NAMES else token
        for name, token in special.named.items()
    ]
    as_they_are = {repr(token) for token in known}
    wanted = [token for token in listed if repr(token) not in as_they_are]
    contents = {token.content for token in (*known, *wanted)}
    wanted += [token for token in (*named, *special.others) if token.content not in contents]
    names = {token.content for token in named}
    for token in wanted:
        if token.content in names:
            token.special = True
    return wanted


def _require_id(tokenizer: Tokenizer, each: _Listed, known: set[str]) -> None:
    """Raise TokenNamesError where a token has another id than a file says. known: texts that tokenizer.json has."""
    number = tokenizer.token_to_id(each.token.content)
    if number == each.number or not each.token.content:
        return
    by = "tokenizer.json" if each.token.content in known else "AutoTokenizer"
    again = f"{_SAVE_AGAIN}, without {_ADDED}" if each.file == _ADDED else _SAVE_AGAIN
    shown = shortened(repr(each.token.content), _MAX_TOKEN)
    raise TokenNamesError(
        f"{each.file} names the token {shown} with the id {shortened(str(each.number), _MAX_TOKEN)}, but {by} gives it "
        f"the id {number}; {again}"
    )


def _special(config: Mapping[str, Any], legacy_map: Mapping[str, Any]) -> _Special:
    """Return the special tokens that files name. legacy_map: special_tokens_map.json, which wins."""
    extra: Any = config.get(_EXTRA) or config.get(_OLD_EXTRA)
    custom = {name: value for name, value in config.items() if _is_custom(name) and isinstance(value, str)}
    custom |= _object(extra)
    custom = (custom or _object(config.get("model_specific_special_tokens"))) | _object(legacy_map.get(_EXTRA))
    found = _by_name(config, legacy_map) | {name: _token(value) for name, value in custom.items()}
    others = _others(extra, config, legacy_map)
    texts = {value for value in _list(extra) if isinstance(value, str)}
    texts |= {config[name] for name in SPECIAL_TOKEN_NAMES if isinstance(config.get(name), str)}
    texts |= {token.content for name in legacy_map if (token := found.get(name)) is not None}
    named = {name: token for name, token in found.items() if token is not None}
    return _Special(named, [token for token in others if token is not None], frozenset(texts))


def _by_name(config: Mapping[str, Any], legacy_map: Mapping[str, Any]) -> dict[str, AddedToken | None]:
    """Return the named tokens but for custom ones that are texts in tokenizer_config.json, which come behind these."""
    names = [*SPECIAL_TOKEN_NAMES, *filter(_is_custom, config), *filter(_is_custom, legacy_map)]
    found: dict[str, AddedToken | None] = {}
    for name in names:
        if name in legacy_map:
            found[name] = _of_map(legacy_map[name])
        elif name in SPECIAL_TOKEN_NAMES or not isinstance(config[name], str):
            found[name] = _token(config.get(name))
    return found


def _others(extra: Any, config: Mapping[str, Any], legacy_map: Mapping[str, Any]) -> list[AddedToken | None]:
    """Return the tokens without a name. extra: those of tokenizer_config.json, if it has a list of them."""
    theirs: Any = legacy_map.get(_EXTRA)
    if theirs is None and not {_EXTRA, _OLD_EXTRA} & config.keys():
        return [_token(value) for value in _list(legacy_map.get(_OLD_EXTRA))]
    return [_token(value) for value in _list(extra)] + [_of_map(value) for value in _list(theirs)]


def _is_custom(name: str) -> bool:
    return name.endswith("_token") and name not in SPECIAL_TOKEN_NAMES


def _object(value: Any) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _list(value: Any) -> Sequence[Any]:
    return cast(list[Any], value) if isinstance(value, list) else ()


def _token(value: Any) -> AddedToken | None:
    """Return a special token of tokenizer_config.json: a text, or what is marked as one; None for what is neither."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    entry = _object(value)
    return _with_flags(entry) if entry.get("__type") == "AddedToken" else None


def _of_map(value: Any) -> AddedToken | None:
    """Return a special token of special_tokens_map.json, where each object is one."""
    return _with_flags({**_object(value), "special": True}) if isinstance(value, dict) else _token(value)


def _with_flags(entry: Mapping[str, Any]) -> AddedToken | None:
    content, flags = entry.get("content"), {name: entry[name] for name in _FLAGS if name in entry}
    if not isinstance(content, str) or any(not isinstance(flag, bool) for flag in flags.values()):
        return None
    return AddedToken(content, **flags)


def _of_decoder(decoder: Any) -> list[_Listed]:
    """Return the tokens of added_tokens_decoder, by their ids."""
    if not isinstance(decoder, dict):
        raise TokenNamesError(f"added_tokens_decoder in {_CONFIG} is no object of ids and tokens; {_COPY_AGAIN}")
    return sorted(_entries(cast(dict[str, Any], decoder)), key=lambda each: each.number)


def _entries(decoder: Mapping[str, Any]) -> Iterator[_Listed]:
    for number, entry in decoder.items():
        token = _with_flags(_object(entry))
        if token is None or not number.isdecimal() or len(number) > _MAX_ID_DIGITS:
            shown = shortened(number, _MAX_TOKEN)
            raise TokenNamesError(f"added_tokens_decoder in {_CONFIG} names no token for the id {shown}; {_COPY_AGAIN}")
        yield _Listed(int(number), token, _CONFIG)


def _of_added(added: Mapping[str, Any], special: frozenset[str]) -> list[_Listed]:
    """Return the tokens of added_tokens.json, which has no flags, by their ids. special: texts of those that are."""
    found: list[_Listed] = []
    for content, number in added.items():
        if type(number) is not int:
            shown = shortened(repr(content), _MAX_TOKEN)
            raise TokenNamesError(f"{_ADDED} names no id for the token {shown}; {_SAVE_AGAIN}, without {_ADDED}")
        token = AddedToken(content, normalized=content not in special, special=content in special)
        found.append(_Listed(number, token, _ADDED))
    return sorted(found, key=lambda each: each.number)
