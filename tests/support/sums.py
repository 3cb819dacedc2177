"""Sums with a right and a wrong answer, and a tiny model that gives both alike: what preference methods tell apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from finetune_trainer.data.examples import TokenRun, one_segment, pair_of
from pair_run import Rows
from tiny_run import STOP_ID, byte_tokenizer, tiny_config, tiny_model

RIGHT, WRONG = 0, 1  # by how much answers are too large that the model is taught, both alike
NEVER_SEEN = 5
HELD_OUT = 30
_SFT_STEPS = 250
_SFT_LEARNING_RATE = 1e-2


class Sum(NamedTuple):
    """Two digits to add."""

    a: int
    b: int

    def run(self, too_much: int) -> TokenRun:
        """Return `3+4=` with `07`, or with so much more, which is as long; the answer is what is learned."""
        prompt = f"{self.a}+{self.b}=".encode()
        answer = f"{self.a + self.b + too_much:02d}".encode()
        tokens = np.array([*prompt, *answer, STOP_ID], dtype="<u4")
        return TokenRun(tokens, (np.arange(len(tokens)) >= len(prompt)).astype("u1"))


def _all_sums() -> list[Sum]:
    order = np.random.default_rng(3).permutation(100)
    return [Sum(*divmod(int(place), 10)) for place in order]


def held_out_sums() -> list[Sum]:
    """Return those of which no answer is preferred in training."""
    return _all_sums()[:HELD_OUT]


def pairs_and_held_out(chosen: int = RIGHT, rejected: int = WRONG) -> tuple[Rows, Rows]:
    """Return pairs to train on, and held out: by how much each answer is too large."""
    sums = _all_sums()

    def rows(some: Sequence[Sum]) -> Rows:
        return Rows([pair_of(each.run(chosen), each.run(rejected)) for each in some])

    return rows(sums[HELD_OUT:]), rows(sums[:HELD_OUT])


def thumbs_and_held_out() -> tuple[Rows, Rows]:
    """Return right answers, which are good, and wrong ones: to train on, and held out."""
    sums = _all_sums()

    def rows(some: Sequence[Sum]) -> Rows:
        trees = [one_segment(*each.run(too_much)) for each in some for too_much in (RIGHT, WRONG)]
        return Rows(trees, [1, -1] * len(some))

    return rows(sums[HELD_OUT:]), rows(sums[:HELD_OUT])


def _stacked(sums: Sequence[Sum], too_much: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sums, tokens) ids and which of them are labels: all are of one length."""
    runs = [each.run(too_much) for each in sums]
    ids, labels = (np.stack([run[part] for run in runs]) for part in (0, 1))
    return torch.from_numpy(ids.astype("i8")), torch.from_numpy(labels.astype(bool))


def save_taught_model(folder: Path) -> None:
    """Write a tiny model that was fine-tuned on all sums, right and wrong ones alike, with its tokenizer."""
    model = tiny_model(tiny_config("llama"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_SFT_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _SFT_STEPS)
    parts = [_stacked(_all_sums(), too_much) for too_much in (RIGHT, WRONG)]
    ids, learned = (torch.cat([part[place] for part in parts]) for place in (0, 1))
    model.train()
    for _ in range(_SFT_STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=torch.where(learned, ids, -100)).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@torch.no_grad()
def share_preferred(model: Any) -> float:
    """Return in which share of the held-out sums transformers' model finds the right answer likelier."""
    logprobs: list[torch.Tensor] = []
    for too_much in (RIGHT, WRONG):
        ids, labels = _stacked(held_out_sums(), too_much)
        tokens = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        logprobs.append((tokens * labels[:, 1:]).sum(1))
    return float((logprobs[0] > logprobs[1]).float().mean())
