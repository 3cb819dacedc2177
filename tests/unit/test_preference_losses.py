# pyright: reportUnknownLambdaType=false, reportArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The losses of preference methods: the papers' formulas by hand, and TRL's own on the same numbers."""

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from finetune_trainer.methods.dpo import chosen_nll, ipo_losses, sigmoid_losses, simpo_losses
from finetune_trainer.methods.kto import kto_losses, reference_point
from finetune_trainer.methods.orpo import orpo_losses
from finetune_trainer.methods.preference import Answers

# Summed log-probabilities, those of the reference, and tokens; the chosen answer's and the rejected one's.
PAIRS = [
    ((-10.0, -12.0, 5), (-20.0, -19.0, 8)),  # better than it was
    ((-20.0, -12.0, 4), (-20.0, -29.0, 4)),  # worse
    ((-3.0, -3.0, 1), (-3.0, -3.0, 1)),  # as it was
    ((-500.0, -900.0, 300), (-900.0, -500.0, 200)),  # far from what exp() holds in fp32
]
CHOSEN, REJECTED = (
    Answers(
        *(torch.tensor(column, dtype=torch.float32) for column in zip(*(pair[side] for pair in PAIRS), strict=True))
    )
    for side in (0, 1)
)


def _sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else math.exp(x)


def _by_hand(of_pair: Callable[..., float]) -> Tensor:
    return torch.tensor([of_pair(*chosen, *rejected) for chosen, rejected in PAIRS], dtype=torch.float32)


def _minus_log_sigma(x: float) -> float:
    return -math.log(_sigma(x)) if x > -700 else -x


BETA, GAMMA, SMOOTHING = 0.3, 0.7, 0.2
FORMULAS: dict[str, tuple[Tensor, Callable[..., float]]] = {
    "sigmoid": (
        sigmoid_losses(CHOSEN, REJECTED, beta=BETA, label_smoothing=0.0),
        lambda c, rc, _, r, rr, __: _minus_log_sigma(BETA * (c - rc) - BETA * (r - rr)),
    ),
    "sigmoid, labels that may be wrong": (
        sigmoid_losses(CHOSEN, REJECTED, beta=BETA, label_smoothing=SMOOTHING),
        lambda c, rc, _, r, rr, __: (
            (1 - SMOOTHING) * _minus_log_sigma(BETA * (c - rc - r + rr))
            + SMOOTHING * _minus_log_sigma(-BETA * (c - rc - r + rr))
        ),
    ),
    "IPO": (
        ipo_losses(CHOSEN, REJECTED, beta=BETA),
        lambda c, rc, nc, r, rr, nr: ((c - rc) / nc - (r - rr) / nr - 1 / (2 * BETA)) ** 2,
    ),
    "SimPO": (
        simpo_losses(CHOSEN, REJECTED, beta=BETA, gamma=GAMMA, label_smoothing=0.0),
        lambda c, _, nc, r, __, nr: _minus_log_sigma(BETA / nc * c - BETA / nr * r - GAMMA),
    ),
    "NLL": (chosen_nll(CHOSEN), lambda c, _, nc, *__: -c / nc),
    "ORPO": (
        orpo_losses(CHOSEN.logprobs / CHOSEN.tokens, REJECTED.logprobs / REJECTED.tokens, weight=0.4),
        lambda c, _, nc, r, __, nr: (
            -c / nc + 0.4 * _minus_log_sigma(math.log(_odds(math.exp(c / nc)) / _odds(math.exp(r / nr))))
        ),
    ),
    "KTO, good": (
        kto_losses(
            CHOSEN.ratios, torch.ones(4, dtype=torch.bool), torch.tensor(1.5), beta=BETA,
            desirable_weight=1.2, undesirable_weight=0.0,
        ),
        lambda c, rc, *_: 1.2 - 1.2 * _sigma(BETA * (c - rc - 1.5)),
    ),
    "KTO, bad": (
        kto_losses(
            REJECTED.ratios, torch.zeros(4, dtype=torch.bool), torch.tensor(1.5), beta=BETA,
            desirable_weight=0.0, undesirable_weight=0.8,
        ),
        lambda _, __, ___, r, rr, ____: 0.8 - 0.8 * _sigma(BETA * (1.5 - (r - rr))),
    ),
}  # fmt: skip


def _odds(probability: float) -> float:
    return probability / (1 - probability)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_is_the_papers_formula(name: str) -> None:
    found, of_pair = FORMULAS[name]
    torch.testing.assert_close(found, _by_hand(of_pair), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(found).all()


def test_the_reference_point_is_never_below_zero_and_has_no_gradient() -> None:
    drift = torch.tensor(2.5, requires_grad=True)
    assert float(reference_point(drift)) == 2.5
    assert not reference_point(drift).requires_grad
    assert float(reference_point(-drift)) == 0


@pytest.mark.parametrize("mean", [0.0, -1e-9, -1e-3, -0.6, -0.8, -20.0, -200.0])
def test_odds_have_finite_losses_and_gradients_however_sure_the_model_is(mean: float) -> None:
    chosen = torch.tensor([mean], requires_grad=True)
    loss = orpo_losses(chosen, torch.tensor([-1.0]), weight=0.1)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert chosen.grad is not None
    assert torch.isfinite(loss).all()
    assert torch.isfinite(chosen.grad).all()


def _same(value: Any) -> Any:
    return value


ACCELERATOR = SimpleNamespace(device="cpu", gather_for_metrics=_same, gather=_same)


class _Model:
    """Gives TRL the log-probabilities of the answers' tokens that it is told, where the labels are."""

    training = True

    def __init__(self, tokens: Tensor) -> None:
        self.log_probs = tokens

    def __call__(self, **_: Any) -> Any:
        zeros = torch.zeros_like(self.log_probs)
        names = ("entropy", "mean_logits")
        return SimpleNamespace(
            log_probs=self.log_probs, is_top1=zeros.bool(), aux_loss=None, **dict.fromkeys(names, zeros)
        )


def _trl_batch(answers: list[Answers]) -> tuple[_Model, dict[str, Tensor]]:
    """Return answers of one prompt token, evenly spread over their tokens, as TRL's trainers see them."""
    logprobs = torch.cat([each.logprobs for each in answers])
    tokens = torch.cat([each.tokens for each in answers]).long()
    longest = int(tokens.max())
    mask = torch.cat([torch.zeros(len(tokens), 1), (torch.arange(longest) < tokens[:, None]).float()], dim=1).long()
    spread = (logprobs / tokens)[:, None] * mask[:, 1:]
    return _Model(spread), {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("sigmoid", sigmoid_losses(CHOSEN, REJECTED, beta=BETA, label_smoothing=0.0)),
        ("ipo", ipo_losses(CHOSEN, REJECTED, beta=BETA)),
    ],
)
def test_dpo_is_trls(kind: str, found: Tensor) -> None:
    model, inputs = _trl_batch([CHOSEN, REJECTED])
    inputs |= {"ref_chosen_logps": CHOSEN.reference, "ref_rejected_logps": REJECTED.reference}
    settings = {
        "aux_loss_enabled": False, "ld_alpha": None, "precompute_ref_logps": True, "f_divergence_type": "reverse_kl",
        "loss_types": [kind], "loss_weights": [1.0], "beta": BETA, "label_smoothing": 0.0, "use_weighting": False,
        "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip
    trainer = SimpleNamespace(
        model=model, accelerator=ACCELERATOR, _metrics=defaultdict(lambda: defaultdict(list)), **settings
    )
    expected = DPOTrainer._compute_loss(trainer, model, inputs, False)  # type: ignore[arg-type]  # pyright: ignore
    torch.testing.assert_close(found.mean(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
def test_simpo_and_smoothed_labels_are_trls(smoothing: float) -> None:
    settings = {"alpha": 0.0, "label_smoothing": smoothing, "beta": BETA, "accelerator": ACCELERATOR}
    simpo = SimpleNamespace(loss_type="simpo", simpo_gamma=GAMMA, **settings)
    expected, *_ = CPOTrainer.cpo_loss(  # TRL averages over tokens before
        simpo,
        CHOSEN.logprobs / CHOSEN.tokens,
        REJECTED.logprobs / REJECTED.tokens,  # type: ignore[arg-type]  # pyright: ignore
    )
    found = simpo_losses(CHOSEN, REJECTED, beta=BETA, gamma=GAMMA, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    sigmoid = SimpleNamespace(loss_type="sigmoid", **settings)  # of log-ratios it is DPO's
    expected, *_ = CPOTrainer.cpo_loss(sigmoid, CHOSEN.ratios, REJECTED.ratios)  # type: ignore[arg-type]  # pyright: ignore
    found = sigmoid_losses(CHOSEN, REJECTED, beta=BETA, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_orpo_is_trls_but_for_the_prompt() -> None:
    chosen, rejected = CHOSEN.logprobs / CHOSEN.tokens, REJECTED.logprobs / REJECTED.tokens
    trainer = SimpleNamespace(beta=0.4, accelerator=ACCELERATOR)
    ratio, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)  # type: ignore[arg-type]  # pyright: ignore
    torch.testing.assert_close(orpo_losses(chosen, rejected, weight=0.4), -chosen - ratio, atol=1e-5, rtol=1e-5)


def test_kto_is_trls() -> None:
    model, inputs = _trl_batch([CHOSEN, REJECTED])
    ratios, desirable = torch.cat([CHOSEN.ratios, REJECTED.ratios]), torch.arange(8) < 4
    mismatched = torch.tensor([3.0, -1.0, 2.0, 1.0, 4.0, 0.5, 0.5, 2.0])
    batch: dict[str, Any] = inputs | {
        "label": desirable,
        "ref_logps": torch.cat([CHOSEN.reference, REJECTED.reference]),
        "ref_KL_logps": torch.zeros(8),
    }
    settings = {
        "precompute_ref_logps": True, "calculate_KL": True, "beta": BETA, "loss_type": "kto", "desirable_weight": 1.2,
        "undesirable_weight": 0.8, "aux_loss_enabled": False, "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip
    trainer = SimpleNamespace(
        model=model, accelerator=ACCELERATOR, _metrics=defaultdict(lambda: defaultdict(list)),
        _compute_kl_logps=lambda *_: mismatched, **settings,
    )  # fmt: skip
    expected = KTOTrainer._compute_loss(trainer, model, batch, False)  # type: ignore[arg-type]  # pyright: ignore
    found = kto_losses(
        ratios, desirable, reference_point(mismatched.mean()), beta=BETA, desirable_weight=1.2, undesirable_weight=0.8
    )
    torch.testing.assert_close(found.mean(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("margin", "loss"), [(math.inf, 0.0), (-math.inf, math.inf)])
def test_without_smoothing_a_margin_that_is_infinite_has_a_loss_that_is_a_number(margin: float, loss: float) -> None:
    sure, other = (Answers(torch.tensor([each]), torch.zeros(1), torch.ones(1)) for each in (margin, 0.0))
    assert float(sigmoid_losses(sure, other, beta=BETA, label_smoothing=0.0)) == loss
