# SPDX-License-Identifier: Apache-2.0
"""Text from a model: of one prompt as it comes, or of a file of prompts into a file that is completed if begun."""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from launch import store
from launch.models import Loaded, load, mesh_of
from research.core.types import UserError
from research.infer.best import best_of
from research.infer.engine import Engine, Request, Result
from research.infer.generate import Settings
from research.infer.sampling import sampling
from research.infer.text import Texts
from research.models.cache import CacheSpec
from research.train.places import absolute


class Sampler:
    """A model with the settings of a command."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.tokens < 1 or options.temperature < 0:
            raise UserError(
                f"--tokens must be at least 1 and --temperature at least 0; given {options.tokens} and "
                f"{options.temperature}."
            )
        if options.best_of is not None and (options.best_of < 1 or options.samples != 1):
            raise UserError("--best-of must be at least 1, and goes without --samples: it gives one text for a prompt.")
        self.options = options
        self.loaded: Loaded = load(options.model, mesh=mesh_of(options.mesh), dtype=options.dtype)
        if self.loaded.tokenizer is None:
            raise UserError(
                f"{options.model} has no tokenizer: put tokenizer.json or tokenizer.model beside its weights."
            )
        self.tokenizer = self.loaded.tokenizer
        self.texts = Texts(self.tokenizer.decode)
        chosen = sampling(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            vocab_size=min(self.tokenizer.vocab_size, self.loaded.model.vocab_size),
        )
        stop = tuple(dict.fromkeys((*self.tokenizer.eos_ids, *self.tokenizer.prefix)))
        settings = Settings(chosen, stop=stop, cache=CacheSpec(options.cache, "ring"))
        self.engine = Engine(self.loaded.model, slots=options.slots, settings=settings)

    def stream(self, prompts: Sequence[tuple[str, int]]) -> Iterator[tuple[Result, int]]:
        """Sequences as they grow, of prompts with the seed of each."""
        count = self.options.best_of or self.options.samples
        requests = [
            Request(
                np.concatenate([self.tokenizer.prefix, self.tokenizer.encode(text)]).astype(np.int32),
                self.options.tokens,
                seed=seed,
                samples=count,
            )
            for text, seed in prompts
        ]
        self.texts = Texts(self.tokenizer.decode, self.options.stop, [request.prompt for request in requests])
        with jax.set_mesh(self.loaded.mesh):
            yield from self.engine.stream(self.loaded.policy, requests, ended=self.texts.ended)


def command(options: argparse.Namespace) -> int:
    """``lab sample``."""
    if (options.prompts is None) != (options.out is None):
        raise UserError("--prompts and --out go together: the texts of a file of prompts go into another file.")
    if options.prompts is not None:
        return _file(options, options.prompts, options.out)
    sampler, out = Sampler(options), sys.stdout
    if (options.best_of or options.samples) == 1:
        _show(sampler, options, out)
        return 0
    found = [result for result, _ in sampler.stream([(options.prompt, options.seed)]) if result.finish is not None]
    chosen = best_of(found).values() if options.best_of else sorted(found, key=lambda one: one.sample)
    for number, result in enumerate(chosen):
        if number:
            print("---", file=out)
        print(options.prompt + sampler.texts.text(result), file=out)
    return 0


def _show(sampler: Sampler, options: argparse.Namespace, out: TextIO) -> None:
    """The prompt and what the model adds, as it comes."""
    begun, written = False, 0
    for result, _ in sampler.stream([(options.prompt, options.seed)]):
        out.write("" if begun else options.prompt)
        begun = True
        shown = sampler.texts.shown(result)
        out.write(shown[written:])
        out.flush()
        written = max(written, len(shown))
    out.write("\n")


def read_prompts(path: Path) -> list[str]:
    """Raises UserError naming a line that is no prompt."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a file with a line of JSON for each prompt.") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f'Line {number} of {path} is no prompt: write {{"prompt": "..."}} on each line.')
        found.append(text)
    return found


def _file(options: argparse.Namespace, prompts: Path, out: Path) -> int:
    """Each finished text is a line at once; what is in the file already is not made again."""
    texts, key = read_prompts(prompts), _key(options)
    done = finished(out, texts, key)
    count = 1 if options.best_of else options.samples
    left = [n for n in range(len(texts)) if any((n, sample) not in done for sample in range(count))]
    if left:
        sampler = Sampler(options)
        with out.open("a", encoding="utf-8") as file:

            def write(result: Result) -> None:
                number = left[result.request]
                sample = 0 if options.best_of else result.sample
                if (number, sample) not in done:
                    file.write(json.dumps(_line(number, sample, texts[number], result, sampler, key)) + "\n")
                    file.flush()

            _run(sampler, [(texts[n], options.seed + n) for n in left], write)
    print(f"{len(texts) * count} texts in {out}, {len(done)} of them from before.")
    return 0


def _run(sampler: Sampler, prompts: Sequence[tuple[str, int]], write: Callable[[Result], None]) -> None:
    together: dict[int, list[Result]] = {}
    for result, _ in sampler.stream(prompts):
        if result.finish is None:
            continue
        if not (number := sampler.options.best_of):
            write(result)
            continue
        samples = together.setdefault(result.request, [])
        samples.append(result)
        if len(samples) == number:
            write(best_of(together.pop(result.request))[result.request])


def _line(number: int, sample: int, prompt: str, result: Result, sampler: Sampler, key: str) -> dict[str, Any]:
    return {
        "index": number,
        "sample": sample,
        "prompt": prompt,
        "text": sampler.texts.text(result),
        "finish": result.finish,
        "tokens": len(result.tokens),
        "log_prob": sum(result.log_probs),
        "settings": key,
    }


def _key(options: argparse.Namespace) -> str:
    """What a text depends on besides its prompt."""
    names = ("tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "best_of", "seed")
    given = {name: getattr(options, name) for name in (*names, "cache", "dtype")}
    given["model"] = str(absolute(store.place(options.model)))
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]


def finished(out: Path, prompts: Sequence[str], key: str) -> set[tuple[int, int]]:
    """Which texts a file has. A last line that was cut off is removed. Raises UserError where the file is not of these
    prompts and settings."""
    if not out.exists():
        return set()
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    found = set()
    for number, line in enumerate(whole.decode("utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            index, sample, same = record["index"], record["sample"], record["settings"] == key
            same = same and prompts[index] == record["prompt"]
        except (ValueError, KeyError, TypeError, IndexError):
            same = False
            index = sample = -1
        if not same:
            raise UserError(
                f"Line {number} of {out} is not of these prompts and settings: name another --out, or remove the file."
            )
        found.add((index, sample))
    if len(whole) < len(content):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return found
