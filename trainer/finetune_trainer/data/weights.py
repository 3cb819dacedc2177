"""Which files hold the base model's weights, and what their headers say; the weights are not downloaded."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import orjson

from finetune_api.errors import StageError
from finetune_api.layout import join
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_trainer.data.model_folder import INDEX, MAX_VALUES, SMALL_FILES, ModelFolder, count_values
from finetune_trainer.data.problems import LFS_POINTER, place
from finetune_trainer.store import ObjectInfo

WEIGHTS = "model.safetensors"
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
         "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
         "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}  # fmt: skip
# Generous: a mixture of 384 experts and 61 layers has 71,000 tensors, in 60 files.
MAX_TENSORS = 2**18
MAX_HEADER_BYTES = 32 * 2**20
_MAX_NAME = 256  # characters of a tensor's name
_MAX_FILES = 1000 - len(SMALL_FILES)  # so many, with the small ones, can a plan hold
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**50  # of sides that are not 0: what torch can count
_MAX_POINTER_BYTES = 1024
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_FORMATS = (".gguf", ".onnx", ".h5", ".msgpack", ".tflite", ".npz")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a header describes it."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class Weights:
    """All tensors of a model."""

    files: list[str]
    tensors: dict[str, StoredTensor]
    index: dict[str, str]  # tensor → file as the index says; empty for a model in one file


def read_weights(folder: ModelFolder) -> Weights:
    """Find the weights as transformers does and read their headers.

    Raises OBJECT_NOT_FOUND, PICKLE_ONLY, NO_SAFETENSORS, BROKEN_MODEL.
    """
    files, index = _files(folder)
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        found = _tensors(folder, name)
        if twice := min(found.keys() & tensors.keys(), default=None):
            raise folder.broken(f"{_cut(twice)} is in {tensors[twice].file} and in {name}; copy the model again, whole")
        tensors |= found
        if len(tensors) > MAX_TENSORS:
            raise folder.broken(f"its files hold more than {MAX_TENSORS:,} tensors, which is no model's number")
    if not tensors:
        raise folder.broken(f"{files[0]} holds no weights")
    return Weights(files, tensors, index)


def _files(folder: ModelFolder) -> tuple[list[str], dict[str, str]]:
    index = folder.json(INDEX)
    if WEIGHTS in folder.files:
        _require_alone(folder, index)
        return [WEIGHTS], {}
    if index is None:
        raise _no_weights(folder)
    weight_map: Any = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise folder.broken(f"{INDEX} has no weight_map")
    index_of = {str(tensor): str(file) for tensor, file in cast(dict[str, Any], weight_map).items()}
    names = sorted(set(index_of.values()))
    if len(names) > _MAX_FILES:
        raise folder.broken(f"{INDEX} names {len(names):,} files; {_MAX_FILES:,} are the most")
    missing = [name for name in names if name not in folder.files]
    if missing:
        raise StageError(Fault.OBJECT_NOT_FOUND, uri=place(join(folder.uri, missing[0])), field="model.uri")
    return names, index_of


def _require_alone(folder: ModelFolder, index: dict[str, Any] | None) -> None:
    """Raise BROKEN_MODEL where other weights lie beside model.safetensors: some load it, others, such as vLLM, them."""
    shard = _first(sorted(folder.files), lambda name: bool(_SHARD.search(name)))
    weight_map: Any = (index or {}).get("weight_map")
    if shard is None and isinstance(weight_map, dict):
        shard = _first((str(file) for file in cast(dict[str, Any], weight_map).values()), lambda name: name != WEIGHTS)
    if shard is not None:
        raise folder.broken(
            f"it has {WEIGHTS} and, as others would load it, {shortened(shard, 100)}; leave only one of both"
        )


def _no_weights(folder: ModelFolder) -> StageError:
    names = sorted(folder.files)
    if shard := _first(names, lambda name: bool(_SHARD.search(name))):
        return folder.broken(f"{INDEX} is missing, which says what {shard} and the other shards hold; copy it too")
    if "adapter_model.safetensors" in names:
        return folder.broken("it is an adapter (adapter_model.safetensors); name the base model that it was made for")
    if other := _first(names, lambda name: name.endswith(".safetensors")):
        return folder.broken(f"it has {other} but no {WEIGHTS}; save it with save_pretrained of transformers")
    if pickle := _first(names, lambda name: name.endswith(_PICKLES)):
        return StageError(Fault.PICKLE_ONLY, uri=place(folder.uri), found=shortened(pickle, 128))
    if other := _first(names, lambda name: name.endswith(_OTHER_FORMATS)):
        return StageError(Fault.NO_SAFETENSORS, uri=place(folder.uri), found=shortened(other, 128))
    return StageError(Fault.OBJECT_NOT_FOUND, uri=place(join(folder.uri, WEIGHTS)), field="model.uri")


def _first(names: Iterable[str], fits: Callable[[str], bool]) -> str | None:
    return next((name for name in names if fits(name)), None)


def _tensors(folder: ModelFolder, name: str) -> dict[str, StoredTensor]:
    """Return the tensors of one file, whose bytes are all there.

    The format: https://github.com/huggingface/safetensors, 8 bytes of length, a JSON header, the data without holes.
    """
    info = folder.files[name]
    header, data_bytes = _header(folder, name, info)
    damaged = folder.broken(f"{name} is damaged: its header does not describe its tensors; copy it again")
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int]] = []
    for key, value in header.items():
        if key == "__metadata__":
            continue
        if len(key) > _MAX_NAME:
            raise folder.broken(f"{name} names a tensor with {len(key):,} characters; {_MAX_NAME} are the most")
        try:
            dtype, shape = value["dtype"], tuple(value["shape"])
            begin, end = value["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise damaged from error
        if any(type(number) is not int for number in (*shape, begin, end)) or not isinstance(dtype, str):
            raise damaged
        bits = _BITS.get(dtype)
        if bits is None:
            raise folder.broken(f"{_cut(key)} in {name} is of the type {shortened(dtype, 32)!r}, which is not known")
        countable = len(shape) <= _MAX_DIMENSIONS and math.prod(max(side, 1) for side in shape) <= _MAX_ELEMENTS
        if min(shape, default=0) < 0 or not countable or 8 * (end - begin) != bits * math.prod(shape):
            raise folder.broken(f"{_cut(key)} in {name} is damaged: its shape and its place in the file do not agree")
        tensors[key] = StoredTensor(dtype, shape, name)
        spans.append((begin, end))
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    if [begin for begin, _ in spans] != ends[:-1]:
        raise damaged
    if ends[-1] > data_bytes:
        last = next(key for key, value in header.items() if key in tensors and value["data_offsets"][1] > data_bytes)
        whole = info.size_bytes + ends[-1] - data_bytes
        raise folder.broken(f"{name} is cut off: {info.size_bytes:,} of {whole:,} bytes, {last} lacks; copy it again")
    if ends[-1] < data_bytes:
        raise folder.broken(f"{name} has {data_bytes - ends[-1]:,} bytes too many at its end; copy it again")
    return tensors


def _header(folder: ModelFolder, name: str, info: ObjectInfo) -> tuple[dict[str, Any], int]:
    """Return the JSON header and the number of bytes after it."""
    not_safetensors = folder.broken(f"{name} is not a safetensors file")
    with folder.store.open(info.uri) as stream:
        head = stream.read(8)
        if LFS_POINTER.startswith(head) and len(head) == 8 and info.size_bytes <= _MAX_POINTER_BYTES:
            raise folder.lfs_pointer(name)
        size = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= size <= 2**32:  # random bytes, most likely
            raise not_safetensors
        if size > MAX_HEADER_BYTES:
            limit = f"{MAX_HEADER_BYTES // 2**20} MiB are the most"
            raise folder.broken(f"the header of {name} has {size // 2**20:,} MiB; {limit}")
        if size > info.size_bytes - 8:
            raise folder.broken(f"{name} is cut off within its header: {info.size_bytes:,} bytes; copy it again")
        body = stream.read(size)
    if (values := count_values(body)) > MAX_VALUES:  # a tensor has about ten
        raise folder.broken(f"the header of {name} has {values:,} values; {MAX_VALUES:,} are the most")
    try:
        header = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise not_safetensors from error
    if not isinstance(header, dict):
        raise not_safetensors
    return cast(dict[str, Any], header), info.size_bytes - 8 - size


def _cut(name: str) -> str:
    return name if len(name) <= 100 else "…" + name[-99:]
