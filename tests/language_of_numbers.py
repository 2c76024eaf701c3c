"""A language of twelve words: a tiny model of it as a directory of transformers, with its tokenizer, and a text."""

from pathlib import Path

import tokenizers
import torch
import transformers

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "[UNK]", "[EOS]"]


def write_model(folder: Path) -> Path:
    """Two layers of random weights; groups of 32 divide its sizes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(WORDS),
        max_position_embeddings=128,
        eos_token_id=11,
        bos_token_id=11,
        pad_token_id=11,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", pad_token="[EOS]"
    ).save_pretrained(folder)
    return folder


def write_text(path: Path) -> Path:
    """700 random digits in words."""
    digits = torch.randint(10, (700,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(WORDS[i] for i in digits))
    return path
