"""What the base model is, from its small files and the headers of its weights; the weights are not downloaded."""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, cast

from tokenizers import Tokenizer

from finetune_api.errors import StageError
from finetune_api.layout import join
from finetune_api.reasons import Fault
from finetune_trainer.data.added_tokens import problem_of_tokens
from finetune_trainer.data.model_folder import SMALL_FILES, ModelFolder
from finetune_trainer.data.problems import place
from finetune_trainer.data.structure import check_structure
from finetune_trainer.data.template import MAX_TEMPLATE_BYTES, find_template
from finetune_trainer.data.tokens import RowTokenizer, special_tokens
from finetune_trainer.data.weights import Weights, read_weights
from finetune_trainer.data.widths import layer_widths
from finetune_trainer.families import MIXTURE_FIELDS, PACKING_FAMILIES, frequencies_change_after, not_adapted
from finetune_trainer.runplan import FileRecord, ModelFacts
from finetune_trainer.store import Store

_MAX_TOKENIZER_BYTES = 64 * 2**20
_CAUSAL = ("ForCausalLM", "GPT2LMHeadModel")  # other …LMHeadModel are of encoders, which see what comes after
_CONTEXT = ("max_seq_len", "max_sequence_length", "seq_length")  # of families that know no max_position_embeddings
_NO_LIMIT = 2**20  # tokens
_LAYER_WEIGHT = re.compile(r"\.\d+\.(?:.+\.)?(?P<module>[^.]+)\.weight$")
_NOT_ADAPTED = re.compile(r"\.experts\.|\.router\.|\.gate\.weight$|norm|embed")


@dataclass(frozen=True)
class Model:
    """The base model as prepare needs it."""

    facts: ModelFacts
    family: str  # model_type of config.json
    tokenizer: RowTokenizer
    special_tokens: dict[str, str]
    chat_template: str | None


def read_model(store: Store, uri: str) -> Model:
    """Read and judge the model at `uri`.

    Raises OBJECT_NOT_FOUND, PICKLE_ONLY, NO_SAFETENSORS, REMOTE_CODE, BROKEN_MODEL, UNSUPPORTED_MODEL, and
    INPUT_CHANGED for a file that is written while it is read.
    """
    folder = ModelFolder(store, uri)
    config = folder.json("config.json")
    if "adapter_config.json" in folder.files:
        raise folder.broken("it holds an adapter (adapter_config.json); name the base model that it was made for")
    if config is None:
        raise StageError(Fault.OBJECT_NOT_FOUND, uri=place(join(uri, "config.json")), field="model.uri")
    tokenizer_config = folder.json("tokenizer_config.json") or {}
    if "auto_map" in config or "auto_map" in tokenizer_config:
        raise StageError(Fault.REMOTE_CODE, uri=place(uri))
    weights = read_weights(folder)
    architecture, family = _architecture(folder, config)
    sizes = check_structure(folder, architecture, config, weights)
    legacy_map = folder.json("special_tokens_map.json") or {}
    tokens = special_tokens(tokenizer_config, legacy_map)
    bare = _bare_tokenizer(folder)
    problem = problem_of_tokens(bare, tokenizer_config, folder.json("added_tokens.json") or {}, legacy_map)
    if problem is not None:
        raise folder.broken(problem)
    tokenizer = _tokenizer(folder, bare, config, tokens)
    template = _template(folder, tokenizer_config)
    facts = _facts(folder, config, sizes, architecture, family, weights)
    return Model(facts, family, tokenizer, tokens, template)


def _architecture(folder: ModelFolder, config: dict[str, Any]) -> tuple[str, str]:
    names: Any = config.get("architectures")
    name = str(cast(list[Any], names)[0])[:256] if isinstance(names, list) and names else ""
    family = config.get("model_type")
    for field, value in (("architectures", name), ("model_type", family)):
        if not isinstance(value, str) or not value:
            raise folder.broken(f"config.json does not say what the model is ({field} is missing); save it again")
    if not name.endswith(_CAUSAL):
        raise folder.unsupported(name, "only causal language models (…ForCausalLM) can be fine-tuned")
    if config.get("quantization_config"):
        raise folder.unsupported(name, "its weights are quantized; use the model they were made from")
    return name, str(family)[:64]


def _bare_tokenizer(folder: ModelFolder) -> Tokenizer:
    """Return the tokenizer of tokenizer.json alone."""
    content = folder.read("tokenizer.json", _MAX_TOKENIZER_BYTES)
    if content is None:
        raise folder.broken("it has no tokenizer.json; save its tokenizer with a current transformers")
    try:
        return Tokenizer.from_buffer(content)
    except ValueError as error:
        raise folder.broken("its tokenizer.json cannot be read") from error


def _tokenizer(
    folder: ModelFolder, tokenizer: Tokenizer, config: dict[str, Any], tokens: dict[str, str]
) -> RowTokenizer:
    eos, ids = tokens.get("eos_token"), _end_ids(folder, config)
    if eos is None and ids and ids[0] >= 0:
        eos = tokenizer.id_to_token(ids[0])
    return RowTokenizer(tokenizer, eos)  # an eos_token that is named was found in tokenizer.json


def _end_ids(folder: ModelFolder, config: dict[str, Any]) -> list[int]:
    """Return the tokens that the model itself stops at. Raises BROKEN_MODEL: train needs them after its last step."""
    for name, content in (
        ("generation_config.json", folder.json("generation_config.json") or {}),
        ("config.json", config),
    ):
        found: Any = content.get("eos_token_id")
        if found is None:
            continue
        ids = cast(list[Any], found) if isinstance(found, list) else [found]
        if any(type(each) is not int for each in ids):
            raise folder.broken(f"eos_token_id in {name} is neither a token id nor a list of them")
        return ids
    return []


def _template(folder: ModelFolder, tokenizer_config: dict[str, Any]) -> str | None:
    content = folder.read("chat_template.jinja", MAX_TEMPLATE_BYTES)
    try:
        template = find_template(tokenizer_config, None if content is None else content.decode())
    except UnicodeDecodeError as error:
        raise folder.broken("chat_template.jinja is not UTF-8") from error
    if template is not None and len(template.encode(errors="replace")) > MAX_TEMPLATE_BYTES:
        raise folder.broken(f"its chat template is larger than {MAX_TEMPLATE_BYTES // 1024} KiB")
    return template


def _size(folder: ModelFolder, sizes: dict[str, int], name: str) -> int:
    if name in sizes:
        return sizes[name]
    raise folder.broken(f"config.json has no {name}")


def _context_length(config: dict[str, Any], sizes: dict[str, int]) -> int:
    """Return how many tokens the model was made for; families without positions have no such limit."""
    named = next((config[name] for name in _CONTEXT if type(config.get(name)) is int and config[name] > 0), None)
    return sizes.get("max_position_embeddings") or named or _NO_LIMIT


def _facts(
    folder: ModelFolder,
    config: dict[str, Any],
    sizes: dict[str, int],
    architecture: str,
    family: str,
    weights: Weights,
) -> ModelFacts:
    shapes = {name: list(tensor.shape) for name, tensor in weights.tensors.items()}
    linear = adapted_shapes(shapes, family)
    if not linear:
        raise folder.unsupported(architecture, "no linear layers are found in its weights")
    files = folder.identify(sorted(weights.files + [name for name in folder.files if name in SMALL_FILES]))
    hidden_size, layers = _size(folder, sizes, "hidden_size"), _size(folder, sizes, "num_hidden_layers")
    return ModelFacts(
        uri=folder.uri,
        digest=_digest(files),
        files=files,
        architecture=architecture,
        hidden_size=hidden_size,
        layers=layers,
        vocabulary_size=_size(folder, sizes, "vocab_size"),
        parameters=sum(_elements(shape) for shape in shapes.values()),
        expert_parameters=sum(_elements(shape) for name, shape in shapes.items() if _is_expert(name, shape, config)),
        context_length=_context_length(config, sizes),
        lora_parameters_per_rank=sum(sum(shape) for _, shape in linear.values()),
        target_modules=sorted({module for module, _ in linear.values()}),
        packing_safe=family in PACKING_FAMILIES,
        widths=layer_widths(config, hidden_size, layers, [shape for _, shape in linear.values()]),
        frequencies_change_after=frequencies_change_after(config, family),
    )


def _is_expert(name: str, shape: list[int], config: dict[str, Any]) -> bool:
    """Return whether a weight is of one or all experts of a layer: by its name, or three-dimensional in a mixture."""
    is_mixture = any(config.get(field) for field in MIXTURE_FIELDS)
    return ".experts." in name or (is_mixture and len(shape) == 3)


def adapted_shapes(shapes: dict[str, list[int]], family: str) -> dict[str, tuple[str, list[int]]]:
    """Return the weights that LoRA is put beside: name -> (module's name, shape)."""
    left_out = not_adapted(family)
    return {
        name: (match["module"], shape)
        for name, shape in shapes.items()
        if len(shape) == 2
        and (match := _LAYER_WEIGHT.search(name))
        and not _NOT_ADAPTED.search(name)
        and match["module"] not in left_out
    }


def _elements(shape: list[int]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def _digest(files: list[FileRecord]) -> str:
    lines = json.dumps(
        [[file.uri.rpartition("/")[2], file.size_bytes, file.sha256 or [file.sample, file.checksum]] for file in files]
    )
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
