"""Held-out loss and answers to sample prompts."""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from finetune_trainer.evaluate import MAX_NEW_TOKENS, HeldOut, answers, held_out_loss, repetition_ratio
from finetune_trainer.inputs import fetch_examples
from finetune_trainer.methods.sft import SFT
from finetune_trainer.model import LanguageModel, load_base
from finetune_trainer.runplan import PassLayout
from finetune_trainer.stop import StopFlag
from tiny_run import STOP_ID, TinyRun, byte_tokenizer, make_run

PACKED = PassLayout.PACKED


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def lm(run: TinyRun) -> LanguageModel:
    return load_base(run.folder / "model", run.plan, torch.device("cpu"))


@pytest.mark.parametrize(
    ("budget_tokens", "layout"),
    [(1, PACKED), (64, PACKED), (10_000, PACKED), (64, PassLayout.APART), (64, PassLayout.TREES)],
)
def test_the_held_out_loss_weighs_every_label_token_alike(
    run: TinyRun, lm: LanguageModel, tmp_path: Path, budget_tokens: int, layout: PassLayout
) -> None:
    assert run.plan.held_out is not None
    rows = fetch_examples(run.store, run.plan.held_out, tmp_path)
    total, count = 0.0, 0
    with lm.own_attention():
        for sequence in rows.sequences_of(range(len(rows))):
            run_ = rows.read(sequence)
            ids = torch.from_numpy(run_.tokens.astype("int64"))
            labels = torch.from_numpy(run_.labels.astype(bool))
            logprobs = lm.causal(input_ids=ids[None]).logits[0].log_softmax(-1)
            total -= float(logprobs[:-1].gather(1, ids[1:, None])[labels[1:]].sum())
            count += int(labels.sum())
    measured = held_out_loss(lm, SFT, rows, budget_tokens, layout, 3, StopFlag(60))
    assert measured is not None
    found = measured.held_out
    assert (found.step, found.rows, found.label_tokens) == (3, 10, count)
    assert found.loss == pytest.approx(total / count, abs=1e-5)


def test_an_evaluation_ends_early_once_asked_to_stop(run: TinyRun, lm: LanguageModel, tmp_path: Path) -> None:
    assert run.plan.held_out is not None
    stop = StopFlag(60)
    stop.set()
    rows = fetch_examples(run.store, run.plan.held_out, tmp_path)
    assert held_out_loss(lm, SFT, rows, 64, PACKED, 0, stop) is None


def test_answers_are_greedy_bounded_and_equal_the_model_s_own(run: TinyRun, lm: LanguageModel) -> None:
    tokenizer = byte_tokenizer()
    found = answers(lm, tokenizer, run.plan.sample_prompts, [STOP_ID])
    assert len(found) == 3
    for answer, prompt in zip(found, run.plan.sample_prompts, strict=True):
        assert 1 <= len(answer.token_ids) <= MAX_NEW_TOKENS
        assert answer.stopped == (answer.token_ids[-1] == STOP_ID)
        ids = prompt.token_ids + answer.token_ids
        with lm.own_attention(), torch.no_grad():
            best = lm.causal(input_ids=torch.tensor([ids])).logits[0].argmax(-1)
        assert best[len(prompt.token_ids) - 1 : -1].tolist() == answer.token_ids


@pytest.mark.parametrize("habit", [{"repetition_penalty": 50.0}, {"no_repeat_ngram_size": 1}])
def test_the_base_model_s_own_way_of_generating_does_not_change_an_answer(
    run: TinyRun, lm: LanguageModel, habit: dict[str, float]
) -> None:
    own = lm.causal.generation_config
    expected = answers(lm, byte_tokenizer(), run.plan.sample_prompts, [STOP_ID])
    assert any(answer.repetition_ratio for answer in expected), "nothing that a penalty could change"
    lm.causal.generation_config = habitual = GenerationConfig(**habit)
    try:
        assert answers(lm, byte_tokenizer(), run.plan.sample_prompts, [STOP_ID]) == expected
        assert lm.causal.generation_config is habitual
    finally:
        lm.causal.generation_config = own


def test_an_answer_that_ends_with_a_stop_token_says_so(run: TinyRun, lm: LanguageModel) -> None:
    prompt = run.plan.sample_prompts[:1]
    first = answers(lm, byte_tokenizer(), prompt, [])[0].token_ids[0]
    (answer,) = answers(lm, byte_tokenizer(), prompt, [first])
    assert (answer.token_ids, answer.stopped, answer.text) == ([first], True, "")


@pytest.mark.parametrize(
    ("token_ids", "ratio"), [([], 0.0), ([1, 2, 3], 0.0), (list(range(20)), 0.0), ([5] * 13, 0.9), ([1, 2] * 4, 0.6)]
)
def test_repetition_is_the_share_of_4_grams_seen_before(token_ids: list[int], ratio: float) -> None:
    assert repetition_ratio(token_ids) == pytest.approx(ratio)


def test_the_perplexity_of_a_hopeless_model_is_still_a_number() -> None:
    assert HeldOut(step=0, loss=5000.0, rows=1, label_tokens=1).perplexity > 1e300
