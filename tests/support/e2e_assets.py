"""A tiny random chat model and small datasets for the node's tests, made without torch in milliseconds."""

import itertools
import json
import random
from typing import Any

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, LAYERS, HEADS, MLP = 128, 4, 4, 256
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 256 + 3  # the bytes, then the special tokens
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BAD_FILE, BAD_ROW = "rows-1.jsonl", 17
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def model_files(seed: int = 0) -> dict[str, bytes]:
    """Content by file name: a Llama in Hugging Face layout, large enough that a step takes tens of milliseconds."""
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    ids = {f"{name}_id": 256 + index for index, name in enumerate(special)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "float32",
        **ids,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 512,
        **special,
    }
    return {
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": _tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps(tokenizer_config).encode(),
        "model.safetensors": safetensors.numpy.save(_weights(seed), metadata={"format": "pt"}),
    }


def _tokenizer() -> Any:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer: Any = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS, PAD])
    return tokenizer


def _weights(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)

    def matrix(out: int, into: int) -> np.ndarray:
        return generator.normal(0, 0.08, (out, into)).astype(np.float32)

    ones = np.ones(HIDDEN, np.float32)
    weights = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": ones,
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        weights |= {f"{prefix}.self_attn.{name}_proj.weight": matrix(HIDDEN, HIDDEN) for name in "qkvo"}
        weights |= {f"{prefix}.mlp.{name}_proj.weight": matrix(MLP, HIDDEN) for name in ("gate", "up")}
        weights[f"{prefix}.mlp.down_proj.weight"] = matrix(HIDDEN, MLP)
        weights |= {f"{prefix}.{name}_layernorm.weight": ones for name in ("input", "post_attention")}
    return weights


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations with something to learn: the answer says the question's first word three times."""
    generator = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        words = ["".join(generator.choices(_LETTERS, k=generator.randint(3, 8))) for _ in range(6)]
        turns = [("user", " ".join(words)), ("assistant", " ".join([words[0]] * 3))]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return rows


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of one word that is repeated."""
    generator = random.Random(seed)
    words = ["".join(generator.choices(_LETTERS, k=6)) for _ in range(count)]
    return [{"text": " ".join([word] * 12)} for word in words]


def pair_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Two answers of equal length to each prompt: letters of the beginning of the alphabet are preferred."""
    generator = random.Random(seed)

    def said(role: str, letters: str, length: int) -> list[dict[str, str]]:
        return [{"role": role, "content": "".join(generator.choices(letters, k=length))}]

    rows: list[dict[str, Any]] = []
    for _ in range(count):
        prompt, length = said("user", _LETTERS, generator.randint(4, 20)), generator.randint(4, 10)
        chosen, rejected = (said("assistant", letters, length) for letters in (_LETTERS[:8], _LETTERS[-8:]))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def thumb_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """One of the answers of each pair with what is said of it: a third is good."""
    names = (("chosen", True), ("rejected", False), ("rejected", False))
    said = zip(pair_rows(count, seed), itertools.cycle(names), strict=False)
    return [{"prompt": row["prompt"], "completion": row[name], "label": label} for row, (name, label) in said]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def broken_files() -> dict[str, bytes]:
    """A dataset whose second file has a message without content in row BAD_ROW."""
    good, bad = chat_rows(30, 1), chat_rows(30, 2)
    del bad[BAD_ROW - 1]["messages"][1]["content"]
    return {"rows-0.jsonl": jsonl(good), BAD_FILE: jsonl(bad)}
