"""Generate text with a quantized model in vLLM, on a GPU: python examples/vllm_plugin.py DIRECTORY

DIRECTORY is the output of `rcp-kernels quantize`. vLLM finds the plugin of rcp-kernels by its entry point.
"""

import sys

from vllm import LLM, SamplingParams

llm = LLM(sys.argv[1])
print(llm.generate("The capital of France is", SamplingParams(max_tokens=16))[0].outputs[0].text)
