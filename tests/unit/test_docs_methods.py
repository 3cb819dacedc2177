"""Every job on the page about methods is valid, and is run on the rows that stand above it, to a committed adapter."""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_run import context, jsonl, train_context
from finetune_api.job import MethodType
from finetune_api.run import StartingAdapter
from finetune_cli.validate import problems
from finetune_trainer import prepare, train
from finetune_trainer.methods import method_of
from finetune_trainer.stop import StopFlag
from tiny_run import byte_tokenizer, tiny_config, tiny_model

PAGE = Path(__file__).resolve().parents[2] / "docs/methods.md"
BLOCK = re.compile(r"^```(json|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
COPIES = 16  # of each row: at the learning rates that are chosen, few steps on two rows would change nothing


@dataclass
class Shown:
    """Jobs of one block, in the order in which one begins with another, and the rows that stand above them."""

    rows: list[dict[str, Any]]
    jobs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    @property
    def name(self) -> str:
        return self.jobs[-1]["metadata"]["name"]


def shown() -> list[Shown]:
    found: list[Shown] = []
    rows: list[dict[str, Any]] = []
    for language, text in BLOCK.findall(PAGE.read_text()):
        if language == "json":
            rows = [json.loads(line) for line in text.splitlines()]
        else:
            found.append(Shown(rows, list(yaml.safe_load_all(text))))
    return found


def rows_for(method: MethodType, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those of the rows that a method learns from, where they are of several jobs."""
    needs = {MethodType.CPT: "text", MethodType.SFT: "messages", MethodType.DPO: "chosen"}
    mixed = len({frozenset(row) for row in rows}) > 1
    return [row for row in rows if not mixed or needs[method] in row]


def test_there_is_a_row_and_a_job_for_every_method_and_one_for_a_chain() -> None:
    methods = [job["spec"]["method"]["type"] for each in shown() for job in each.jobs]
    assert set(methods) == set(MethodType)
    assert max(len(each.jobs) for each in shown()) == 3
    sections = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
    assert [each.value for each in MethodType if each.value in sections] == list(MethodType)


@pytest.mark.parametrize("each", shown(), ids=lambda each: each.name)
def test_every_job_of_the_page_becomes_an_adapter(tmp_path: Path, each: Shown) -> None:
    tiny_model(tiny_config("llama", max_position_embeddings=512)).save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    committed: dict[str, StartingAdapter] = {}
    for job in each.jobs:
        assert problems(job) == []
        spec, name = job["spec"], job["metadata"]["name"]
        folder = tmp_path / name
        (folder / "data").mkdir(parents=True)
        rows = rows_for(MethodType(spec["method"]["type"]), each.rows)
        assert rows
        (folder / "data" / "a.jsonl").write_bytes(jsonl(rows * COPIES))
        parent = spec["model"].get("adapterFrom", {})
        here: dict[str, Any] = {
            **spec,
            "model": {"uri": (tmp_path / "model").as_uri(), **({"adapterFrom": parent} if parent else {})},
            "datasets": [{**dataset, "uri": (folder / "data").as_uri() + "/"} for dataset in spec["datasets"]],
            "output": {"uri": (folder / "out").as_uri()},
        }
        ctx = context(folder, here)
        ctx = replace(
            ctx, config=ctx.config.model_copy(update={"starting_adapter": committed.get(parent.get("jobName"))})
        )
        prepared = prepare.run(ctx)
        assert prepared.plan is not None
        result = train.run(train_context(ctx, prepared.plan.digest, folder / "train"), StopFlag(60))
        assert result.artifact is not None
        committed[name] = StartingAdapter(uri=result.artifact.uri, digest=result.artifact.digest)
        card = (Path(result.artifact.uri.removeprefix("file://")) / "README.md").read_text()
        assert f"trained by {method_of(MethodType(spec['method']['type'])).name}" in card
        assert not parent or committed[parent["jobName"]].uri.rstrip("/") in card
