"""The CLI judges jobs as the API server does: over the same table, with the same words."""

from pathlib import Path
from typing import Any

import pytest

import spec_cases
from finetune_cli.load import load_jobs
from finetune_cli.validate import problems


@pytest.mark.parametrize("path", spec_cases.EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_accepted(path: Path):
    assert [problems(job, local=False) for job in load_jobs(path)] == [[]] * len(load_jobs(path))


@pytest.mark.parametrize(("name", "body"), spec_cases.accepted())
def test_accepted(name: str, body: dict[str, Any]):
    assert problems(body, local=False) == []


@pytest.mark.parametrize(("name", "body", "says"), spec_cases.refused())
def test_refused_with_words_that_help(name: str, body: dict[str, Any], says: str):
    assert says in "\n".join(problems(body, local=False))


@pytest.mark.parametrize(("name", "body", "says"), spec_cases.refused_changes())
def test_changes_are_refused(name: str, body: dict[str, Any], says: str):
    assert problems(body) == []
    assert says in "\n".join(problems(body, spec_cases.base()))


@pytest.mark.parametrize(("name", "body"), spec_cases.allowed_changes())
def test_changes_are_allowed(name: str, body: dict[str, Any]):
    assert problems(body, spec_cases.base()) == []


def test_files_of_this_machine_are_taken_without_a_cluster_only():
    body = spec_cases.base()
    body["spec"]["model"]["uri"] = "file:///models/x"
    assert problems(body, local=True) == []
    (for_the_cluster,) = problems(body, local=False)
    assert "write s3://BUCKET/FOLDER" in for_the_cluster
    assert "only finetune run takes files of this machine" in for_the_cluster


def test_of_many_files_of_this_machine_it_is_said_once_who_takes_them():
    body = spec_cases.base()
    body["spec"] |= {"output": {"uri": "file:///out"}, "datasets": [{"uri": "file:///a"}, {"uri": "file:///b"}]}
    said = problems(body, local=False)
    assert len(said) == 3
    assert "\n".join(said).count("only finetune run takes files") == 1


@pytest.mark.parametrize(("given", "loss"), [("SimPO", "SimPO"), ("IPO", "IPO"), ("sigmoid", "Sigmoid")])
def test_a_loss_of_dpo_as_a_method_is_told_where_it_belongs(given: str, loss: str):
    body = spec_cases.base()
    body["spec"]["method"] = {"type": given}
    assert problems(body)[0].endswith(f"; {loss} is a loss of DPO: write type: DPO, and dpo.loss: {loss}")


def test_a_relative_path_is_not_taken():
    body = spec_cases.base()
    body["spec"]["model"]["uri"] = "file://models/x"
    assert f"write file://{Path.cwd()}/models/x" in problems(body)[0]


@pytest.mark.parametrize(
    ("given", "advised"),
    [
        ("/data/x.jsonl", "write file:///data/x.jsonl for a path of this machine"),
        ("./x.jsonl", "write file:///here/x.jsonl"),
        ("sub/../chat/", "write file:///here/chat/ "),
        ("~/x.jsonl", "write file:///home/me/x.jsonl"),
        ("file:/data/x.jsonl", "write file:///data/x.jsonl"),
        ("gs://bucket/x.jsonl", "write s3://BUCKET/PATH, or file:// and the absolute path"),
        ("hf://org/rows", "nothing is fetched from the Hugging Face Hub: download it"),
        ("org/rows", "a name on the Hugging Face Hub is downloaded first"),
    ],
)
def test_a_path_of_this_machine_is_told_as_the_uri_to_write(given: str, advised: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "cwd", lambda: Path("/here"))
    monkeypatch.setenv("HOME", "/home/me")
    body = spec_cases.base()
    body["spec"]["datasets"] = [{"uri": given}]
    (first, *_) = problems(body)
    assert first.startswith("spec.datasets[0].uri: ")
    assert advised in first
    assert advised not in "\n".join(problems(body, local=False))


@pytest.mark.parametrize("name", ["My_Pirate", "Pirate", "pirate bot", "bot.v2", "-pirate", "pirate-", ""])
def test_a_name_that_no_pod_may_have_is_told_what_it_may_hold(name: str):
    body = spec_cases.base()
    body["metadata"]["name"] = name
    assert "metadata.name" in "\n".join(problems(body))
    if name:
        assert "may hold only lower-case letters, digits and -" in "\n".join(problems(body))


def test_a_misspelt_field_is_told_its_right_name():
    body = spec_cases.base()
    body["spec"]["hyperparameters"] = {"learning_rate": 1e-4}
    assert problems(body) == ['unknown field "spec.hyperparameters.learning_rate"; write learningRate']


@pytest.mark.parametrize(
    ("place", "name", "says"),
    [
        ("hyperparameters", "lr", "the fields here are epochs, globalBatchSize, learningRate, "),
        ("hyperparameters", "batchSize", "globalBatchSize"),
        ("hyperparameters", "warmup_steps", "warmupRatio"),
        ("", "learningRate", "it belongs into spec.hyperparameters"),
        ("", "learning_rate", "it belongs into spec.hyperparameters, as learningRate"),
        ("hyperparameters", "rank", "it belongs into spec.peft"),
        ("", "maxSequenceLength", "it belongs into spec.preprocessing"),
        ("method", "lambda", "it belongs into spec.method.orpo"),
        ("method", "beta", "it belongs into spec.method.dpo or spec.method.kto"),
        ("", "dataset", "the fields here are activeDeadlineSeconds, checkpoint, datasets, "),
    ],
)
def test_an_unknown_field_is_told_where_it_belongs_or_what_there_is(place: str, name: str, says: str):
    body = spec_cases.base()
    (body["spec"].setdefault(place, {}) if place else body["spec"])[name] = 1
    (only,) = problems(body)
    assert only.startswith(f'unknown field "{".".join(filter(None, ("spec", place, name)))}"; ')
    assert says in only


def test_a_field_of_another_methods_options_is_not_sent_there():
    body = spec_cases.base()
    body["spec"]["method"] = {"type": "ORPO", "orpo": {"beta": 0.1}}
    assert problems(body) == ['unknown field "spec.method.orpo.beta"; the fields here are lambda']


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**30])
def test_a_number_that_the_api_server_cannot_hold_is_refused(number: int):
    body = spec_cases.base()
    body["spec"]["resources"] = {"cpu": number}
    assert problems(body) == ["spec.resources.cpu: the number is too large"]


def test_rules_see_of_the_metadata_only_the_name_as_in_the_cluster():
    body = spec_cases.base()
    body["metadata"]["annotations"] = {"build": 10**30}
    assert problems(body) == []


def test_another_kind_is_refused():
    assert "no FineTuneJob" in problems({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}})[0]


@pytest.mark.parametrize("metadata", [None, {}, {"name": ""}, "bot"])
def test_a_job_without_a_name_is_refused(metadata: Any):
    assert problems(spec_cases.base() | {"metadata": metadata}) == ["metadata.name: Required value"]


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"name": 7}, "metadata.name: must be of type string; quote it"),
        ({"name": "bot", "labels": {"team": 7}}, "metadata.labels.team: must be of type string; quote it"),
        ({"name": "bot", "annotations": {"on": True}}, "metadata.annotations.on: must be of type string; quote it"),
        ({"name": "bot", "labels": ["team"]}, "metadata.labels: must be of type object"),
    ],
)
def test_metadata_that_no_object_may_have_is_refused(metadata: dict[str, Any], says: str):
    assert problems(spec_cases.base() | {"metadata": metadata}, local=False) == [says]


def test_labels_and_annotations_of_texts_are_accepted():
    metadata = {"name": "bot", "labels": {"team": "7", "cost": None}, "annotations": None}
    assert problems(spec_cases.base() | {"metadata": metadata}, local=False) == []


def test_a_name_that_the_cluster_is_to_make_is_judged_as_it_would_be_made():
    """As `kubectl create` takes it."""
    body = spec_cases.base() | {"metadata": {"generateName": "bot-"}}
    assert problems(body, local=False) == []
    assert problems(body, local=True) == ["metadata.name: Required value"]
    body["metadata"] = {"generateName": "Bot."}
    assert "may hold only lower-case letters, digits and -" in problems(body, local=False)[0]
