"""Judge rows by their language and by rules with a threshold each: leave poor ones out, or report them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune_api.job import FineTuneJobSpec, PreprocessingSpec
from finetune_api.text_quality import (
    MIN_WORDS_OF_REPETITION,
    RULES,
    QualityPreset,
    QualitySpec,
    ThresholdsSpec,
    thresholds_of,
)
from finetune_trainer.data.accounts import Action, FieldPlace
from finetune_trainer.data.kinds import kind_of
from finetune_trainer.data.languages import SAMPLE_CHARACTERS, Told, languages
from finetune_trainer.data.poor_answers import fewest_letters, placeholders, refusals
from finetune_trainer.data.problems import Drop
from finetune_trainer.data.prose import prose
from finetune_trainer.data.reading import Checked
from finetune_trainer.data.repetition import Floats
from finetune_trainer.data.rows import Row
from finetune_trainer.data.spans import Bools
from finetune_trainer.data.stages.stage import Stage, Staged
from finetune_trainer.data.text_figures import OF_TEXTS, figures
from finetune_trainer.methods import method_of

STAGE = "quality"
JUDGED = "judged"  # counted: rows that were judged by rules
LANGUAGE = "language "  # begins the names of what is counted by language
_MIN_ASKED = 0.1  # likelihood that a row is in one of the languages asked for, below which it is left out
_WORDS = "min_words"  # whose figure the rules of repetition need too
_REPETITION = frozenset((Drop.REPEATED_LINES, Drop.REPEATED_PARAGRAPHS, Drop.REPEATED_WORDS))
_OF_ANSWERS = {"max_placeholders": placeholders, "min_answer_letters": fewest_letters, "max_refusals": refusals}


@dataclass(frozen=True)
class Judge:
    """Judges rows. thresholds: of the rules that hold, by name; languages: to keep, all where there are none."""

    preset: QualityPreset
    thresholds: Mapping[str, float]
    languages: tuple[str, ...]

    @property
    def drops(self) -> bool:
        """Whether rows that do not meet a rule are left out."""
        return self.preset in (QualityPreset.DOCUMENTS, QualityPreset.WEB)

    def __call__(self, rows: Sequence[Checked]) -> Staged:
        texts = [list(prose(item.row).values()) for item in rows]
        told = languages([_sample(each) for each in texts], self.languages)
        found = self._figures([item.row for item in rows], texts, told)
        failed = {name: _fails(name, found, limit) for name, limit in self.thresholds.items()}
        staged = Staged([], counters=Counter({JUDGED: len(rows)} if self.thresholds else {}))
        for at, (item, language) in enumerate(zip(rows, told, strict=True)):
            staged.counters[LANGUAGE + language.language] += 1
            poor = [name for name in self.thresholds if failed[name][at]]
            if self.languages and language.is_told and language.asked < _MIN_ASKED:
                staged.decide(item, Action.DROP, Drop.OTHER_LANGUAGE, language.language)
                continue
            reasons = list(dict.fromkeys(RULES[name].reason for name in poor))
            for reason in reasons[: 1 if self.drops else None]:
                staged.count(reason, FieldPlace(item.file, item.number, ""))
            if poor and self.drops:
                words = _words(poor[0], found[poor[0]][at], self.thresholds[poor[0]])
                staged.decide(item, Action.DROP, reasons[0], words)
            else:
                staged.rows.append(item)
        return staged

    def _figures(self, rows: Sequence[Row], texts: Sequence[list[str]], told: Sequence[Told]) -> dict[str, Floats]:
        """Return the figure of each rule for each row: of its answers where the preset is about them."""
        if not self.thresholds:
            return {}
        is_english = np.array([each.language == "en" for each in told])
        answers = [kind_of(row).answers(row) for row in rows]
        of_chats = self.preset is QualityPreset.CHAT
        judged = ["\n".join(each) for each in (answers if of_chats else texts)]
        own = {name for name in self.thresholds if name not in OF_TEXTS or (of_chats and name in _OF_ANSWERS)}
        found = figures(judged, is_english, {_WORDS, *(name for name in self.thresholds if name not in own)})
        for name in own:
            found[name] = np.array([_OF_ANSWERS[name](each) for each in answers], dtype=np.float64)
        return found


def quality_of(spec: FineTuneJobSpec) -> QualitySpec:
    """Return what a job says of the quality of its texts."""
    return (spec.preprocessing or PreprocessingSpec()).quality or QualitySpec()


def judge_of(spec: FineTuneJobSpec) -> Judge:
    """Return how the rows of a job are judged."""
    given = quality_of(spec)
    preset = given.preset or method_of(spec.method.type).quality_preset
    return Judge(preset, thresholds_of(preset, given.thresholds), tuple(given.languages or ()))


def quality_stages(spec: FineTuneJobSpec) -> tuple[Stage, ...]:
    """Return the stage that judges the rows of a job; none where nothing is asked about them."""
    judge = judge_of(spec)
    if judge.preset is QualityPreset.OFF and not judge.languages:
        return ()
    return (Stage(STAGE, "leaves out poor rows, or those of other languages, or reports them", judge),)


def _sample(texts: Sequence[str]) -> str:
    """Return the first characters of a row, of each of its texts some."""
    share = max(1, SAMPLE_CHARACTERS // max(1, len(texts)))
    return "\n".join(text[:share] for text in texts)


def _fails(name: str, found: Mapping[str, Floats], limit: float) -> Bools:
    """Return which rows do not meet a rule."""
    values, rule = found[name], RULES[name]
    if rule.reason in _REPETITION:
        return (values > limit) & (found[_WORDS] >= MIN_WORDS_OF_REPETITION)
    return values < limit if rule.is_least else values > limit


def _words(name: str, value: float, limit: float) -> str:
    alias = ThresholdsSpec.model_fields[name].alias
    return f"{alias}: {value:.4g}, {'at least' if RULES[name].is_least else 'at most'} {limit:g}"
