"""Rules of quality: what each is about, whom they leave out or report, and when that ends the job."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import py3langid.langid
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_run import chat, jsonl, prepare_run, put
from finetune_api.errors import StageError
from finetune_api.job import FineTuneJobSpec
from finetune_api.reasons import Fault
from finetune_api.text_quality import LANGUAGES, RULES, QualityPreset, ThresholdsSpec, thresholds_of
from finetune_trainer.data.accounts import FieldPlace
from finetune_trainer.data.languages import known_languages, languages
from finetune_trainer.data.poor_answers import fewest_letters, placeholders, refusals
from finetune_trainer.data.problems import Drop
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.rows import Completion, Conversation, Pair, RankedPair, Ranking, Row, Text, Thumb
from finetune_trainer.data.stages.quality import Judge, judge_of, quality_stages
from finetune_trainer.data.text_figures import OF_TEXTS, figures

ENGLISH = (
    "The committee has met in the town hall to speak of the new bridge over the river. It was built of stone, and that "
    "is why people have come with their families to look at it on Sundays. Nobody knew how long it would take."
)
GERMAN = "Der Ausschuss hat im Rathaus über die neue Brücke gesprochen, die aus Stein gebaut wurde und allen gefällt."
FRENCH = "Le comité s'est réuni à la mairie pour parler du nouveau pont sur la rivière, qui a été construit en pierre."
CHINESE = "委员会在市政厅开会\uff0c讨论了河上的新桥。这座桥是用石头建造的\uff0c所以人们星期天带着家人来看它。"


def spec(method: str = "CPT", **quality: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"uri": "s3://models/a"},
            "method": {"type": method},
            "datasets": [{"uri": "s3://data/a/"}],
            "output": {"uri": "s3://out/a"},
            "preprocessing": {"quality": quality},
        }
    )


def checked(*rows: Row) -> list[Checked]:
    return [Checked(0, at, row, b"", 1) for at, row in enumerate(rows, 1)]


def figure(name: str, text: str, is_english: bool = True) -> float:
    return float(figures([text], np.array([is_english]), [name])[name][0])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("min_words", "one two -- 3 ... four", 4),
        ("min_words", "", 0),
        ("min_words", "委员会在市政厅开会\uff0c", 4.5),  # nine letters of a script without spaces, and a comma
        ("min_mean_word_length", "a bcd --- éé", 2),
        ("min_alphabetic_words", "a 1 2 b3 --", 0.5),
        ("max_symbols_per_word", "# a b # c d ... e… f....", 0.5),
        ("max_bullet_lines", "- a\n  * b\n• c\nd\n\n", 0.75),
        ("max_ellipsis_lines", "a...\nb…\nc\n d \n", 0.5),
        ("min_stop_words", "The cat and the dog", 2),
        ("max_placeholders", "Lorem ipsum dolor", 1),
        ("max_boilerplate_lines", "We use cookies.\nSee our Privacy Policy, terms of use\na\nb", 0.5),
        ("min_line_punctuation", "a.\nb!  \nc”\nd", 0.75),
        ("max_short_lines", "short\n" + "long " * 7, 0.5),
        ("max_repeated_lines", "a\n a \nb\nA\n\n", 0.5),
        ("max_repeated_line_characters", "aaaa\naaaa\nbb", 0.4),
        ("max_repeated_paragraphs", "a\nb\n\na\nb\n\n\nc", 1 / 3),
        ("max_repeated_paragraph_characters", "ab\n\nab\n \ncd", 1 / 3),
        ("max_most_said_two_words", "aa b aa b cc", 6 / 8),
        ("max_most_said_two_words", "a b c d", 0),
        ("max_most_said_four_words", "a b c d e a b c d", 8 / 9),
        ("max_repeated_five_words", "a b c d e x a b c d e", 5 / 11),
        ("max_repeated_five_words", "a b c d e f a b c d e f", 0.5),
        ("max_repeated_six_words", "a b c d e x a b c d e", 0),
        ("max_repeated_ten_words", "a b c d e f g h i j " * 10, 0.9),
        ("max_repeated_ten_words", "too short", 0),
    ],
)
def test_each_figure_is_counted_as_its_rule_says(name: str, text: str, expected: float) -> None:
    assert figure(name, text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("min_mean_word_length", CHINESE),  # words cannot be told
        ("min_alphabetic_words", CHINESE),
        ("min_alphabetic_words", ""),
        ("max_short_lines", " \n "),
    ],
)
def test_a_text_without_a_figure_meets_its_rule(name: str, text: str) -> None:
    assert np.isnan(figure(name, text))


def test_stop_words_are_asked_of_english_texts_alone() -> None:
    assert np.isnan(figure("min_stop_words", GERMAN, is_english=False))


@given(st.lists(st.text(alphabet="ab \n.#é委•", max_size=60), max_size=12))
def test_the_figures_of_a_text_do_not_depend_on_the_texts_beside_it(texts: list[str]) -> None:
    together = figures(texts, np.ones(len(texts), dtype=bool), OF_TEXTS)
    for at, text in enumerate(texts):
        alone = figures([text], np.array([True]), OF_TEXTS)
        assert {name: values[at].tobytes() for name, values in together.items()} == {
            name: values[0].tobytes() for name, values in alone.items()
        }


def plainly_repeated(words: list[str], size: int) -> float:
    """Count word by word what is said again."""
    said: set[tuple[str, ...]] = set()
    inside = [False] * len(words)
    for at in range(len(words) - size + 1):
        run = tuple(words[at : at + size])
        if run in said:
            inside[at : at + size] = [True] * size
        said.add(run)
    total = sum(map(len, words))
    return sum(len(word) for word, is_inside in zip(words, inside, strict=True) if is_inside) / max(1, total)


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=60), st.integers(5, 10))
def test_repeated_words_are_those_that_a_plain_count_finds(words: list[str], size: int) -> None:
    names = {5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}
    assert figure(f"max_repeated_{names[size]}_words", " ".join(words)) == pytest.approx(plainly_repeated(words, size))


def test_every_threshold_has_a_field_a_rule_a_figure_and_a_reason() -> None:
    assert list(ThresholdsSpec.model_fields) == list(RULES)
    assert set(RULES) - set(OF_TEXTS) == {"min_answer_letters", "max_refusals"}
    assert {rule.reason for rule in RULES.values()} <= set(Drop)
    assert thresholds_of(QualityPreset.OFF, ThresholdsSpec(min_words=3)) == {}
    own = ThresholdsSpec(min_words=3, max_refusals=2)
    assert thresholds_of(QualityPreset.DOCUMENTS, own)["min_words"] == 3
    assert thresholds_of(QualityPreset.DOCUMENTS, own)["max_refusals"] == 2


def test_languages_are_those_that_the_library_tells_one_by_one() -> None:
    assert set(LANGUAGES) == known_languages()
    one_by_one = py3langid.langid.LanguageIdentifier.from_model_file(py3langid.langid.MODEL_FILE, norm_probs=True)
    texts = [ENGLISH, GERMAN, FRENCH, CHINESE, "Привет, как дела? Давно не виделись.", ENGLISH.upper(), GERMAN[:60]]
    found = languages(texts, ["en", "fr"])
    for text, each in zip(texts, found, strict=True):
        ranks = dict(one_by_one.rank(text))
        assert each.language == max(ranks, key=ranks.__getitem__)
        assert each.asked == pytest.approx(ranks["en"] + ranks["fr"], abs=1e-3)
    assert [each.language for each in languages(["", "ok", "12 34 !!", "\x00"])] == ["und"] * 4


@pytest.mark.parametrize(
    ("answer", "refuses", "places"),
    [
        ("As an AI language model, I cannot feel.", 1, 0),
        ("I'm sorry, but I can\u2019t help with that.", 1, 0),
        ("I am sorry for your loss.", 0, 0),
        ("An AI model is a program.", 0, 0),
        ("Dear [insert name], TODO", 0, 1),
        ("Dear [Your Name],", 0, 1),
        ("Use `a[0]`.\n```python\n# TODO: more\n```\n", 0, 0),
        ("todo el mundo [1]", 0, 0),
    ],
)
def test_refusals_and_placeholders_are_told_from_answers_that_speak_of_them(
    answer: str, refuses: int, places: int
) -> None:
    assert (refusals([answer]), placeholders([answer])) == (refuses, places)


@pytest.mark.parametrize(
    ("answers", "letters"),
    [(["Yes.", "4"], 1), (["...", "Yes"], 0), (["N/A"], 0), ([" 是 "], 1), (["-" * 300 + "a"], 1)],
)
def test_the_answer_that_says_least_counts(answers: list[str], letters: int) -> None:
    assert fewest_letters(answers) == letters
    assert np.isnan(fewest_letters([]))


def test_documents_leaves_out_what_says_nothing_or_the_same_again_and_again() -> None:
    rows = checked(
        Text(ENGLISH),
        Text("-- --"),
        Text("The same line of words.\n" * 20),
        Text("1 2 3 4 5 6 7 8 9 x"),
        Text("no " * 40),
    )
    (stage,) = quality_stages(spec())
    staged = stage.run(rows)
    assert [each.number for each in staged.rows] == [1, 5]
    assert [(each.row, each.reason, each.detail) for each in staged.decisions] == [
        (2, "few_words", "minWords: 0, at least 1"),
        (3, "repeated_lines", "maxRepeatedLineCharacters: 0.95, at most 0.5"),
        (4, "few_letters", "minAlphabeticWords: 0.1, at least 0.4"),
    ]
    counted = {name: rows for name, rows in staged.counters.items() if not name.startswith("language")}
    assert counted == {"judged": 5, "few_words": 1, "repeated_lines": 1, "few_letters": 1}
    assert staged.places["few_words"] == [FieldPlace(0, 2, "")]


def answered(content: str) -> Conversation:
    return Conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": content}], (False, True))


def test_chat_reports_poor_answers_and_leaves_none_out() -> None:
    refusal, good = answered("As an AI language model, I cannot [insert verb]."), answered("Yes.")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    calling = Conversation([{"role": "user", "content": "?"}, call], (False, True))
    rows = checked(refusal, good, calling, answered("N/A"))
    (stage,) = quality_stages(spec("SFT"))
    staged = stage.run(rows)
    assert staged.rows == rows
    assert not staged.decisions
    counted = {name: rows for name, rows in staged.counters.items() if not name.startswith("language")}
    assert counted == {"judged": 4, "refusal": 1, "placeholder": 1, "empty_answer": 1}


def test_answers_that_are_not_to_be_given_are_not_judged() -> None:
    poor, good = Completion("q", "As an AI language model, no."), Completion("q", "b c")
    (stage,) = quality_stages(spec("DPO"))
    for row, found in [
        (Pair(good, poor), 0),
        (Pair(poor, good), 1),
        (Thumb(poor, False), 0),
        (Thumb(poor, True), 1),
        (Ranking((poor, good), (1.0, 2.0), (RankedPair(1, 0),)), 0),
        (Ranking((poor, good), (3.0, 2.0), (RankedPair(0, 1),)), 1),
    ]:
        assert stage.run(checked(row)).counters["refusal"] == found


def test_rows_of_other_languages_are_left_out_once_languages_are_named() -> None:
    rows = checked(Text(ENGLISH), Text(GERMAN), Text(FRENCH), Text(CHINESE), Text("ok"))
    (stage,) = quality_stages(spec(preset="Off", languages=["de", "fr"]))
    staged = stage.run(rows)
    assert [each.number for each in staged.rows] == [2, 3, 5]
    assert [(each.row, each.reason, each.detail) for each in staged.decisions] == [
        (1, "other_language", "en"),
        (4, "other_language", "zh"),
    ]
    assert quality_stages(spec(preset="Off")) == ()


def test_the_preset_follows_from_the_method_and_thresholds_from_both() -> None:
    assert judge_of(spec()).preset is QualityPreset.DOCUMENTS
    assert [judge_of(spec(method)).preset for method in ("SFT", "DPO", "ORPO", "KTO")] == [QualityPreset.CHAT] * 4
    web = judge_of(spec("SFT", preset="Web", thresholds={"minWords": 9}))
    assert web.drops
    assert web.thresholds["min_words"] == 9
    assert isinstance(web, Judge)
    assert web == judge_of(spec("SFT", preset="Web", thresholds={"minWords": 9}))


WORDS = ENGLISH.split()


def documents(count: int) -> list[dict[str, str]]:
    drawn = random.Random(0)
    return [{"text": " ".join(drawn.choices(WORDS, k=60)) + f" {at}."} for at in range(count)]


def test_the_job_goes_on_without_few_poor_rows_and_the_report_says_which(tmp_path: Path) -> None:
    rows = documents(95) + [{"text": "-" * (at + 1)} for at in range(7)]
    put(tmp_path, a_jsonl=jsonl(rows))
    prepared = prepare_run(tmp_path, {"method": {"type": "CPT"}})
    assert prepared.result.data is not None
    assert prepared.report["dropped"] == {"few_words": 7}
    quality = prepared.report["quality"]
    uri = (tmp_path / "data" / "a.jsonl").as_uri()
    assert quality == {
        "preset": "Documents",
        "drops": True,
        "rows": 102,
        "max_dropped_fraction": 0.1,
        "found": [
            {
                "reason": "few_words",
                "rows": 7,
                "share": 0.0686,
                "places": [{"uri": uri, "row": row} for row in range(96, 101)],
            }
        ],
    }
    assert prepared.report["languages"] == {"en": 95, "und": 7}


def test_the_job_fails_before_training_when_too_many_rows_are_poor(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=jsonl(documents(60) + [{"text": "-" * (at + 1)} for at in range(40)]))
    with pytest.raises(StageError) as caught:
        prepare_run(tmp_path, {"method": {"type": "CPT"}})
    assert caught.value.fault is Fault.TOO_MANY_POOR_ROWS
    assert "preset Documents would leave out 40 of 100 rows (40 %)" in str(caught.value)
    assert "40 few_words (a.jsonl row 61, a.jsonl row 62)" in str(caught.value)
    asked = {"method": {"type": "CPT"}, "preprocessing": {"quality": {"maxDroppedFraction": 0.4}}}
    assert prepare_run(tmp_path, asked, attempt=2).report["dropped"] == {"few_words": 40}
    off = {"method": {"type": "CPT"}, "preprocessing": {"quality": {"preset": "Off"}}}
    assert prepare_run(tmp_path, off, attempt=3).report["dropped"] == {}


def test_chats_are_reported_and_trained_on(tmp_path: Path) -> None:
    rows = [chat(f"what is {at}?", "As an AI language model, I cannot say.") for at in range(40)]
    put(tmp_path, a_jsonl=jsonl(rows))
    report = prepare_run(tmp_path).report
    assert report["dropped"] == {}
    assert [(each["reason"], each["rows"], len(each["places"])) for each in report["quality"]["found"]] == [
        ("refusal", 40, 5)
    ]
