"""What the model can do: loss on held-out rows, and answers to the sample prompts."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from finetune_api.base import StoredModel
from finetune_api.defaults import MAX_HELD_OUT_ROWS
from finetune_trainer.data.examples import Examples, FlatSequence
from finetune_trainer.inputs import Batch, make_batch
from finetune_trainer.loop import log_ratios
from finetune_trainer.methods.method import Method
from finetune_trainer.model import LanguageModel
from finetune_trainer.passes import passes
from finetune_trainer.policy import Scores
from finetune_trainer.runplan import PassLayout, SamplePrompt
from finetune_trainer.stop import StopFlag

MAX_NEW_TOKENS = 64
_NGRAM = 4


class HeldOut(StoredModel):
    """Loss on held-out rows after a number of steps; 0 is the base model. Every unit counts alike: see `methods`."""

    # A loss that is not finite must be readable again: a checkpoint holds it.
    model_config = ConfigDict(ser_json_inf_nan="strings", extra="ignore")  # as checkpoint.Position

    step: int = Field(ge=0)
    loss: float  # nats per unit
    rows: int = Field(ge=0)
    label_tokens: int = Field(ge=0)
    change: float | None = None  # of the loss since the first evaluation, nats per unit
    change_error: float | None = None  # standard error of `change`, paired by row
    answer_ends: int = Field(default=0, ge=0)  # label tokens that end an answer
    end_probability: float | None = None  # mean over them of the probability of the token that ends the answer
    # What the method measures beside the loss, means over its units.
    figures: dict[str, float] = Field(default_factory=dict[str, float], max_length=16)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # e^709 is the largest float


@dataclass(frozen=True)
class Measurement:
    """A `HeldOut`, and what it was made from: for each row the sum of its units' losses, and their number."""

    held_out: HeldOut
    row_losses: list[float]  # (rows,) nats
    row_units: list[int]  # (rows,)

    def of(self, rows: Sequence[int]) -> "Measurement":
        """Return the same of some of the rows, by their place."""
        losses, units = [self.row_losses[row] for row in rows], [self.row_units[row] for row in rows]
        return Measurement(self.held_out, losses, units)


@dataclass(frozen=True)
class Answer:
    """A greedy answer. Its words are data: they belong into eval.json in the bucket and nowhere else."""

    text: str
    token_ids: list[int]
    stopped: bool  # by a stop token, not by the limit

    @property
    def repetition_ratio(self) -> float:
        return repetition_ratio(self.token_ids)


def repetition_ratio(token_ids: Sequence[int]) -> float:
    """Share of the 4-grams that occurred before in the same answer; 0 for answers too short to tell."""
    ngrams = [tuple(token_ids[i : i + _NGRAM]) for i in range(len(token_ids) - _NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def sampled_rows(rows: int, seed: int) -> list[int]:
    """Return the held-out rows that are measured between the steps, at most MAX_HELD_OUT_ROWS, drawn by the seed."""
    if rows <= MAX_HELD_OUT_ROWS:
        return list(range(rows))
    drawn = np.random.Generator(np.random.Philox(key=[seed, 0])).choice(rows, MAX_HELD_OUT_ROWS, replace=False)
    return np.sort(drawn).tolist()


@torch.no_grad()
def held_out_loss(
    lm: LanguageModel,
    method: Method,
    held_out: Examples,
    budget_tokens: int,
    layout: PassLayout,
    step: int,
    stop: StopFlag,
    on_pass: Callable[[], None] = lambda: None,
    *,
    rows: Sequence[int] | None = None,
    end_ids: Sequence[int] = (),
    last_ends: bool = False,
) -> Measurement | None:
    """Measure held-out rows, summed in fp64; None when asked to stop meanwhile. rows: which of them; None: all.

    Every unit of the method counts alike: the weight of a row says how much it is learned, not how well it is known.

    end_ids: tokens that end answers; their probability is taken from the same passes, where they are the label.
    last_ends: only the last end of each row counts, as questions end with the same tokens and are labels too.
    """
    measured = range(len(held_out)) if rows is None else rows
    place_of = measured if rows is None else {row: place for place, row in enumerate(rows)}
    row_losses, row_units = np.zeros(len(measured)), np.zeros(len(measured), dtype=np.int64)
    figures = dict.fromkeys(method.figures, 0.0)
    end_probability, ends, label_tokens = 0.0, 0, 0
    whole = method.denominator.keeps_examples_whole
    drift = _drift(lm, held_out.mismatched, measured, budget_tokens, layout, stop, on_pass)
    for group in _passes_over(held_out, measured, budget_tokens, layout, whole):
        if stop.is_set():
            return None
        batch = replace(make_batch(held_out, group, lm.device, layout), drift=drift)
        scores = Scores(lm, batch)
        losses = method.losses(scores, batch).cpu().numpy().astype(np.float64)
        rows_of_units = _rows_of_units(group, batch, whole, place_of)
        np.add.at(row_losses, rows_of_units, losses)
        np.add.at(row_units, rows_of_units, 1)
        for name, values in method.measures(scores, batch).items():
            figures[name] += float(values.double().sum())
        label_tokens += len(batch.targets)
        is_end = np.isin(batch.targets.cpu().numpy(), list(end_ids))
        if last_ends:
            is_end = _last_of_each(is_end, np.repeat(np.arange(len(group)), batch.label_counts))
        is_end &= np.repeat(method.wanted(batch), batch.label_counts)
        if is_end.any():
            end_probability += float(np.exp(scores.tokens.cpu().numpy().astype(np.float64)[is_end]).sum())
        ends += int(is_end.sum())
        on_pass()
    units = max(1, int(row_units.sum()))
    found = HeldOut(
        step=step,
        loss=float(row_losses.sum()) / units,
        rows=len(measured),
        label_tokens=label_tokens,
        answer_ends=ends,
        end_probability=end_probability / ends if ends else None,
        figures={name: total / units for name, total in figures.items()},
    )
    return Measurement(found, row_losses.tolist(), row_units.tolist())


def _drift(
    lm: LanguageModel,
    mismatched: Examples | None,
    rows: Sequence[int],
    budget_tokens: int,
    layout: PassLayout,
    stop: StopFlag,
    on_pass: Callable[[], None],
) -> Tensor | None:
    """Return what `Batch.drift` is of these rows; None where nothing asks for it, or there is no time for it."""
    if mismatched is None:
        return None
    ratios: list[Tensor] = []
    for group in _passes_over(mismatched, rows, budget_tokens, layout, whole=True):
        if stop.is_set():
            return None
        ratios.append(log_ratios(lm, make_batch(mismatched, group, lm.device, layout)))
        on_pass()
    return torch.cat(ratios).mean()


def _rows_of_units(
    group: Sequence[FlatSequence], batch: Batch, whole: bool, place_of: Sequence[int] | Mapping[int, int]
) -> list[int]:
    """Return the place of each unit's row among those that are measured, in the order of a pass."""
    if whole:
        return [place_of[group[end - 1].example] for end in accumulate(batch.example_counts)]
    return np.repeat([place_of[each.example] for each in group], batch.label_counts).tolist()


def _passes_over(
    held_out: Examples, rows: Sequence[int], budget_tokens: int, layout: PassLayout, whole: bool
) -> Iterator[list[FlatSequence]]:
    """Yield the sequences of each pass, the rows packed so many at a time that all of them may be held out."""
    for begin in range(0, len(rows), MAX_HELD_OUT_ROWS):
        yield from passes(held_out, rows[begin : begin + MAX_HELD_OUT_ROWS], budget_tokens, layout, whole=whole)


def _last_of_each(chosen: npt.NDArray[np.bool_], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return `chosen` with only the last place of each row left. chosen, rows: (places,), equal rows beside another."""
    places = np.flatnonzero(chosen)
    last = np.zeros_like(chosen)
    last[places[np.append(np.diff(rows[places]) != 0, True)[: len(places)]]] = True
    return last


class Decoder(Protocol):
    """Whatever makes text of token ids."""

    def decode(self, ids: list[int], /) -> Any: ...


class _EveryToken(StoppingCriteria):
    """Calls a function after every token of an answer, and stops nothing itself."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002 (transformers' calling convention)
        self._beat()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def answers(
    lm: LanguageModel,
    decoder: Decoder,
    prompts: Sequence[SamplePrompt],
    stop_ids: list[int],
    on_token: Callable[[], None] = lambda: None,
    limit: int = MAX_NEW_TOKENS,
) -> list[Answer]:
    """Return greedy answers of at most `limit` tokens to the prompts, one after another; `on_token` may raise.

    How the base's own configuration generates, such as with a penalty for repetition, changes nothing."""
    padding = stop_ids[0] if stop_ids else 0
    config = GenerationConfig(
        max_new_tokens=limit, do_sample=False, eos_token_id=stop_ids or None, pad_token_id=padding
    )
    found: list[Answer] = []
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids], dtype=torch.int64, device=lm.device)
        with lm.own_attention(), lm.precision(), _without_generation_config(lm):
            output = lm.causal.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([_EveryToken(on_token)]),
            )
        new: list[int] = output[0, ids.shape[1] :].tolist()
        stopped = bool(new) and new[-1] in stop_ids
        text = decoder.decode(new[:-1] if stopped else new)
        found.append(Answer(str(text), new, stopped))
    return found


@contextmanager
def _without_generation_config(lm: LanguageModel) -> Generator[None]:
    """Take away the base's generation configuration, from which `generate` fills all that ours leaves open."""
    own = lm.causal.generation_config
    lm.causal.generation_config = GenerationConfig()
    try:
        yield
    finally:
        lm.causal.generation_config = own
