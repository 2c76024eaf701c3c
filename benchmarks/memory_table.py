"""The table of docs/memory.md: peak memory by method and model, from dry runs.

python benchmarks/memory_table.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rcp_kernels.pipeline import Recipe, dry_run

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
MODELS = {"1B": "llama-3.2-1b", "7B": "llama-2-7b", "13B": "llama-2-13b", "70B": "llama-2-70b"}
TRAINING: dict[str, Any] = {"micro_batch": 1, "batch": 8, "activation_checkpointing": True}
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "rtn": ({"method": "rtn"}, 1),
    "gptq": ({"method": "gptq", "samples": 128, "sequence": 2048}, 1),
    "laquant": ({"method": "laquant", "samples": 128, "sequence": 2048}, 1),
    "rcp": ({"method": "rcp", "sequence": 1024, "training": TRAINING}, 1),
    "rcp, adamw8bit": ({"method": "rcp", "sequence": 1024, "training": {**TRAINING, "optimizer": "adamw8bit"}}, 1),
    "rcp, --shard, 8 processes": ({"method": "rcp", "sequence": 1024, "training": TRAINING}, 8),
}


def main() -> None:
    print(f"| GB on the device / on the host | {' | '.join(MODELS)} |")
    print(f"|---|{'---:|' * len(MODELS)}")
    for name, (fields, processes) in RUNS.items():
        cells = []
        for folder in MODELS.values():
            recipe = Recipe(str(CONFIGS / folder), **fields)
            needs = dry_run(recipe, device="cuda", processes=processes, shard=processes > 1)
            cells.append(f"{needs.device_bytes / 1e9:.1f} / {needs.host_bytes / 1e9:.0f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
