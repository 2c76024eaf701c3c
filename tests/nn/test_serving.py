"""One process under load: many threads on the same layers, thread counts that change, forks, what is left behind."""

import copy
import gc
import os
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from rcp_kernels import OnlineRotation, QuantLinear, ops
from rcp_kernels.bench.lut_linear import random_packed_weight

WORKERS = 8
SECONDS = 120

# bits, group_size, act_bits, act_clip, rotation of 384 = 12 * 32 inputs
LAYERS = {
    "W2A4": (2, 64, 4, 1.0, None),
    "W2A4 rotated": (2, 32, 4, 0.9, {}),
    "W3A8 rotated with signs": (3, 128, 8, 1.0, "signs"),
    "W4A16": (4, 384, 16, 1.0, None),
}


def make_layer(name, out_features=256, in_features=384):
    bits, group_size, act_bits, clip, rotation = LAYERS[name]
    torch.manual_seed(0)
    if rotation == "signs":
        rotation = {"order": "natural", "signs": torch.randint(2, (in_features,)) * 2 - 1}
    rotation = None if rotation is None else OnlineRotation(in_features, **rotation)
    weight = random_packed_weight(out_features, in_features, bits, group_size)
    return QuantLinear.from_packed(weight, torch.randn(out_features), act_bits, clip, rotation).eval()


def make_model():
    """A gated MLP between norms, the tokens' mean added: a model whose own state would show if it had any."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(384, elementwise_affine=False)
            self.gate = make_layer("W2A4 rotated", 256)
            self.up = make_layer("W3A8 rotated with signs", 256)
            torch.manual_seed(1)
            self.down = QuantLinear.from_packed(random_packed_weight(384, 256, 4, 64), None, 8).eval()

        def forward(self, x):
            for _ in range(2):
                h = self.norm(x)
                x = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h)) + x.mean(-2, keepdim=True)
            return x

    return Model().eval()


def requests(features=384):
    torch.manual_seed(2)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [torch.randn(tokens, features).to(dtypes[tokens % 3]) for tokens in (1, 2, 3, 4, 7, 16, 17, 64)]


@torch.inference_mode()
def serve(module, inputs, expected, calls, worker, before=lambda call: None):
    """The number of calls done, and of those whose result was not the expected bits."""
    wrong = 0
    for call in range(calls):
        before(call)
        i = (call * 5 + worker) % len(inputs)
        wrong += not torch.equal(module(inputs[i]), expected[i])
    return calls, wrong


def in_threads(work, workers=WORKERS):
    """What work(worker) gives for each worker, all started at once; fails where one hangs."""
    barrier = threading.Barrier(workers)
    results, errors = {}, []

    def run(worker):
        try:
            barrier.wait(SECONDS)
            results[worker] = work(worker)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(worker,), daemon=True) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not errors, errors
    return [results[worker] for worker in range(workers)]


@pytest.fixture(autouse=True)
def threads_of_torch():
    """set_num_threads holds for the whole process: put back what was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def total(found):
    return tuple(map(sum, zip(*found, strict=True)))


@pytest.mark.parametrize("name", LAYERS)
def test_many_threads_call_one_layer(name):
    torch.set_num_threads(1)
    layer, inputs = make_layer(name), requests()
    with torch.inference_mode():
        expected = [layer(x) for x in inputs]
    found = in_threads(lambda worker: serve(layer, inputs, expected, 250, worker))
    assert total(found) == (WORKERS * 250, 0)


def test_many_threads_call_one_model_while_others_read_it():
    torch.set_num_threads(1)
    model, inputs = make_model(), requests()
    with torch.inference_mode():
        expected = [model(x) for x in inputs]
    state = copy.deepcopy(model.state_dict())

    def work(worker):
        if worker >= 2:
            return serve(model, inputs, expected, 100, worker)
        wrong = 0
        for _ in range(10):  # a copy and a checkpoint, as a server makes them while it serves
            other = copy.deepcopy(model) if worker else make_model()
            if not worker:
                other.load_state_dict(model.state_dict())
            found = other.state_dict()
            wrong += any(not torch.equal(found[key], state[key]) for key in state)
        return 10, wrong

    assert total(in_threads(work)) == ((WORKERS - 2) * 100 + 2 * 10, 0)


def test_the_first_calls_of_all_come_at_once():
    """The first caller makes the tables of a rotation."""
    torch.set_num_threads(1)
    layer, inputs = make_layer("W2A4 rotated"), requests()
    with torch.inference_mode():
        expected = [layer(x) for x in inputs]
    for _ in range(20):
        ops.walsh_transform.__globals__["_tables_cache"].clear()
        assert total(in_threads(lambda worker: serve(layer, inputs, expected, 2, worker))) == (WORKERS * 2, 0)


def test_the_number_of_threads_changes_while_serving():
    torch.set_num_threads(2)
    layer = make_layer("W2A4", 1024)  # large enough for several threads
    inputs = requests()
    with torch.inference_mode():
        expected = [layer(x) for x in inputs]
    seen = set()

    def change(call):
        torch.set_num_threads(1 + call % 3)
        seen.add(torch.get_num_threads())

    found = in_threads(lambda worker: serve(layer, inputs, expected, 60, worker, change), workers=3)
    assert total(found) == (180, 0)
    assert seen == {1, 2, 3}


def test_inference_mode_and_gradients_at_the_same_time():
    """One thread trains what is before the layer while others serve it."""
    torch.set_num_threads(1)
    layer, inputs = make_layer("W2A4 rotated"), requests()
    with torch.inference_mode():
        expected = [layer(x) for x in inputs]
    x = inputs[5].float()

    def gradient():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(layer(leaf).square().sum(), leaf)[0]

    reference = gradient()

    def work(worker):
        if worker:
            return serve(layer, inputs, expected, 100, worker)
        return 40, sum(not torch.equal(gradient(), reference) for _ in range(40))

    assert total(in_threads(work, 4)) == (3 * 100 + 40, 0)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_nothing_is_left_behind():
    """Outputs of 17 kB and weights of 40 kB each: were one in ten kept, memory would grow by megabytes."""
    torch.set_num_threads(1)
    model = make_model()
    x = requests()[5].float()
    calls, layers = 6000, 400

    def call(count):
        with torch.inference_mode():
            for _ in range(count):
                model(x[:11])

    def make(count):
        for _ in range(count):
            make_layer("W2A4 rotated").packed_weight()

    with ThreadPoolExecutor(4) as pool:

        def load(count_calls, count_layers):
            futures = [pool.submit(call, count_calls // 4) for _ in range(4)]
            futures.append(pool.submit(make, count_layers))
            for future in futures:
                future.result(SECONDS)
            gc.collect()

        load(400, 40)  # pools, arenas and caches of all threads
        before = resident_bytes()
        load(calls, layers)
        grown = resident_bytes() - before
        assert grown < 4 << 20

        tracemalloc.start()
        try:
            load(100, 10)
            python = tracemalloc.get_traced_memory()[0]
            load(1000, 100)
            assert tracemalloc.get_traced_memory()[0] - python < 20_000
        finally:
            tracemalloc.stop()


FORK = """
    import faulthandler, os, threading, time
    faulthandler.dump_traceback_later(100, exit=True)
    import torch
    torch.set_num_threads(1)
    from rcp_kernels import OnlineRotation, QuantLinear
    from rcp_kernels.bench.lut_linear import random_packed_weight

    torch.manual_seed(0)
    layer = QuantLinear.from_packed(random_packed_weight(1024, 512, 2, 64), input_rotation=OnlineRotation(512))
    x = torch.randn(64, 512)

    def run():
        with torch.inference_mode():
            return layer(x)

    def in_child(work):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = work()
            finally:
                os._exit(code)
        for _ in range(600):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)
        os.kill(child, 9)
        raise SystemExit("the child hangs")
"""


def run_script(body):
    """Run a script after FORK in a process of its own: pytest's has threads of other tests."""
    script = textwrap.dedent(FORK) + textwrap.dedent(body)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_fork_after_loading_and_warming_up_with_one_thread():
    """Torch's pool has not been started: children may use as many threads as they like."""
    found = run_script("""
        torch.set_num_threads(1)
        expected = run()

        def work():
            torch.set_num_threads(2)
            same = torch.equal(run(), expected)
            return 0 if same and len(os.listdir("/proc/self/task")) > 1 else 3

        print(in_child(work), in_child(work), torch.equal(run(), expected))
    """)
    assert found == ["0", "0", "True"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_fork_while_threads_compute():
    """Torch's pool runs in the parent, and Python threads are inside the operator: the child sets one thread, as
    torch's own data loaders do, and computes the same bits; the parent goes on."""
    codes = run_script("""
        torch.set_num_threads(2)
        expected = run()
        going, wrong, done = [True], [], []

        def soak():
            while going:
                (done if torch.equal(run(), expected) else wrong).append(1)

        def work():
            torch.set_num_threads(1)
            return 0 if torch.equal(run(), expected) else 3

        threads = [threading.Thread(target=soak) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            print(in_child(work))
        going.clear()
        for thread in threads:
            thread.join(60)
        print(any(thread.is_alive() for thread in threads), len(wrong), len(done) > 0, torch.equal(run(), expected))
    """)
    assert codes == ["0"] * 5 + ["False", "0", "True", "True"]
