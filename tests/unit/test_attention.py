"""Rows packed into one pass see only themselves, in every family that is said to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer import attention
from finetune_trainer.attention import (
    PACKED,
    Segments,
    _per_row,  # pyright: ignore[reportPrivateUsage]
    packed_attention,
)
from finetune_trainer.families import PACKING_FAMILIES, frequencies_change_after
from finetune_trainer.inputs import Batch, pack_rows
from finetune_trainer.model import (
    LanguageModel,
    _logit_scale,  # pyright: ignore[reportPrivateUsage]
    language_model,
    load_base,
)
from packing_cases import EACH_CASE, SPECIAL, WINDOW, WINDOWED
from tiny_run import VOCABULARY, linear_modules, make_run, tiny_config, tiny_model, use_model

CPU = torch.device("cpu")
LENGTHS = (9, 2, 13, 6)


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


@EACH_CASE
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
        # Sums in another order: what they are off by follows from the largest summands, which differ by CPU.
        atol = 1e-4 * max(1.0, float(alone_gradients[name].abs().max()))
        torch.testing.assert_close(gradient, alone_gradients[name], atol=atol, rtol=1e-3, msg=name)


ORIGINAL = 8  # rows of LENGTHS lie on both sides of it, and none beyond the context length
FACTORS = {"linear": 4.0, "dynamic": 4.0, "yarn": 4.0, "llama3": 4.0, "longrope": 4.0}
ROPE_CASES = [
    (family, kind)
    for family in sorted(PACKING_FAMILIES)
    for kind in ("default", *FACTORS)
    if family != "phi3" or kind in ("default", "longrope")  # its configuration refuses the others
]


def _rope_model(family: str, kind: str) -> Any:
    """A tiny model of `family` whose rotary embedding is scaled in the way `kind`, from ORIGINAL tokens on."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10_000.0}
    if family == "gpt_neox":
        rope["partial_rotary_factor"] = 1.0  # a quarter of 8 dimensions is too few for "dynamic"
    if kind in FACTORS:
        rope["factor"] = FACTORS[kind]
    if kind in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = ORIGINAL
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        rotated = 4 if family == "phi" else 8  # of a head's 8 dimensions
        rope |= {"short_factor": [1.0] * (rotated // 2), "long_factor": [8.0] * (rotated // 2)}
    layers: dict[str, Any] = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    fields: dict[str, Any] = {
        "rope_parameters": layers if family == "gemma3_text" else rope,
        "max_position_embeddings": 4 * ORIGINAL,
    }
    if family == "gemma3_text":
        fields["layer_types"] = list(layers)
    if family == "phi3":
        fields["original_max_position_embeddings"] = ORIGINAL
    model = tiny_model(tiny_config(family, **SPECIAL.get(family, {}), **fields))
    model.set_attn_implementation("sdpa")
    return model


def _alone_and_packed(base: Any, rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the rows' tokens, by the model's own attention one by one, and by ours in one pass."""
    labels = [np.arange(len(row)) > 0 for row in rows]
    scale = _logit_scale(base.config)
    base.requires_grad_(False)
    own = LanguageModel(base, CPU, packed=False, logit_scale=scale)
    alone = [own.token_logprobs(pack_rows([row], [label], CPU)) for row, label in zip(rows, labels, strict=True)]
    attention.register()
    base.set_attn_implementation(PACKED)
    packed = LanguageModel(base, CPU, packed=True, logit_scale=scale)
    return torch.cat(alone), packed.token_logprobs(pack_rows(rows, labels, CPU))


@pytest.mark.parametrize(("family", "kind"), ROPE_CASES, ids=["-".join(case) for case in ROPE_CASES])
def test_rows_on_both_sides_of_a_rotary_threshold_are_packed_only_where_that_changes_nothing(
    family: str, kind: str
) -> None:
    base = _rope_model(family, kind)
    changes_after = frequencies_change_after(base.config.to_dict(), family)
    rows, _ = _rows()
    assert min(map(len, rows)) < ORIGINAL < max(map(len, rows))
    assert changes_after == {"longrope": ORIGINAL, "dynamic": 4 * ORIGINAL}.get(kind)
    alone, together = _alone_and_packed(base, rows)
    if changes_after == ORIGINAL:
        assert (together - alone).abs().max() > 1e-3, "a short row is read like its long neighbour"
        alone, together = _alone_and_packed(_rope_model(family, kind), [row[:ORIGINAL] for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("length", [4, 5, 6, 7])
def test_rows_as_long_as_the_window_and_just_beyond_it_are_packed_exactly(family: str, length: int) -> None:
    base = tiny_model(tiny_config(family, **SPECIAL.get(family, {}), **WINDOW))
    base.set_attn_implementation("sdpa")
    generator = np.random.default_rng(length)
    alone, together = _alone_and_packed(base, [generator.integers(0, VOCABULARY, size) for size in (length, 3, length)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "family", "limit"),
    [
        ({}, "llama", None),
        ({"rope_scaling": None}, "llama", None),
        ({"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 8192}}, "llama", None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "llama", None),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 2048}, "llama", 2048),
        ({"rope_scaling": {"type": "longrope"}, "max_position_embeddings": 131072}, "phi3", 4096),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 512}, "phi3", 512),
        ({"rope_scaling": {"type": "yarn"}}, "phi3", 4096),
        ({"rope_scaling": {"type": "yarn"}, "max_position_embeddings": 9}, "qwen2", None),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 64}}, "llama", 64),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 7},
                              "sliding_attention": {"rope_type": "default"}}}, "gemma3_text", 7),
        ({"rope_scaling": {"type": "of-next-year"}, "max_position_embeddings": 2048}, "llama", 0),
        ({"rope_scaling": {"type": "longrope"}}, "llama", 0),
        ({"rope_scaling": {"type": ["no", "word"]}}, "llama", 0),
    ],
)  # fmt: skip
def test_the_length_from_which_on_frequencies_change_is_read_from_the_configuration(
    config: dict[str, Any], family: str, limit: int | None
) -> None:
    assert frequencies_change_after(config, family) == limit


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_longer_than_every_row_of_the_check_at_load_is_still_checked(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, family=family, model_changes={**SPECIAL.get(family, {}), **WINDOW, "sliding_window": 200})
    lm = load_base(run.folder / "model", run.plan, CPU)
    assert lm.causal.config.sliding_window in (200, 101), "as it was: gemma3 counts both sides"
    assert {m.sliding_window for m in lm.causal.modules() if getattr(m, "sliding_window", None)} <= {200, 101}

    def without_window(q: Any, k: Any, v: Any, segments: Any, scale: Any, _window: Any) -> Any:
        return per_row(q, k, v, segments, scale, None)

    per_row = attention._per_row  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(attention, "_per_row", without_window)
    with pytest.raises(StageError) as caught:
        load_base(run.folder / "model", run.plan, CPU)
    assert caught.value.fault is Fault.UNSUPPORTED_MODEL


def _rounded_as_flash_attention(
    q: Any, k: Any, v: Any, segments: Segments, scale: float | None, _window: Any
) -> torch.Tensor:
    """Attention whose probabilities are rounded to bf16 before they are multiplied, as flash attention's are."""
    mask = torch.where(segments.dense_mask, 0.0, -torch.inf)
    scores = q.float() @ k.float().transpose(2, 3) * (scale or q.shape[-1] ** -0.5)
    probabilities = (scores + mask).softmax(-1).to(q.dtype)
    return (probabilities.float() @ v.float()).to(q.dtype)


def _rows_see_each_other(q: Any, k: Any, v: Any, _segments: Any, scale: float | None, _window: Any) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def _nothing_before_the_window(
    q: Any, k: Any, v: Any, segments: Any, scale: float | None, _window: Any
) -> torch.Tensor:
    return _per_row(q, k, v, segments, scale, 4)


@pytest.mark.real_model
def test_a_real_model_in_bf16_passes_whatever_its_kernels_round_and_not_where_rows_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from demo import assets

    run = make_run(tmp_path)
    use_model(run, assets.ensure_model())
    monkeypatch.setattr(attention, "_per_row", _rounded_as_flash_attention)
    causal = load_base(Path(run.plan.model.uri.removeprefix("file://")), run.plan, CPU, torch.bfloat16).causal
    for wrong in (_rows_see_each_other, _nothing_before_the_window):
        monkeypatch.setattr(attention, "_per_row", wrong)
        causal.set_attn_implementation("sdpa")
        with pytest.raises(StageError, match="differ by"):
            language_model(causal, run.plan, CPU)


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
