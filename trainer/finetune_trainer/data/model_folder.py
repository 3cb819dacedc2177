"""The base model's files in storage, what tells their content, and the words for what is wrong with them."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from finetune_api.base import sha256_digest
from finetune_api.errors import StageError
from finetune_api.layout import join
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_trainer.data.problems import LFS_POINTER, place
from finetune_trainer.identity import SAMPLE_BYTES, sample_digest, sample_places
from finetune_trainer.runplan import FileRecord
from finetune_trainer.store import Store, spec_field

INDEX = "model.safetensors.index.json"
# What transformers reads of a model besides its weights. Other files, whatever their names, are never fetched: an
# adapter, or a second configuration, would be loaded that nobody has judged.
SMALL_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        INDEX,
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
    }
)
# Chat templates by name: transformers writes all but `default` into a folder beside it. These it takes by itself;
# others, such as `rag`, only where somebody asks for them.
TEMPLATES = {
    "default": "chat_template.jinja",
    "tool_use": "additional_chat_templates/tool_use.jinja",
}
# Fields by which transformers takes another file in the place of the one that prepare has judged.
_OTHER_FILES = {"config.json": "configuration_files", "tokenizer_config.json": "fast_tokenizer_files"}
# The largest in use: an index of 94,000 tensors has 9 MiB, a tokenizer_config.json that describes 65,536 tokens of
# speech 15 MiB, any other file 2 MiB.
_MAX_JSON_BYTES = {INDEX: 32 * 2**20, "tokenizer_config.json": 32 * 2**20}
_MAX_OTHER_JSON_BYTES = 4 * 2**20
_MAX_JSON_DEPTH = 32
MAX_VALUES = 2**20  # of a JSON file; Python needs 64 to 250 bytes for each
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_PARALLEL_SAMPLES = 8
_MAX_PROBLEM = 256  # as much as a result carries of one argument


class ModelFolder:
    """The files at `uri`, and below it the chat templates; each is read whole at one version, or not at all."""

    def __init__(self, store: Store, uri: str) -> None:
        self.store, self.uri = store, uri
        prefix = join(uri, "")
        with spec_field("model.uri"):
            self.files = {
                info.uri.removeprefix(prefix): info
                for info in store.list(prefix)
                if _is_kept(info.uri.removeprefix(prefix))
            }
        self.records: dict[str, FileRecord] = {}  # of those that were read whole
        for name, info in self.files.items():
            if is_read(name) and store.leads_outside(info.uri, prefix):
                raise self.broken(f"{name} is a link to a file outside of the folder; copy the file itself into it")

    def read(self, name: str, max_bytes: int = 16 * 2**20) -> bytes | None:
        info = self.files.get(name)
        if info is None:
            return None
        content, etag = self.store.read(info.uri, max_bytes=max_bytes)
        if content.startswith(LFS_POINTER):
            raise self.lfs_pointer(name)
        sha256 = sha256_digest(content)
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
            sha256 = sha256_digest(b"".join(blocks))
            return FileRecord(uri=info.uri, size_bytes=info.size_bytes, sha256=sha256, etag=info.etag)
        return FileRecord(
            uri=info.uri,
            size_bytes=info.size_bytes,
            sample=sample_digest(info.size_bytes, blocks),
            checksum=info.checksum,
            etag=info.etag,
        )

    def json(self, name: str) -> dict[str, Any] | None:
        content = self.read(name, _MAX_JSON_BYTES.get(name, _MAX_OTHER_JSON_BYTES))
        if content is None:
            return None
        if (values := count_values(content)) > MAX_VALUES:
            raise self.broken(f"{name} has {values:,} values; {MAX_VALUES:,} are the most")
        try:
            value = json.loads(content.decode())  # as transformers reads it: some configurations hold Infinity
        except (ValueError, RecursionError) as error:
            raise self.broken(f"{name} is not valid JSON") from error
        if not isinstance(value, dict):
            raise self.broken(f"{name} is not a JSON object")
        if _is_deeper(value, _MAX_JSON_DEPTH):
            raise self.broken(f"{name} is nested deeper than {_MAX_JSON_DEPTH} levels")
        if _SURROGATE.search(content) and not _is_text(value):
            raise self.broken(f"{name} holds half of a surrogate pair, which is no character")
        other = _OTHER_FILES.get(name)
        if other in value:
            raise self.broken(f"{name} names other files to be read in its place ({other}); remove that field")
        return cast(dict[str, Any], value)

    def unsupported(self, architecture: str, problem: str) -> StageError:
        """A whole model that this trainer cannot train."""
        return StageError(
            Fault.UNSUPPORTED_MODEL,
            uri=place(self.uri),
            architecture=shortened(architecture, 64),
            problem=shortened(problem, _MAX_PROBLEM),
        )

    def broken(self, problem: str) -> StageError:
        """A model whose files are damaged, incomplete, or do not belong together."""
        return StageError(Fault.BROKEN_MODEL, uri=place(self.uri), problem=shortened(problem, _MAX_PROBLEM))

    def lfs_pointer(self, name: str) -> StageError:
        return self.broken(
            f"{name} is a Git LFS pointer, not the file itself; run git lfs pull where it was cloned, and copy it again"
        )


def count_values(content: bytes) -> int:
    """Return at least how many lists, objects and values in them there are, before they are made."""
    return content.count(b",") + content.count(b"{") + content.count(b"[")


def _is_deeper(value: Any, depth: int) -> bool:
    """Return whether lists and objects lie within each other more than `depth` times. Goes level by level."""
    level = [value]
    for _ in range(depth + 1):
        children = [each for parent in level for each in (parent.values() if isinstance(parent, dict) else parent)]
        level = [each for each in children if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def _is_text(value: Any) -> bool:
    """Return whether all strings can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_read(name: str) -> bool:
    """Return whether a file of this name is a part of a model."""
    return name in SMALL_FILES or name in TEMPLATES.values() or name.endswith(".safetensors")


def _is_kept(path: str) -> bool:
    return "/" not in path or path in TEMPLATES.values()
