"""The child process that loads a model without its values: `python -P -m finetune_trainer.dry_load`, for prepare.

Reads {"config": …, "shapes": {tensor: shape}} as JSON from stdin and writes a LoadReport to stdout. All tensors are on
torch's meta device, so a model of any size takes no memory. What transformers raises while it builds the model ends
the process; the parent says the last line.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from finetune_trainer.data.structure import MACHINE_FAILED, NO_MEMORY, READY, SIZES, LoadReport, is_of_the_machine
from finetune_trainer.load_report import report_of

Shapes = dict[str, list[int]]


def judge(config: dict[str, Any], shapes: Shapes) -> LoadReport:
    """Return what transformers says when it loads tensors of these shapes into the model of this configuration."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        empty = cast(PreTrainedModel, AutoModelForCausalLM.from_config(settings, dtype=torch.float32))
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    loader: Any = type(empty)  # whose types do not know of a loading report
    try:
        loaded, info = loader.from_pretrained(
            None,
            config=empty.config,
            state_dict=tensors,
            dtype=torch.float32,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,  # reported, not raised
            output_loading_info=True,
        )
    except RuntimeError:  # experts that cannot be stacked, say: told by what the conversions would have needed
        return report_of(empty, None, shapes)
    return report_of(loaded, info, shapes).model_copy(update={"sizes": _sizes(settings)})


def _sizes(settings: PreTrainedConfig) -> dict[str, int]:
    found = {name: getattr(settings, name, None) for name in SIZES}
    return {name: size for name, size in found.items() if isinstance(size, int) and size > 0}


def main() -> int:
    with os.fdopen(os.dup(1), "wb") as reply:
        os.dup2(2, 1)  # whatever libraries print is no reply
        reply.write(READY)
        reply.flush()
        request = json.load(sys.stdin.buffer)
        try:
            reply.write(judge(request["config"], request["shapes"]).model_dump_json().encode())
        except OSError as error:
            if is_of_the_machine(error):
                return MACHINE_FAILED
            raise
        except MemoryError:
            return NO_MEMORY
    return 0


if __name__ == "__main__":
    sys.exit(main())
