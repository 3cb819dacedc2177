"""Text to token ids and labels, without transformers, which would import torch.

What is tokenised is always the whole text of a row, in one piece, so the ids equal `apply_chat_template`. Labels are
laid over it by the positions of characters. A token that reaches over an answer's begin, such as " Paris" where the
prompt ends in the space, is learned, as in transformers' `return_assistant_tokens_mask`: else the answer's first word
would never be.
"""

import json
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from finetune_trainer.data.cuts import Marks, marks_of
from finetune_trainer.data.encoders import Encoders

if TYPE_CHECKING:  # the process that runs tokenizers must start fast
    from finetune_trainer.data.sequences import Span

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKENIZER_CLASS = "PreTrainedTokenizerFast"  # takes tokenizer.json as it is, and reads no vocabulary beside it
_MAX_END_IDS = 256
_STOP_WINDOW = 256  # characters at an answer's end in which its stop token is looked for


TEXT_PROMPT_TOKENS = 32  # of a document: what a sample of it begins with


class AddedWord(NamedTuple):
    """A token that is read wherever its text stands. is_special: whether it is no word of a language."""

    number: int
    content: str
    is_special: bool


class Tokens(NamedTuple):
    """One row: ids uint32 (n,), labels uint8 (n,), and how many tokens come before its first answer."""

    ids: npt.NDArray[np.uint32]
    labels: npt.NDArray[np.uint8]
    prompt_tokens: int


def of_document(ids: npt.NDArray[np.uint32], context: int = 1) -> Tokens:
    """Return a document, or a piece of one: every token is learned but the first ones, which are context alone."""
    labels = np.ones(len(ids), dtype=np.uint8)
    labels[:context] = 0
    return Tokens(ids, labels, min(TEXT_PROMPT_TOKENS, len(ids)))


def all_end_in(sequences: Sequence[Tokens], stop_ids: Collection[int]) -> bool:
    """Whether whatever is learned without a gap ends in one of these tokens."""
    for ids, labels, _ in sequences:
        ends = ids[:-1][labels[:-1] > labels[1:]].tolist()
        if labels[-1:].any():
            ends.append(int(ids[-1]))
        if not set(ends).issubset(stop_ids):
            return False
    return True


def special_tokens(config: dict[str, Any], legacy_map: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens by name, as chat templates see them.

    special_tokens_map.json wins over tokenizer_config.json, but is read only where that lists no added tokens."""
    found: dict[str, str] = {}
    for source in (config, {} if config.get("added_tokens_decoder") is not None else legacy_map):
        extra: Any = source.get("extra_special_tokens")
        named = {name: value for name, value in source.items() if name.endswith("_token")}
        for name, value in {**named, **(cast(dict[str, Any], extra) if isinstance(extra, dict) else {})}.items():
            text: Any = cast(dict[str, Any], value).get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text:
                found[name] = text
    return found


def end_ids(content: dict[str, Any], vocabulary_size: int) -> list[int] | None:
    """Return the tokens that the model stops at, by its generation_config.json or config.json.

    None where that says nothing. Raises ValueError for what are no ids; those of no token are left out.
    """
    found: Any = content.get("eos_token_id")
    if found is None:
        return None
    ids = cast(list[Any], found) if isinstance(found, list) else [found]
    if any(type(each) is not int for each in ids) or len(ids) > _MAX_END_IDS:
        raise ValueError(f"eos_token_id is neither a token id nor a list of at most {_MAX_END_IDS} of them")
    return [each for each in ids if 0 <= each < vocabulary_size]


class RowTokenizer:
    """The model's tokenizer and the tokens that begin and end rows; in the child process of `tokenizer_worker`.

    eos_token: ends texts and completions; None when the model names none. Raises ValueError when it is no token.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token: str | None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.added = [AddedWord(number, token.content, token.special) for number, token in sorted(added.items())]
        # An end token need not be marked as special; what is no added token is split like other text.
        ends = [token.content for token in added.values() if token.special or token.content == eos_token]
        self._stops = tuple(ends)
        self.eos_id = None if eos_token is None else tokenizer.token_to_id(eos_token)
        if eos_token is not None and self.eos_id is None:
            raise ValueError("the tokenizer's eos_token is not in its vocabulary")
        bare = tokenizer.encode("a", add_special_tokens=False).ids
        full = tokenizer.encode("a", add_special_tokens=True).ids
        begins = full.index(bare[0]) if bare and bare[0] in full else 0
        self.prefix_ids: list[int] = full[:begins]  # usually [] or the begin-of-text token
        # What it would add is written by templates and by us; what it would cut off the offsets, as `trim_offsets`
        # does with the spaces at a token's begin, is a part of the answer.
        tokenizer.post_processor = None  # type: ignore[assignment]
        self.encoders = Encoders(tokenizer)
        self._marks: Marks | None = None
        self.stop_ids: set[int] = set()  # tokens seen to end an answer or a text

    @property
    def vocabulary_size(self) -> int:
        """One above the largest token id."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def unknown_id(self, content: bytes) -> int | None:
        """Return the token of words that the vocabulary lacks, if there is one. content: tokenizer.json."""
        model: Any = self._tokenizer.model
        if isinstance(model, Unigram):  # which does not tell
            return json.loads(content)["model"].get("unk_id")
        token = getattr(model, "unk_token", None)
        return self._tokenizer.token_to_id(token) if token else None

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def conversations(self, texts: Sequence[str], spans: "Sequence[Sequence[Span]]", learn_all: bool) -> list[Tokens]:
        """Tokenise rendered conversations; the template has written all special tokens.

        An answer whose begin is not known is no label and ends no prompt, but where it ends it is seen to stop.
        """
        rows: list[Tokens] = []
        for text, encoded, row_spans in zip(texts, self.encoders.encode(texts), spans, strict=True):
            labels = np.zeros(len(encoded.ids), dtype=np.uint8)
            prompt_tokens = len(encoded.ids)
            for known_begin, end in row_spans:
                begin = known_begin or 0
                end = self._without_tail(text, begin, end)
                first, last = encoded.tokens_of(begin, end)
                if known_begin is not None:
                    labels[first:last] = 1
                    prompt_tokens = min(prompt_tokens, first)
                if first < last and text.endswith(self._stops, begin, end):
                    self.stop_ids.add(int(encoded.ids[last - 1]))
            rows.append(_row(encoded.ids, labels, prompt_tokens, learn_all))
        return rows

    def _without_tail(self, text: str, begin: int, end: int) -> int:
        """The answer's end without the white space that a template writes after the stop token."""
        tail = text[max(begin, end - _STOP_WINDOW) : end]
        bare = tail.rstrip()
        return end - (len(tail) - len(bare)) if bare.endswith(self._stops) else end

    def completions(self, rows: Sequence[tuple[str, str]], learn_all: bool) -> list[Tokens]:
        """Tokenise pairs as prompt + completion + end token, after the token that the tokenizer begins texts with.

        A token that the row has there itself is not doubled."""
        if not rows:
            return []
        result: list[Tokens] = []
        encoded = self.encoders.encode([prompt + completion for prompt, completion in rows])
        for (prompt, completion), each in zip(rows, encoded, strict=True):
            ids, added = self._whole(each.ids)
            labels = np.zeros(len(ids), dtype=np.uint8)
            first = added + each.tokens_of(len(prompt), len(prompt) + len(completion))[0]
            labels[first:] = 1
            result.append(_row(ids, labels, first, learn_all))
        return result

    def texts(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Documents, each after the tokenizer's begin token and before the end token, which are not doubled."""
        return [self._whole(each.ids)[0] for each in self.encoders.encode(texts)] if texts else []

    def _whole(self, ids: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.uint32], int]:
        """Return a text's tokens with those that begin and end it, and how many were put before them."""
        assert self.eos_id is not None
        self.stop_ids.add(self.eos_id)
        begin = [] if ids[: len(self.prefix_ids)].tolist() == self.prefix_ids else self.prefix_ids
        end = [] if ids[-1:].tolist() == [self.eos_id] else [self.eos_id]
        return np.array([*begin, *ids.tolist(), *end], dtype=np.uint32), len(begin)

    @property
    def marks(self) -> Marks:
        """(vocabulary,) what each token begins or ends: where a text is best cut."""
        if self._marks is None:
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
            self._marks = marks_of(vocabulary.items(), self.vocabulary_size)
        return self._marks


def _row(ids: npt.NDArray[np.uint32], labels: npt.NDArray[np.uint8], prompt_tokens: int, learn_all: bool) -> Tokens:
    if learn_all:
        labels[:] = 1
    labels[:1] = 0  # nothing comes before a row's first token
    return Tokens(ids, labels, prompt_tokens)
