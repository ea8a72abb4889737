# SPDX-License-Identifier: Apache-2.0
"""A task's worked solutions as conversations to learn from."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from research.core.config import config_hash, from_json, to_json
from research.core.sharding import MeshSpec, make_mesh
from research.core.types import Context, UserError
from research.data.chat import PLAIN, Message
from research.data.chat_source import ChatSource
from research.data.sources import ChatCorpus, Mixture, PlainText, Synthetic
from research.data.tokenizers import Bytes, Characters
from research.evals.tasks.arithmetic import Arithmetic
from research.evals.tasks.base import Problem, Response, Reward, Task
from research.evals.tasks.worked import Worked
from research.rl.rewards.numeric import Numeric

CORPUS = Worked(Arithmetic(), count=300, validation_count=20)


@dataclass(frozen=True)
class Unworked:
    count: int = 3

    def size(self, split: str) -> int:
        return self.count

    @property
    def verifier(self) -> Reward:
        return Numeric()

    def problem(self, split: str, index: int) -> Problem:
        return Problem(f"{split} {index}", "1", "1" if index < 2 else "")


def test_the_first_problems_of_each_split_as_the_task_has_them(cache_dir):
    task = CORPUS.task
    assert isinstance(CORPUS, ChatCorpus) and isinstance(task, Task)
    found = {split: list(CORPUS.conversations(split, cache_dir=cache_dir)) for split in ("train", "validation")}
    assert {split: len(many) for split, many in found.items()} == {"train": 300, "validation": 20}
    for split, many in found.items():
        for index, (user, assistant) in enumerate(many):
            problem = task.problem(split, index)
            assert (user, assistant) == (Message("user", problem.prompt), Message("assistant", problem.worked))
            assert task.verifier.score(problem, Response(assistant.content)) == 1
    assert not {user for user, _ in found["train"]} & {user for user, _ in found["validation"]}
    told = replace(CORPUS, system="Add up.")
    assert next(told.conversations("train", cache_dir=cache_dir)) == (Message("system", "Add up."), *found["train"][0])
    document = next(CORPUS.documents("train", cache_dir=cache_dir))
    assert document == "\n".join(content for _, content in found["train"][0])


def test_it_is_a_setting_known_by_its_content(cache_dir):
    again = from_json(json.loads(json.dumps(to_json(CORPUS))))
    assert again == CORPUS and config_hash(again) == config_hash(CORPUS)
    others = [replace(CORPUS, count=299), replace(CORPUS, validation_count=21), replace(CORPUS, system="a")]
    others += [replace(CORPUS, task=Arithmetic(seed=1)), replace(CORPUS, task=Arithmetic(terms=2)), CORPUS]
    assert len({corpus.fingerprint(cache_dir) for corpus in others}) == 6


def test_it_is_trained_on(cache_dir):
    """Only the solutions and their ends are learned; all of what is asked fits."""
    source = ChatSource(CORPUS, Characters(), PLAIN, batch_size=8, sequence_length=64)
    context = Context(mesh=make_mesh(MeshSpec()), seed=0, cache_dir=cache_dir)
    stream = source.start(context)
    info = stream.info
    worked = sum(len(m[1].content) for m in CORPUS.conversations("train", cache_dir=cache_dir))
    assert info["train_trained"] == worked + 300 and info["train_documents"] == 300
    assert info["train_cut"] == info["train_lost"] == 0 and info["train_filled"] > 0.9
    batch = {name: np.asarray(x) for name, x in stream.next(None, 0).items()}
    row = stream.tokenizer.decode(batch["targets"][0][batch["weights"][0] > 0])
    assert row.count("#") == batch["segment_ids"][0].max() and row.count(";") == row.count("#")
    mixed = replace(source, corpus=Mixture((CORPUS, PlainText(Synthetic())), (3, 1)), tokenizer=Bytes())
    assert mixed.start(context).next(None, 0)["weights"].sum() > 0


def test_mistakes(cache_dir):
    with pytest.raises(UserError, match="at least one problem of each split; given count=0 and validation_count=256"):
        Worked(Arithmetic(), count=0)
    few = Worked(Unworked(2), count=10)
    assert len(list(few.conversations("train", cache_dir=cache_dir))) == 2
    with pytest.raises(UserError, match="Problem 2 of Unworked's train split has no worked solution"):
        list(replace(few, task=Unworked()).conversations("train", cache_dir=cache_dir))
