"""The train stage from plan to commit, and every way it stops in between."""

import errno
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from e2e_prometheus import lint
from finetune_api.errors import StageError
from finetune_api.job import MethodType
from finetune_api.layout import CHECKPOINTS, LATEST, METRICS, join
from finetune_api.quality import Quality
from finetune_api.reasons import Fault, Reason
from finetune_api.status import Artifact
from finetune_trainer import base_weights, checkpoint, commit, patience, session, standstill, train
from finetune_trainer.context import StageContext
from finetune_trainer.inputs import fetch_steps
from finetune_trainer.loop import Stepper
from finetune_trainer.model import load_base
from finetune_trainer.stop import StopFlag
from finetune_trainer.store import Store
from tiny_run import STOP_ID, TinyRun, context, make_run, stop_before, use_model
from waiting import PATIENCE_S


def committed_artifact(run: TinyRun) -> Artifact | None:
    found = commit.read_commit(run.store, run.run_uri)
    return found and found.artifact


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("family", "changes", "method"),
    [
        ("llama", {}, MethodType.SFT),
        ("qwen3", {"tie_word_embeddings": True}, MethodType.CPT),
        ("gpt2", {}, MethodType.SFT),
        ("gemma2", {"query_pre_attn_scalar": 8, "final_logit_softcapping": None}, MethodType.SFT),
    ],
)
def test_a_run_ends_with_a_committed_adapter_and_its_figures(
    tmp_path: Path, family: str, changes: dict[str, Any], method: MethodType
) -> None:
    run = make_run(tmp_path, family=family, model_changes=changes, method=method)
    ctx = context(run)
    result = train.run(ctx, StopFlag(60))
    assert (result.fault, result.exit_code, result.step) == (Fault.COMMITTED, 0, 12)
    assert result.artifact is not None
    assert result.artifact == committed_artifact(run)
    assert result.metrics is not None
    assert result.metrics.train_loss is not None
    assert result.metrics.base_eval_loss is not None
    assert result.metrics.eval_loss != result.metrics.base_eval_loss
    assert len(result.to_message()) < 4000
    found = json.loads(run.local("adapter", "eval.json").read_text())
    assert [evaluation["step"] for evaluation in found["held_out"]] == [0, 4, 8, 12]
    assert len(found["samples"]) == 3
    rows = _rows(run.local(METRICS))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    progress = ctx.reporter.progress()
    assert (progress.activity, progress.step, progress.total_steps) == ("Done", 12, 12)
    latest = json.loads((run.local().parent / LATEST).read_text())
    assert latest["artifact"]["digest"] == result.artifact.digest


def _samples(ctx: StageContext) -> dict[str, float]:
    families = text_string_to_metric_families(generate_latest(ctx.reporter.registry).decode())
    return {
        sample.name + "".join(f"/{value}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_tell_what_was_done_and_hold_nothing_that_is_not_known(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    ctx = context(run)
    train.run(ctx, StopFlag(60))
    samples = _samples(ctx)
    assert samples["finetune_train_step"] == samples["finetune_train_planned_steps"] == 12
    assert samples["finetune_train_step_seconds_count"] == 12
    planned = fetch_steps(run.store, run.plan, tmp_path)
    assert samples["finetune_train_tokens_total"] == planned.tokens.sum()
    assert samples["finetune_train_label_tokens_total"] == planned.label_tokens.sum()
    assert 0 < samples["finetune_train_data_wait_seconds_total"] < samples["finetune_train_step_seconds_sum"]
    assert samples["finetune_train_loss_spikes_total"] == 0
    for name in ("grad_norm", "goodput_ratio", "epoch_ratio", "checkpoint_write_seconds", "checkpoint_upload_seconds"):
        assert samples[f"finetune_train_{name}"] > 0, name
    activities = ("Starting", "Reading", "Loading", "Training", "Evaluating", "Saving", "Committing")
    assert all(f"finetune_stage_seconds_total/{activity}/train" in samples for activity in activities)
    unknown = ("mfu_ratio", "gpu_memory_peak_bytes", "gpu_memory_reserved_bytes")
    assert not {f"finetune_train_{name}" for name in unknown} & samples.keys(), "there is no GPU"


def test_counts_of_tokens_go_on_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, stop = make_run(tmp_path), StopFlag(60)
    with monkeypatch.context() as patch:
        stop_before(patch, stop, 5)
        with pytest.raises(StageError):
            train.run(context(run), stop)
    ctx = context(run, attempt=2)
    train.run(ctx, StopFlag(60))
    samples = _samples(ctx)
    planned = fetch_steps(run.store, run.plan, tmp_path)
    assert samples["finetune_train_tokens_total"] == planned.tokens.sum()
    assert samples["finetune_train_label_tokens_total"] == planned.label_tokens.sum()
    assert (samples["finetune_train_resumes_total"], samples["finetune_train_step_seconds_count"]) == (1, 7)


def test_where_the_peak_of_the_gpu_is_known_its_use_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = session.Session.run

    def with_peak(self: session.Session) -> bool:
        self.peak_flops = 1e12
        return original(self)

    monkeypatch.setattr(session.Session, "run", with_peak)
    ctx = context(make_run(tmp_path))
    train.run(ctx, StopFlag(60))
    assert 0 < _samples(ctx)["finetune_train_mfu_ratio"] < 1


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_promtool_has_nothing_against_the_metrics(tmp_path: Path) -> None:
    ctx = context(make_run(tmp_path))
    train.run(ctx, StopFlag(60))
    assert lint(generate_latest(ctx.reporter.registry).decode()) == ""


def test_training_learns_its_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=60, rows=8, batch=8, learning_rate=2e-2)
    train.run(context(run), StopFlag(60))
    losses = [row["loss"] for row in _rows(run.local(METRICS)) if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]


def test_a_stop_is_a_checkpoint_and_the_next_attempt_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, stopped = (make_run(tmp_path / name) for name in ("undisturbed", "stopped"))
    train.run(context(undisturbed), StopFlag(60))
    stop = StopFlag(60)
    with monkeypatch.context() as patch:
        stop_before(patch, stop, 5)
        ctx = context(stopped)
        with pytest.raises(StageError) as caught:
            train.run(ctx, stop)
    assert (caught.value.fault, caught.value.exit_code) == (Fault.INTERRUPTED, 30)
    assert caught.value.args_by_name == {"step": 5}
    saved = ctx.reporter.progress().checkpoint
    assert saved is not None
    assert saved.step == 5
    # The pod is gone, and with it its disk.
    for path in Path(stopped.config.work_dir).glob("metrics.jsonl"):
        path.unlink()
    result = train.run(context(stopped, attempt=2), StopFlag(60))
    assert (result.resumed_from_step, result.step) == (5, 12)
    assert stopped.adapter_bytes() == undisturbed.adapter_bytes()
    assert [row["step"] for row in _rows(stopped.local(METRICS)) if "loss" in row] == list(range(1, 13))
    both = [json.loads(run.local("adapter", "eval.json").read_text()) for run in (undisturbed, stopped)]
    assert both[0] == both[1]


def test_a_stop_while_loading_ends_at_once(tmp_path: Path) -> None:
    stop = StopFlag(60)
    stop.set()
    with pytest.raises(StageError) as caught:
        train.run(context(make_run(tmp_path)), stop)
    assert (caught.value.fault, caught.value.exit_code) == (Fault.STOPPED, 30)


def test_checkpoints_are_written_as_time_goes_by_and_only_the_last_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, checkpoint_interval_s=1, keep_last=2)
    published: list[str] = []
    original = commit.publish_manifest

    def publish(store: Any, fence: Any, uri: str, manifest: Any) -> str:
        published.append(uri)
        return original(store, fence, uri, manifest)

    now = [0.0]

    def clock() -> float:
        now[0] += 0.1  # ten readings a second: several per step
        return now[0]

    monkeypatch.setattr("finetune_trainer.checkpoint.publish_manifest", publish)
    monkeypatch.setattr(session.time, "monotonic", clock)
    train.run(context(run), StopFlag(60))
    assert len(published) >= 2
    left = {Path(info.uri).parent.name for info in run.store.list(join(run.run_uri, CHECKPOINTS, ""))}
    assert left == {"00000012-1"}


def test_a_last_save_waits_for_the_one_in_flight_and_does_not_write_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, checkpoint_interval_s=1)
    evaluated, published = threading.Event(), commit.publish_manifest

    def publish(store: Any, fence: Any, uri: str, manifest: Any) -> str:
        if "/00000012-" in uri:
            assert evaluated.wait(PATIENCE_S)  # the upload of the last step takes longer than the last evaluation
        return published(store, fence, uri, manifest)

    def wait(self: checkpoint.Checkpointer, timeout_s: float | None = None) -> bool:
        if run_session and run_session[0].position.evaluations[-1].step == 12:
            evaluated.set()
        return waited(self, timeout_s)

    def begin(self: session.Session) -> bool:
        run_session.append(self)
        return begun(self)

    now, run_session, waited, begun = [0.0], list[session.Session](), checkpoint.Checkpointer.wait, session.Session.run

    def clock() -> float:
        now[0] += 0.5  # a save is due after every step
        return now[0]

    monkeypatch.setattr("finetune_trainer.checkpoint.publish_manifest", publish)
    monkeypatch.setattr(checkpoint.Checkpointer, "wait", wait)
    monkeypatch.setattr(session.Session, "run", begin)
    monkeypatch.setattr(session.time, "monotonic", clock)
    assert train.run(context(run), StopFlag(60)).exit_code == 0


def test_a_stop_during_an_evaluation_leaves_no_hole_among_the_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stop = make_run(tmp_path), StopFlag(60)
    with monkeypatch.context() as patch:
        stop_before(patch, stop, 4)
        with pytest.raises(StageError) as caught:
            train.run(context(run), stop)
    assert caught.value.args_by_name == {"step": 4}
    train.run(context(run, attempt=2), StopFlag(60))
    found = json.loads(run.local("adapter", "eval.json").read_text())
    assert [evaluation["step"] for evaluation in found["held_out"]] == [0, 4, 8, 12]


def test_what_an_attempt_that_died_after_its_commit_left_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train, "_after_commit", lambda *_: None)  # pyright: ignore[reportUnknownLambdaType]
        artifact = train.run(context(run), StopFlag(60)).artifact
    run.store.put(join(run.run_uri, "adapter-1", "README.md"), b"of an attempt that never committed")
    run.store.put(join(run.run_uri, CHECKPOINTS, "00000003-1", "manifest.json"), b"{}")
    assert train.run(context(run, attempt=2), StopFlag(60)).artifact == artifact
    assert run.store.list(join(run.run_uri, "adapter-1", "")) == []
    left = {Path(info.uri).parent.name for info in run.store.list(join(run.run_uri, CHECKPOINTS, ""))}
    assert left == {"00000012-1"}
    assert committed_artifact(run) == artifact


def test_an_attempt_after_the_commit_verifies_it_and_ends_well(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first = train.run(context(run), StopFlag(60))
    (run.local().parent / LATEST).unlink()
    second = train.run(context(run, attempt=2), StopFlag(60))
    assert (second.exit_code, second.artifact) == (0, first.artifact)
    assert second.quality == first.quality
    assert first.metrics is not None
    assert second.metrics is not None
    assert None is not first.metrics.eval_loss == second.metrics.eval_loss
    assert None is not first.metrics.base_eval_loss == second.metrics.base_eval_loss
    assert second.step == first.step == 12
    assert (run.local().parent / LATEST).exists()


def test_what_another_job_has_committed_in_the_folder_is_no_success_of_this_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=1)
    train.run(context(run), StopFlag(60))
    job = run.config.job.model_copy(update={"uid": "9" * 8})
    run.config = run.config.model_copy(update={"job": job})
    with pytest.raises(StageError) as caught:
        train.run(context(run), StopFlag(60))
    assert (caught.value.fault, caught.value.exit_code) == (Fault.OUTPUT_CONFLICT, 17)


def test_where_another_attempt_has_committed_first_its_adapter_and_figures_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, steps=1)
    concern = Quality(concerns=[Reason.WORSE_THAN_START])
    original, theirs = commit.commit, list[Artifact]()

    def commit_after_another(store: Store, fence: commit.Fence, run_uri: str, artifact: Artifact) -> commit.Committed:
        theirs.append(artifact.model_copy(update={"uri": f"{run_uri}/adapter-9/"}))
        store.put(f"{theirs[0].uri}eval.json", json.dumps({"quality": concern.model_dump(mode="json")}).encode())
        original(store, fence, run_uri, theirs[0])
        return original(store, fence, run_uri, artifact)

    monkeypatch.setattr(commit, "commit", commit_after_another)
    result = train.run(context(run), StopFlag(60))
    assert (result.artifact, result.quality) == (theirs[0], concern)


def test_an_attempt_that_died_before_the_commit_is_finished_from_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)

    def die(*_: Any) -> None:
        raise StageError(Fault.STORAGE_UNAVAILABLE)

    with monkeypatch.context() as patch:
        patch.setattr(commit, "commit", die)
        patch.setattr(patience, "MAX_AWAY_S", 0.0)  # the first try is the last
        with pytest.raises(StageError):
            train.run(context(run), StopFlag(60))
    result = train.run(context(run, attempt=2), StopFlag(60))
    assert (result.exit_code, result.resumed_from_step) == (0, 12)
    assert result.artifact is not None
    assert result.artifact.uri.endswith("/adapter-2/")
    assert not run.local("adapter").exists() or not list(run.local("adapter").iterdir())


def _change_model(run: TinyRun) -> None:
    with (run.folder / "model" / "config.json").open("a") as file:
        file.write(" ")


def _change_tokens(run: TinyRun) -> None:
    path = Path(run.plan.train.arrays["tokens"].uri.removeprefix("file://"))
    path.write_bytes(path.read_bytes()[::-1])


def _change_plan(run: TinyRun) -> None:
    told = run.plan
    run.write_plan(told.model_copy(update={"train_tokens": 1}))
    run.plan = told


def _take_folder(run: TinyRun) -> None:
    commit.claim(run.store, run.run_uri, "another job's uid")


def _pickle(run: TinyRun) -> None:
    plan = run.plan
    files = [record for record in plan.model.files if not record.uri.endswith(".safetensors")]
    run.write_plan(plan.model_copy(update={"model": plan.model.model_copy(update={"files": files})}))


def _unsafe_packing(run: TinyRun) -> None:
    """A plan that says a family packs safely whose attention has a variant that packing leaves out."""
    plan = run.plan
    run.write_plan(plan.model_copy(update={"model": plan.model.model_copy(update={"packing_safe": True})}))


@pytest.mark.parametrize(
    ("change", "family", "fault", "exit_code"),
    [
        (_change_model, "llama", Fault.MODEL_CHANGED, 22),
        (_change_tokens, "llama", Fault.INPUT_CHANGED, 11),
        (_change_plan, "llama", Fault.CONFIG_CHANGED, 10),
        (_take_folder, "llama", Fault.OUTPUT_CONFLICT, 17),
        (_pickle, "llama", Fault.UNSUPPORTED_MODEL, 10),
        (_unsafe_packing, "gemma2", Fault.UNSUPPORTED_MODEL, 10),
    ],
)
def test_what_is_not_what_was_planned_ends_the_run_before_step_1(
    tmp_path: Path, change: Any, family: str, fault: Fault, exit_code: int
) -> None:
    run = make_run(tmp_path, family=family)
    change(run)
    with pytest.raises(StageError) as caught:
        train.run(context(run), StopFlag(60))
    assert (caught.value.fault, caught.value.exit_code) == (fault, exit_code)
    assert run.store.list(join(run.run_uri, CHECKPOINTS)) == []


Change = Callable[[dict[str, torch.Tensor]], None]


def _edit(run: TinyRun, change: Change) -> None:
    """Other weights than the architecture's, planned with: as if prepare had judged nothing."""
    path = run.folder / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    use_model(run, run.folder / "model")


UP = "model.layers.1.mlp.up_proj.weight"


def _drop(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


def _put(name: str, value: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({name: value})


def _poison(value: float) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][3, 5] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop(UP), f"{UP} is missing from model.safetensors"),
        (_drop("lm_head.weight"), "lm_head.weight is missing from model.safetensors"),
        (_put(UP, torch.zeros(64, 33)), f"{UP} in model.safetensors is 64 x 33, but config.json asks for 64 x 32"),
        (_put("model.layers.2.mlp.up_proj.weight", torch.zeros(64, 32)), "model.layers.2.mlp.up_proj.weight in model"),
        (_poison(float("nan")), f"{UP} in model.safetensors has 1 of 2,048 values that are NaN or infinite"),
        (_poison(float("-inf")), f"{UP} in model.safetensors has 1 of 2,048 values that are NaN or infinite"),
    ],
    ids=["missing", "no head", "reshaped", "a layer too many", "NaN", "infinite"],
)
def test_weights_that_are_not_the_models_end_the_run_before_step_1(tmp_path: Path, change: Change, words: str) -> None:
    run = make_run(tmp_path)
    _edit(run, change)
    with pytest.raises(StageError) as caught:
        train.run(context(run), StopFlag(60))
    assert (caught.value.fault, caught.value.exit_code) == (Fault.BROKEN_MODEL, 10)
    assert words in str(caught.value)


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _strange_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))


def test_a_model_whose_own_pass_fails_is_a_final_fault_and_no_bug(tmp_path: Path) -> None:
    """More experts for each token than there are fit every tensor, and no pass."""
    run = make_run(tmp_path, family="olmoe", model_changes={"num_experts": 4, "num_experts_per_tok": 8})
    with pytest.raises(StageError, match="its own pass fails, its config") as caught:
        load_base(run.folder / "model", run.plan, torch.device("cpu"))
    assert (caught.value.fault, caught.value.exit_code) == (Fault.UNSUPPORTED_MODEL, 10)


def test_a_model_that_transformers_cannot_generate_with_is_refused_before_step_1(tmp_path: Path) -> None:
    """Layers of a state space alone: transformers asks the cache of such a Jamba for what only attention keeps."""
    sizes = {"mamba_d_state": 4, "mamba_expand": 1, "mamba_dt_rank": 4, "num_experts": 2}
    run = make_run(tmp_path, steps=1, family="jamba", model_changes=sizes)
    with pytest.raises(StageError, match="transformers cannot generate answers with it") as caught:
        train.run(context(run), StopFlag(60))
    assert caught.value.fault is Fault.UNSUPPORTED_MODEL
    assert not run.local(METRICS).exists()


@pytest.mark.parametrize("said", ["CUDA error: CUBLAS_STATUS_NOT_INITIALIZED", "cuDNN error: internal"])
def test_a_gpu_that_fails_in_the_models_own_pass_says_nothing_of_the_model(tmp_path: Path, said: str) -> None:
    plan = make_run(tmp_path).plan
    with pytest.raises(RuntimeError, match="error"), base_weights.told_of_the_model(plan, "it fails"):
        raise RuntimeError(said)


@pytest.mark.parametrize("damage", [_cut_weights, _strange_config])
def test_whatever_loading_raises_is_a_final_fault_and_no_bug(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = tmp_path / "model"
    plan = make_run(tmp_path).plan
    damage(folder)
    with pytest.raises(StageError, match="transformers could not load it") as caught:
        load_base(folder, plan, torch.device("cpu"))
    assert (caught.value.fault, caught.value.exit_code) == (Fault.UNSUPPORTED_MODEL, 10)


@pytest.mark.parametrize(
    ("number", "raised"), [(errno.EMFILE, OSError), (errno.EIO, OSError), (errno.ENOENT, StageError)]
)
def test_what_the_machine_refuses_while_loading_says_nothing_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raised: type[Exception]
) -> None:
    plan = make_run(tmp_path).plan

    def refuse(*_args: object, **_more: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(base_weights.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(raised):
        load_base(tmp_path / "model", plan, torch.device("cpu"))


def test_a_tokenizer_that_cannot_be_loaded_is_found_before_step_1(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run.folder / "model" / "tokenizer.json").write_text('{"model": {"type": "Unknown"}}')
    use_model(run, run.folder / "model")
    with pytest.raises(StageError, match=r"its tokenizer\.json cannot be read") as caught:
        train.run(context(run), StopFlag(60))
    assert caught.value.fault is Fault.UNSUPPORTED_MODEL
    assert not run.local(METRICS).exists()


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["norm"], "PEFT cannot adapt it: Target module"),
        (["q_proj", "c_fc_0"], "its files hold weights of c_fc_0, but it has no such module to adapt"),
    ],
)
def test_modules_that_cannot_be_adapted_are_named(tmp_path: Path, targets: list[str], words: str) -> None:
    run = make_run(tmp_path)
    run.write_plan(run.plan.model_copy(update={"model": run.plan.model.model_copy(update={"target_modules": targets})}))
    with pytest.raises(StageError, match=words) as caught:
        train.run(context(run), StopFlag(60))
    assert caught.value.fault is Fault.UNSUPPORTED_MODEL


def test_a_run_that_diverges_is_not_committed(tmp_path: Path) -> None:
    run = make_run(tmp_path, learning_rate=1e30)
    with pytest.raises(StageError) as caught:
        train.run(context(run), StopFlag(60))
    assert (caught.value.fault, caught.value.exit_code) == (Fault.NOT_FINITE, 15)
    assert commit.read_commit(run.store, run.run_uri) is None


def test_the_card_of_a_run_counts_rows_once_and_no_tokens_of_a_skipped_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, steps=8, rows=12)
    original = Stepper.run

    def skip_one(self: Stepper, number: int) -> torch.Tensor:
        values = original(self, number)
        return torch.full_like(values, torch.nan).index_fill(0, torch.tensor([2]), 0.0) if number == 3 else values

    monkeypatch.setattr(Stepper, "run", skip_one)
    train.run(context(run), StopFlag(60))
    steps = fetch_steps(run.store, run.plan, tmp_path)
    learned = int(steps.label_tokens.sum() - steps.label_tokens[3])
    card = run.local("adapter", "README.md").read_text()
    assert "8 steps (1 of them skipped: not finite) read 32 rows, 12 of the 12 prepared for training" in card
    assert f"{steps.total_tokens:,} tokens, {learned:,} of them learned from" in card


def test_a_run_without_held_out_rows_and_prompts_ends_well(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.write_plan(run.plan.model_copy(update={"held_out": None, "sample_prompts": []}))
    result = train.run(context(run), StopFlag(60))
    assert result.exit_code == 0
    assert result.metrics is not None
    assert result.metrics.eval_loss is None


def test_answers_of_the_tuned_model_end_where_the_plan_says(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    train.run(context(run), StopFlag(60))
    assert json.loads(run.local("adapter", "generation_config.json").read_text())["eos_token_id"] == [STOP_ID]


def test_a_step_that_hangs_is_reported_and_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    ctx = context(run)
    file = tmp_path / "result.json"
    ended: list[int] = []
    monkeypatch.setattr(standstill.os, "_exit", ended.append)
    train._end_stalled(replace(ctx, result_file=file), 7, 301.0)  # pyright: ignore[reportPrivateUsage]
    assert ended == [32]
    assert json.loads(file.read_text())["args"] == {"seconds": 301, "step": 7}


def test_a_stop_during_the_last_evaluation_leaves_it_to_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    stop = StopFlag(60)
    with monkeypatch.context() as patch:
        stop_before(patch, stop, 12)
        with pytest.raises(StageError) as caught:
            train.run(context(run), stop)
    assert (caught.value.fault, caught.value.args_by_name) == (Fault.INTERRUPTED, {"step": 12})
    assert train.run(context(run, attempt=2), StopFlag(60)).exit_code == 0
    found = json.loads(run.local("adapter", "eval.json").read_text())
    assert [evaluation["step"] for evaluation in found["held_out"]] == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("error", "fault", "exit_code"),
    [
        (torch.cuda.OutOfMemoryError("injected"), Fault.GPU_OOM, 16),
        (torch.AcceleratorError("injected", 700), Fault.GPU_FAULT, 33),
    ],
)
def test_a_gpu_that_fails_outside_a_step_is_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, fault: Fault, exit_code: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(train, "load_for_training", fail)
    with pytest.raises(StageError) as caught:
        train.run(context(make_run(tmp_path)), StopFlag(60))
    assert (caught.value.fault, caught.value.exit_code) == (fault, exit_code)
