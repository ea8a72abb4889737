# SPDX-License-Identifier: Apache-2.0
"""Speed of generation on a CPU: against Hugging Face's ``generate``, against the memory's bandwidth, and of continuous
against static batching.

    python -m benchmarks.generate [--hf PYTHON]     # PYTHON: one that has torch==2.13.0 and transformers

The model has 4 layers of d_model 256, a vocabulary of 8192, in float32. Greedy: a batch of 8, prompts of 64, 128 new
tokens. Ragged: 256 prompts, whose lengths and whose new tokens are drawn from 16 to 256, over 8 slots; static batching
takes eight at a time and waits for the longest. All are run in turns, and ratios are of the medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from research.core.tree import size  # noqa: E402
from research.core.types import Precision  # noqa: E402
from research.hf import convert  # noqa: E402
from research.infer.engine import Engine, Request  # noqa: E402
from research.infer.generate import Settings, bucket  # noqa: E402
from research.infer.sampling import sampling  # noqa: E402
from research.models.attention import Attention  # noqa: E402
from research.models.decoder import Decoder  # noqa: E402
from research.models.mlp import Mlp  # noqa: E402

MODEL = Decoder(vocab_size=8192, d_model=256, num_layers=4, attention=Attention(num_heads=4), mlp=Mlp(d_ff=688))
BATCH, PROMPT, NEW = 8, 64, 128
SHORTEST, LONGEST, REQUESTS = 16, 256, 256
HF_SCRIPT = """
import json, sys, time
import torch, transformers
config = transformers.AutoConfig.for_model(**json.loads(sys.argv[1]))
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
batch, prompt, new = (int(x) for x in sys.argv[2:5])
ids = torch.randint(0, config.vocab_size, (batch, prompt))
how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)
with torch.no_grad():
    model.generate(ids, **how)
    for _ in sys.stdin:
        begun = time.perf_counter()
        model.generate(ids, **how)
        print(time.perf_counter() - begun, flush=True)
"""


class HuggingFace:
    """``generate`` in a process of its own, one run for each call."""

    def __init__(self, python: str) -> None:
        _, config = convert.fitting(MODEL, 512)
        words = [python, "-c", HF_SCRIPT, json.dumps(config), str(BATCH), str(PROMPT), str(NEW)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.process = subprocess.Popen(words, cwd=Path(__file__).parents[1], **pipes)

    def __call__(self) -> float:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def bandwidth() -> float:
    """Bytes a second that a product of a matrix and a vector reads, from memory too large for caches."""
    w = jnp.ones((8192, 16_384), jnp.float32)
    run = jax.jit(lambda w, x: w @ x)
    x = jnp.ones((16_384,))
    run(w, x).block_until_ready()
    return w.nbytes / min(timed(lambda: run(w, x).block_until_ready()) for _ in range(7))


def floor_seconds(rate: float) -> float:
    """What a step must take: to read the weights but for the embedding, and the cache as full as it is on average."""
    weights = (size(MODEL.shapes(Precision())) - MODEL.vocab_size * MODEL.d_model) * 4
    cache = BATCH * (PROMPT + NEW / 2) * 2 * MODEL.num_layers * MODEL.d_model * 4
    return (weights + cache) / rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", metavar="PYTHON", help="a Python with torch and transformers, to compare with")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    policy = MODEL.bind(jax.jit(lambda: MODEL.init_params(jax.random.key(0), Precision()))(), {}, Precision())
    rng = np.random.default_rng(0)
    greedy = [Request(rng.integers(0, 8192, PROMPT), NEW) for _ in range(BATCH)]
    engine = Engine(MODEL, slots=BATCH, settings=Settings(sampling(temperature=0), steps=32))
    theirs = HuggingFace(options.hf) if options.hf else None
    run = lambda: list(engine.run(policy, greedy))  # noqa: E731
    run()
    ours, hf = [], []
    for _ in range(options.repeats):
        ours.append(timed(run))
        if theirs is not None:
            hf.append(theirs())
    if theirs is not None:
        theirs.close()
    mine, rate = statistics.median(ours), bandwidth()
    least = floor_seconds(rate) * NEW
    print(f"greedy: {BATCH * NEW / mine:,.0f} new tokens/s; memory at {rate / 1e9:.1f} GB/s allows "
          f"{BATCH * NEW / least:,.0f}: {mine / least:.2f} times that floor's time")  # fmt: skip
    if hf:
        print(f"Hugging Face generate: {BATCH * NEW / statistics.median(hf):,.0f} new tokens/s; ours is "
              f"{statistics.median(hf) / mine:.2f} times as fast")  # fmt: skip
    draws = {
        "uniform": lambda count: rng.integers(SHORTEST, LONGEST + 1, count),
        "log-uniform": lambda count: np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST + 1), count)).astype(int),
    }
    for name, draw in draws.items():
        ragged(policy, name, draw(REQUESTS), draw(REQUESTS), max(3, options.repeats // 2))


def ragged(policy: object, name: str, prompts: np.ndarray, news: np.ndarray, repeats: int) -> None:
    rng = np.random.default_rng(1)
    requests = [Request(rng.integers(0, 8192, p), int(n)) for p, n in zip(prompts, news, strict=True)]
    longest = bucket(2 * LONGEST)
    engine = Engine(MODEL, slots=BATCH, settings=Settings(sampling(temperature=0), steps=32), length=longest)
    continuous = lambda: list(engine.run(policy, requests))  # noqa: E731

    def static() -> None:
        for start in range(0, len(requests), BATCH):
            list(engine.run(policy, requests[start : start + BATCH]))

    continuous(), static()
    times = [(timed(continuous), timed(static)) for _ in range(repeats)]
    one, other = (statistics.median(column) for column in zip(*times, strict=True))
    chunks = news.reshape(-1, BATCH)
    bound = BATCH * np.sum(np.max(chunks, axis=1)) / np.sum(news)  # were every step and nothing else to cost the same
    print(f"ragged, {name} from {SHORTEST} to {LONGEST}: continuous {np.sum(news) / one:,.0f} tokens/s, static "
          f"{np.sum(news) / other:,.0f}: {other / one:.2f} times as fast; by steps alone {bound:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
