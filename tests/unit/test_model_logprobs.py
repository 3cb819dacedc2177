"""The tiled loss head equals the plain one."""

import pytest
import torch

from finetune_trainer import logprobs
from finetune_trainer.logprobs import nll_sum, token_logprobs


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
