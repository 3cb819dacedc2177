"""examples/documents.yaml on a folder as a team has it, through both stages on this machine, to a committed adapter."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import spec_cases
from data_run import Prepared, accounted, context, read_back, train_context
from finetune_cli.load import load_job
from finetune_trainer import prepare, train
from finetune_trainer.stop import StopFlag
from team_folder import BROKEN, COPY, NEAR_COPY, PLANTED, planted_in, team_folder
from tiny_run import byte_tokenizer, tiny_config, tiny_model

EXAMPLE = spec_cases.ROOT / "examples/documents.yaml"
COPIES = ((COPY, "notes/1.md"), (NEAR_COPY, "pages/1.html"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model and the documents lie."""
    folder = tmp_path_factory.mktemp("documents")
    tiny_model(tiny_config("llama", max_position_embeddings=512)).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    for name, content in team_folder().items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def spec_here(folder: Path) -> dict[str, Any]:
    """Return the example's spec with its places below the folder, and few steps."""
    spec = load_job(EXAMPLE)["spec"]
    (dataset,) = spec["datasets"]
    return {
        **{name: value for name, value in spec.items() if name != "storage"},
        "model": {"uri": (folder / "model").as_uri()},
        "datasets": [{**dataset, "uri": (folder / "data").as_uri() + "/"}],
        "output": {"uri": (folder / "out").as_uri()},
        "hyperparameters": {**spec["hyperparameters"], "maxSteps": 2},
    }


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Prepared:
    """What prepare left. The job has trained, too."""
    ctx = context(folder, spec_here(folder))
    result = prepare.run(ctx)
    assert result.plan is not None
    trained = train.run(train_context(ctx, result.plan.digest, folder / "train"), StopFlag(60))
    assert trained.artifact is not None
    return read_back(folder, result)


def dropped(prepared: Prepared) -> dict[str, str]:
    """Return why which files are left out."""
    data = prepared.report["files"][0]["uri"].rpartition("/data/")[0] + "/data/"
    return {each["file"].removeprefix(data): each["reason"] for each in prepared.decisions if each["action"] == "drop"}


def test_every_file_is_learned_held_out_or_left_out_with_its_reason(prepared: Prepared) -> None:
    accounted(prepared)
    assert len(prepared.report["files"]) == len(team_folder())
    reasons = dropped(prepared)
    assert reasons.pop(BROKEN) == "broken_document"
    copies = [reasons.pop(one, None) or reasons.pop(other) for one, other in COPIES]
    assert copies == ["near_duplicate"] * 2, "as the template puts the name of the file into the text of copies, too"
    telling = {"manuals/0.pdf", "pages/0.html", "notes/0.md", "mail/0.eml"}
    assert reasons == dict.fromkeys(telling, "personal_data")


def test_no_planted_value_is_in_anything_that_is_written(prepared: Prepared, folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "model/tokenizer.json"))
    assert planted_in((folder / "data/notes/0.md").read_bytes(), tokenizer) == list(PLANTED)
    written = [path for path in (folder / "out").rglob("*") if path.is_file()]
    assert {"eval.json", "README.md", "report.html", "decisions.jsonl"} <= {path.name for path in written}
    assert {path.name: found for path in written if (found := planted_in(path.read_bytes(), tokenizer))} == {}
