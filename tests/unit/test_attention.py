"""Rows packed into one pass see only themselves, in every family that is said to."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from finetune_trainer import attention
from finetune_trainer.attention import PACKED, Segments, packed_attention
from finetune_trainer.families import PACKING_FAMILIES
from finetune_trainer.inputs import Batch, pack_rows
from finetune_trainer.model import LanguageModel, _logit_scale  # pyright: ignore[reportPrivateUsage]
from tiny_run import VOCABULARY, linear_modules, tiny_config, tiny_model

CPU = torch.device("cpu")
LENGTHS = (9, 2, 13, 6)
# Something in each that a plain Llama does not have.
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.7},
}
WINDOW = {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
WINDOWED = ("gemma3_text", "mistral", "phi3", "qwen2", "qwen3", "starcoder2")
CASES = [(family, SPECIAL.get(family, {})) for family in sorted(PACKING_FAMILIES)] + [(f, WINDOW) for f in WINDOWED]


def _segments(lengths: tuple[int, ...]) -> Segments:
    bounds = np.cumsum([0, *lengths])
    return Segments(tuple(bounds.tolist()), torch.from_numpy(bounds.astype(np.int32)), max(lengths))


def _rows() -> tuple[list[Any], list[Any]]:
    generator = np.random.default_rng(3)
    rows = [generator.integers(0, VOCABULARY, length) for length in LENGTHS]
    return rows, [np.arange(len(row)) > 0 for row in rows]


def _gradients(lm: LanguageModel, batches: list[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities of all label tokens and the gradients of their sum."""
    lm.causal.zero_grad()
    for batch in batches:
        lm.nll_sum(batch).backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad.clone() for n, p in lm.causal.named_parameters() if p.grad is not None}
    return torch.cat([lm.token_logprobs(batch) for batch in batches]), gradients


@pytest.mark.parametrize(("family", "changes"), CASES, ids=[f"{f}{'-window' if c is WINDOW else ''}" for f, c in CASES])
def test_packed_rows_have_the_logprobs_and_gradients_of_rows_alone(family: str, changes: dict[str, Any]) -> None:
    base = tiny_model(tiny_config(family, **changes))
    config = LoraConfig(r=2, target_modules=linear_modules(base), init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(base, config)
    rows, labels = _rows()
    own = LanguageModel(base, CPU, packed=False, logit_scale=_logit_scale(base.config))
    alone, alone_gradients = _gradients(
        own, [pack_rows([row], [label], CPU) for row, label in zip(rows, labels, strict=True)]
    )
    attention.register()
    base.set_attn_implementation(PACKED)
    packed = LanguageModel(base, CPU, packed=True, logit_scale=own.logit_scale)
    together, gradients = _gradients(packed, [pack_rows(rows, labels, CPU)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
    assert gradients.keys() == alone_gradients.keys()
    assert any("lora_B" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, alone_gradients[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("window", [None, 3, 50])
def test_one_call_per_row_equals_the_dense_mask(window: int | None) -> None:
    torch.manual_seed(1)
    segments = _segments(LENGTHS)
    q, k, v = (torch.randn(1, 4, sum(LENGTHS), 8) for _ in range(3))
    per_row = attention._per_row(q, k, v, segments, None, window)  # pyright: ignore[reportPrivateUsage]
    dense = attention._dense(q, k, v, segments, None, window)  # pyright: ignore[reportPrivateUsage]
    torch.testing.assert_close(per_row, dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["softcap", "s_aux", "position_bias"])
def test_attention_that_would_be_left_out_silently_is_refused_by_name(variant: str) -> None:
    q = torch.randn(1, 2, 6, 8)
    other: Any = {variant: torch.ones(1)}
    with pytest.raises(NotImplementedError, match=variant):
        packed_attention(torch.nn.Identity(), q, q, q, None, segments=_segments((6,)), **other)
