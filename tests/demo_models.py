"""A tiny model and its tokenizer, for the tests of the demo."""

import torch
import transformers


def make_tiny(layers):
    """A LLaMA with hidden size 192 = 3 * 64, grouped heads and tied embeddings, as SmolLM2 has."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


class Tokenizer:
    """Stands in for the real one where measure() needs it: a question as tokens, and tokens as text."""

    eos_token_id = 2

    def apply_chat_template(self, messages, **_):
        return {"input_ids": torch.arange(3, 3 + len(messages[0]["content"]))[None]}

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))
