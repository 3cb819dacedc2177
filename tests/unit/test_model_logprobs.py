"""The tiled loss head equals the plain one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer import logprobs
from finetune_trainer.inputs import Batch, pack_rows
from finetune_trainer.logprobs import nll_sum, token_logprobs
from finetune_trainer.model import LanguageModel, adapter_parameters, add_adapter, load_base
from finetune_trainer.policy import Scores
from finetune_trainer.runplan import RunPlan
from tiny_run import make_run


@pytest.fixture(params=[1, 64 * 2**20], ids=["many tiles", "one tile"])
def _tile_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logprobs._TILE_BYTES, "cpu", request.param)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.usefixtures("_tile_bytes")
@pytest.mark.parametrize(("bias", "scale"), [(False, 1.0), (True, 0.25)])
def test_the_loss_head_equals_cross_entropy_on_full_logits(bias: bool, scale: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, dtype=torch.float32, requires_grad=True)
    head, offset = torch.randn(97, 16), torch.randn(97) if bias else None
    targets = torch.randint(0, 97, (50,))
    expected_hidden = hidden.detach().clone().requires_grad_()
    logits = scale * expected_hidden @ head.t() + (0 if offset is None else offset)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (expected / 7).backward()

    found = nll_sum(hidden, head, offset, targets, scale)
    (found / 7).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(hidden.grad, expected_hidden.grad)
    logprob = token_logprobs(hidden, head, offset, targets, scale)
    torch.testing.assert_close(-logprob.sum(), expected.detach())


def test_no_label_gives_no_loss_and_no_gradient() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    loss = nll_sum(hidden, torch.randn(9, 4), None, torch.zeros(0, dtype=torch.int64))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0


@pytest.mark.usefixtures("_tile_bytes")
@pytest.mark.parametrize(("bias", "scale"), [(False, 1.0), (True, 0.25)])
def test_log_probabilities_of_tokens_have_the_gradient_of_the_plain_form(bias: bool, scale: float) -> None:
    """Of a function of them that is no sum, so that every token counts differently."""
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    head, offset = torch.randn(97, 16), torch.randn(97) if bias else None
    targets = torch.randint(0, 97, (50,))
    expected_hidden = hidden.detach().clone().requires_grad_()
    logits = scale * expected_hidden @ head.t() + (0 if offset is None else offset)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found = token_logprobs(hidden, head, offset, targets, scale)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for logprobs_ in (found, expected):
        first, second = logprobs_.split([20, 30])
        (0.1 * (first.sum() - second.sum())).sigmoid().log().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(hidden.grad, expected_hidden.grad, atol=1e-5, rtol=1e-5)


def test_log_probabilities_of_tokens_hold_no_more_logits_than_a_tile_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor for backward: what is kept for it is as large as the hidden states."""
    monkeypatch.setitem(logprobs._TILE_BYTES, "cpu", 1)  # pyright: ignore[reportPrivateUsage]
    kept: list[int] = []
    rows: list[int] = []
    compute = logprobs._logits  # pyright: ignore[reportPrivateUsage]

    def counted(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
        rows.append(len(hidden))
        return compute(hidden, head, bias)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    monkeypatch.setattr(logprobs, "_logits", counted)
    hidden, head = torch.randn(50, 16, requires_grad=True), torch.randn(970, 16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = token_logprobs(hidden, head, None, torch.randint(0, 970, (50,)))
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert rows == 2 * [16, 16, 16, 2], "each tile is made twice"
    assert max(kept) == head.numel()
    assert sum(kept) == head.numel() + hidden.numel() + 2 * len(hidden)


@pytest.mark.parametrize("computed", [nll_sum, token_logprobs])
@pytest.mark.parametrize("trained", ["head", "bias"])
def test_a_head_that_is_trained_is_refused_as_it_would_get_no_gradient(
    computed: Callable[..., Tensor], trained: str
) -> None:
    head, bias = torch.randn(9, 4), torch.randn(9)
    (head if trained == "head" else bias).requires_grad_()
    with pytest.raises(AssertionError, match="the head is trained"):
        computed(torch.randn(3, 4), head, bias, torch.zeros(3, dtype=torch.int64))


def _lm(tmp_path: Path, **changes: Any) -> tuple[LanguageModel, RunPlan]:
    run = make_run(tmp_path, steps=1, **changes)
    return load_base(run.folder / "model", run.plan, torch.device("cpu")), run.plan


def _batch(lm: LanguageModel) -> Batch:
    return pack_rows([np.arange(9), np.arange(5)], [np.arange(9) > 2, np.arange(5) > 3], lm.device)


def test_an_adapter_on_the_output_layer_is_refused_before_any_step(tmp_path: Path) -> None:
    lm, plan = _lm(tmp_path)
    model = plan.model.model_copy(update={"target_modules": [*plan.model.target_modules, "lm_head"]})
    with pytest.raises(StageError, match="its output layer would be adapted") as caught:
        add_adapter(lm, plan.model_copy(update={"model": model}))
    assert caught.value.fault is Fault.UNSUPPORTED_MODEL


TRAINED_HEADS: dict[str, dict[str, Any]] = {
    "an adapter beside it": {"target_modules": ["q_proj", "lm_head"]},
    "a copy that is trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "single tokens of it": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 2]}},
    "those of tied embeddings": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("how", [*TRAINED_HEADS, "its own weights"])
def test_no_loss_is_computed_with_a_head_whose_training_it_would_not_see(tmp_path: Path, how: str) -> None:
    lm, _ = _lm(tmp_path, model_changes={"tie_word_embeddings": "tied" in how})
    if how in TRAINED_HEADS:
        get_peft_model(lm.causal, LoraConfig(task_type="CAUSAL_LM", **TRAINED_HEADS[how]))
    else:
        lm.head.weight.requires_grad_()
    for computed in (lm.nll_sum, lm.token_logprobs):
        with pytest.raises(AssertionError, match="the head is trained"):
            computed(_batch(lm))


def test_embeddings_that_are_tied_to_the_head_are_frozen_with_it(tmp_path: Path) -> None:
    lm, plan = _lm(tmp_path, model_changes={"tie_word_embeddings": True})
    adapted = add_adapter(lm, plan)
    assert lm.head.weight is lm.causal.get_input_embeddings().weight
    assert {name.split(".")[-3] for name in adapter_parameters(adapted)} == {"lora_A", "lora_B"}
    lm.nll_sum(_batch(lm)).backward()  # type: ignore[no-untyped-call]


def test_sequences_are_scored_by_the_sum_over_their_label_tokens(tmp_path: Path) -> None:
    lm, _ = _lm(tmp_path)
    rows = [np.arange(9), np.arange(5), np.arange(4)]
    labels = [np.arange(9) > 2, np.zeros(5), np.arange(4) > 0]
    scores = Scores(lm, pack_rows(rows, labels, lm.device))
    with torch.no_grad():
        alone = [lm.token_logprobs(pack_rows([rows[i]], [labels[i]], lm.device)).sum() for i in (0, 2)]
        torch.testing.assert_close(scores.sequences, torch.stack([alone[0], torch.zeros(()), alone[1]]))
        torch.testing.assert_close(scores.sequences.sum(), -scores.nll_sum())


def test_a_method_s_gradient_through_tiles_is_that_through_full_logits(tmp_path: Path) -> None:
    """Of a loss that is no sum over tokens, with an adapter that is no longer zero."""
    lm, plan = _lm(tmp_path)
    parameters = adapter_parameters(add_adapter(lm, plan))
    generator = torch.Generator().manual_seed(3)
    for parameter in parameters.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    batch = _batch(lm)
    better, worse = Scores(lm, batch).sequences
    (0.1 * (better - worse)).sigmoid().log().backward()  # type: ignore[no-untyped-call]
    found = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    states = lm.predicting_states(batch)
    logprobs_ = (states @ lm.head.weight.t()).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    better, worse = (part.sum() for part in logprobs_.split(list(batch.label_counts)))
    (0.1 * (better - worse)).sigmoid().log().backward()  # type: ignore[no-untyped-call]
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_that_may_not_share_a_call_of_the_model_are_scored_as_if_they_were_alone(
    tmp_path: Path, family: str
) -> None:
    """gpt2 is of no family whose rows may be packed."""
    lm, _ = _lm(tmp_path, family=family)
    assert lm.packed == (family == "llama")
    rows, labels = [np.arange(9), np.arange(3, 8), np.arange(4)], [np.arange(9) > 2, np.arange(5) > 1, np.arange(4) > 0]
    batch = replace(pack_rows(rows, labels, lm.device), apart=True)
    with torch.no_grad():
        alone = [
            lm.token_logprobs(pack_rows([row], [label], lm.device)) for row, label in zip(rows, labels, strict=True)
        ]
        assert torch.equal(lm.token_logprobs(batch), torch.cat(alone))
