"""README.md of a quantized model's directory: the model card of the hub, made from the other files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from .. import extras

__all__ = ["model_card", "write_model_card"]

# The model of `rcp-kernels quantize demo`.
_NAMES = {"demo": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_ELEMENT_BITS = {"codes": 8, "levels": 8, "scales": 16}
_CLIPS = ("act_clip", "kv_clip")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write_model_card(directory: str | Path) -> None:
    """Write README.md into a directory with a quantized model's config.json and weights. An old README.md is replaced.

    Raises:
        OSError, ValueError, KeyError: as :func:`model_card`.
    """
    (Path(directory) / "README.md").write_text(model_card(directory))


def model_card(directory: str | Path) -> str:
    """The card of a model: how it is stored, how it was made (from recipe.yaml), and how to load it.

    Args:
        directory: with config.json and the safetensors files of a quantized model, and recipe.yaml and tokenizer files
            if there are any.

    Returns:
        Markdown with the hub's metadata in front.

    Raises:
        MissingExtra: safetensors is missing.
        OSError: no config.json.
        ValueError, KeyError: config.json is not that of a quantized model.
    """
    directory = Path(directory)
    fields = json.loads((directory / "config.json").read_text())
    stored = fields["quantization_config"]
    recipe = directory / "recipe.yaml"
    text = recipe.read_text().strip() if recipe.is_file() else None
    base = None
    if text is not None and (found := re.search(r"^model: *['\"]?([^'\"\n]+)", text, re.MULTILINE)):
        base = _NAMES.get(found[1].strip(), found[1].strip())
    # A relative directory may look like a name on the hub. A directory exists.
    is_hub = base is not None and _HUB_NAME.fullmatch(base) is not None and not Path(base).exists()
    has_tokenizer = any(directory.glob("tokenizer*"))
    called = None if base is None else base if is_hub else Path(base).name
    licensed = "" if called is None else f" Base model: `{called}`; its license holds for this one too."
    parts = [
        _metadata(base if is_hub else None, stored["bits"]),
        f"# {Path(called).name if called else fields['model_type']}, {stored['bits']} bits a weight",
        f"A causal language model ({fields['architectures'][0]}) whose linear layers were quantized by "
        f"[rcp-kernels](https://pypi.org/project/rcp-kernels/).{licensed}",
        _table(stored, directory),
        _loading(stored, has_tokenizer),
    ]
    if text is not None:
        parts.append(f"## How it was made\n\n`rcp-kernels quantize` with this recipe:\n\n```yaml\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _metadata(base: str | None, bits: int) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if base is not None:
        lines += [f"base_model: {base}", "base_model_relation: quantized"]
    return "\n".join(["---", *lines, "tags:", "- rcp-kernels", f"- {bits}-bit", "---"])


def _table(stored: dict[str, Any], directory: Path) -> str:
    clip = {name: "" if stored[name] == 1.0 else f", clipped at {stored[name]:.4g} of the largest" for name in _CLIPS}
    rotation = stored["rotation"]
    online = [] if rotation is None else [name.upper() for name in ("r2", "r3", "r4") if rotation[name]]
    kept = stored["modules_to_not_convert"]
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    rows = {
        "weights": f"{stored['bits']} bits in groups of {stored['group_size']}; "
        f"{_bits_per_weight(directory):.4g} bits a packed weight with levels and scales",
        "activations": "16 bits" if stored["act_bits"] == 16 else f"{stored['act_bits']} bits{clip['act_clip']}",
        "keys and values": "16 bits" if stored["kv_bits"] == 16 else f"{stored['kv_bits']} bits{clip['kv_clip']}",
        "rotation": "none" if rotation is None else ", ".join([f"R1 {rotation['rotation']}", *online]),
        "in floating point": ", ".join(kept[:3]) + (f" and {len(kept) - 3} more" if len(kept) > 3 else "") or "none",
        "weight files": f"{size / 1e6:.1f} MB",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _bits_per_weight(directory: Path) -> float:
    """Bits per weight of the packed layers, from the headers of the files."""
    extras.require("safetensors")
    from safetensors import safe_open

    stored = weights = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                name = key.rpartition(".")[2]
                if name in _ELEMENT_BITS:
                    stored += math.prod(file.get_slice(key).get_shape()) * _ELEMENT_BITS[name]
                elif name == "format":
                    weights += math.prod(file.get_tensor(key)[3:5].tolist())
    return stored / weights


def _loading(stored: dict[str, Any], has_tokenizer: bool) -> str:
    classes = "AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else "AutoModelForCausalLM"
    lines = [
        'import rcp_kernels  # registers the method "rcp" with transformers',
        f"from transformers import {classes}",
        "",
        'name = "."  # this directory, or the hub\'s name of this repository',
        "model = AutoModelForCausalLM.from_pretrained(name)",
    ]
    if has_tokenizer:
        lines.append("tokenizer = AutoTokenizer.from_pretrained(name)")
    if stored["kv_bits"] != 16:
        lines += [
            "",
            "from rcp_kernels.nn import QuantizedKVCache",
            "",
            "# A new one for each text: model.generate(..., cache=cache)",
            "# The argument was called past_key_values before transformers 5.24.",
            f"cache = QuantizedKVCache(model.config, clip={stored['kv_clip']})",
        ]
    code = "\n".join(lines)
    return f"## How to load it\n\n`pip install 'rcp-kernels[integrations]'`, then:\n\n```python\n{code}\n```"
