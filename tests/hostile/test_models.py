"""What a base model's files say is bounded before anything is trained: a named end, within memory and time."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import data_run
from attacked import Case, Seen, attack
from finetune_api.errors import StageError
from finetune_api.reasons import Fault

MIB = 2**20
# A forked stage has about 100 MiB of libraries; a header of 2^20 values is what takes most.
PEAK_BYTES = 600 * MIB
MOST_OF_A_TOKENIZER = 200 * MIB  # which is run elsewhere
# The child that loads a model without its values has 600 MiB of libraries.
CHILD_PEAK_BYTES = 1500 * MIB
# What the attacks are held to, so that they end soon: the limits of the product are some times higher.
LIMITS: dict[str, float] = {
    "finetune_trainer.data.tokenizer.MEMORY_BYTES": 700 * MIB,
    "finetune_trainer.data.tokenizer.LOAD_CPU_S": 2,
    "finetune_trainer.data.structure.MEMORY_BYTES": 1200 * MIB,
}

Json = dict[str, Any]
Spoil = Callable[[Path], object]


def _replace(find: str, content: str) -> Json:
    return {"type": "Replace", "pattern": {"String": find}, "content": content}


def _tokenizer(**changes: Any) -> Spoil:
    def spoil(model: Path) -> None:
        path = model / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def _bpe(**changes: Any) -> Spoil:
    def spoil(model: Path) -> None:
        path = model / "tokenizer.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"model": content["model"] | changes}))

    return spoil


def _json(name: str, **changes: Any) -> Spoil:
    def spoil(model: Path) -> None:
        path = model / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | changes))

    return spoil


def _raw(name: str, content: str) -> Spoil:
    return lambda model: (model / name).write_text(content)


DOUBLINGS = [_replace("a", "aa")] * 40
TOKENIZERS: dict[str, tuple[Spoil, str]] = {
    "a normaliser that doubles forty times": (
        _tokenizer(normalizer={"type": "Sequence", "normalizers": DOUBLINGS}),
        " cannot be trained as it is: its tokenizer.json takes more than",
    ),
    "a decoder that doubles forty times": (
        _tokenizer(decoder={"type": "Sequence", "decoders": DOUBLINGS}),
        "its tokenizer.json takes more than",
    ),
    "an expansion that is not yet too large for the memory": (
        _tokenizer(normalizer=_replace("a", "a" * 300)),
        "64 of a character are the most",
    ),
    "a character map that is cut off": (
        _tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "its tokenizer.json makes the tokenizers library fail",
    ),
    "a merge of a piece that is shorter than its prefix": (
        _bpe(vocab={"a": 0, "b": 1, "ab": 2}, merges=[["a", "b"]], continuing_subword_prefix="####"),
        "its tokenizer.json makes the tokenizers library fail",
    ),
    "pieces of no length": (
        _tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}),
        "its tokenizer.json makes the tokenizers library fail",
    ),
    "an id of four thousand million": (_bpe(vocab={"a": 2**32 - 1}, merges=[]), "a token with the id 4,294,967,295"),
    "chance": (_bpe(dropout=0.5), "has a dropout"),
}


def _header(body: bytes) -> Spoil:
    return lambda model: (model / "model.safetensors").write_bytes(struct.pack("<Q", len(body)) + body)


def _entry(**changes: Any) -> Spoil:
    """One tensor whose entry in the header is not what the format allows."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes

    def spoil(model: Path) -> None:
        body = json.dumps({"x.0.weight": entry}).encode()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(body)) + body + b"\0" * 4)

    return spoil


def _also(tensors: dict[str, Any]) -> Spoil:
    def spoil(model: Path) -> None:
        path = model / "model.safetensors"
        safetensors.numpy.save_file(safetensors.numpy.load_file(path) | tensors, path)

    return spoil


def _both(model: Path) -> None:
    safetensors.numpy.save_file({"x": np.zeros(1)}, model / "model-00001-of-00001.safetensors")


def _deep(levels: int) -> str:
    return '{"a":' + "[" * levels + "]" * levels + "}"


FILES: dict[str, tuple[Spoil, str]] = {
    "a header of two million lists": (
        _header(b'{"x":[' + b"[]," * 2 * MIB + b"[]]}"),
        "4,194,307 values; 1,048,576 are the most",
    ),
    "a header of as many objects as are read": (
        _header(b'{"x":[' + b'{"":0},' * 500_000 + b"0]}"),
        "its header does not describe its tensors",
    ),
    "a header of 60 MiB": (_header(b'{"x":"' + b"x" * 60 * MIB + b'"}'), "has 60 MiB; 32 MiB are the most"),
    "a tensor with a long name": (_also({"n" * 300: np.zeros(1)}), "names a tensor with 300 characters"),
    "a side that is text": (_entry(shape="1"), "its header does not describe its tensors"),
    "a side that is a fraction": (_entry(shape=[1.0]), "its header does not describe its tensors"),
    "a side that is negative": (_entry(shape=[-1, -1]), "its shape and its place"),
    "sides whose product nobody can count": (_entry(shape=[2**62, 0], data_offsets=[0, 0]), "its shape and its place"),
    "more sides than any tensor has": (_entry(shape=[1] * 100), "its shape and its place"),
    "a type that is an object": (_entry(dtype={}), "its header does not describe its tensors"),
    "a type that nobody knows": (_entry(dtype="X" * 1000), "is of the type 'XXX"),
    "shards beside the whole": (_both, "as others would load it, model-00001-of-00001.safetensors"),
    "a configuration nested a thousand times": (_raw("config.json", _deep(900)), "deeper than 32 levels"),
    "a configuration of a million lists": (
        _raw("config.json", '{"a":[' + "[]," * 1_300_000 + "0]}"),
        "2,600,002 values; 1,048,576 are the most",
    ),
    "half a character": (_json("tokenizer_config.json", model_input_names=["\ud800"]), "half of a surrogate pair"),
    "a hundred thousand tokens to stop at": (_json("generation_config.json", eos_token_id=[1] * 10**5), "at most 256"),
    "a layer's name for every field": (_json("config.json", n_layer=10**9), "1,000,000,000 layers"),
}

# Each takes the seconds that importing transformers does.
CONFIGURATIONS: dict[str, tuple[Spoil, str]] = {
    "a thousand million labels": (
        _json("config.json", num_labels=10**9),
        "transformers needs more than 1.17 GiB to build it without its values",
    ),
}
ATTACKS = TOKENIZERS | FILES | CONFIGURATIONS


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """How prepare ended with each of the attacks."""
    tmp_path = tmp_path_factory.mktemp("attacks")
    data_run.put(tmp_path, a_jsonl=data_run.jsonl(data_run.chats(3)))
    cases = [Case(str(tmp_path), limits=LIMITS)]  # no attack: the limits of the test are none for an ordinary model
    for number, (spoil, _) in enumerate(ATTACKS.values()):
        folder = tmp_path / str(number)
        data_run.write_model(folder / "model")
        spoil(folder / "model")
        cases.append(Case(str(folder), limits=LIMITS))
    whole, *others = attack(cases)
    assert whole.fault == Fault.PREPARED
    return dict(zip(ATTACKS, others, strict=True))


@pytest.mark.parametrize("name", ATTACKS)
def test_what_a_model_s_files_make_of_prepare_is_a_named_end_within_bounds(seen: dict[str, Seen], name: str) -> None:
    found = seen[name]
    assert found.fault in (Fault.UNSUPPORTED_MODEL, Fault.BROKEN_MODEL)
    assert ATTACKS[name][1] in found.words
    assert found.peak_bytes < (MOST_OF_A_TOKENIZER if name in TOKENIZERS else PEAK_BYTES)
    assert found.child_peak_bytes < CHILD_PEAK_BYTES


@pytest.mark.parametrize(
    ("normalizer", "words"),
    [
        ({"type": "Sequence", "normalizers": [_replace("§", "§§")] * 40}, "its tokenizer.json takes more than"),
        (_replace("§", "§" * 20_000), "tokens of a text of"),
    ],
)
def test_a_tokenizer_that_shows_what_it_is_at_a_row_is_named_with_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalizer: Json, words: str
) -> None:
    for name, value in LIMITS.items():
        monkeypatch.setattr(name, value)
    data_run.write_model(tmp_path / "model")
    _tokenizer(normalizer=normalizer)(tmp_path / "model")
    data_run.put(tmp_path, a_jsonl=data_run.jsonl([*data_run.chats(3), data_run.chat("What is § 1?", "A secret.")]))
    with pytest.raises(StageError) as caught:
        data_run.prepare_run(tmp_path)
    assert caught.value.fault is Fault.UNSUPPORTED_MODEL
    assert words in str(caught.value)
    assert "at row 1 of file:///" in str(caught.value)
    assert "secret" not in str(caught.value)
