"""The faster library gives the ids of Hugging Face's, and the same labels, or it is not used."""

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data_run import byte_bpe
from finetune_trainer.data import encoders
from finetune_trainer.data.encoders import FAST, HUGGING_FACE, Choice, Encoders, FastDiffersError, FastEncoder, slow
from finetune_trainer.data.rows import Completion
from finetune_trainer.data.tokenizer import Tokenizer as ChildTokenizer
from finetune_trainer.data.tokens import RowTokenizer

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=60)
MIXED = st.lists(st.sampled_from([*encoders.PARTS, "<|im_end|>", "the quick", " fox"]), max_size=30).map("".join)


def split_like(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def changed(**parts: Any) -> Tokenizer:
    """The small byte-level BPE with other parts."""
    tokenizer: Any = Tokenizer.from_str(byte_bpe().to_str())
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def with_token(token: AddedToken) -> Tokenizer:
    tokenizer = changed()
    tokenizer.add_tokens([token])
    return tokenizer


def gemma_like() -> Tokenizer:
    """SentencePiece's way: spaces as a letter, and bytes where the vocabulary lacks a character."""
    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "é", "ab", "▁a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("a", "b"), ("▁", "a")]
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    return tokenizer


def lacks_a_byte() -> Tokenizer:
    """As SmolLM2's vocabulary, in which some bytes are no token: they are passed over."""
    content = json.loads(byte_bpe().to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["<0>"] = vocabulary.pop("ñ")  # which stands for the byte 0xf1
    return Tokenizer.from_str(json.dumps(content))


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
KINDS: dict[str, Tokenizer] = {
    "GPT-2": changed(),
    "SmolLM2": changed(pre_tokenizer=DIGITS),
    "Llama 3": changed(pre_tokenizer=split_like(LLAMA_3)),
    "Qwen 3": changed(pre_tokenizer=split_like(LLAMA_3.replace("{1,3}", "")), normalizer=normalizers.NFC()),
    "Gemma 3": gemma_like(),
    "lacks a byte": lacks_a_byte(),
    "offsets are trimmed": changed(post_processor=processors.ByteLevel(trim_offsets=True)),
    "a space before all": changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "takes spaces on its left": with_token(AddedToken("<l>", lstrip=True)),
    "takes spaces on its right": with_token(AddedToken("<r>", rstrip=True, special=True)),
    "a word alone": with_token(AddedToken("fox", single_word=True)),
    "lower case": changed(normalizer=normalizers.Lowercase()),
}
NOT_READ: dict[str, Tokenizer] = {"compatible forms": changed(normalizer=normalizers.NFKC())}


def both(kind: str) -> tuple[FastEncoder, Tokenizer]:
    tokenizer = KINDS[kind]
    RowTokenizer(tokenizer, None)  # takes off what would cut offsets
    return FastEncoder(tokenizer.to_str(), tokenizer), tokenizer


def require_equal(fast: FastEncoder, tokenizer: Tokenizer, texts: list[str]) -> int:
    """Require the ids and places of Hugging Face's library; return of how many texts the faster one gave any."""
    given_by_fast = 0
    for text, found, judge in zip(texts, fast.encode(texts), slow(tokenizer, texts), strict=True):
        if found is None:
            continue
        given_by_fast += 1
        assert found.ids.tolist() == judge.ids.tolist(), ascii(text)
        ends = range(0, len(text) + 1, max(1, len(text) // 5))
        for begin, end in ((a, b) for a in ends for b in ends if a <= b):
            assert found.tokens_of(begin, end) == judge.tokens_of(begin, end), (ascii(text), begin, end)
    return given_by_fast


@pytest.mark.parametrize("kind", KINDS)
def test_the_faster_library_gives_the_same_ids_and_places_on_the_hard_texts(kind: str) -> None:
    fast, tokenizer = both(kind)
    texts = encoders.hard_texts(tokenizer)
    assert require_equal(fast, tokenizer, texts) > (len(texts) // 2 if kind in ("GPT-2", "SmolLM2", "Llama 3") else -1)


@pytest.mark.parametrize("kind", ["SmolLM2", "Llama 3", "Qwen 3", "Gemma 3"])
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(TEXTS | MIXED, max_size=8))
def test_the_faster_library_gives_the_same_ids_and_places_on_any_text(kind: str, texts: list[str]) -> None:
    require_equal(*both(kind), texts)


def enough_rows(kind: str, text: str = "the quick brown fox jumps over the lazy dog, don't it? ") -> Encoders:
    """Return encoders that have read enough rows by Hugging Face's library to try the faster one."""
    tokenizer = KINDS[kind] if kind in KINDS else NOT_READ[kind]
    found = Encoders(tokenizer)
    found.consider(tokenizer.to_str(), after=2000)
    found.encode([text] * 10)
    assert not found.is_due
    found.encode([text] * 40)
    assert found.is_due
    return found


def test_the_faster_library_is_taken_where_it_gives_the_same_ids() -> None:
    found = enough_rows("Llama 3")
    found.try_fast()
    assert not found.is_due
    assert found.choice.library == FAST
    texts = ["the fox", "éa \u017f", "", "'\u017fx"]
    assert [each.ids.tolist() for each in found.encode(texts)] == [
        each.ids.tolist() for each in slow(KINDS["Llama 3"], texts)
    ]


def test_a_text_with_a_byte_of_no_token_is_left_to_hugging_face_and_the_others_of_its_batch_are_not() -> None:
    fast, _ = both("lacks a byte")
    assert [each is not None for each in fast.encode(["the fox", "\U00040000", "é"])] == [True, False, True]


def test_digits_taken_one_by_one_are_split_by_one_pattern_and_other_tokenizers_are_left_as_they_are() -> None:
    steps = json.loads(encoders.fused(KINDS["SmolLM2"].to_str()))["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in steps] == ["Split", "ByteLevel"]
    assert encoders.fused(KINDS["Llama 3"].to_str()) == KINDS["Llama 3"].to_str()


def test_a_tokenizer_that_the_faster_library_does_not_read_is_read_by_hugging_face() -> None:
    found = enough_rows("compatible forms")
    found.try_fast()
    assert found.choice == Choice(HUGGING_FACE, "fastokens does not read this tokenizer.json")
    assert [each.ids.tolist() for each in found.encode(["ﬁ fox"])] == [
        NOT_READ["compatible forms"].encode("ﬁ fox", add_special_tokens=False).ids
    ]


def wrong_for(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """Let the faster library lose the last token of texts with these words: the fault that is looked for."""
    encode = FastEncoder.encode

    def encode_wrongly(self: FastEncoder, texts: list[str]) -> Any:
        found = encode(self, texts)
        return [
            each if each is None or words not in text else encoders.Encoded(each.ids[:-1], each.begins, each.ends)
            for each, text in zip(found, texts, strict=True)
        ]

    monkeypatch.setattr(FastEncoder, "encode", encode_wrongly)


@pytest.mark.parametrize("words", ["lazy dog", "don't WE'LL"])
def test_one_row_or_hard_text_with_other_ids_is_enough_to_leave_it(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    found = enough_rows("GPT-2")
    wrong_for(monkeypatch, words)
    found.try_fast()
    assert found.choice.library == HUGGING_FACE
    assert "other ids" in found.choice.reason
    assert found.choice.differs


def test_a_row_that_is_read_otherwise_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = enough_rows("GPT-2")
    found.try_fast()
    wrong_for(monkeypatch, "quick")
    assert found.choice.library == FAST
    with pytest.raises(FastDiffersError):
        found.encode(["the quick one"] * encoders.COMPARE_EVERY)


@pytest.fixture
def in_a_child(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChildTokenizer]:
    """A tokenizer that reads by the faster library after its first row."""
    monkeypatch.setattr("finetune_trainer.data.tokenizer.FAST_AFTER", 1)
    tokenizer = ChildTokenizer(KINDS["Llama 3"].to_str().encode(), "<|im_end|>")
    yield tokenizer
    tokenizer.close()


ROWS = [Completion("the quick é", " brown fox"), Completion("user: \n\n", "    jumps")]


def test_rows_are_the_same_from_both_libraries(in_a_child: ChildTokenizer) -> None:
    first = in_a_child.completions(ROWS, learn_all=False)
    assert in_a_child.choice.library == HUGGING_FACE
    second = in_a_child.completions(ROWS, learn_all=False)
    assert in_a_child.choice.library == FAST
    assert [(row.ids.tolist(), row.labels.tolist(), row.prompt_tokens) for row in first] == [
        (row.ids.tolist(), row.labels.tolist(), row.prompt_tokens) for row in second
    ]


def test_a_faster_library_that_dies_is_left_for_good_and_no_row_is_lost(in_a_child: ChildTokenizer) -> None:
    first = in_a_child.completions(ROWS, learn_all=False)
    in_a_child.completions(ROWS, learn_all=False)
    process = in_a_child._child  # pyright: ignore[reportPrivateUsage]
    process.send_signal(signal.SIGSEGV)
    process.wait(timeout=60)
    for _ in range(3):
        (row, _) = in_a_child.completions(ROWS, learn_all=False)
        assert row.ids.tolist() == first[0].ids.tolist()
    assert in_a_child.choice == Choice(HUGGING_FACE, "fastokens failed")
