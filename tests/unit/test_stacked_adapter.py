"""A new adapter beside an earlier one, which stays as it is: trained, resumed, committed as one for the bare base."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from chained import Prepared, begin_with, source_of, stopped_before
from finetune_api.base import sha256_digest
from finetune_api.errors import StageError
from finetune_api.job import AdapterMode, MethodType
from finetune_api.layout import ADAPTER, CHECKPOINTS
from finetune_api.reasons import Fault
from finetune_api.run import StartingAdapter
from finetune_trainer import train
from finetune_trainer.checkpoint import TENSORS
from finetune_trainer.earlier_adapter import load_starting_adapter
from finetune_trainer.inputs import fetch_examples, make_batch
from finetune_trainer.memory import adapter_bytes, kept_bytes
from finetune_trainer.model import adapter_parameters, add_adapter, load_base, model_size
from finetune_trainer.runplan import AdapterFacts, RunPlan
from finetune_trainer.sizing import memory_estimate
from finetune_trainer.starting_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter
from finetune_trainer.stop import StopFlag
from pair_run import preference_run
from tiny_run import TinyRun, context, make_run

CPU = torch.device("cpu")
RANK, ALPHA = 4, 32  # of the first adapter
ATTENTION = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A job that has committed its adapter."""
    run = make_run(tmp_path_factory.mktemp("first"), steps=8, lora_rank=RANK, lora_alpha=ALPHA)
    train.run(context(run), StopFlag(60))
    return run


def stacked(folder: Path, run: TinyRun, **changes: Any) -> TinyRun:
    """A second job that keeps the adapter of `run` beside its own."""
    return begin_with(make_run(folder, steps=6, **changes), run, AdapterMode.STACK)


def changed(run: TinyRun, folder: Path, config: Mapping[str, Any], modules: tuple[str, ...] = ()) -> StartingAdapter:
    """Return the adapter of `run` as if it had been committed with another configuration, or with fewer modules."""
    shutil.copytree(run.local(ADAPTER), folder)
    content = json.loads((folder / ADAPTER_CONFIG).read_text()) | dict(config)
    if modules:
        content["target_modules"] = list(modules)
        weights = load_file(folder / ADAPTER_WEIGHTS)
        save_file(
            {name: each for name, each in weights.items() if any(f".{module}." in name for module in modules)},
            folder / ADAPTER_WEIGHTS,
        )
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content))
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in manifest["files"]:
        written = (folder / file["path"]).read_bytes()
        file |= {"size_bytes": len(written), "sha256": sha256_digest(written)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return StartingAdapter(uri=folder.as_uri())


def products(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return what an adapter adds to the weights of each layer, by the layer's name; in fp64."""
    return {
        name.removesuffix(".lora_A.weight"): scale
        * (weights[name.replace("lora_A", "lora_B")].double() @ weights[name].double())
        for name in weights
        if name.endswith(".lora_A.weight")
    }


def trained_weights(run: TinyRun) -> dict[str, Tensor]:
    """Return what the last checkpoint holds of the adapter that was trained, by the names of its file."""
    newest = sorted(run.local(CHECKPOINTS).iterdir())[-1]
    return {
        name.removeprefix("adapter.").replace(".default.", "."): each
        for name, each in load_file(newest / TENSORS).items()
        if name.startswith("adapter.")
    }


def exported(folder: Path) -> dict[str, Tensor]:
    """Return the products of an adapter as plain PEFT scales it."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert not config["use_rslora"]
    return products(load_file(folder / ADAPTER_WEIGHTS), config["lora_alpha"] / config["r"])


@pytest.mark.parametrize(
    ("own", "config", "modules", "alpha", "kept_scale"),
    [
        ({"lora_rank": 4, "lora_alpha": 32}, {}, (), 64, 8.0),
        ({"lora_rank": 6, "lora_alpha": 9}, {}, (), 15, 8.0),
        ({"lora_rank": 3, "lora_alpha": 7}, {}, (), 16, 8.0),  # 16 1/3 would be the same scale
        ({"lora_rank": 4, "lora_alpha": 32}, {"use_rslora": True}, (), 64, 16.0),
        ({"lora_rank": 2, "lora_alpha": 4}, {}, ATTENTION, 12, 8.0),
    ],
    ids=["alike", "another scale", "no whole alpha", "rsLoRA", "fewer layers"],
)
def test_one_adapter_of_the_joint_rank_adds_what_the_earlier_one_and_the_trained_one_add(
    tmp_path: Path,
    first: TinyRun,
    own: dict[str, Any],
    config: dict[str, Any],
    modules: tuple[str, ...],
    alpha: int,
    kept_scale: float,
) -> None:
    earlier = changed(first, tmp_path / "earlier", config, modules)
    second = make_run(tmp_path / "second", steps=6, **own)
    adapter = read_adapter(second.store, earlier, second.plan.model, AdapterMode.STACK)
    second.write_plan(second.plan.model_copy(update={"starting_adapter": adapter}))
    result = train.run(context(second), StopFlag(60))
    assert result.artifact is not None
    rank = own["lora_rank"]
    assert result.artifact.rank == RANK + rank
    found = json.loads(second.local(ADAPTER, ADAPTER_CONFIG).read_bytes())
    assert (found["r"], found["lora_alpha"], found["use_rslora"]) == (RANK + rank, alpha, False)
    kept = load_file(tmp_path / "earlier" / ADAPTER_WEIGHTS)
    before = products(kept, kept_scale)
    added = products(trained_weights(second), own["lora_alpha"] / rank)
    joint = exported(second.local(ADAPTER))
    assert joint.keys() == added.keys()
    assert before.keys() < joint.keys() if modules else before.keys() == joint.keys()
    for name, each in joint.items():
        assert added[name].abs().max() > 1e-4, "the trained one has learned"
        torch.testing.assert_close(each, before.get(name, 0) + added[name], rtol=1e-5, atol=1e-6)
    for name, each in load_file(second.local(ADAPTER, ADAPTER_WEIGHTS)).items():
        if "lora_A" in name and name in kept:
            assert torch.equal(each[:RANK], kept[name]), "what is kept is not trained"


def held_out_losses(run: TinyRun) -> list[float]:
    return [each["loss"] for each in json.loads(run.local(ADAPTER, "eval.json").read_bytes())["held_out"]]


def test_training_begins_with_what_the_earlier_adapter_gave_and_both_are_named(tmp_path: Path, first: TinyRun) -> None:
    second = stacked(tmp_path, first)
    train.run(context(second), StopFlag(60))
    before, after = held_out_losses(first), held_out_losses(second)
    assert after[0] == pytest.approx(before[-1], abs=1e-5)
    assert after[-1] < after[0]
    alone = load_base(second.folder / "model", second.plan, CPU).causal
    PeftModel.from_pretrained(alone, str(second.local(ADAPTER)))  # on the bare base, with nothing of the first beside
    manifest = json.loads(second.local(ADAPTER, "manifest.json").read_bytes())
    assert manifest["starting_adapter"] == {**source_of(first).model_dump(), "mode": "Stack"}
    assert 0 <= manifest["checks"]["reload_difference"] <= 1e-6, "what was trained is what is served"
    card = second.local(ADAPTER, "README.md").read_text()
    assert f"beside the adapter `{source_of(first).uri}`, which was kept as it is" in card
    assert "of its rank of 8, 4 are that one's, and 4 were trained" in card
    assert str(source_of(first).digest) in card
    assert "--max-lora-rank 8" in card


def test_a_resumed_attempt_gives_the_bits_of_an_undisturbed_one(
    tmp_path: Path, first: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (stacked(tmp_path / name, first) for name in ("whole", "cut"))
    train.run(context(whole), StopFlag(60))
    assert stopped_before(monkeypatch, cut, 3).fault is Fault.INTERRUPTED
    assert {name.partition(".")[0] for name in load_file(next(cut.local(CHECKPOINTS).iterdir()) / TENSORS)} == {
        "adapter",
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    shapes = {tuple(each.shape) for name, each in trained_weights(cut).items() if "lora_A" in name}
    assert {shape[0] for shape in shapes} == {4}, "a checkpoint holds what is trained alone"
    assert train.run(context(cut, attempt=2), StopFlag(60)).resumed_from_step == 3
    assert cut.adapter_bytes() == whole.adapter_bytes()


@pytest.mark.parametrize("mode", AdapterMode)
def test_a_stacked_adapter_can_be_stacked_on_and_gone_on_with(
    tmp_path: Path, first: TinyRun, mode: AdapterMode
) -> None:
    second = stacked(tmp_path / "second", first)
    train.run(context(second), StopFlag(60))
    rank = 4 if mode is AdapterMode.STACK else 8
    third = begin_with(make_run(tmp_path / "third", steps=6, lora_rank=rank, lora_alpha=64), second, mode)
    result = train.run(context(third), StopFlag(60))
    assert result.artifact is not None
    assert result.artifact.rank == (12 if mode is AdapterMode.STACK else 8)
    losses = held_out_losses(third)
    assert losses[0] == pytest.approx(held_out_losses(second)[-1], abs=1e-5)
    assert losses[-1] < losses[0]


def test_a_new_adapter_that_learned_nothing_is_not_committed_for_the_effect_of_the_kept_one(
    tmp_path: Path, first: TinyRun
) -> None:
    second = stacked(tmp_path, first, learning_rate=0.0)
    with pytest.raises(StageError) as caught:
        train.run(context(second), StopFlag(60))
    assert caught.value.fault is Fault.ADAPTER_NO_EFFECT


def test_preferences_are_compared_with_the_base_and_the_kept_adapter(tmp_path: Path, first: TinyRun) -> None:
    second = begin_with(preference_run(tmp_path, MethodType.DPO, steps=6), first, AdapterMode.STACK)
    train.run(context(second), StopFlag(60))
    held_out = json.loads(second.local(ADAPTER, "eval.json").read_bytes())["held_out"]
    assert held_out[0]["figures"]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert held_out[-1]["figures"]["reward_margin"] > 1e-3
    bare = preference_run(tmp_path / "bare", MethodType.DPO, steps=6)
    train.run(context(bare), StopFlag(60))
    start = json.loads(bare.local(ADAPTER, "eval.json").read_bytes())["held_out"][0]["figures"]["chosen_logprob"]
    assert abs(held_out[0]["figures"]["chosen_logprob"] - start) > 1e-2, "the kept adapter is in what is compared with"


def test_weights_of_other_layers_are_refused_before_step_1(tmp_path: Path, first: TinyRun) -> None:
    second = stacked(tmp_path, first)
    adapter = second.plan.starting_adapter
    assert adapter is not None
    fewer = adapter.model_copy(update={"target_modules": list(ATTENTION)})
    second.write_plan(second.plan.model_copy(update={"starting_adapter": fewer}))
    with pytest.raises(StageError) as caught:
        train.run(context(second), StopFlag(60))
    assert caught.value.fault is Fault.ADAPTER_UNUSABLE
    assert "other layers" in str(caught.value.args_by_name["problem"])


class _Counted(NamedTuple):
    kept: int  # bytes, by autograd
    trained: int
    layers: int


def _counted(run: TinyRun, folder: Path, plan: RunPlan) -> _Counted:
    """Count what one pass keeps until it goes backward, beside the model itself."""
    lm = load_base(run.folder / "model", plan, CPU)
    adapted = add_adapter(lm, plan)
    if plan.starting_adapter is not None:
        load_starting_adapter(adapted, Path(plan.starting_adapter.weights.uri.removeprefix("file://")), plan)
    own = {each.untyped_storage().data_ptr() for each in [*adapted.parameters(), *adapted.buffers()]}
    examples = fetch_examples(run.store, plan.train, folder)
    batch = make_batch(examples, examples.sequences_of(range(3)), CPU)
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lm.nll_sum(batch)
    size = model_size(lm, adapted)
    assert size is not None
    trained = sum(each.numel() for each in adapter_parameters(adapted).values())
    assert size.adapter_weights == trained
    return _Counted(kept=sum(kept.values()), trained=trained, layers=size.layer_weights)


def test_the_plan_counts_what_a_kept_adapter_takes(tmp_path: Path, first: TinyRun) -> None:
    second = stacked(tmp_path, first, lora_rank=3)
    plan, facts = second.plan, second.plan.model
    alone = _counted(second, tmp_path / "alone", plan.model_copy(update={"starting_adapter": None}))
    both = _counted(second, tmp_path / "both", plan)
    kept = RANK * facts.lora_parameters_per_rank
    assert both.trained == alone.trained
    assert both.layers - alone.layers == kept, "it is multiplied with as frozen weights are"
    examples = fetch_examples(second.store, plan.train, tmp_path / "rows")
    tokens = sum(examples.lengths(examples.sequences_of(range(3))))
    planned = [kept_bytes(facts, "llama", rank, tokens, 40, gpu=False) for rank in (plan.exported_rank, 3)]
    copies = adapter_bytes(facts, 3, False, RANK) - adapter_bytes(facts, 3, False) - 4 * kept
    unused = 4 * plan.exported_rank * 3 * facts.hidden_size  # as what the first layer reads has no gradient
    assert both.kept - alone.kept == planned[0] - planned[1] + copies - unused
    more = memory_estimate(facts, "llama", 3, tokens, 40, 0, kept_rank=RANK)
    more -= memory_estimate(facts, "llama", 3, tokens, 40, 0)
    assert more >= 4 * kept + both.kept - alone.kept


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return Prepared(tmp_path)


def kept_in(plan: RunPlan) -> AdapterFacts:
    assert plan.stacked_on is not None
    return plan.stacked_on


def test_rank_and_alpha_are_those_of_a_new_adapter_and_the_plan_tells_the_joint_rank(prepared: Prepared) -> None:
    digest = prepared.write()
    chosen = prepared.prepare(digest, AdapterMode.STACK)
    assert (kept_in(chosen).digest, kept_in(chosen).rank) == (digest, 7)
    assert (chosen.hyperparameters.lora_rank, chosen.hyperparameters.lora_alpha) == (16, 32)
    told = {value.field: (value.value, value.reason) for value in chosen.resolved}
    assert told["exportedRank"][0] == "23"
    assert "7 of the adapter in model.adapterFrom, which is kept as it is, and 16 beside it" in told["exportedRank"][1]
    given = prepared.prepare(digest, AdapterMode.STACK, rank=4, alpha=8)
    assert (given.hyperparameters.lora_rank, given.hyperparameters.lora_alpha, given.exported_rank) == (4, 8, 11)
    alone = prepared.prepare(digest)
    assert alone.stacked_on is None
    assert (alone.exported_rank, "exportedRank" in {value.field for value in alone.resolved}) == (7, False)


@pytest.mark.parametrize(
    ("kept", "asked", "says"),
    [
        (500, {"rank": 16}, "write a rank up to 12"),
        (512, {}, "write model.adapterFrom.mode: Continue"),
        (600, {"rank": 1}, "write model.adapterFrom.mode: Continue"),
    ],
)
def test_a_joint_rank_that_no_server_takes_is_refused_before_anything_is_paid(
    prepared: Prepared, kept: int, asked: dict[str, int], says: str
) -> None:
    prepared.config["r"] = kept
    error = prepared.fault(prepared.write(), AdapterMode.STACK, **asked)
    assert error.fault is Fault.CONFIG_UNREADABLE
    assert says in str(error.args_by_name["problem"])


def test_a_rank_that_was_left_open_leaves_room_for_the_kept_one(prepared: Prepared) -> None:
    prepared.config["r"] = 500
    plan = prepared.prepare(prepared.write(), AdapterMode.STACK)
    assert (plan.hyperparameters.lora_rank, plan.exported_rank) == (12, 512)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "it adapts embed_tokens, q_proj"),
    ],
)
def test_an_adapter_that_cannot_be_kept_exactly_is_refused_in_words(
    prepared: Prepared, change: dict[str, Any], problem: str
) -> None:
    prepared.config |= change
    prepared.write()
    error = prepared.fault(mode=AdapterMode.STACK)
    assert error.fault is Fault.ADAPTER_UNUSABLE
    assert problem in str(error.args_by_name["problem"])


def test_one_that_is_scaled_by_rslora_or_adapts_less_can_be_kept_but_not_trained_on(prepared: Prepared) -> None:
    prepared.config |= {"use_rslora": True, "target_modules": ["q_proj"]}
    prepared.write()
    kept = kept_in(prepared.prepare(mode=AdapterMode.STACK))
    assert (kept.rslora, kept.target_modules, kept.scale) == (True, ["q_proj"], pytest.approx(9 / 7**0.5))
    assert "mode: Stack keeps it as it is" in str(prepared.fault().args_by_name["problem"])
