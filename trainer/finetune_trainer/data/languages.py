"""Which language texts are in, by the model of py3langid, with the same answers, for many texts at once."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from py3langid.langid import MODEL_DIR, MODEL_FILE
from py3langid.modelio import load_model

from finetune_api.text_quality import NO_LANGUAGE

SAMPLE_CHARACTERS = 500  # of a text: more make it hardly surer
_MIN_LETTERS = 20  # below, languages are told by chance
_MIN_PROBABILITY = 0.3  # of the likeliest
_MAX_TEXTS = 256  # at once

Floats = npt.NDArray[np.float32]


class Told(NamedTuple):
    """Which language a text is in, and how likely each of the languages asked about, taken together."""

    language: str
    asked: float

    @property
    def is_told(self) -> bool:
        """Whether a language was found at all."""
        return self.language != NO_LANGUAGE


class _Model(NamedTuple):
    """A finite automaton over bytes, and what its features say of languages.

    moves: next states, by the row of the state and the byte; rows: of each state, times 256; features: of each state,
    -1 for none; table: (features, languages) log-probabilities; priors: of the languages."""

    moves: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    features: npt.NDArray[np.int64]
    table: Floats
    priors: Floats
    languages: tuple[str, ...]


@cache
def _model() -> _Model:
    table, priors, names, moves, rows, features = load_model(MODEL_DIR / MODEL_FILE)
    return _Model(
        np.array(moves, dtype=np.int64),
        np.array(rows, dtype=np.int64) << 8,
        np.array(features, dtype=np.int64),
        np.asarray(table, dtype=np.float32),
        np.asarray(priors, dtype=np.float32),
        tuple(names),
    )


def known_languages() -> frozenset[str]:
    """Return the codes of all languages that are told apart."""
    return frozenset(_model().languages)


def languages(samples: Sequence[str], asked: Sequence[str] = ()) -> list[Told]:
    """Return the language of each text, by its first characters."""
    found: list[Told] = []
    for begin in range(0, len(samples), _MAX_TEXTS):
        found += _told(samples[begin : begin + _MAX_TEXTS], asked)
    return found


def _told(samples: Sequence[str], asked: Sequence[str]) -> list[Told]:
    model = _model()
    encoded = [_encoded(each) for each in samples]
    wanted = np.array([name in asked for name in model.languages])
    names = list(dict.fromkeys(model.languages))  # some have two scripts, each with a column of its own
    likely = _probabilities(encoded)
    by_name = np.zeros((len(names), len(samples)), dtype=np.float32)
    np.add.at(by_name, [names.index(name) for name in model.languages], likely.T)
    best, asked_for = by_name.argmax(axis=0), likely[:, wanted].sum(axis=1)
    is_sure = by_name.max(axis=0) >= _MIN_PROBABILITY
    return [
        Told(names[best[at]] if is_sure[at] and _has_letters(sample) else NO_LANGUAGE, float(asked_for[at]))
        for at, sample in enumerate(samples)
    ]


def _has_letters(sample: str) -> bool:
    """Return whether there are enough letters to tell a language by; as a rule the first characters say so."""
    return any(sum(map(str.isalpha, part)) >= _MIN_LETTERS for part in (sample[: 2 * _MIN_LETTERS], sample))


def _encoded(sample: str) -> bytes:
    text = sample[:SAMPLE_CHARACTERS]
    return (text.lower() if text.isupper() else text).encode(errors="surrogatepass")


def _probabilities(encoded: Sequence[bytes]) -> Floats:
    """Return (texts, languages) probabilities; all alike for a text without any feature."""
    model = _model()
    features = _features(encoded)
    found = np.zeros((len(encoded), len(model.languages)), dtype=np.float32)
    for at, text in enumerate(encoded):
        own, counts = np.unique(features[at, : len(text)], return_counts=True)
        own, counts = own[own >= 0], counts[own >= 0]
        if len(own):
            found[at] = np.log1p(counts.astype(np.float32)) @ model.table[own] + model.priors
            found[at] /= np.float32(np.sqrt(len(text)))  # which keeps texts of all lengths as sure as they are
    found = np.exp(found - found.max(axis=1, keepdims=True))
    return found / found.sum(axis=1, keepdims=True)


def _features(encoded: Sequence[bytes]) -> npt.NDArray[np.int64]:
    """Return (texts, bytes) the feature that each byte completes, -1 for none; what is behind a text says nothing."""
    model = _model()
    size = max(map(len, encoded), default=0)
    columns = np.zeros((size, len(encoded)), dtype=np.int64)
    for at, text in enumerate(encoded):
        columns[: len(text), at] = np.frombuffer(text, dtype=np.uint8)
    found = np.empty((len(encoded), size), dtype=np.int64)
    states = np.zeros(len(encoded), dtype=np.int64)
    for at, column in enumerate(columns):
        states = model.moves[model.rows[states] + column]
        found[:, at] = model.features[states]
    return found
