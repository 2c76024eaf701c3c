"""SmolLM2-135M before and after, by EleutherAI's lm_eval: python examples/lm_eval_harness.py [FLOAT DIRECTORY]

Needs `pip install lm_eval`. The task is written here, so that nothing is downloaded: twenty capitals, of four choices
each. lm_eval's own tasks go by name, tasks=["arc_easy"], and want the hub.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
from lm_eval.models.huggingface import HFLM
from smollm2 import load

from rcp_kernels import quantize_model

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Russia": "Moscow", "Japan": "Tokyo",
    "China": "Beijing", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Poland": "Warsaw",
    "Austria": "Vienna", "Hungary": "Budapest", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "Thailand": "Bangkok",
}  # fmt: skip


def task(folder: Path) -> dict:
    """A task of lm_eval: the right capital and the next three countries' as continuations."""
    cities = list(CAPITALS.values())
    rows = [
        {
            "text": f"The capital of {country} is",
            "choices": [cities[(i + k) % len(cities)] for k in range(4)],
            "label": 0,
        }
        for i, country in enumerate(CAPITALS)
    ]
    path = folder / "capitals.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return {
        "task": "capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }


def main(directory: str | None = None) -> None:
    model, tokenizer = load(directory)
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("float", "3 bits, 8-bit activations"):
            if name != "float":
                quantize_model(model, bits=3, group_size=64, act_bits=8)
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
            results = lm_eval.simple_evaluate(model=lm, tasks=[task(Path(scratch))], bootstrap_iters=0)["results"]
            print(f"{name}: accuracy {results['capitals']['acc,none']:.2f} on {len(CAPITALS)} capitals")


if __name__ == "__main__":
    main(*sys.argv[1:])
