"""What is done about the quality of texts: repair, languages, and rules with a threshold each, by preset."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from finetune_api import defaults
from finetune_api.base import ApiModel

# ISO 639-1, and what else py3langid tells apart.
LANGUAGES = (
    *("ace", "af", "am", "an", "ar", "ary", "arz", "as", "az", "ba", "bcl", "be", "bg", "bn", "br", "bs", "ca"),
    *("crh", "cs", "cy", "da", "de", "dz", "el", "en", "eo", "es", "et", "eu", "ext", "fa", "fi", "fo", "fr", "fuv"),
    *("fy", "ga", "gcf", "gcr", "gd", "gl", "gom", "grc", "gu", "gug", "guw", "ha", "hbo", "he", "hi", "hr", "ht"),
    *("hu", "hy", "id", "ig", "is", "it", "ja", "jv", "ka", "kab", "kik", "kk", "km", "kn", "ko", "ku", "ky", "la"),
    *("lb", "lg", "lij", "ln", "lo", "lt", "ltg", "lv", "mg", "mk", "ml", "mn", "mr", "ms", "mt", "my", "ne", "nl"),
    *("nn", "no", "nso", "oc", "om", "or", "pa", "pcm", "pl", "ps", "pt", "qu", "ro", "ru", "rw", "sa", "sdh", "se"),
    *("si", "sk", "sl", "sn", "so", "sq", "sr", "st", "sv", "sw", "ta", "te", "tg", "th", "tk", "tl", "tr", "tt"),
    *("ug", "uk", "ur", "uz", "uzs", "vec", "vi", "vo", "wa", "wuu", "xh", "yo", "yue", "zh", "zu", "zxx"),
)
Language = Annotated[str, Field(max_length=8, json_schema_extra={"enum": list(LANGUAGES)})]
MIN_WORDS_OF_REPETITION = 50  # of a text, below which it may say the same again: Gopher judges no shorter ones
NO_LANGUAGE = "und"  # of a text that is too short, or says it in no language


class QualityPreset(StrEnum):
    """Which rules texts are judged by."""

    OFF = "Off"
    DOCUMENTS = "Documents"
    WEB = "Web"
    CHAT = "Chat"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule about a figure of a text: what it is, where it comes from, and the threshold in each preset.

    is_least: whether a text must have as much at least; else it may have as much at most. reason: of rows that do not
    meet it. whole: whether it is a number, else it is a share. In a preset that is not listed there is no such rule."""

    figure: str
    source: str
    reason: str
    is_least: bool = False
    whole: bool = False
    presets: Mapping[QualityPreset, float]


_GOPHER, _C4, _FINEWEB = "Gopher", "C4", "FineWeb"
_D, _W, _C = QualityPreset.DOCUMENTS, QualityPreset.WEB, QualityPreset.CHAT
_REPEATED = "share of the characters in {} words after another that were said before"
_MOST = "share of the characters in the {} words after another that are said most often"


def _web(value: float) -> Mapping[QualityPreset, float]:
    return {_W: value}


# By the name of the threshold, in the order in which a row's first reason is looked for.
RULES: Mapping[str, Rule] = {
    "min_words": Rule(
        figure="words with a letter or a digit; of scripts without spaces two letters are a word",
        source=f"{_GOPHER}: 50",
        reason="few_words",
        is_least=True,
        whole=True,
        presets={_D: 1, _W: 50},
    ),
    "max_words": Rule(
        figure="words with a letter or a digit",
        source=_GOPHER,
        reason="many_words",
        whole=True,
        presets=_web(100_000),
    ),
    "min_mean_word_length": Rule(
        figure="characters of a word, in the mean",
        source=_GOPHER,
        reason="word_lengths",
        is_least=True,
        whole=True,
        presets=_web(3),
    ),
    "max_mean_word_length": Rule(
        figure="characters of a word, in the mean",
        source=_GOPHER,
        reason="word_lengths",
        whole=True,
        presets=_web(10),
    ),
    "min_alphabetic_words": Rule(
        figure="share of the words that have a letter",
        source=f"{_GOPHER}: 0.8",
        reason="few_letters",
        is_least=True,
        presets={_D: 0.4, _W: 0.8},
    ),
    "max_symbols_per_word": Rule(
        figure="number signs, or ellipses, for each word",
        source=_GOPHER,
        reason="symbols",
        presets=_web(0.1),
    ),
    "max_bullet_lines": Rule(
        figure="share of the lines that begin with a bullet",
        source=_GOPHER,
        reason="bullet_lines",
        presets=_web(0.9),
    ),
    "max_ellipsis_lines": Rule(
        figure="share of the lines that end with an ellipsis",
        source=_GOPHER,
        reason="ellipsis_lines",
        presets=_web(0.3),
    ),
    "min_stop_words": Rule(
        figure="of the, be, to, of, and, that, have and with, as many different ones; of English texts",
        source=_GOPHER,
        reason="few_stop_words",
        is_least=True,
        whole=True,
        presets=_web(2),
    ),
    "max_placeholders": Rule(
        figure="places such as lorem ipsum, of answers also TODO and [insert …]",
        source=f"{_C4}: lorem ipsum",
        reason="placeholder",
        whole=True,
        presets={_W: 0, _C: 0},
    ),
    "max_boilerplate_lines": Rule(
        figure="share of the lines about cookies, terms of use, privacy, or JavaScript that is missing",
        source=f"{_C4}, which leaves out such lines",
        reason="boilerplate",
        presets={_D: 0.5, _W: 0.1},
    ),
    "min_line_punctuation": Rule(
        figure="share of the lines that end with a mark of punctuation",
        source=_FINEWEB,
        reason="line_punctuation",
        is_least=True,
        presets=_web(0.12),
    ),
    "max_short_lines": Rule(
        figure="share of the lines of 30 characters at most",
        source=_FINEWEB,
        reason="short_lines",
        presets=_web(0.67),
    ),
    "max_repeated_lines": Rule(
        figure="share of the lines that were said before",
        source=_GOPHER,
        reason="repeated_lines",
        presets=_web(0.3),
    ),
    "max_repeated_line_characters": Rule(
        figure="share of the characters in lines that were said before",
        source=f"{_GOPHER}: 0.2; {_FINEWEB}: 0.1",
        reason="repeated_lines",
        presets={_D: 0.5, _W: 0.1},
    ),
    "max_repeated_paragraphs": Rule(
        figure="share of the paragraphs that were said before",
        source=_GOPHER,
        reason="repeated_paragraphs",
        presets=_web(0.3),
    ),
    "max_repeated_paragraph_characters": Rule(
        figure="share of the characters in paragraphs that were said before",
        source=_GOPHER,
        reason="repeated_paragraphs",
        presets=_web(0.2),
    ),
    "max_most_said_two_words": Rule(
        figure=_MOST.format("two"), source=_GOPHER, reason="repeated_words", presets=_web(0.2)
    ),
    "max_most_said_three_words": Rule(
        figure=_MOST.format("three"), source=_GOPHER, reason="repeated_words", presets=_web(0.18)
    ),
    "max_most_said_four_words": Rule(
        figure=_MOST.format("four"), source=_GOPHER, reason="repeated_words", presets=_web(0.16)
    ),
    "max_repeated_five_words": Rule(
        figure=_REPEATED.format("five"), source=_GOPHER, reason="repeated_words", presets=_web(0.15)
    ),
    "max_repeated_six_words": Rule(
        figure=_REPEATED.format("six"), source=_GOPHER, reason="repeated_words", presets=_web(0.14)
    ),
    "max_repeated_seven_words": Rule(
        figure=_REPEATED.format("seven"), source=_GOPHER, reason="repeated_words", presets=_web(0.13)
    ),
    "max_repeated_eight_words": Rule(
        figure=_REPEATED.format("eight"), source=_GOPHER, reason="repeated_words", presets=_web(0.12)
    ),
    "max_repeated_nine_words": Rule(
        figure=_REPEATED.format("nine"), source=_GOPHER, reason="repeated_words", presets=_web(0.11)
    ),
    "max_repeated_ten_words": Rule(
        figure=_REPEATED.format("ten"),
        source=f"{_GOPHER}: 0.1",
        reason="repeated_words",
        presets={_D: 0.6, _W: 0.1, _C: 0.5},
    ),
    "min_answer_letters": Rule(
        figure="letters and digits of the answer that has the fewest; n/a, null and nan have none",
        source="ours",
        reason="empty_answer",
        is_least=True,
        whole=True,
        presets={_C: 1},
    ),
    "max_refusals": Rule(
        figure="answers such as “As an AI language model, I cannot …”",
        source="ours",
        reason="refusal",
        whole=True,
        presets={_C: 0},
    ),
}


def _threshold(name: str) -> Any:
    rule = RULES[name]
    presets = ", ".join(f"{preset} {value:g}" for preset, value in rule.presets.items())
    bound = "At least so much" if rule.is_least else "At most so much"
    return Field(
        default=None,
        ge=0,
        le=1e9 if rule.whole else 100,
        description=f"{bound}: {rule.figure}. Source: {rule.source}. Absent: {presets}; no such rule in other presets.",
    )


class ThresholdsSpec(ApiModel):
    """Thresholds in place of the preset's. A rule that the preset does not have is added by its threshold."""

    min_words: float | None = _threshold("min_words")
    max_words: float | None = _threshold("max_words")
    min_mean_word_length: float | None = _threshold("min_mean_word_length")
    max_mean_word_length: float | None = _threshold("max_mean_word_length")
    min_alphabetic_words: float | None = _threshold("min_alphabetic_words")
    max_symbols_per_word: float | None = _threshold("max_symbols_per_word")
    max_bullet_lines: float | None = _threshold("max_bullet_lines")
    max_ellipsis_lines: float | None = _threshold("max_ellipsis_lines")
    min_stop_words: float | None = _threshold("min_stop_words")
    max_placeholders: float | None = _threshold("max_placeholders")
    max_boilerplate_lines: float | None = _threshold("max_boilerplate_lines")
    min_line_punctuation: float | None = _threshold("min_line_punctuation")
    max_short_lines: float | None = _threshold("max_short_lines")
    max_repeated_lines: float | None = _threshold("max_repeated_lines")
    max_repeated_line_characters: float | None = _threshold("max_repeated_line_characters")
    max_repeated_paragraphs: float | None = _threshold("max_repeated_paragraphs")
    max_repeated_paragraph_characters: float | None = _threshold("max_repeated_paragraph_characters")
    max_most_said_two_words: float | None = _threshold("max_most_said_two_words")
    max_most_said_three_words: float | None = _threshold("max_most_said_three_words")
    max_most_said_four_words: float | None = _threshold("max_most_said_four_words")
    max_repeated_five_words: float | None = _threshold("max_repeated_five_words")
    max_repeated_six_words: float | None = _threshold("max_repeated_six_words")
    max_repeated_seven_words: float | None = _threshold("max_repeated_seven_words")
    max_repeated_eight_words: float | None = _threshold("max_repeated_eight_words")
    max_repeated_nine_words: float | None = _threshold("max_repeated_nine_words")
    max_repeated_ten_words: float | None = _threshold("max_repeated_ten_words")
    min_answer_letters: float | None = _threshold("min_answer_letters")
    max_refusals: float | None = _threshold("max_refusals")


class QualitySpec(ApiModel):
    """What is done about the quality of texts before they are rendered."""

    repair: bool | None = Field(
        default=None,
        description="Whether damaged characters are put right: what a wrong encoding made of others, control "
        "characters, line ends, Unicode in several parts. Code is left as it is but for its line ends, and what "
        "functions are called with is not touched. Every changed row is in decisions.jsonl. Absent: true.",
    )
    preset: QualityPreset | None = Field(
        default=None,
        description="Which rules rows are judged by; docs/data.md has their thresholds. Documents leaves out rows that "
        "hardly say anything, or the same again and again. Web has the rules that crawled pages are filtered by "
        "(Gopher, C4, FineWeb); tables and lists do not meet them. Chat only reports: answers that are empty, refuse "
        "or hold the place of others. Off judges none. Absent: Documents for CPT, Chat for other methods.",
    )
    languages: list[Language] | None = Field(
        default=None,
        min_length=1,
        max_length=20,
        description="The languages to keep, as codes of ISO 639-1. Rows that are surely in another one are left out; "
        "those of too few letters to tell stay. Absent: languages are counted for the report, and none is left out. "
        "Example: [de, en]",
    )
    max_dropped_fraction: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="With Documents and Web: the job fails before training, with a table of reasons and places, when "
        "the rules would leave out a larger share of the rows. Languages do not count. "
        f"Absent: {defaults.MAX_POOR_FRACTION}.",
    )
    thresholds: ThresholdsSpec | None = Field(
        default=None, description="Thresholds of single rules. Absent: those of the preset."
    )


def thresholds_of(preset: QualityPreset, given: ThresholdsSpec | None) -> dict[str, float]:
    """Return the thresholds of the rules that hold, by name, in the order of RULES."""
    if preset is QualityPreset.OFF:
        return {}
    own: dict[str, float] = {} if given is None else given.model_dump(by_alias=False, exclude_none=True)
    of_preset = {name: rule.presets[preset] for name, rule in RULES.items() if preset in rule.presets}
    every = of_preset | own
    return {name: every[name] for name in RULES if name in every}
