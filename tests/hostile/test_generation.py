"""After the last step nothing that came with the base model decides whether the adapter is kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.reasons import Fault
from finetune_trainer import train
from finetune_trainer.decoding import LastWords
from finetune_trainer.stop import StopFlag
from tiny_run import context, make_run, use_model

GENERATION: dict[str, Any] = {
    "num_beams": 3000,
    "num_return_sequences": 3000,
    "stop_strings": ["x"],
    "do_sample": True,
    "temperature": 0.0,
    "cache_implementation": "static",
    "prompt_lookup_num_tokens": 9,
    "max_time": 1e-9,
    "eos_token_id": [-1, 10**30, 257],
}
TOKENIZER: dict[str, Any] = {"tokenizer_class": "WhisperTokenizer", "errors": "nonsense", "model_max_length": -1}


def test_another_way_to_generate_and_another_class_of_tokenizer_lose_no_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2)
    model = run.folder / "model"
    (model / "generation_config.json").write_text(json.dumps(GENERATION))
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | TOKENIZER))
    use_model(run, model)
    run.write_plan(run.plan.model_copy(update={"stop_token_ids": []}))
    result = train.run(context(run), StopFlag(60))
    assert result.fault is Fault.COMMITTED
    adapter = Path(f"{result.args['uri']}".removeprefix("file://"))
    samples = json.loads((adapter / "eval.json").read_text())["samples"]
    assert all(1 <= len(each["tuned"]["token_ids"]) <= 64 for each in samples)
    assert json.loads((adapter / "generation_config.json").read_text())["eos_token_id"] == [257]


def test_a_tokenizer_that_fails_after_the_last_step_costs_the_words_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path, steps=1)
    path = run.folder / "model" / "tokenizer.json"
    endless = {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": endless}))
    words = LastWords(run.folder / "model")
    assert [words.decode([65, 66]), words.decode([67])] == ["", ""]
    words.close()
    assert len([each for each in caplog.messages if "makes the tokenizers library fail" in each]) == 1
