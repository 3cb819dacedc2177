"""What preparing conversations costs by part, without the messages between prepare's own processes."""

import json
from contextlib import closing
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from time import process_time
from unittest.mock import patch

import psutil

_BATCH_ROWS = 512  # as prepare's own batches


def cpu_s_by_part(rows: Path, model: Path, folder: Path) -> dict[str, float]:
    """Prepare the rows of a file step by step; return the seconds of CPU of each part."""
    from tokenizers import Tokenizer

    from finetune_api.job import DatasetFormat
    from finetune_trainer.data.examples import TokenRun, tree_of
    from finetune_trainer.data.kinds import content_hash
    from finetune_trainer.data.raw_rows import decode_row, raw_line
    from finetune_trainer.data.renderer import Rendered, Renderer
    from finetune_trainer.data.rows import Conversation
    from finetune_trainer.data.shapes import Found, RowChoices, read_row
    from finetune_trainer.data.spool import Spool
    from finetune_trainer.data.stops import Ends
    from finetune_trainer.data.tokens import RowTokenizer

    config = json.loads((model / "tokenizer_config.json").read_bytes())
    end, choices, content = config["eos_token"], RowChoices(), (model / "tokenizer.json").read_text()
    tokenizer = RowTokenizer(Tokenizer.from_str(content), end)
    tokenizer.encoders.consider(content, after=0)
    tokenizer.encoders.try_fast()
    template = (model / "chat_template.jinja").read_text()
    renderer = Renderer(template, {}, datetime.now(UTC), ends=Ends((end,)), learn_all=False)
    spent: dict[str, float] = dict.fromkeys(("JSON", "check and hash", "tokens", "labels", "write"), 0.0)

    def spend(part: str) -> None:
        nonlocal began_s
        now_s = process_time()
        spent[part] += now_s - began_s
        began_s = now_s

    with rows.open("rb") as lines, Spool(folder / "parts") as spool, closing(renderer):
        while raw := [raw_line(number, line) for number, line in enumerate(islice(lines, _BATCH_ROWS))]:
            began_s = process_time()
            values = [decode_row(each).value for each in raw]
            spend("JSON")
            found = [read_row(value, DatasetFormat.MESSAGES, choices) for value in values]
            checked = [each.row for each in found if isinstance(each, Found) and isinstance(each.row, Conversation)]
            hashes = [content_hash(row) for row in checked]
            spend("check and hash")
            results: list[object] = []
            while len(results) < len(checked):  # as many at once as it is good to hold
                results += renderer.render(checked[len(results) :])
            sequences = [each for result in results if isinstance(result, Rendered) for each in result.sequences]
            texts, spans = [each.text for each in sequences], [each.spans for each in sequences]
            began_s = process_time()
            encoded = tokenizer.encoders.encode(texts)
            spend("tokens")
            with patch.object(tokenizer.encoders, "encode", return_value=encoded):
                tokens = tokenizer.conversations(texts, spans, learn_all=False)
            spend("labels")
            for number, (hashed, each) in enumerate(zip(hashes, tokens, strict=True)):
                assert isinstance(hashed, bytes)
                spool.append(hashed, 0, number, [tree_of([TokenRun(each.ids, each.labels)])])
            spend("write")
        (child,) = psutil.Process().children()
        times = child.cpu_times()
    return spent | {"render": times.user + times.system}
