"""Labels lie on the answers and the token that ends them; texts are split without losing a token."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from data_run import CHATML, byte_bpe, every_answer, one_sequence
from finetune_trainer.data.template import ChatTemplate
from finetune_trainer.data.tokens import RowTokenizer, Tokens, special_tokens

BPE = byte_bpe()
NOW = datetime(2026, 1, 2, tzinfo=UTC)
TEXTS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)


def tokenizer(eos: str | None = "<|im_end|>") -> RowTokenizer:
    return RowTokenizer(Tokenizer.from_str(BPE.to_str()), eos)


def learned(tokens: Tokens, rows: RowTokenizer) -> list[str]:
    """Texts of the runs of label tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], tokens.labels, [0]])))
    return [rows.decode(tokens.ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def conversation(template: str, texts: list[str], learn_all: bool = False) -> tuple[str, Tokens, RowTokenizer]:
    rows = tokenizer()
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    compiled = ChatTemplate(template, {"eos_token": "<|im_end|>"}, NOW)
    whole, spans = one_sequence(compiled, messages, every_answer(messages), learn_all)
    return whole, rows.conversations([whole], [spans], learn_all)[0], rows


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_exactly_the_answers_with_their_stop_token_are_learned(turns: list[tuple[str, str]]) -> None:
    texts = [text for turn in turns for text in turn]
    whole, tokens, rows = conversation(CHATML, texts)
    assert tokens.ids.tolist() == BPE.encode(whole, add_special_tokens=False).ids
    assert tokens.labels.sum() > 0
    merges = any(text[:1].isspace() for text in texts)  # with the newline before it
    if not merges and not any("<|" in text for text in texts):
        assert learned(tokens, rows) == [answer + "<|im_end|>" for _, answer in turns]
        assert rows.stop_ids == {BPE.token_to_id("<|im_end|>")}


def test_an_end_token_that_is_not_marked_as_special_ends_answers_too() -> None:
    bare = Tokenizer.from_str(BPE.to_str())
    bare.add_tokens([AddedToken("</s>", special=False)])
    rows = RowTokenizer(bare, "</s>")
    source = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    template = ChatTemplate(source, {"eos_token": "</s>"}, NOW)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    whole, spans = one_sequence(template, messages, every_answer(messages), False)
    (tokens,) = rows.conversations([whole], [spans], False)
    assert (learned(tokens, rows), rows.stop_ids) == (["Hello</s>"], {rows.eos_id})


def test_a_token_that_reaches_over_the_begin_of_an_answer_is_learned() -> None:
    rows = tokenizer()
    (tokens,) = rows.completions([("the ", "quick")], learn_all=False)
    assert learned(tokens, rows) == [" quick<|im_end|>"]


def test_an_answer_without_a_stop_token_keeps_its_newline() -> None:
    rows = tokenizer()
    (tokens,) = rows.conversations(["user: q\nassistant: a\n"], [[(19, 22)]], learn_all=False)
    assert learned(tokens, rows) == [" a\n"]
    assert rows.stop_ids == set()


def test_the_first_answer_is_where_a_sample_prompt_ends() -> None:
    for learn_all in (False, True):
        _, tokens, rows = conversation(CHATML, ["question", "answer"], learn_all)
        prompt = rows.decode(tokens.ids[: tokens.prompt_tokens].tolist())
        assert prompt == "<|im_start|>user\nquestion<|im_end|>\n<|im_start|>assistant\n"


def test_all_tokens_but_the_first_are_learned_when_asked() -> None:
    _, tokens, _ = conversation(CHATML, ["question", "answer"], learn_all=True)
    assert tokens.labels.tolist() == [0] + [1] * (len(tokens.ids) - 1)


def test_a_completion_ends_with_the_end_token_and_only_it_is_learned() -> None:
    rows = tokenizer()
    (tokens,) = rows.completions([("the quick", " brown fox")], learn_all=False)
    assert rows.decode(tokens.ids.tolist()) == "the quick brown fox<|im_end|>"
    assert learned(tokens, rows) == [" brown fox<|im_end|>"]
    assert rows.stop_ids == {rows.eos_id}


def with_begin_token() -> Tokenizer:
    wrapped = Tokenizer.from_str(BPE.to_str())
    begin = ("<|im_start|>", BPE.token_to_id("<|im_start|>"))
    wrapped.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<|im_start|> $A", special_tokens=[begin]
    )
    return wrapped


def test_texts_begin_as_the_tokenizer_begins_them() -> None:
    rows = RowTokenizer(with_begin_token(), "<|im_end|>")
    (ids,) = rows.texts(["the fox"])
    assert rows.decode(ids.tolist()) == "<|im_start|>the fox<|im_end|>"
    assert rows.stop_ids == {rows.eos_id}, "the end of a document is trained"
    (tokens,) = rows.completions([("the", " fox")], learn_all=False)
    assert rows.decode(tokens.ids.tolist()) == "<|im_start|>the fox<|im_end|>"
    assert learned(tokens, rows) == [" fox<|im_end|>"]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("the quick", " brown fox"), ("<|im_start|>the quick", " brown fox"), ("the quick", " brown fox<|im_end|>")],
)
def test_no_begin_or_end_token_is_doubled(prompt: str, completion: str) -> None:
    rows = RowTokenizer(with_begin_token(), "<|im_end|>")
    (tokens,) = rows.completions([(prompt, completion)], learn_all=False)
    assert rows.decode(tokens.ids.tolist()) == "<|im_start|>the quick brown fox<|im_end|>"
    assert learned(tokens, rows) == [" brown fox<|im_end|>"]
    (ids,) = rows.texts([prompt + completion])
    assert ids.tolist() == tokens.ids.tolist()


@pytest.mark.parametrize("indent", ["    ", "\t", "  \n  "])
def test_white_space_that_begins_an_answer_is_learned_where_the_tokenizer_trims_offsets(indent: str) -> None:
    trimming = Tokenizer.from_str(BPE.to_str())
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)  # type: ignore[assignment]
    rows = RowTokenizer(trimming, "<|im_end|>")
    (tokens,) = rows.completions([("def f(x):", indent + "return x")], learn_all=False)
    assert learned(tokens, rows) == [indent + "return x<|im_end|>"]


def test_metaspace_tokenizers_are_labelled_by_their_own_offsets() -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "▁": 2, "▁a": 3, "b": 4, "▁b": 5, "a": 6, ":": 7}
    plain = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    plain.decoder = decoders.Metaspace()  # type: ignore[assignment]
    plain.add_special_tokens(["<unk>", "</s>"])
    rows = RowTokenizer(plain, "</s>")
    (tokens,) = rows.completions([("a:", " b")], learn_all=False)
    assert [plain.id_to_token(i) for i in tokens.ids.tolist()] == ["▁a", ":", "▁b", "</s>"]
    assert tokens.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("indent", ["  ", "    ", "\n  "])
@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_white_space_that_begins_an_answer_is_learned_by_metaspace_tokenizers_too(indent: str, scheme: Any) -> None:
    pieces = ["<unk>", "</s>", "▁", "▁a", "b", "▁b", "a", ":", "▁▁", "▁▁▁▁", "\n"]
    plain: Any = Tokenizer(models.Unigram([(piece, -float(len(pieces) - len(piece))) for piece in pieces], 0))
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    plain.decoder = decoders.Replace("▁", " ")
    plain.add_special_tokens(["<unk>", "</s>"])
    rows = RowTokenizer(plain, "</s>")
    (tokens,) = rows.completions([("a:", indent + "b")], learn_all=False)
    assert learned(tokens, rows) == [indent + "b</s>"]


def test_truncation_and_padding_of_the_tokenizer_file_are_off() -> None:
    cut = Tokenizer.from_str(BPE.to_str())
    cut.enable_truncation(2)
    cut.enable_padding(length=64)
    (ids,) = RowTokenizer(cut, "<|im_end|>").texts(["the quick brown fox"])
    assert ids.tolist() == [*BPE.encode("the quick brown fox").ids, BPE.token_to_id("<|im_end|>")]


def test_an_end_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="eos_token"):
        tokenizer("<|nothing|>")


def test_special_tokens_are_read_in_all_the_ways_they_are_written() -> None:
    config = {"eos_token": {"content": "</s>"}, "pad_token": None, "extra_special_tokens": {"image_token": "<i>"}}
    config |= {"end_of_thought_token": "<t>", "add_bos_token": True}
    named = {"eos_token": "</s>", "image_token": "<i>", "end_of_thought_token": "<t>"}
    older = {"bos_token": "<s>", "eos_token": "<e>"}
    assert special_tokens(config, older) == {**named, **older}
    assert special_tokens(config | {"added_tokens_decoder": {}}, older) == named
