# SPDX-License-Identifier: Apache-2.0
"""EleutherAI's evaluation harness (Gao et al. 2023; the extra ``eval``) as a client of the models here.

Its three kinds of requests become forward passes over padded batches and runs of the engine. Tokens are made of text as
its own Hugging Face backend makes them, so that the results agree.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM

from research.core.types import Array, UserError
from research.data.tokenizer_base import Tokenizer
from research.infer.engine import Engine, Request
from research.infer.generate import Settings, batch_of, bucket
from research.infer.sampling import sampling
from research.infer.text import Texts
from research.models.bound import Bound
from research.models.decoder import Decoder
from research.models.positions import Learned

MAX_GENERATED = 256  # where a task does not say
COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
READ = {*COUNTS, "until", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}


class HarnessModel(TemplateLM):
    """A policy on the mesh in scope. rows: sequences at a time; length: the most tokens that it sees at once. Raises
    UserError where the model's table of positions is shorter."""

    def __init__(
        self, model: Decoder, policy: Bound, tokenizer: Tokenizer, *, rows: int = 8, length: int = 2048
    ) -> None:
        super().__init__()
        table = model.position.max_length if isinstance(model.position, Learned) else length
        if not 1 < length <= table:
            raise UserError(f"A length of {length} tokens does not fit the model: it must be from 2 to {table}.")
        self.model, self.policy, self.ids, self.rows, self.length = model, policy, tokenizer, rows, length

    @property
    def eot_token_id(self) -> int:
        return self.ids.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.ids.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.ids.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        found = self.ids.encode(string).tolist()
        return found if add_special_tokens is False else [*self.ids.prefix, *found]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Of each continuation after its context: the sum of log-probabilities, and whether each of its tokens is the
        likeliest. What is too long loses its beginning."""
        pairs = [
            ((context + continuation)[-(self.length + 1) :], len(continuation)) for _, context, continuation in requests
        ]
        for whole, count in pairs:
            if count >= len(whole):
                raise UserError(f"A continuation of {count} tokens does not fit {self.length} with what precedes it.")
        order = sorted(range(len(pairs)), key=lambda n: -len(pairs[n][0]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for start in range(0, len(order), self.rows):
            part = order[start : start + self.rows]
            width = bucket(max(len(pairs[n][0]) for n in part))
            tokens, lengths = np.zeros((self.rows, width), np.int32), np.zeros(self.rows, np.int32)
            for row, n in enumerate(part):  # of the last token, what follows it is not asked
                tokens[row, : len(pairs[n][0])], lengths[row] = pairs[n][0], len(pairs[n][0]) - 1
            log_probs, likeliest = jax.device_get(_scores(self.policy, tokens, lengths))
            for row, n in enumerate(part):
                whole, count = pairs[n]
                at = slice(len(whole) - 1 - count, len(whole) - 1)
                found[n] = float(np.sum(log_probs[row, at], dtype=np.float64)), bool(np.all(likeliest[row, at]))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that do not overlap, the first token after a prefix."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += log_prob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy unless a task asks for a temperature; a text ends before the first of its stop strings."""
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(number)
        found = [""] * len(requests)
        for numbers in groups.values():
            asked = dict(requests[numbers[0]].args[1])
            for number, text in zip(
                numbers, self._generate([requests[n].args[0] for n in numbers], asked), strict=True
            ):
                found[number] = text
        return found

    def _generate(self, contexts: list[str], asked: dict[str, Any]) -> list[str]:
        if unknown := sorted(set(asked) - READ):
            raise UserError(f"A task asks for {unknown[0]} in its generation_kwargs, which is not supported.")
        until = asked.get("until") or []
        texts = Texts(self.ids.decode, [until] if isinstance(until, str) else until)
        count = next((int(asked[name]) for name in COUNTS if asked.get(name)), MAX_GENERATED)
        if count >= self.length:
            raise UserError(f"A task asks for {count} tokens of a model that sees {self.length}: raise --length.")
        temperature = float(asked.get("temperature") or 0.0) if asked.get("do_sample", True) else 0.0
        vocabulary = min(self.ids.vocab_size, self.model.vocab_size)
        chosen = sampling(
            temperature=temperature,
            top_k=int(asked.get("top_k") or 0),
            top_p=float(asked.get("top_p") or 1.0),
            min_p=float(asked.get("min_p") or 0.0),
            repetition_penalty=float(asked.get("repetition_penalty") or 1.0),
            vocab_size=vocabulary,
        )
        engine = Engine(self.model, slots=self.rows, settings=Settings(chosen, stop=tuple(self.ids.eos_ids)))
        prompts = [self.tok_encode(text)[-(self.length - count) :] for text in contexts]
        requests = [Request(prompt, count, seed=number) for number, prompt in enumerate(prompts)]
        results = {one.request: one for one in engine.run(self.policy, requests, ended=texts.ended)}
        return [texts.text(results[number]) for number in range(len(contexts))]


@functools.partial(jax.jit)
def _scores(policy: Bound, tokens_BT: Array, length_B: Array) -> tuple[Array, Array]:
    """The log-probability of each next token [B, T - 1], and whether it is the likeliest."""
    real = jnp.arange(tokens_BT.shape[1])[None, :] < length_B[:, None]
    hidden_BTD = policy.forward(batch_of(tokens_BT, jnp.zeros_like(length_B), real)).hidden

    def row(given: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_TD, next_T = given
        log_probs = jax.nn.log_softmax(policy.logits(hidden_TD[None])[0].astype(jnp.float32), axis=-1)
        chosen = jnp.take_along_axis(log_probs, next_T[:, None], axis=-1)[:, 0]
        return chosen, jnp.argmax(log_probs, axis=-1) == next_T

    return jax.lax.map(row, (hidden_BTD[:, :-1], tokens_BT[:, 1:]))


def evaluate(model: HarnessModel, tasks: Sequence[str], **how: Any) -> dict[str, Any]:
    """The harness's results of tasks given as files (.yaml) or by the names that it knows. Raises UserError for a file
    that is no task, and for data or settings that the harness cannot use."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folders, names = [], []
    for task in tasks:
        name, folder = _named(task)
        names.append(name)
        folders += [folder] if folder else []
    manager = TaskManager(include_path=folders or None, include_defaults=len(folders) < len(tasks))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(f"The harness knows no task {unknown[0]}: give a .yaml file of a task, or one of its names.")
    try:
        found = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, **how)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError) as error:  # of its data, its settings or a network
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"The harness could not run {', '.join(names)} ({type(error).__name__}: {reason}): see that the task's "
            "files can be read from where the command is given, and that its settings fit them."
        ) from error
    assert found is not None
    return found


def _named(task: str) -> tuple[str, str | None]:
    """A task's name, and the folder of its file."""
    from pathlib import Path

    path = Path(task)
    if path.suffix not in (".yaml", ".yml"):
        return task, None
    if not path.exists():
        raise UserError(f"There is no task {task}: give a .yaml file of a task, or a name that the harness knows.")
    name = next(
        (line[5:].partition(" #")[0].strip() for line in path.read_text().splitlines() if line.startswith("task:")), ""
    )
    if not name:
        raise UserError(f"{task} has no line 'task: NAME': it is no task of the harness.")
    return name.strip("'\""), str(path.resolve().parent)
