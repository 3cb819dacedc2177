"""The language model that is trained: load the base, add the adapter, compute log-probabilities of label tokens."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_api.run import MAX_ARG_CHARS
from finetune_trainer import attention, world
from finetune_trainer.attention import Segments
from finetune_trainer.base_weights import load_weights, require_finite, told_of_the_model
from finetune_trainer.earlier_adapter import kept_weights
from finetune_trainer.families import MIXTURE_FIELDS
from finetune_trainer.flops import ModelSize
from finetune_trainer.inputs import Batch, pack_rows
from finetune_trainer.logprobs import nll_sum, token_logprobs
from finetune_trainer.runplan import PassLayout, RunPlan

# Differences of log-probabilities between our pass and the model's own that are rounding and nothing else, in nats.
_SAME_LOGPROB = 1e-3  # at most, in fp32
# On average, in bf16: layers multiply what two kernels round differently. SmolLM2-135M's own log-probabilities in bf16
# are 0.07 to 0.14 away from those in fp32, single ones up to 0.7; rows that see each other change them by 0.5 and more.
_SAME_MEAN_LOGPROB_BF16 = 0.3
_CHECKED_LENGTHS = (33, 24)
_CHECKED_WINDOW = 4


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with a frozen head; LoRA layers, once added, live inside `causal`."""

    causal: PreTrainedModel
    device: torch.device
    packed: bool  # whether our attention is in place, so that a pass may hold several rows
    logit_scale: float

    @property
    def dtype(self) -> torch.dtype:
        """What the frozen weights are held and multiplied in."""
        return self.head.weight.dtype

    @property
    def head(self) -> nn.Linear:
        return cast(nn.Linear, self.causal.get_output_embeddings())

    def precision(self) -> AbstractContextManager[object]:
        """Return the context in which the model is called."""
        return world.autocast(self.device, self.dtype)

    def predicting_states(self, batch: Batch) -> Tensor:
        """(N, h) hidden states that predict the batch's N label tokens.

        Rows that may not share a call of the model have one each."""
        segments = batch.segments
        assert self.packed or not segments.shared, "only our attention lets rows share what they begin with"
        if (self.packed and not batch.apart) or len(segments.bounds) == 2:
            return self._states(batch.input_ids, batch.position_ids, segments)[batch.sources]
        alone: list[Tensor] = []
        for place, (begin, end) in enumerate(pairwise(segments.bounds)):
            cumulative = segments.cumulative[place : place + 2] - segments.cumulative[place]
            one = Segments((0, end - begin), cumulative, end - begin)
            alone.append(self._states(batch.input_ids[:, begin:end], batch.position_ids[:, begin:end], one))
        return torch.cat(alone)[batch.sources]

    def _states(self, input_ids: Tensor, position_ids: Tensor, segments: Segments) -> Tensor:
        """(T, h) last hidden states of the rows of one call of the model."""
        decoder = getattr(self.causal, self.causal.base_model_prefix)
        rows: dict[str, Any] = {"segments": segments} if self.packed else {}
        with self.precision():
            output = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **rows)
        return output.last_hidden_state[0]

    def nll_sum(self, batch: Batch) -> Tensor:
        """Sum of the label tokens' negative log-likelihoods, each times its weight: a scalar in nats, fp32."""
        head = self._frozen_head()
        states = self.predicting_states(batch)
        return nll_sum(states, head.weight, head.bias, batch.targets, self.logit_scale, batch.weights)

    def token_logprobs(self, batch: Batch) -> Tensor:
        """(N,) log-probabilities of the label tokens, fp32, in nats."""
        head = self._frozen_head()
        return token_logprobs(self.predicting_states(batch), head.weight, head.bias, batch.targets, self.logit_scale)

    def _frozen_head(self) -> nn.Linear:
        """Return the head, after asserting that nothing in it or around it is trained: only its weights are read."""
        head = self.head
        assert not _is_trained(head), "the head is trained, which the loss would not see"
        return head

    @contextmanager
    def own_attention(self) -> Generator[None]:
        """The model's own attention, for generation with a cache."""
        if not self.packed:
            yield
            return
        self.causal.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            self.causal.set_attn_implementation(attention.PACKED)


def load_base(folder: Path, plan: RunPlan, device: torch.device, dtype: torch.dtype | None = None) -> LanguageModel:
    """Return the frozen base model in evaluation mode, in `dtype`; None: fp32 on the CPU, bf16 on CUDA.

    Raises BROKEN_MODEL when its weights are not whole and finite, UNSUPPORTED_MODEL when transformers has no such
    model, or computes something else than our pass.
    """
    causal = load_weights(folder, plan, dtype or world.weight_dtype(device))
    require_finite(causal, folder, plan)
    return language_model(causal, plan, device)


def language_model(causal: PreTrainedModel, plan: RunPlan, device: torch.device) -> LanguageModel:
    """Freeze a loaded model, move it to its device and put our attention in place.

    Raises UNSUPPORTED_MODEL when it computes something else than our pass.
    """
    causal.requires_grad_(False).eval()
    causal.to(device)  # type: ignore[arg-type]
    with told_of_the_model(plan, "config.json has a scale of its logits that is no number"):
        scale = _logit_scale(causal.config)
    lm = LanguageModel(causal, device, plan.model.packing_safe, scale)
    _check_our_pass(lm, plan)
    return lm


def _logit_scale(config: Any) -> float:
    """Factor between head output and logits: Cohere multiplies by logit_scale, Granite divides by logits_scaling."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


@torch.no_grad()
def _check_our_pass(lm: LanguageModel, plan: RunPlan) -> None:
    """Put our attention in place and compare our log-probabilities of short rows with the model's own.

    Sliding windows are made shorter than the rows meanwhile, so that they count whatever their size."""
    with _small_windows(lm.causal):
        _compare_passes(lm, plan)


@contextmanager
def _small_windows(causal: PreTrainedModel) -> Generator[None]:
    """Make sliding windows _CHECKED_WINDOW tokens long: in the configuration, and where layers have copied it."""
    holders: list[Any] = [causal.config, *causal.modules()]
    found = [(each, each.sliding_window) for each in holders if isinstance(getattr(each, "sliding_window", None), int)]
    try:
        for each, _ in found:
            each.sliding_window = _CHECKED_WINDOW
        yield
    finally:
        for each, window in found:
            each.sliding_window = window


def _compare_passes(lm: LanguageModel, plan: RunPlan) -> None:
    generator = np.random.default_rng(0)
    lengths = [min(length, plan.model.context_length) for length in _CHECKED_LENGTHS]
    rows = [generator.integers(0, plan.model.vocabulary_size, length) for length in lengths]
    shared = [0] * len(rows)
    if plan.hyperparameters.layout is PassLayout.TREES:
        shared.append(lengths[-1] // 2)
        rows.append(np.concatenate([rows[-1][: shared[-1]], rows[0][shared[-1] :]]))
    labels = [np.arange(len(row)) >= max(1, begin) for row, begin in zip(rows, shared, strict=True)]
    expected: list[Tensor] = []
    for row, label in zip(rows, labels, strict=True):
        ids = torch.from_numpy(row).to(lm.device)
        with lm.precision(), told_of_the_model(plan, "its own pass fails, its config.json may be of another model"):
            logits = lm.causal(input_ids=ids[None], use_cache=False).logits[0].float()
        expected.append(logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0][label[1:]])
    if lm.packed:
        attention.register()
        lm.causal.set_attn_implementation(attention.PACKED)
    try:
        if lm.packed:
            found = lm.token_logprobs(pack_rows(rows, labels, lm.device, shared=shared))
        else:
            single = [
                lm.token_logprobs(pack_rows([row], [label], lm.device)) for row, label in zip(rows, labels, strict=True)
            ]
            found = torch.cat(single)
    except (NotImplementedError, TypeError, AttributeError) as error:
        raise _unsupported(plan, shortened(f"it has {error}", 200)) from error
    differences = (found - torch.cat(expected)).abs()
    exact = lm.dtype == torch.float32
    difference = float(differences.max() if exact else differences.mean())
    if not difference <= (_SAME_LOGPROB if exact else _SAME_MEAN_LOGPROB_BF16):
        raise _unsupported(plan, f"its log-probabilities differ by {difference:.3g} from what its head gives")


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _unsupported(plan: RunPlan, problem: str) -> StageError:
    facts = plan.model
    return StageError(Fault.UNSUPPORTED_MODEL, uri=facts.uri, architecture=facts.architecture, problem=problem)


def add_adapter(lm: LanguageModel, plan: RunPlan) -> PeftModel:
    """Put LoRA on the planned modules of `lm.causal`, in place; weights drawn from the plan's seed alone.

    Raises UNSUPPORTED_MODEL when PEFT has no layer for one of them, or one of them is the head.
    """
    hyper = plan.hyperparameters
    config = LoraConfig(
        r=hyper.lora_rank,
        lora_alpha=hyper.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(plan.model.target_modules),
        task_type="CAUSAL_LM",
    )
    head = lm.head
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(hyper.seed)
        try:
            adapted = get_peft_model(lm.causal, config)
        except ValueError as error:
            raise _unsupported(plan, shortened(f"PEFT cannot adapt it: {error}", MAX_ARG_CHARS)) from error
    if lm.head is not head or _is_trained(head):
        raise _unsupported(plan, "its output layer would be adapted, which the loss takes as frozen")
    names = [name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    for target in plan.model.target_modules:  # PEFT is content with one of them
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise _unsupported(plan, f"its files hold weights of {target}, but it has no such module to adapt")
    adapted.base_model_name_or_path = plan.model.uri  # type: ignore[assignment]
    config.base_model_name_or_path = plan.model.uri
    assert isinstance(adapted, PeftModel)
    return adapted


def model_size(lm: LanguageModel, adapted: PeftModel) -> ModelSize | None:
    """What the FLOPs are counted from; None for a mixture of experts, which multiplies with a part of its weights."""
    config = lm.causal.config
    if any(getattr(config, name, None) for name in MIXTURE_FIELDS):
        return None
    embeddings = cast(nn.Embedding, lm.causal.get_input_embeddings()).weight
    frozen = {id(p): p.numel() for p in adapted.parameters() if not p.requires_grad}
    outside = {id(embeddings), id(lm.head.weight)}
    return ModelSize(
        layer_weights=sum(count for key, count in frozen.items() if key not in outside) + kept_weights(adapted),
        head_weights=lm.head.weight.numel(),
        adapter_weights=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
    )


def adapter_parameters(adapted: PeftModel) -> dict[str, nn.Parameter]:
    """The trained parameters by name, sorted; names as in the model, with PEFT's adapter name in them."""
    return {name: parameter for name, parameter in sorted(adapted.named_parameters()) if parameter.requires_grad}
