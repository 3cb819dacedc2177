"""Texts to token ids and where each token lies, by Hugging Face's library or by a faster one that gives the same ids.

In the child process of `tokenizer_worker`. Rows are first read by Hugging Face's library. Once there are enough of them
for a second library to pay, it must give the same ids on those very rows and on the tokenizer's own hard cases, else
it is not used; where it is used, every so many texts are read by both. Labels need to know where tokens lie: by
Hugging Face's offsets, or by the bytes that tokens stand for, where these spell the text exactly.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import fastokens
import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

Ids = npt.NDArray[np.uint32]
Positions = npt.NDArray[np.int64]

HUGGING_FACE, FAST = "tokenizers", "fastokens"
# Loading and proving it takes 1 to 7 s of CPU, in which Hugging Face's library reads about so many characters.
FAST_AFTER = 2 * 2**20
FAST_AFTER_IN_WORKER = 2**18  # one of several processes has rows enough for it to pay, and each proves it for itself
PROBE_CHARACTERS = 2**20  # of the job's first rows
COMPARE_EVERY = 64  # texts: 1.6 %, which cost as much as a third of the others
_MAX_PROBED_TOKENS = 400  # added tokens: Gemma 3 has 6,415, most of them alike
# `s` and `k` where case does not count, as in patterns for `'s`: PCRE does not take them for these, Oniguruma does.
_FOLDED = ("\u017f", "\u212a")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS_FIRST = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]}
_DIGITS_WITHIN = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_SPELLS_A_SPACE = "▁"  # SentencePiece's


class FastDiffersError(Exception):
    """The faster library gave other ids for a row than Hugging Face's, after it had given the same for the probe."""


@dataclass(frozen=True)
class Encoded:
    """A text's tokens: ids (n,), and where each begins and ends, both (n,), never decreasing.

    Positions are of characters, or where `starts` (characters,) is given of bytes: it has each character's first.
    """

    ids: Ids
    begins: Positions
    ends: Positions
    starts: Positions | None = None

    def tokens_of(self, begin: int, end: int) -> tuple[int, int]:
        """Return the tokens that hold any of the characters begin … end - 1, as a half-open range."""
        if self.starts is not None:
            begin, end = (self._byte(character) for character in (begin, end))
        first = int(self.ends.searchsorted(begin, side="right"))
        return first, max(first, int(self.begins.searchsorted(end, side="left")))

    def _byte(self, character: int) -> int:
        assert self.starts is not None
        return int(self.starts[character]) if character < len(self.starts) else int(self.ends[-1])


class Choice(NamedTuple):
    """The library that rows are read by now, and why. differs: whether the faster one gave other ids."""

    library: str
    reason: str
    differs: bool = False


def slow(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoded]:
    """Encode by Hugging Face's library; its offsets are of characters."""
    return [_by_offsets(each) for each in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def _by_offsets(encoding: Encoding) -> Encoded:
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    begins, ends = np.maximum.accumulate(offsets, axis=0).T  # a normalizer may turn the order of characters round
    return Encoded(np.array(encoding.ids, dtype=np.uint32), begins, ends)


class FastEncoder:
    """The faster library, with the bytes that each token stands for. Raises ValueError for what it does not read."""

    def __init__(self, content: str, tokenizer: Tokenizer) -> None:
        self._native = fastokens.Tokenizer.from_json_str(fused(content))
        self._native.no_truncation()
        self._native.no_padding()
        pieces = pieces_of(tokenizer)
        self._spelled = np.frombuffer(b"".join(pieces), dtype=np.uint8)  # all pieces, one after another
        self._lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self._begins = np.cumsum(self._lengths) - self._lengths

    def encode(self, texts: Sequence[str]) -> list[Encoded | None]:
        """Encode texts; None for one whose tokens do not spell it byte by byte, or that has a byte of no token."""
        try:
            flat, bounds = self._native.encode_batch_flat(list(texts))
        except ValueError:
            return [None] if len(texts) == 1 else [each for text in texts for each in self.encode([text])]
        ids = np.frombuffer(flat, dtype=np.uint32)
        cuts = np.frombuffer(bounds, dtype=np.uint64).astype(np.int64).tolist()
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths)
        begins = ends - lengths
        places = np.arange(int(lengths.sum())) + np.repeat(self._begins[ids] - begins, lengths)
        spelled = self._spelled[places]  # by the bytes that the tokens of all texts stand for
        found: list[Encoded | None] = []
        before = 0  # bytes
        for text, first, last in zip(texts, cuts[:-1], cuts[1:], strict=True):
            after = int(ends[last - 1]) if last > first else before
            content = spelled[before:after].tobytes()
            here = slice(first, last)
            is_spelled = content == text.encode() and not any(character in text for character in _FOLDED)
            starts = None if len(content) == len(text) else _starts(content)
            one = Encoded(ids[here], begins[here] - before, ends[here] - before, starts)
            found.append(one if is_spelled else None)
            before = after
        return found


def _starts(content: bytes) -> Positions:
    """Return where each character of a text begins in its bytes."""
    return np.flatnonzero((np.frombuffer(content, dtype=np.uint8) & 0xC0) != 0x80)


def fused(content: str) -> str:
    """Return a tokenizer.json that splits texts the same, but by one pattern where it does so by two steps.

    SmolLM2, StarCoder 2 and Granite take digits one by one, then the rest by GPT-2's pattern, for which a text ends
    where a digit comes; one pattern is read four times as fast."""
    parsed = json.loads(content)
    if parsed.get("pre_tokenizer") != _DIGITS_FIRST:
        return content
    split = {"type": "Split", "pattern": {"Regex": _DIGITS_WITHIN}, "behavior": "Isolated", "invert": False}
    parsed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL | {"use_regex": False}]}
    return json.dumps(parsed)


def byte_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


def pieces_of(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes of text that each token most likely stands for, by id; whoever uses them compares the text."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
    letters = byte_letters()
    is_byte_level = all(letter in letters for token in vocabulary if vocabulary[token] not in added for letter in token)
    pieces = [b""] * (1 + max(vocabulary.values(), default=-1))
    for token, number in vocabulary.items():
        if number in added:
            pieces[number] = added[number].encode(errors="replace")
        elif is_byte_level:
            pieces[number] = bytes(letters[letter] for letter in token)
        elif len(token) == len("<0x00>") and token.startswith("<0x"):
            pieces[number] = bytes.fromhex(token[3:5])
        else:
            pieces[number] = token.replace(_SPELLS_A_SPACE, " ").encode(errors="replace")
    return pieces


class Encoders:
    """Encodes by Hugging Face's library until `consider` was called and the faster one has proven itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._content: str | None = None  # of tokenizer.json, until the faster library has read it
        self._fast_after = 0
        self._probe: list[tuple[str, list[int]]] = []  # first rows with Hugging Face's ids
        self._characters = 0
        self._texts = 0
        self._fast: FastEncoder | None = None
        self.choice = Choice(HUGGING_FACE, "there are too few rows for a faster library to pay")

    def consider(self, content: str, after: int) -> None:
        """Let the faster library be tried after so many characters of rows. content: tokenizer.json."""
        self._content, self._fast_after, self._characters = content, after, 0

    @property
    def is_due(self) -> bool:
        """Whether the faster library is to be tried now."""
        return self._content is not None and self._characters >= self._fast_after

    def try_fast(self) -> None:
        """Load the faster library and take it if it gives the same ids on the first rows and on the hard cases."""
        assert self._content is not None
        content, self._content = self._content, None
        rows, self._probe = self._probe, []
        hard = hard_texts(self._tokenizer)
        try:
            fast = FastEncoder(content, self._tokenizer)
        except ValueError:
            self.choice = Choice(HUGGING_FACE, f"{FAST} does not read this tokenizer.json")
            return
        found = fast.encode([text for text, _ in rows])
        wrong = sum(
            each is not None and each.ids.tolist() != ids for each, (_, ids) in zip(found, rows, strict=True)
        ) + self._differing(fast.encode(hard), hard)
        probed = len(rows) + len(hard)
        if wrong:
            self.choice = Choice(HUGGING_FACE, f"{FAST} gives other ids for {wrong:,} of {probed:,} texts", True)
        else:
            self._fast = fast
            reason = f"the same ids as {HUGGING_FACE} on {probed:,} texts, and on every {COMPARE_EVERY}th row"
            self.choice = Choice(FAST, reason)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode texts, in order. Raises FastDiffersError."""
        if self._fast is None:
            judged = slow(self._tokenizer, texts)
            self._remember(texts, judged)
            return judged
        found = self._fast.encode(texts)
        sample = [index for index in range(len(texts)) if (self._texts + index) % COMPARE_EVERY == 0]
        self._texts += len(texts)
        if self._differing([found[index] for index in sample], [texts[index] for index in sample]):
            raise FastDiffersError
        left = [index for index, each in enumerate(found) if each is None]
        for index, each in zip(left, slow(self._tokenizer, [texts[index] for index in left]), strict=True):
            found[index] = each
        return [each for each in found if each is not None]

    def _remember(self, texts: Sequence[str], judged: Sequence[Encoded]) -> None:
        for text, each in zip(texts, judged, strict=True):
            if self._content is not None and self._characters < PROBE_CHARACTERS:
                self._probe.append((text, each.ids.tolist()))
            self._characters += len(text)

    def _differing(self, found: Sequence[Encoded | None], texts: Sequence[str]) -> int:
        """Count the texts whose ids are not Hugging Face's; those that it would read itself cannot differ."""
        compared = [(each.ids, text) for each, text in zip(found, texts, strict=True) if each is not None]
        judged = self._tokenizer.encode_batch_fast([text for _, text in compared], add_special_tokens=False)
        return sum(ids.tolist() != judge.ids for (ids, _), judge in zip(compared, judged, strict=True))


def hard_texts(tokenizer: Tokenizer) -> list[str]:
    """Return texts that tokenizers are known to read differently, with this one's added tokens in all positions."""
    generator = random.Random(0)
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.content]
    if len(added) > _MAX_PROBED_TOKENS:
        added = generator.sample(added, _MAX_PROBED_TOKENS)
    parts = [*PARTS, *generator.sample(added, min(len(added), 8))]
    mixed = ["".join(generator.choices(parts, k=40)) for _ in range(300)]
    planes = (0x80, 0x250, 0x3000, 0x10000, 0x110000)
    codes = [[generator.randrange(1, generator.choice(planes)) for _ in range(40)] for _ in range(300)]
    strange = ["".join(chr(code) for code in each if not 0xD800 <= code < 0xE000) for each in codes]
    around = [f"a {token} b{token}c\n{token}{token} {token[:-1]} {token.upper()}\t {token}" for token in added]
    blocks = ["".join(map(chr, range(first, first + 64))) for first in range(1, 0x3001, 64)]
    return [*_HARD, *mixed, *strange, *around, *blocks]


PARTS = (" ", "  ", "\n", "\r", "\t", "\x0b", "\x85", "\u00a0", "\u3000", "a", "B", "é", "e\u0301", "'", "'s", "'LL",
          "1", "٣", "²", "Ⅳ", "½", ".", "_", "/", "你", "ß", "ǅ", "🙂", "\u200d", "\ufe0f")  # fmt: skip
_HARD = (
    " ",
    "  ",
    "\n",
    "\r\n\r\n a\r\n",
    "\t\t x  \n  \n   y ",
    " leading and trailing  ",
    "👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪 ﷺ \u0301\u200b\ufeff\ufffd ﬁ ① ½",
    "שלום עולם مرحبا ١٢٣٤٥ नमस्ते ภาษาไทย",
    "你好、世界。こんにちは 안녕하세요 Здравствуй, où, naïve, Größe",
    "don't WE'LL I'M you'Re 'S ' s '",
    "1234567890" * 100,
    "3.14159 1,000,000 0x7f 1e-9 2026-11-26T19:18:00Z",
    "a" * 4000,
    "é" * 1000,
    " " * 1000 + "x",
    "\n" * 300,
    "=" * 500 + "-" * 500,
    "x" + "\u0300" * 100,
    "\x01\x02\x1b[31m red\x7f\x85\u2028\u2029",
    "\U0001d518\U0001d52b\U0001d526 \U0010ffff \ue000",
    "def f(x):\n    if x:\n\t\treturn {'a': [1, 2], \"b\": None}  # no\n\n\n",
    "https://example.com/a?b=c&d=%20#e user@example.com C:\\x\\y",
    "▁ ▁a Ġ Ċ <0x0A>",
)
