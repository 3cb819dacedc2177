"""What the base model is, from its small files and the headers of its weights; the weights are not downloaded."""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import orjson
from tokenizers import Tokenizer

from finetune_api.errors import StageError
from finetune_api.layout import join
from finetune_api.reasons import Fault
from finetune_trainer.data.problems import place
from finetune_trainer.data.template import MAX_TEMPLATE_BYTES, find_template
from finetune_trainer.data.tokens import RowTokenizer, special_tokens
from finetune_trainer.data.widths import layer_widths
from finetune_trainer.families import MIXTURE_FIELDS, PACKING_FAMILIES, frequencies_change_after
from finetune_trainer.identity import SAMPLE_BYTES, sample_digest, sample_places
from finetune_trainer.runplan import FileRecord, ModelFacts
from finetune_trainer.store import ObjectInfo, Store, spec_field

_MAX_HEADER_BYTES = 64 * 2**20
_MAX_TOKENIZER_BYTES = 64 * 2**20
_PARALLEL_SAMPLES = 8
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".onnx", ".h5", ".msgpack")
_SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model")
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


class _Folder:
    """The model's files; each is read whole at one version, or not at all."""

    def __init__(self, store: Store, uri: str) -> None:
        self.store, self.uri = store, uri
        prefix = join(uri, "")
        with spec_field("model.uri"):
            self.files = {
                info.uri.removeprefix(prefix): info
                for info in store.list(prefix)
                if "/" not in info.uri.removeprefix(prefix)
            }
        self.records: dict[str, FileRecord] = {}  # of those that were read whole

    def read(self, name: str, max_bytes: int = 16 * 2**20) -> bytes | None:
        info = self.files.get(name)
        if info is None:
            return None
        content, etag = self.store.read(info.uri, max_bytes=max_bytes)
        sha256 = "sha256:" + hashlib.sha256(content).hexdigest()
        self.records[name] = FileRecord(uri=info.uri, size_bytes=len(content), sha256=sha256, etag=etag)
        return content

    def identify(self, names: list[str]) -> list[FileRecord]:
        """Return what tells the content of each file: of those that were not read, without reading them whole."""
        with ThreadPoolExecutor(_PARALLEL_SAMPLES, thread_name_prefix="identify") as pool:
            return list(pool.map(self._identify, names))

    def _identify(self, name: str) -> FileRecord:
        if name in self.records:
            return self.records[name]
        info = self.store.head(self.files[name].uri)
        if info is None:
            raise StageError(Fault.OBJECT_NOT_FOUND, uri=place(self.files[name].uri), field="model.uri")
        blocks = [
            self.store.read_range(info.uri, offset, length, if_match=info.etag)
            for offset, length in sample_places(info.size_bytes)
        ]
        if info.size_bytes <= SAMPLE_BYTES:
            sha256 = "sha256:" + hashlib.sha256(b"".join(blocks)).hexdigest()
            return FileRecord(uri=info.uri, size_bytes=info.size_bytes, sha256=sha256, etag=info.etag)
        return FileRecord(
            uri=info.uri,
            size_bytes=info.size_bytes,
            sample=sample_digest(info.size_bytes, blocks),
            checksum=info.checksum,
            etag=info.etag,
        )

    def json(self, name: str) -> dict[str, Any] | None:
        content = self.read(name)
        if content is None:
            return None
        try:
            value = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise self.unsupported(f"{name} is not valid JSON") from error
        if not isinstance(value, dict):
            raise self.unsupported(f"{name} is not a JSON object")
        return cast(dict[str, Any], value)

    def unsupported(self, problem: str, architecture: str = "model") -> StageError:
        return StageError(
            Fault.UNSUPPORTED_MODEL, uri=place(self.uri), architecture=architecture[:64], problem=problem[:256]
        )


def read_model(store: Store, uri: str) -> Model:
    """Read and judge the model at `uri`.

    Raises OBJECT_NOT_FOUND, PICKLE_ONLY, REMOTE_CODE, UNSUPPORTED_MODEL, and INPUT_CHANGED for a file that is written
    while it is read.
    """
    folder = _Folder(store, uri)
    config = folder.json("config.json")
    if config is None:
        raise StageError(Fault.OBJECT_NOT_FOUND, uri=place(join(uri, "config.json")), field="model.uri")
    tokenizer_config = folder.json("tokenizer_config.json") or {}
    if "auto_map" in config or "auto_map" in tokenizer_config:
        raise StageError(Fault.REMOTE_CODE, uri=place(uri))
    weights = _weight_files(folder)
    architecture, family = _architecture(folder, config)
    shapes = _shapes(folder, weights)
    tokens = special_tokens(tokenizer_config, folder.json("special_tokens_map.json") or {})
    tokenizer = _tokenizer(folder, config, tokens)
    template = _template(folder, tokenizer_config)
    facts = _facts(folder, config, architecture, family, shapes, weights)
    return Model(facts, family, tokenizer, tokens, template)


def _weight_files(folder: _Folder) -> list[str]:
    index = folder.json("model.safetensors.index.json")
    if index is not None:
        weight_map: Any = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise folder.unsupported("model.safetensors.index.json has no weight_map")
        names = sorted({str(name) for name in cast(dict[str, Any], weight_map).values()})
        missing = [name for name in names if name not in folder.files]
        if missing:
            raise StageError(Fault.OBJECT_NOT_FOUND, uri=place(join(folder.uri, missing[0])), field="model.uri")
        return names
    if "model.safetensors" in folder.files:
        return ["model.safetensors"]
    pickles = [name for name in sorted(folder.files) if name.endswith(_PICKLES)]
    if pickles:
        raise StageError(Fault.PICKLE_ONLY, uri=place(folder.uri), found=pickles[0][:128])
    raise StageError(Fault.OBJECT_NOT_FOUND, uri=place(join(folder.uri, "model.safetensors")), field="model.uri")


def _architecture(folder: _Folder, config: dict[str, Any]) -> tuple[str, str]:
    names: Any = config.get("architectures")
    name = str(cast(list[Any], names)[0]) if isinstance(names, list) and names else ""
    family = config.get("model_type")
    if not name.endswith("ForCausalLM") or not isinstance(family, str):
        raise folder.unsupported("only causal language models (…ForCausalLM) can be fine-tuned", name or "model")
    if config.get("quantization_config"):
        raise folder.unsupported("its weights are quantized; use the model they were made from", name)
    return name[:256], family[:64]


def _shapes(folder: _Folder, weights: list[str]) -> dict[str, list[int]]:
    """Shapes of all weights, from the headers of the safetensors files."""
    shapes: dict[str, list[int]] = {}
    for name in weights:
        info = folder.files[name]
        for key, entry in _header(folder, info).items():
            shape = cast(dict[str, Any], entry).get("shape") if isinstance(entry, dict) else None
            if key != "__metadata__" and isinstance(shape, list):
                shapes[key] = [int(side) for side in cast(list[Any], shape)]
    if not shapes:
        raise folder.unsupported("its safetensors files hold no weights")
    return shapes


def _header(folder: _Folder, info: ObjectInfo) -> dict[str, Any]:
    damaged = folder.unsupported(f"{info.uri.rpartition('/')[2]} is not a safetensors file")
    with folder.store.open(info.uri) as stream:
        head = stream.read(8)
        size = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= size <= min(info.size_bytes - 8, _MAX_HEADER_BYTES):
            raise damaged
        body = stream.read(size)
    try:
        header = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise damaged from error
    if not isinstance(header, dict):
        raise damaged
    return cast(dict[str, Any], header)


def _tokenizer(folder: _Folder, config: dict[str, Any], tokens: dict[str, str]) -> RowTokenizer:
    content = folder.read("tokenizer.json", _MAX_TOKENIZER_BYTES)
    if content is None:
        raise folder.unsupported("it has no tokenizer.json; save its tokenizer with a current transformers")
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except ValueError as error:
        raise folder.unsupported("its tokenizer.json cannot be read") from error
    eos = tokens.get("eos_token")
    if eos is None:
        generation = folder.json("generation_config.json") or {}
        ids: Any = generation.get("eos_token_id", config.get("eos_token_id"))
        number = cast(list[Any], ids)[0] if isinstance(ids, list) and ids else ids
        eos = tokenizer.id_to_token(number) if isinstance(number, int) and number >= 0 else None
    try:
        return RowTokenizer(tokenizer, eos)
    except ValueError as error:
        raise folder.unsupported(str(error)) from error


def _template(folder: _Folder, tokenizer_config: dict[str, Any]) -> str | None:
    content = folder.read("chat_template.jinja", MAX_TEMPLATE_BYTES)
    try:
        template = find_template(tokenizer_config, None if content is None else content.decode())
    except UnicodeDecodeError as error:
        raise folder.unsupported("chat_template.jinja is not UTF-8") from error
    if template is not None and len(template.encode(errors="replace")) > MAX_TEMPLATE_BYTES:
        raise folder.unsupported(f"its chat template is larger than {MAX_TEMPLATE_BYTES // 1024} KiB")
    return template


def _number(folder: _Folder, config: dict[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise folder.unsupported(f"config.json has no {names[0]}")


def _facts(
    folder: _Folder,
    config: dict[str, Any],
    architecture: str,
    family: str,
    shapes: dict[str, list[int]],
    weights: list[str],
) -> ModelFacts:
    linear = adapted_shapes(shapes)
    if not linear:
        raise folder.unsupported("no linear layers are found in its weights", architecture)
    files = folder.identify(sorted(weights + [name for name in folder.files if name.endswith(_SMALL_SUFFIXES)]))
    hidden_size = _number(folder, config, "hidden_size", "n_embd", "d_model")
    layers = _number(folder, config, "num_hidden_layers", "n_layer", "num_layers")
    return ModelFacts(
        uri=folder.uri,
        digest=_digest(files),
        files=files,
        architecture=architecture,
        hidden_size=hidden_size,
        layers=layers,
        vocabulary_size=_number(folder, config, "vocab_size"),
        parameters=sum(_elements(shape) for shape in shapes.values()),
        expert_parameters=sum(_elements(shape) for name, shape in shapes.items() if _is_expert(name, shape, config)),
        context_length=_number(folder, config, "max_position_embeddings", "n_positions", "max_sequence_length"),
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


def adapted_shapes(shapes: dict[str, list[int]]) -> dict[str, tuple[str, list[int]]]:
    """Return the weights that LoRA is put beside: name -> (module's name, shape)."""
    return {
        name: (match["module"], shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and (match := _LAYER_WEIGHT.search(name)) and not _NOT_ADAPTED.search(name)
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
