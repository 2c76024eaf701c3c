"""A quantized SmolLM2-135M served by many threads of a process, and by a fork: python examples/serving.py [DIRECTORY]

DIRECTORY is one of the float model. Only its first four layers, so that it takes seconds.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from smollm2 import load

from rcp_kernels import quantize_model

WORKERS, ANSWERS = 8, 96


def main(directory: str | None = None) -> None:
    # Parallel by requests: the threads of torch's pool inside each would only compete with the other requests.
    torch.set_num_threads(1)
    model, tokenizer = load(directory)
    model.model.layers = model.model.layers[:4]
    quantize_model(model, bits=2, group_size=64, act_bits=4, levels="uniform")
    words = "Many threads call the same layers and none of them waits for another".split()
    prompts = [tokenizer(" ".join(words[: 1 + i]), return_tensors="pt").input_ids for i in range(len(words))]

    @torch.inference_mode()
    def answer(i):
        return model(prompts[i % len(prompts)], logits_to_keep=1).logits

    expected = [answer(i) for i in range(len(prompts))]
    with ThreadPoolExecutor(WORKERS) as pool:
        answers = list(pool.map(answer, range(ANSWERS)))
    same = sum(torch.equal(found, expected[i % len(prompts)]) for i, found in enumerate(answers))
    print(f"{same} of {ANSWERS} answers of {WORKERS} threads: bit-equal: {same == ANSWERS}")

    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(answer(3), expected[3]) else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"forked after loading: bit-equal: {code == 0}")


if __name__ == "__main__":
    main(*sys.argv[1:])
