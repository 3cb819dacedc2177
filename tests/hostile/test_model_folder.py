"""Of a base model exactly those files are read that make it a model, and none that lies elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import data_run
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.data.model_facts import read_model
from finetune_trainer.store import open_store

SECRET = b"aws_secret_access_key = not-for-others"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "credentials").write_bytes(SECRET)
    data_run.write_model(tmp_path / "model")
    return tmp_path / "model"


def _read(model: Path) -> list[str]:
    """Return the names of the files that a plan for this model holds."""
    store = open_store(StorageConfig())
    return [Path(record.uri).name for record in read_model(store, model.as_uri()).facts.files]


def _linked(name: str) -> Callable[[Path], None]:
    def plant(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(model.parent / "credentials")

    return plant


def _moved_out(name: str) -> Callable[[Path], None]:
    """Its content is right, but the folder is not what somebody would copy."""

    def plant(model: Path) -> None:
        (model / name).rename(model.parent / name)
        (model / name).symlink_to(Path("..", name))

    return plant


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (_linked("merges.txt"), "merges.txt"),
        (_linked("config.json"), "config.json"),
        (_linked("model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors"),
        (_moved_out("tokenizer.json"), "tokenizer.json"),
        (_moved_out("model.safetensors"), "model.safetensors"),
    ],
)
def test_a_link_out_of_the_folder_is_named_and_not_read(model: Path, plant: Callable[[Path], None], name: str) -> None:
    plant(model)
    with pytest.raises(StageError) as caught:
        _read(model)
    assert caught.value.fault is Fault.BROKEN_MODEL
    assert f"{name} is a link to a file outside of the folder" in str(caught.value)
    assert "not-for-others" not in str(caught.value)


def test_a_snapshot_in_the_hubs_cache_is_read_through_its_links(model: Path, tmp_path: Path) -> None:
    expected = _read(model)
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert _read(snapshot) == expected


def test_files_that_are_no_part_of_a_model_are_not_fetched_with_it(model: Path) -> None:
    expected = _read(model)
    for name in ("config.9.9.9.json", "trainer_state.json", "notes.txt", "other.jinja", "custom.model", ".env.json"):
        (model / name).write_text("{}")
    (model / "README.md").symlink_to(model.parent / "credentials")
    assert _read(model) == expected
    assert "config.json" in expected


@pytest.mark.parametrize(
    ("name", "field", "others"),
    [
        ("config.json", "configuration_files", ["config.4.0.0.json"]),
        ("tokenizer_config.json", "fast_tokenizer_files", ["tokenizer.4.0.0.json"]),
    ],
)
def test_a_file_that_puts_another_in_its_place_is_refused(
    model: Path, name: str, field: str, others: list[str]
) -> None:
    path = model / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | {field: others}))
    (model / others[0]).write_text(json.dumps(content | {"num_hidden_layers": 1}))
    with pytest.raises(StageError) as caught:
        _read(model)
    assert caught.value.fault is Fault.BROKEN_MODEL
    assert field in str(caught.value)
    assert "remove that field" in str(caught.value)
