"""What the base model is, from its small files and the headers of its weights; the weights are not downloaded."""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from finetune_api.base import sha256_digest
from finetune_api.errors import StageError
from finetune_api.layout import join
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_trainer.data.model_folder import SMALL_FILES, TEMPLATES, ModelFolder
from finetune_trainer.data.problems import place
from finetune_trainer.data.structure import Judge, LoadReport, check_structure
from finetune_trainer.data.template import MAX_TEMPLATE_BYTES, find_template
from finetune_trainer.data.tokenizer import Tokenizer, TokenizerFailedError
from finetune_trainer.data.tokenizer_worker import MAX_TOKEN_ID
from finetune_trainer.data.tokens import TOKENIZER_CLASS, end_ids, special_tokens
from finetune_trainer.data.weights import Weights, read_weights
from finetune_trainer.data.widths import layer_widths
from finetune_trainer.families import MIXTURE_FIELDS, PACKING_FAMILIES, frequencies_change_after, not_adapted
from finetune_trainer.runplan import MAX_MODULES, FileRecord, LayerWidths, ModelFacts
from finetune_trainer.store import Store

_GENERATION = "generation_config.json"
MAX_TOKENIZER_BYTES = 64 * 2**20
_CAUSAL = ("ForCausalLM", "GPT2LMHeadModel")  # other …LMHeadModel are of encoders, which see what comes after
_LEAST = {  # that a number must be, and finite, for the model to give numbers
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), sys.float_info.min),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"), 0.0),
}
_CONTEXT = ("max_seq_len", "max_sequence_length", "seq_length")  # of families that know no max_position_embeddings
_NO_LIMIT = 2**20  # tokens
_MAX_MODULE_NAME = 64
_MOST = 2**31 - 1  # of what is counted in tokens: a number of config.json may have a thousand digits
_LAYER = re.compile(r"^(?:.*?\.)?\d+\.")  # of a tensor's name, through its first number
_LAYER_WEIGHT = re.compile(r"\.\d+\.(?:.+\.)?(?P<module>[^.]+)\.weight$")
_NOT_ADAPTED = re.compile(r"\.experts\.|\.router\.|\.gate\.weight$|norm|embed")


@dataclass(frozen=True)
class Model:
    """The base model as prepare needs it."""

    facts: ModelFacts
    family: str  # model_type of config.json
    tokenizer: Tokenizer  # a process: to be closed
    special_tokens: dict[str, str]
    chat_template: str | None
    stop_ids: tuple[int, ...]  # the tokens at which the model stops; by the tokenizer where the model names none
    stops: tuple[str, ...]  # the same as text
    files: Mapping[str, bytes]  # by name, those that transformers' AutoTokenizer reads

    @property
    def unknown_id(self) -> int | None:
        """The token that stands for words which the tokenizer does not know, if one does and says nothing else."""
        unknown_id = self.tokenizer.unknown_id
        return None if unknown_id in (*self.stop_ids, self.tokenizer.eos_id, *self.tokenizer.prefix_ids) else unknown_id


def read_model(store: Store, uri: str, judge: Judge = check_structure) -> Model:
    """Read and judge the model at `uri`, the structure of its weights by `judge`.

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
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        if "auto_map" in content:
            raise StageError(Fault.REMOTE_CODE, uri=place(uri), file=name)
    _require_numbers(folder, config)
    weights = read_weights(folder)
    architecture, family = _architecture(folder, config)
    others = {name: folder.json(name) for name in ("added_tokens.json", "special_tokens_map.json", _GENERATION)}
    added_tokens, legacy_map, generation_config = (content or {} for content in others.values())
    tokens = special_tokens(tokenizer_config, legacy_map)
    template = _template(folder, tokenizer_config)
    content = folder.read("tokenizer.json", MAX_TOKENIZER_BYTES)
    if content is None:
        raise folder.broken("it has no tokenizer.json; save its tokenizer with a current transformers")
    ends = _end_ids(folder, generation_config, config)
    tokenizer = _tokenizer(
        folder, architecture, content, tokens.get("eos_token"), ends, [tokenizer_config, added_tokens, legacy_map]
    )
    exported = {name: json.dumps(other) for name, other in others.items() if other is not None}
    exported["tokenizer_config.json"] = json.dumps(tokenizer_config | {"tokenizer_class": TOKENIZER_CLASS})
    exported["tokenizer.json"] = content.decode()
    report = judge(folder, architecture, config, weights, exported)
    facts = _facts(folder, config, report, architecture, family, weights)
    stop_ids = _stop_ids(tokenizer, ends)
    texts = [tokenizer.decode([each]) for each in stop_ids]
    stops = tuple(dict.fromkeys(text for text in texts if text.strip()))
    named = others | {"config.json": config, "tokenizer_config.json": tokenizer_config}
    files = {name: json.dumps(other).encode() for name, other in named.items() if other is not None}
    return Model(facts, family, tokenizer, tokens, template, stop_ids, stops, files=files | {"tokenizer.json": content})


def _stop_ids(tokenizer: Tokenizer, ends: list[int]) -> tuple[int, ...]:
    if not ends and tokenizer.eos_id is not None:
        ends = [tokenizer.eos_id]
    return tuple(each for each in ends if each < tokenizer.vocabulary_size)


def _require_numbers(folder: ModelFolder, value: Any, place: str = "") -> None:
    """Raise BROKEN_MODEL for a number of config.json by which all that the model computes is no number."""
    if isinstance(value, dict):
        for name, each in cast(dict[str, Any], value).items():
            _require_numbers(folder, each, f"{place}.{name}" if place else name)
    elif isinstance(value, list):
        for index, each in enumerate(cast(list[Any], value)):
            _require_numbers(folder, each, f"{place}[{index}]")
    elif type(value) in (int, float):
        least = _LEAST.get(place.rpartition(".")[2])
        if isinstance(value, float) and math.isnan(value):
            shown = "NaN"
        elif least is not None and not least <= value < math.inf:
            shown = f"{max(value, -1e18):g}"
        else:
            return
        field = shortened(place, 64)
        raise folder.broken(f"config.json has {field} {shown}, with which the model gives no numbers")


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


def _tokenizer(
    folder: ModelFolder,
    architecture: str,
    content: bytes,
    eos_token: str | None,
    ends: list[int],
    files: list[dict[str, Any]],
) -> Tokenizer:
    try:
        return Tokenizer(content, eos_token, ends[0] if ends else None, files)
    except TokenizerFailedError as error:
        if error.readable:
            raise folder.broken(str(error)) from error
        raise folder.unsupported(architecture, str(error)) from error


def _end_ids(folder: ModelFolder, generation_config: dict[str, Any], config: dict[str, Any]) -> list[int]:
    """Return the tokens that the model itself stops at. Raises BROKEN_MODEL: train needs them after its last step."""
    for name, content in ((_GENERATION, generation_config), ("config.json", config)):
        try:
            found = end_ids(content, MAX_TOKEN_ID)
        except ValueError as error:
            raise folder.broken(f"{name}: {error}") from error
        if found is not None:
            return found
    return []


def _template(folder: ModelFolder, tokenizer_config: dict[str, Any]) -> str | None:
    files: dict[str, str] = {}
    for name, path in TEMPLATES.items():
        content = folder.read(path, MAX_TEMPLATE_BYTES)
        try:
            files |= {} if content is None else {name: content.decode()}
        except UnicodeDecodeError as error:
            raise folder.broken(f"{path} is not UTF-8") from error
    template = find_template(tokenizer_config, files)
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
    report: LoadReport,
    architecture: str,
    family: str,
    weights: Weights,
) -> ModelFacts:
    beside = {*report.beside}
    shapes = {name: list(tensor.shape) for name, tensor in weights.tensors.items() if name not in beside}
    linear = adapted_shapes(shapes, family)
    if not linear:
        raise folder.unsupported(architecture, "no linear layers are found in its weights")
    modules = sorted({module for module, _ in linear.values()})
    if len(modules) > MAX_MODULES or max(map(len, modules)) > _MAX_MODULE_NAME:
        most = f"{MAX_MODULES} with names of {_MAX_MODULE_NAME} characters are the most"
        problem = (
            f"it has {len(modules)} kinds of linear layers, such as {shortened(max(modules, key=len), 64)!r}; {most}"
        )
        raise folder.unsupported(architecture, problem)
    files = folder.identify(sorted(weights.files + [name for name in folder.files if name in SMALL_FILES]))
    width, layers = _width(_size(folder, report.sizes, "hidden_size"), shapes), _layers(shapes)
    layers = layers or min(_size(folder, report.sizes, "num_hidden_layers"), len(shapes))
    widths = layer_widths(config, width, layers, [shape for _, shape in linear.values()])
    frequencies = frequencies_change_after(config, family)
    return ModelFacts(
        uri=folder.uri,
        digest=_digest(files),
        files=files,
        architecture=architecture,
        hidden_size=width,
        layers=layers,
        vocabulary_size=_size(folder, report.sizes, "vocab_size"),
        parameters=sum(_elements(shape) for shape in shapes.values()),
        expert_parameters=sum(_elements(shape) for name, shape in shapes.items() if _is_expert(name, shape, config)),
        context_length=min(_context_length(config, report.sizes), _MOST),
        lora_parameters_per_rank=sum(sum(shape) for _, shape in linear.values()),
        target_modules=modules,
        packing_safe=family in PACKING_FAMILIES,
        widths=_as_wide_as_the_weights(widths, width, layers, shapes),
        frequencies_change_after=None if frequencies is None else min(frequencies, _MOST),
    )


def _layers(shapes: dict[str, list[int]]) -> int:
    """Return how many layers the tensors are of, by their names; 0 where these have no numbers."""
    stacks = Counter(layer.rstrip(".").rpartition(".")[0] for layer in {*_by_layer(shapes)} - {""})
    return max(stacks.values(), default=0)


def _by_layer(shapes: dict[str, list[int]]) -> Counter[str]:
    """Return the number of weights of each layer: model.layers.3.experts.7.… is of `model.layers.3.`, others of ""."""
    found: Counter[str] = Counter()
    for name, shape in shapes.items():
        match = _LAYER.match(name)
        found[match[0] if match else ""] += _elements(shape)
    return found


def _width(hidden_size: int, shapes: dict[str, list[int]]) -> int:
    """Return `hidden_size` if weights have it, or the side that most weights have."""
    sides = Counter(side for shape in shapes.values() if len(shape) == 2 for side in {*shape})
    return hidden_size if sides[hidden_size] else sides.most_common(1)[0][0]


def _as_wide_as_the_weights(
    widths: LayerWidths, hidden_size: int, layers: int, shapes: dict[str, list[int]]
) -> LayerWidths:
    """Return the widths as far as a layer's weights can have them: a field that no one reads may say more."""
    per_layer = _by_layer(shapes)
    most = max(
        1, (max((count for layer, count in per_layer.items() if layer), default=0) or per_layer[""]) // hidden_size
    )
    return LayerWidths(
        query=min(widths.query, most),
        key=min(widths.key, most),
        mlp=min(widths.mlp, most),
        window=None if widths.window is None else min(widths.window, _MOST),
        windowed_layers=min(widths.windowed_layers, layers),
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
    return sha256_digest(lines.encode())
