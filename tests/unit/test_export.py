"""The exported folder is what it says, or it is not committed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_run import byte_bpe
from finetune_api.errors import StageError
from finetune_api.governance import Confidentiality
from finetune_api.job import MethodType
from finetune_api.layout import ADAPTER, join
from finetune_api.quality import Quality
from finetune_api.reasons import Fault, Reason
from finetune_api.status import ResolvedValue
from finetune_trainer import commit, export
from finetune_trainer.card import Evaluations, Learned, Lineage, model_card, vllm_rank
from finetune_trainer.evaluate import Answer, HeldOut
from finetune_trainer.inputs import Batch, fetch_examples, make_batch
from finetune_trainer.methods import method_of
from finetune_trainer.model import LanguageModel, add_adapter, load_base
from finetune_trainer.origins import DataOrigin
from finetune_trainer.patience import Patience
from finetune_trainer.runplan import AdapterFacts
from finetune_trainer.stop import StopFlag
from tiny_run import STOP_ID, TinyRun, make_run

PATIENCE = Patience(lambda: 0.0, lambda _seconds: None, lambda _trouble: None)
LINEAGE = Lineage(
    "tiny", "sha256:" + "3" * 64, "sha256:" + "4" * 64, {"model.safetensors": "sha256:5"}, {"peft": "1"}, "trainer:1"
)
FOUND = Evaluations(
    [HeldOut(step=0, loss=3.0, rows=2, label_tokens=9), HeldOut(step=4, loss=1.0, rows=2, label_tokens=9)],
    [Answer("secret words", [1, 2, 3], stopped=False)] * 3,
    [Answer("other words", [1, 2], stopped=True)] * 3,
    Quality(held_out_rows=2, start_loss=3.0, loss=1.0),
    "fp32",
)
LEARNED = Learned(rows=80, distinct_rows=48, tokens=8484, label_tokens=3020, skipped_steps=0)


class Trained:
    """A tiny model with an adapter that has an effect, written to a folder."""

    def __init__(self, run: TinyRun, folder: Path, effect: float = 0.05) -> None:
        self.run = run
        self.lm: LanguageModel = load_base(run.folder / "model", run.plan, torch.device("cpu"))
        self.adapted: PeftModel = add_adapter(self.lm, run.plan)
        torch.manual_seed(0)
        for name, parameter in self.adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, effect)
        folder.mkdir(parents=True, exist_ok=True)
        rows = fetch_examples(run.store, run.plan.train, folder / "rows")
        self.batches: list[Batch] = [make_batch(rows, [each], self.lm.device) for each in rows.sequences_of(range(4))]
        self.folder = folder / "adapter"

    def write(self) -> Path:
        model = self.run.folder / "model"
        export.write_adapter(self.adapted, self.folder, model, self.run.plan, [STOP_ID], LINEAGE, LEARNED, FOUND)
        return self.folder

    def check(self) -> dict[str, float]:
        return export.check_reload(self.lm, self.adapted, self.folder, self.batches)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"))


def _scale_weights(folder: Path, factor: float) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: factor * tensor for name, tensor in load_file(path).items()}, path)


def test_the_folder_works_with_plain_peft_and_transformers(run: TinyRun, tmp_path: Path) -> None:
    trained = Trained(run, tmp_path)
    folder = trained.write()
    live = torch.cat([trained.lm.token_logprobs(batch) for batch in trained.batches])
    base = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(folder))
    found: list[torch.Tensor] = []
    with torch.no_grad():
        for batch in trained.batches:
            logprobs = model(input_ids=batch.input_ids).logits[0].log_softmax(-1)
            found.append(logprobs[batch.sources, batch.targets])
    torch.testing.assert_close(torch.cat(found), live, atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("Grüße")) == "Grüße"
    assert tokenizer.chat_template == run.plan.chat_template
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [STOP_ID]
    assert model.peft_config["default"].base_model_name_or_path == run.plan.model.uri


def test_the_folder_s_tokenizer_reads_as_the_base_s_tokenizer_json_whatever_class_the_base_names(
    run: TinyRun, tmp_path: Path
) -> None:
    """Classes such as GPT2Tokenizer replace the pre-tokenizer of tokenizer.json: olmo2 and starcoder2 name it."""
    base, text = tmp_path / "base", "the quick brown fox 1234 the"
    base.mkdir()
    tokenizer = byte_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split("u", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}')
    trained = Trained(run, tmp_path)
    export.write_adapter(trained.adapted, trained.folder, base, run.plan, [STOP_ID], LINEAGE, LEARNED, FOUND)
    exported = AutoTokenizer.from_pretrained(trained.folder)
    assert exported.encode(text, add_special_tokens=False) == tokenizer.encode(text).ids
    assert byte_bpe().encode(text).ids != tokenizer.encode(text).ids, "else the class would make no difference"
    assert (exported.eos_token, exported.chat_template) == ("<|im_end|>", run.plan.chat_template)


def test_a_good_adapter_equals_the_live_model_and_differs_from_the_base(run: TinyRun, tmp_path: Path) -> None:
    trained = Trained(run, tmp_path)
    trained.write()
    checks = trained.check()
    assert checks["reload_difference"] <= 1e-5
    assert checks["effect"] > 1e-3


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_files_that_do_not_hold_what_was_trained_are_found(run: TinyRun, tmp_path: Path, factor: float) -> None:
    trained = Trained(run, tmp_path)
    _scale_weights(trained.write(), factor)
    with pytest.raises(StageError) as caught:
        trained.check()
    assert (caught.value.fault, caught.value.exit_code) == (Fault.RELOAD_MISMATCH, 21)


def test_an_adapter_without_effect_is_not_committed(run: TinyRun, tmp_path: Path) -> None:
    trained = Trained(run, tmp_path, effect=0.0)
    trained.write()
    with pytest.raises(StageError) as caught:
        trained.check()
    assert (caught.value.fault, caught.value.exit_code) == (Fault.ADAPTER_NO_EFFECT, 21)


def test_weights_that_are_not_numbers_are_never_exported(run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        Trained(run, tmp_path, effect=float("inf")).write()
    assert (caught.value.fault, caught.value.exit_code) == (Fault.NOT_FINITE, 15)


def test_the_manifest_vouches_for_every_file_and_names_the_lineage(run: TinyRun, tmp_path: Path) -> None:
    folder = Trained(run, tmp_path).write()
    run_uri = f"file://{tmp_path}/out/run"
    fence = commit.raise_epoch(run.store, run_uri, 1, "pod")
    artifact = export.upload(run.store, fence, run_uri, folder, run.plan, LINEAGE, {"effect": 1.0}, PATIENCE)
    manifest = commit.read_manifest(run.store, artifact.manifest_uri, artifact.digest)
    files: Any = manifest["files"]
    assert {file["path"] for file in files} == {path.name for path in folder.iterdir()}
    assert manifest["plan_digest"] == LINEAGE.plan_digest
    assert manifest["image"] == "trainer:1"
    assert manifest["base"] == {
        "uri": run.plan.model.uri,
        "digest": LINEAGE.base_digest,
        "files": LINEAGE.base_files,
        "known_by": LINEAGE.base_known_by,
    }
    assert artifact.uri == join(run_uri, ADAPTER, "")


def test_what_an_attempt_that_died_has_left_is_not_overwritten_but_removed_after_the_commit(
    run: TinyRun, tmp_path: Path
) -> None:
    folder = Trained(run, tmp_path).write()
    run_uri = f"file://{tmp_path}/out/run"
    run.store.put(join(run_uri, ADAPTER, "eval.json"), b"half")
    fence = commit.raise_epoch(run.store, run_uri, 2, "pod")
    artifact = export.upload(run.store, fence, run_uri, folder, run.plan, LINEAGE, {}, PATIENCE)
    assert run.store.read(join(run_uri, ADAPTER, "eval.json"))[0] == b"half"
    commit.commit(run.store, fence, run_uri, artifact)
    stop = StopFlag(60)
    stop.set()
    export.remove_orphans(run.store, fence, run_uri, artifact, stop)
    assert run.store.head(join(run_uri, ADAPTER, "eval.json")), "a stop does not wait for tidying"
    export.remove_orphans(run.store, fence, run_uri, artifact, StopFlag(60))
    found = commit.read_commit(run.store, run_uri)
    assert found is not None
    assert found.artifact == artifact
    assert run.store.head(join(run_uri, ADAPTER, "eval.json")) is None


def test_manifest_and_card_say_what_is_said_of_the_data_and_that_of_an_earlier_adapter(
    run: TinyRun, tmp_path: Path
) -> None:
    data = [
        DataOrigin(uri="s3://data/a/", name="chats", license="CC-BY-4.0", source="a | dump", copyright_holder="us",
                   confidentiality=Confidentiality.INTERNAL)
    ]  # fmt: skip
    earlier = [DataOrigin(uri="s3://data/b/", confidentiality=Confidentiality.RESTRICTED)]
    adapter = AdapterFacts(
        uri="s3://adapters/cpt/adapter", digest="sha256:" + "0" * 64, weights=run.plan.model.files[0], base_files={},
        rank=4, alpha=32, data=earlier,
    )  # fmt: skip
    plan = run.plan.model_copy(update={"data": data, "starting_adapter": adapter})
    card = model_card(plan, LINEAGE, LEARNED, FOUND)
    assert "| chats: s3&#58;//data/a/ | CC-BY-4.0 | a &#124; dump | Internal | us |" in card
    assert "| s3&#58;//data/b/ (earlier adapter) | not said | not said | Restricted | not said |" in card
    assert "What was learned from all of it is Restricted as a whole." in card
    of_old_release = plan.model_copy(update={"starting_adapter": adapter.model_copy(update={"data": []})})
    assert "as a whole" not in model_card(of_old_release, LINEAGE, LEARNED, FOUND)
    trained = Trained(run, tmp_path)
    folder = trained.write()
    run_uri = f"file://{tmp_path}/out/run"
    fence = commit.raise_epoch(run.store, run_uri, 1, "pod")
    artifact = export.upload(run.store, fence, run_uri, folder, plan, LINEAGE, {}, PATIENCE)
    manifest = commit.read_manifest(run.store, artifact.manifest_uri, artifact.digest)
    assert manifest["data"] == [
        {"uri": "s3://data/a/", "name": "chats", "license": "CC-BY-4.0", "source": "a | dump",
         "confidentiality": "Internal", "copyright_holder": "us"}
    ]  # fmt: skip
    assert (manifest["earlier_data"], manifest["confidentiality"]) == (
        [{"uri": "s3://data/b/", "confidentiality": "Restricted"}], "Restricted",
    )  # fmt: skip


def test_files_that_another_has_put_into_both_folders_are_named_by_no_manifest(run: TinyRun, tmp_path: Path) -> None:
    folder = Trained(run, tmp_path).write()
    run_uri = f"file://{tmp_path}/out/run"
    fence = commit.raise_epoch(run.store, run_uri, 1, "pod")
    for name in ("adapter", f"adapter-{fence.epoch}"):
        run.store.put(join(run_uri, name, "README.md"), b"another's")
    with pytest.raises(StageError) as caught:
        export.upload(run.store, fence, run_uri, folder, run.plan, LINEAGE, {}, PATIENCE)
    assert (caught.value.fault, caught.value.exit_code) == (Fault.STORAGE_UNAVAILABLE, 31)
    assert run.store.head(join(run_uri, f"adapter-{fence.epoch}", "manifest.json")) is None


def test_a_superseded_attempt_uploads_nothing(run: TinyRun, tmp_path: Path) -> None:
    folder = Trained(run, tmp_path).write()
    run_uri = f"file://{tmp_path}/out/run"
    fence = commit.raise_epoch(run.store, run_uri, 1, "pod")
    commit.raise_epoch(run.store, run_uri, 2, "other")
    with pytest.raises(StageError) as caught:
        export.upload(run.store, fence, run_uri, folder, run.plan, LINEAGE, {}, PATIENCE)
    assert caught.value.fault is Fault.SUPERSEDED
    assert run.store.list(join(run_uri, ADAPTER)) == []


def test_answers_are_in_eval_json_and_their_words_nowhere_else(run: TinyRun, tmp_path: Path) -> None:
    folder = Trained(run, tmp_path).write()
    found = json.loads((folder / "eval.json").read_text())
    assert [sample["base"]["text"] for sample in found["samples"]] == ["secret words"] * 3
    assert found["stop_ratio"] == {"base": 0.0, "tuned": 1.0}
    assert found["held_out"][1]["perplexity"] == pytest.approx(2.71828, rel=1e-4)
    assert "words" not in (folder / "README.md").read_text()


def test_the_card_says_how_good_how_made_and_how_to_serve(run: TinyRun) -> None:
    value = ResolvedValue(field="peft.rank", value="16", reason="enough | for 5 tokens")
    card = model_card(run.plan.model_copy(update={"resolved": [value]}), LINEAGE, LEARNED, FOUND)
    assert "| loss on 2 held-out rows (nats per token) | 3.0000 | 1.0000 |" in card
    assert "--max-lora-rank 8 " in card
    assert "| peft.rank | 16 | enough &#124; for 5 tokens |" in card
    assert LINEAGE.plan_digest in card
    assert "| trainer image, as it was named | trainer:1 |" in card
    assert "## Results" not in model_card(run.plan, LINEAGE, LEARNED, Evaluations([], [], [], Quality(), "fp32"))


def test_the_card_counts_what_the_steps_read_and_not_what_there_was(run: TinyRun) -> None:
    card = model_card(run.plan, LINEAGE, LEARNED, FOUND)
    assert f"12 steps read 80 rows, 48 of the {run.plan.train.examples} prepared for training:" in card
    assert "8,484 tokens, 3,020 of them learned from" in card
    skipped = model_card(run.plan, LINEAGE, replace(LEARNED, skipped_steps=2), FOUND)
    assert "12 steps (2 of them skipped: not finite) read 80 rows" in skipped
    cpt = run.plan.model_copy(update={"method": MethodType.CPT, "chat_template": None})
    assert "80 texts or pieces of texts" in model_card(cpt, LINEAGE, LEARNED, FOUND)


def test_what_speaks_against_the_adapter_is_the_first_thing_the_card_says(run: TinyRun) -> None:
    quality = Quality(concerns=[Reason.WORSE_THAN_START], held_out_rows=2, start_loss=3.19, loss=28.0, change_error=1.5)
    card = model_card(run.plan, LINEAGE, LEARNED, replace(FOUND, quality=quality))
    first = card.partition("# tiny\n")[2].strip().splitlines()[0]
    assert first.startswith("> **WorseThanStart**: on 2 held-out rows the loss is 28.000 nats per token after training")
    assert "no rows were held out" in model_card(run.plan, LINEAGE, LEARNED, Evaluations([], [], [], Quality(), "fp32"))


def test_the_card_does_not_speak_of_a_template_or_of_ends_that_were_not_trained(run: TinyRun) -> None:
    plain = run.plan.model_copy(update={"chat_template": None, "stop_token_ids": []})
    card = model_card(plain, LINEAGE, LEARNED, FOUND)
    assert "It was trained on plain text, without a chat template." in card
    assert "the one that was trained with" not in card
    assert "ended what was trained" not in card


def test_the_card_names_the_stop_tokens_and_the_form_that_were_taught(run: TinyRun) -> None:
    form = ResolvedValue(field="answers.without_reasoning", value="3 of 4 conversations", reason="rendered without it")
    plan = run.plan.model_copy(update={"stop_token_ids": [7], "stop_tokens": ["<|im_end|>"], "resolved": [form]})
    card = model_card(plan, LINEAGE, LEARNED, FOUND)
    assert "with the token ids that ended what was trained (`<|im_end|>`)." in card
    assert "How its answers were taught:\n\n- 3 of 4 conversations: rendered without it.\n" in card
    assert "How its answers were taught" not in model_card(run.plan, LINEAGE, LEARNED, FOUND)


def test_the_card_names_the_experts_that_have_no_adapter(run: TinyRun) -> None:
    model = run.plan.model.model_copy(update={"expert_parameters": 9000})
    mixture = run.plan.model_copy(update={"model": model})
    assert "experts of its mixture are not adapted: 9,000 of its" in model_card(mixture, LINEAGE, LEARNED, FOUND)
    assert "expert" not in model_card(run.plan, LINEAGE, LEARNED, FOUND)


@pytest.mark.parametrize(("rank", "served"), [(1, 8), (8, 8), (9, 16), (100, 128), (256, 256)])
def test_the_card_names_a_rank_that_vllm_accepts(rank: int, served: int) -> None:
    assert vllm_rank(rank) == served


@pytest.mark.parametrize(
    ("method", "trained", "model", "stops"),
    [
        (MethodType.SFT, [7], [9], [7]),
        (MethodType.SFT, [], [9], [9]),
        (MethodType.CPT, [7], [9, 7], [7, 9]),
        (MethodType.CPT, [], [9], [9]),
    ],
)
def test_answers_stop_where_the_method_taught_them_to(
    run: TinyRun, method: MethodType, trained: list[int], model: list[int], stops: list[int]
) -> None:
    plan = run.plan.model_copy(update={"stop_token_ids": trained})
    assert method_of(method).stop_token_ids(plan, model) == stops
