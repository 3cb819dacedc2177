"""What the sequences of an example share is computed once, and nothing else changes: the sum over flat sequences."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from finetune_api.errors import StageError
from finetune_api.job import MethodType
from finetune_api.reasons import Fault
from finetune_trainer import attention
from finetune_trainer.attention import (
    PACKED,
    Segments,
    _per_row,  # pyright: ignore[reportPrivateUsage]
)
from finetune_trainer.data.examples import Examples, TokenRun, Tree, pair_of, tree_of
from finetune_trainer.evaluate import Measurement, held_out_loss
from finetune_trainer.inputs import Batch, fetch_examples, fetch_steps, make_batch
from finetune_trainer.loop import Stepper, make_optimizer
from finetune_trainer.methods import planned_method
from finetune_trainer.methods.sft import SFT
from finetune_trainer.model import (
    LanguageModel,
    _logit_scale,  # pyright: ignore[reportPrivateUsage]
    adapter_parameters,
    add_adapter,
    load_base,
)
from finetune_trainer.passes import computed_tokens, passes
from finetune_trainer.policy import Scores
from finetune_trainer.runplan import PassLayout
from finetune_trainer.stop import StopFlag
from finetune_trainer.trees import computes_trees
from packing_cases import EACH_CASE
from pair_run import joined_trees, preference_run
from tiny_run import VOCABULARY, TinyRun, linear_modules, make_run, tiny_config, tiny_model

CPU = torch.device("cpu")
APART, PACKED_ROWS, TREES = PassLayout.APART, PassLayout.PACKED, PassLayout.TREES


def _run(*parts: np.ndarray, labelled: int) -> TokenRun:
    """Return the parts one behind another; of each but the first, the last so many tokens are learned."""
    labels = [
        np.arange(len(part)) >= (len(part) - labelled if place else len(part)) for place, part in enumerate(parts)
    ]
    return TokenRun(np.concatenate(parts).astype("u4"), np.concatenate(labels).astype("u1"))


def _trees(seed: int = 0) -> list[Tree]:
    """Return trees of every form: a pair, a deep tree with labels inside, several roots, one sequence, and a pair whose
    answers are a token each."""
    generator = np.random.default_rng(seed)

    def part(length: int) -> np.ndarray:
        return generator.integers(0, VOCABULARY, length)

    prompt, first, second, third = part(11), part(6), part(4), part(5)
    deep = [
        _run(prompt, first, part(4), labelled=3),
        _run(prompt, first, second, part(3), labelled=2),
        _run(prompt, first, second, part(7), labelled=4),
        _run(prompt, third, part(2), labelled=2),
        _run(prompt, third, part(9), labelled=5),
    ]
    roots = [_run(part(3), part(4), labelled=4), _run(part(5), part(3), labelled=2)]
    short = [TokenRun(np.append(prompt[:3], end).astype("u4"), np.array([0, 0, 0, 1], "u1")) for end in (1, 2)]
    return [
        pair_of(_run(prompt, part(5), labelled=5), _run(prompt, part(8), labelled=8)),
        tree_of(deep),
        tree_of(roots),
        tree_of([_run(part(4), part(3), labelled=3)]),
        pair_of(*short),
    ]


def _ancestors(examples: Examples) -> list[list[int]]:
    """Return the segments that each segment sees beside itself."""
    found: list[list[int]] = []
    for segment, up in enumerate(examples.parents.tolist()):
        found.append([*found[segment - up], segment - up] if up else [])
    return found


def _oracle(examples: Examples, window: int | None) -> Tensor:
    """Return the mask of all stored tokens by the definition: ancestors, and itself up to the query."""
    bounds, ancestors = examples.segment_offsets, _ancestors(examples)
    mask = torch.zeros(len(examples.tokens), len(examples.tokens), dtype=torch.bool)
    for segment in range(len(examples.parents)):
        before = [place for each in ancestors[segment] for place in range(bounds[each], bounds[each + 1])]
        for query in range(bounds[segment], bounds[segment + 1]):
            seen = [*before, *range(bounds[segment], query + 1)]
            mask[query, seen if window is None else seen[-window:]] = True
    return mask


def _batch(examples: Examples, layout: PassLayout = TREES) -> Batch:
    return make_batch(examples, examples.sequences_of(range(len(examples))), CPU, layout)


@pytest.mark.parametrize("block", [1, 3, 512])
@pytest.mark.parametrize("window", [None, 3, 50])
def test_branches_see_their_ancestors_and_themselves_alone(
    monkeypatch: pytest.MonkeyPatch, window: int | None, block: int
) -> None:
    monkeypatch.setattr(attention, "_QUERY_BLOCK", block)
    examples = joined_trees(_trees())
    batch = _batch(examples)
    torch.manual_seed(1)
    q, k, v = qkv = [torch.randn(1, 4, len(examples.tokens), 8, requires_grad=True) for _ in range(3)]
    found = _per_row(q, k, v, batch.segments, None, window)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=_oracle(examples, window))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, qkv, upstream), torch.autograd.grad(expected, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_pass_holds_each_segment_once_with_the_positions_and_labels_of_its_sequences() -> None:
    examples = joined_trees(_trees())
    trees, flat = _batch(examples), _batch(examples, PACKED_ROWS)
    assert trees.input_ids[0].tolist() == examples.tokens.tolist()
    assert trees.tokens == flat.tokens == flat.input_ids.numel() > 1.5 * trees.input_ids.numel()
    bounds, ancestors = examples.segment_offsets, _ancestors(examples)
    begins = [sum(int(bounds[up + 1] - bounds[up]) for up in ups) for ups in ancestors]
    expected = [place + begin for n, begin in zip(np.diff(bounds), begins, strict=True) for place in range(n)]
    assert trees.position_ids[0].tolist() == expected
    assert torch.equal(trees.targets, flat.targets)
    assert (trees.label_counts, trees.example_counts) == (flat.label_counts, flat.example_counts)
    for batch in (trees, flat):
        predicting = batch.position_ids[0, batch.sources] + 1
        assert torch.equal(predicting, flat.position_ids[0, flat.sources] + 1), "the last before it, in its sequence"


def test_what_is_read_with_other_answers_lies_in_a_pass_as_it_is_read() -> None:
    """As it is of one segment each, trees and flat sequences are the same pass."""
    examples = joined_trees([tree for tree in _trees() if len(tree.lengths) == 1])
    trees, flat = _batch(examples), _batch(examples, PACKED_ROWS)
    assert torch.equal(trees.input_ids, flat.input_ids)
    assert not trees.segments.shared


def _perturbed(parameters: dict[str, Any]) -> None:
    """B starts at zero, where A has no gradient."""
    generator = torch.Generator().manual_seed(7)
    for _, parameter in sorted(parameters.items()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _scored(lm: LanguageModel, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the log-probabilities of all labels, and gradients of a function of sequences that is no sum of tokens."""
    lm.causal.zero_grad()
    logprobs: list[Tensor] = []
    for batch in batches:
        scores = Scores(lm, batch)
        (0.1 * scores.sequences).sigmoid().log().sum().backward()  # type: ignore[no-untyped-call]
        logprobs.append(scores.tokens.detach())
    return torch.cat(logprobs), {n: p.grad.clone() for n, p in lm.causal.named_parameters() if p.grad is not None}


@EACH_CASE
def test_trees_have_the_logprobs_and_gradients_of_flat_sequences(family: str, changes: dict[str, Any]) -> None:
    """By the model's own attention, one sequence at a time."""
    base = tiny_model(tiny_config(family, **changes))
    get_peft_model(base, LoraConfig(r=2, target_modules=linear_modules(base)))
    _perturbed({name: each for name, each in base.named_parameters() if each.requires_grad})
    examples = joined_trees(_trees())
    own = LanguageModel(base, CPU, packed=False, logit_scale=_logit_scale(base.config))
    alone = [make_batch(examples, [each], CPU, APART) for each in examples.sequences_of(range(len(examples)))]
    expected, flat_gradients = _scored(own, alone)
    attention.register()
    base.set_attn_implementation(PACKED)
    found, gradients = _scored(replace(own, packed=True), [_batch(examples)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert gradients.keys() == flat_gradients.keys()
    assert any("lora_A" in name for name in gradients)
    for name, gradient in gradients.items():
        atol = 1e-5 * max(1.0, float(flat_gradients[name].abs().max()))
        torch.testing.assert_close(gradient, flat_gradients[name], atol=atol, rtol=1e-4, msg=name)


def test_no_mask_grows_with_the_square_of_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers and rows keep one block of it for their gradients."""
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 16)
    generator = np.random.default_rng(0)
    prompt, *answers = (generator.integers(0, VOCABULARY, 400) for _ in range(4))
    examples = joined_trees([tree_of([_run(prompt, each, labelled=400) for each in answers])])
    base = tiny_model(tiny_config("llama", max_position_embeddings=1024))
    attention.register()
    base.set_attn_implementation(PACKED)
    get_peft_model(base, LoraConfig(r=2, target_modules=linear_modules(base)))
    masks: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() and bool(torch.isinf(tensor).any()):
            masks[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        LanguageModel(base, CPU, packed=True, logit_scale=1.0).nll_sum(_batch(examples))
    assert list(masks.values()) == [4 * 16 * (800 + 16)]


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_an_example_is_never_divided_and_what_it_shares_counts_once(budget: int) -> None:
    examples = joined_trees([*_trees(0), *_trees(1)])
    found = list(passes(examples, range(len(examples)), budget, TREES))
    assert sorted(each for group in found for each in group) == examples.sequences_of(range(len(examples)))
    for group in found:
        numbers = dict.fromkeys(each.example for each in group)
        assert group == examples.sequences_of(list(numbers)), "all of each, in the order of the leaves"
    largest = max(len(tree.tokens) for tree in _trees())
    assert all(sum(computed_tokens(examples, group, TREES)) <= max(budget, largest) for group in found)
    assert sum(sum(computed_tokens(examples, group, TREES)) for group in found) == len(examples.tokens)


def test_half_of_a_tree_is_refused() -> None:
    examples = joined_trees(_trees())
    with pytest.raises(AssertionError, match="all sequences of an example"):
        make_batch(examples, examples.sequences_of([1])[1:], CPU, TREES)


class _Step:
    """The first step of a run on a perturbed adapter, however its sequences lie in passes."""

    def __init__(self, run: TinyRun, folder: Path) -> None:
        self.run = run
        self.lm = load_base(run.folder / "model", run.plan, CPU)
        self.method = planned_method(run.plan)
        self.parameters = adapter_parameters(add_adapter(self.lm, run.plan))
        self.rows, self.held_out = (
            self._referred(fetch_examples(run.store, split, folder / name))
            for name, split in (("train", run.plan.train), ("held_out", run.plan.held_out))
            if split is not None
        )
        self.steps = fetch_steps(run.store, run.plan, folder)
        _perturbed(self.parameters)

    def _referred(self, rows: Examples) -> Examples:
        if not self.method.needs_reference:
            return rows
        with torch.no_grad():
            values = [
                Scores(self.lm, make_batch(rows, [each], CPU)).sequences for each in rows.sequences_of(range(len(rows)))
            ]
        reference = torch.full((len(rows.parents),), float("nan"))
        reference[[each.leaf for each in rows.sequences_of(range(len(rows)))]] = torch.cat(values)
        return replace(rows, reference=reference.numpy())

    def taken(self, *, trees: bool) -> tuple[float, dict[str, Tensor]]:
        """Return the loss and the gradients."""
        hyper = self.run.plan.hyperparameters.model_copy(update={"trees": trees, "learning_rate": 0.0})
        trained = list(self.parameters.values())
        stepper = Stepper(
            self.lm, self.method, trained, make_optimizer(trained, hyper), self.rows, self.steps, hyper,
            hyper.micro_batch_tokens,
        )  # fmt: skip
        loss = float(stepper.run(0)[0])
        return loss, {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}

    def measured(self, layout: PassLayout) -> Measurement:
        found = held_out_loss(self.lm, self.method, self.held_out, 60, layout, 0, StopFlag(60), end_ids=[0])
        assert found is not None
        return found


PREFERENCES: list[tuple[MethodType, dict[str, Any]]] = [
    (MethodType.DPO, {"beta": 0.3}),
    (MethodType.DPO, {"beta": 0.3, "loss": "IPO", "nllWeight": 0.5}),
    (MethodType.DPO, {"beta": 2.0, "loss": "SimPO"}),
    (MethodType.ORPO, {"lambda": 0.4}),
]


@pytest.mark.parametrize(("method", "options"), PREFERENCES, ids=[f"{m}-{o.get('loss', '')}" for m, o in PREFERENCES])
def test_a_step_of_pairs_is_that_of_their_flat_sequences(
    tmp_path: Path, method: MethodType, options: dict[str, Any]
) -> None:
    run = preference_run(tmp_path, method, options, batch=8, equal=False, micro_batch_tokens=60, max_grad_norm=1e9)
    step = _Step(run, tmp_path / "fetched")
    loss, gradients = step.taken(trees=True)
    expected, flat_gradients = step.taken(trees=False)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert gradients.keys() == flat_gradients.keys() == step.parameters.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, flat_gradients[name], atol=1e-5, rtol=1e-4)
    trees, flat = step.measured(TREES), step.measured(PACKED_ROWS)
    np.testing.assert_allclose(trees.row_losses, flat.row_losses, atol=1e-5)
    assert trees.held_out.figures == pytest.approx(flat.held_out.figures, abs=1e-4)


def test_unrolled_conversations_are_measured_as_their_flat_sequences(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=1)
    lm, examples = load_base(run.folder / "model", run.plan, CPU), joined_trees(_trees())
    found = [held_out_loss(lm, SFT, examples, 60, layout, 0, StopFlag(60), end_ids=[0]) for layout in PassLayout]
    assert all(each is not None for each in found)
    apart, *others = [each for each in found if each is not None]
    for each in others:
        np.testing.assert_allclose(each.row_losses, apart.row_losses, atol=1e-5)
        assert each.row_units == apart.row_units


def _sees_all(segments: Segments, queries: int, before: int, window: int | None, like: Tensor) -> Tensor:
    return like.new_zeros(queries, before + queries)


@pytest.mark.parametrize("trees", [False, True])
def test_a_model_that_trees_are_not_exact_for_is_refused_at_load_where_they_are_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trees: bool
) -> None:
    run = make_run(tmp_path, steps=1, trees=trees)
    load_base(run.folder / "model", run.plan, CPU)
    monkeypatch.setattr(Segments, "block_mask", _sees_all)
    if not trees:
        load_base(run.folder / "model", run.plan, CPU)
        return
    with pytest.raises(StageError, match="log-probabilities differ") as caught:
        load_base(run.folder / "model", run.plan, CPU)
    assert caught.value.fault is Fault.UNSUPPORTED_MODEL


@pytest.mark.parametrize(
    ("facts", "value", "words"),
    [
        ({}, True, "1,900 tokens are computed in the place of 3,400, 44% fewer"),
        ({"packing": False}, False, "sequences may not share a pass"),
        ({"gpu": True}, False, "on a GPU this was never tried"),
        ({"fits": False}, False, "which memory does not allow"),
        ({"in_time": False}, False, "which may outlast progressDeadlineSeconds"),
        ({"stored_tokens": 3399}, False, "which its attention may cost"),
    ],
)
def test_trees_are_computed_where_they_are_exact_and_save_time(facts: dict[str, Any], value: bool, words: str) -> None:
    usual: dict[str, Any] = {
        "packing": True,
        "gpu": False,
        "tokens": 3400,
        "stored_tokens": 1900,
        "fits": True,
        "in_time": True,
    }
    found = computes_trees(**usual | facts)
    assert found.value is value
    assert words in found.reason
