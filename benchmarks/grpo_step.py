# SPDX-License-Identifier: Apache-2.0
"""Seconds of a GRPO step on a CPU, by part, against TRL's on the same machine and against the engine alone.

    python -m benchmarks.grpo_step [--trl PYTHON] [--steps N]    # PYTHON: one that has torch==2.13.0 and trl

16 prompts of 64 tokens, 8 samples of 64 new tokens to each, a model with 4 layers of d_model 256 and a vocabulary of
8192 in float32, no KL penalty, one epoch, AdamW. Ours is the training loop's own source and step; TRL's is its trainer
with the same model. Responses end only at their full length: no end is ever drawn. Steps are taken in turns, and ratios
are of the medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import generate  # noqa: E402
from research.core.sharding import MeshSpec, make_mesh  # noqa: E402
from research.core.types import Context  # noqa: E402
from research.data.chat import ChatTemplate  # noqa: E402
from research.data.tokenizers import Bytes  # noqa: E402
from research.evals.tasks.base import Problem, Response  # noqa: E402
from research.hf import convert  # noqa: E402
from research.infer.engine import Engine, Request  # noqa: E402
from research.objectives.grpo import Grpo  # noqa: E402
from research.rl.respond import Speech, seed_of  # noqa: E402
from research.rl.rollout import Rollouts  # noqa: E402
from research.train.experiment import AdamW, Experiment, Steps  # noqa: E402
from research.train.start import Program  # noqa: E402

MODEL = replace(generate.MODEL, layers="unrolled")
PROMPTS, SAMPLES, PROMPT, NEW = 16, 8, 64, 64
TRL_SCRIPT = """
import json, sys, time
import torch, transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
config = transformers.AutoConfig.for_model(**json.loads(sys.argv[1]))
prompts, samples, prompt, new, steps = (int(x) for x in sys.argv[2:7])
config.eos_token_id = config.pad_token_id = config.bos_token_id = None
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
names = [f"w{i}" for i in range(config.vocab_size - 2)] + ["<pad>", "<eos>"]
vocabulary = {name: i for i, name in enumerate(names)}
library = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
library.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, pad_token="<pad>", eos_token="<eos>")
random = torch.Generator().manual_seed(0)
rows = torch.randint(0, config.vocab_size - 2, (prompts * (steps + 1), prompt), generator=random).tolist()
data = Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in row)} for row in rows])
spent = []
class Trainer(GRPOTrainer):
    def _generate_single_turn(self, *given, **named):
        begun = time.perf_counter()
        try:
            return super()._generate_single_turn(*given, **named)
        finally:
            spent[-1]["generation"] += time.perf_counter() - begun
class Turns(TrainerCallback):
    def on_step_begin(self, *_, **__):
        sys.stdin.readline()
    def on_step_end(self, *_, **__):
        print(json.dumps({**spent[-1], "step": time.perf_counter() - spent[-1].pop("begun")}), flush=True)
class Timed(Trainer):
    def training_step(self, *given, **named):
        spent.append({"generation": 0.0, "begun": time.perf_counter()})
        return super().training_step(*given, **named)
settings = GRPOConfig(
    output_dir="unused", per_device_train_batch_size=prompts * samples, num_generations=samples, max_steps=steps,
    max_completion_length=new, beta=0.0, learning_rate=1e-4, use_cpu=True, report_to=[], save_strategy="no",
    logging_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False, temperature=1.0,
    generation_kwargs={"min_new_tokens": new},
)
def reward(completions, **_):
    return [float(sum(map(ord, text)) % 7) for text in completions]
how = dict(reward_funcs=reward, train_dataset=data, processing_class=tokenizer, callbacks=[Turns()])
Timed(model, args=settings, **how).train()
"""


@dataclass(frozen=True)
class Arbitrary:
    """Random bytes as prompts; a response is worth what tells those to one prompt apart."""

    def size(self, split: str) -> None: ...

    @property
    def verifier(self) -> "Arbitrary":
        return self

    def score(self, problem: Problem, response: Response) -> float:
        return float(sum(map(ord, response.text)) % 7)

    def problem(self, split: str, index: int) -> Problem:
        drawn = np.random.default_rng(index).integers(97, 123, PROMPT - 1)
        return Problem("".join(map(chr, drawn)), "")


@dataclass(frozen=True)
class Endless(ChatTemplate):
    """A template none of whose ends is ever drawn."""

    def stop(self, tokenizer) -> tuple[int, ...]:
        return (MODEL.vocab_size + 1,)


class Ours:
    """The loop's own source and step."""

    def __init__(self) -> None:
        speech = Speech(Bytes(), Endless(), prompt_length=PROMPT, max_tokens=NEW)
        self.experiment = Experiment(
            name="grpo-step",
            model=MODEL,
            objective=Grpo(),
            source=Rollouts(Arbitrary(), speech, prompts=PROMPTS, samples=SAMPLES, recorded=0),
            optimizer=AdamW(peak=1e-4),
            length=Steps(1000),
        )
        self.mesh = make_mesh(MeshSpec())
        self.number = 0
        with jax.set_mesh(self.mesh):
            self.program = Program(self.experiment, self.mesh)
            self.stream = self.experiment.source.start(Context(self.mesh, 0, Path("unused")))
            self.state = self.program.fresh()

    def __call__(self) -> dict[str, float]:
        with jax.set_mesh(self.mesh):
            begun = time.perf_counter()
            batch = self.stream.next(self.program.bind(self.state), self.number)
            drawn = time.perf_counter()
            self.state, measured = self.program.step(self.state, {}, batch, np.float32(1e-4))
            jax.block_until_ready((self.state, measured))
            ended = time.perf_counter()
        self.number += 1
        report = self.stream.report()
        parts = {name: report[f"seconds/{name}"] for name in ("generation", "reward")}
        rest = drawn - begun - sum(parts.values())
        return {**parts, "rows": rest, "training": ended - drawn, "step": ended - begun}

    def engine(self) -> float:
        """Seconds of the engine alone for as many prompts of as many tokens."""
        requests = [
            Request(np.full(PROMPT, 97 + number), NEW, seed=seed_of(self.number, number), samples=SAMPLES)
            for number in range(PROMPTS)
        ]
        engine = Engine(MODEL, slots=PROMPTS * SAMPLES, settings=self.stream.speaker.settings, length=PROMPT + NEW)
        with jax.set_mesh(self.mesh):
            begun = time.perf_counter()
            made = sum(len(result.tokens) for result in engine.run(self.program.bind(self.state), requests))
            assert made == PROMPTS * SAMPLES * NEW
            return time.perf_counter() - begun


class Trl:
    """Its trainer in a process of its own, one step for each call."""

    def __init__(self, python: str, steps: int) -> None:
        _, config = convert.fitting(MODEL, 512)
        words = [python, "-c", TRL_SCRIPT, json.dumps(config), *map(str, (PROMPTS, SAMPLES, PROMPT, NEW, steps))]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.process = subprocess.Popen(words, cwd="/tmp", env={**os.environ, "HF_HUB_OFFLINE": "1"}, **pipes)

    def __call__(self) -> dict[str, float]:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("{"):
            assert line, "TRL ended"
        found = json.loads(line)
        return {"generation": found["generation"], "rest": found["step"] - found["generation"], "step": found["step"]}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.kill()


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", metavar="PYTHON", help="a python with torch, transformers and trl")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    ours, theirs = Ours(), Trl(options.trl, options.steps + 1) if options.trl else None
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    alone = []
    for number in range(options.steps + 1):
        turn = {"ours": ours(), "trl": theirs()} if theirs else {"ours": ours()}
        engine = ours.engine()
        if number:  # the first compiles
            alone.append(engine)
            for name, one in turn.items():
                runs[name].append(one)
    mine = medians(runs["ours"])
    print("ours:  ", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in mine.items()))
    share = statistics.median(alone) / mine["generation"]
    print(f"engine: {statistics.median(alone):.2f} s alone: generation runs at {share:.0%} of its throughput")
    if theirs:
        their = medians(runs["trl"])
        theirs.close()
        print("trl:   ", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in their.items()))
        print(f"a step takes {mine['step'] / their['step']:.2f} of TRL's time")


if __name__ == "__main__":
    main()
