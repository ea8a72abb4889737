# SPDX-License-Identifier: Apache-2.0
# A trained model's own answers as a corpus, and the report of a study of post-training.

import json
from dataclasses import replace

import pytest

from research.core.types import UserError
from research.data.chat import PLAIN
from research.data.chat_source import ChatSource
from research.data.tokenizers import Bytes
from research.objectives.next_token import NextToken
from research.recipes import sampled
from research.recipes.graph import inputs, resolved, stage
from research.recipes.report import write_report
from research.recipes.sampled import Sampled
from research.scaling.table import Run, Table
from research.train import loop, weights
from research.train.checkpoint import CheckpointError
from research.train.experiment import CheckpointPolicy
from tests import tiny
from tests.rl import letters


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder, and that of the cache."""
    folder = tmp_path_factory.mktemp("runs")
    experiment = letters.experiment(3, checkpoint=CheckpointPolicy(every=0), log_every=1)
    loop.run(experiment, folder / "rl", loop.Options(cache_dir=folder / "cache"))
    return folder


def corpus(trained, **changes):
    made = Sampled(
        str(trained / "rl"), letters.Letters(), letters.SPEECH, problems=80, validation_problems=16, samples=16
    )
    return replace(made, **changes)


def test_right_answers_are_kept_each_once_and_the_same_each_time(trained, monkeypatch):
    asked = corpus(trained, keep=2)
    found = list(asked.conversations("train", cache_dir=trained / "cache"))
    per_problem = {}
    for user, assistant in found:
        per_problem.setdefault(user.content, []).append(assistant.content)
        assert sum(ord(c) < 128 for c in assistant.content) >= 4
    assert len(found) > 0 and max(map(len, per_problem.values())) <= 2
    everything = corpus(trained, least=0.0, keep=4)
    assert len(list(everything.conversations("train", cache_dir=trained / "cache"))) > len(found)
    monkeypatch.setattr(sampled._Model, "said", lambda *_: pytest.fail("it is on disk"))
    assert list(asked.conversations("train", cache_dir=trained / "cache")) == found


def test_a_chunk_that_was_done_is_not_done_again(trained, tmp_path, monkeypatch):
    said, calls = sampled._Model.said, []

    def dies_in_the_second(self, split, chosen):
        calls.append(chosen)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return said(self, split, chosen)

    monkeypatch.setattr(sampled._Model, "said", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        list(corpus(trained).conversations("train", cache_dir=tmp_path))
    list(corpus(trained).conversations("train", cache_dir=tmp_path))
    assert calls == [range(0, 64), range(64, 80), range(64, 80)]


def test_its_fingerprint_is_that_of_the_weights_wherever_they_lie(trained, tmp_path):
    one = corpus(trained)
    content = weights.content(one.checkpoint)
    elsewhere = replace(one, checkpoint=str(tmp_path), content=content)
    assert one.fingerprint(tmp_path) == elsewhere.fingerprint(tmp_path)
    assert one.fingerprint(tmp_path) != replace(one, seed=1).fingerprint(tmp_path)
    with pytest.raises(CheckpointError):
        replace(one, checkpoint=str(tmp_path)).fingerprint(tmp_path)
    with pytest.raises(UserError, match="at least 1"):
        corpus(trained, keep=0)


def test_a_stage_learns_from_another_ones_answers(trained, tmp_path):
    source = ChatSource(
        corpus=corpus(trained, checkpoint=stage("rl"), validation_problems=80, least=0.0),
        tokenizer=Bytes(),
        template=PLAIN,
        batch_size=8,
        sequence_length=32,
    )
    waiting = tiny.experiment(steps=2, model=letters.MODEL, objective=NextToken(), source=source, evals=())
    assert inputs(waiting) == ("rl",)
    settled = resolved(waiting, trained)
    assert settled.source.corpus.content == weights.content(trained / "rl") and settled.hash != waiting.hash
    result = loop.run(settled, tmp_path / "taught", loop.Options(cache_dir=trained / "cache"))
    assert result["data"]["train_documents"] > 0


def test_a_model_without_a_right_answer_is_told_of(trained):
    with pytest.raises(UserError, match="No answer of .* to 80 problems was finished and worth at least 2.0"):
        list(corpus(trained, least=2.0).conversations("train", cache_dir=trained / "cache"))


def test_the_report_shows_what_runs_solve_and_say(trained, tmp_path):
    (tmp_path / "rl").symlink_to(trained / "rl")
    runs = Table(tuple(Run(name, 1, 1, 1, 1.0, status=s) for name, s in (("rl", "finished"), ("lost", "failed"))))
    found = write_report(runs, tmp_path, title="Small & smaller", kinds={"GRPO": ["rl", "lost"]}, sentences=["It ran."])
    record = json.loads((tmp_path / "solved.json").read_text())
    assert record["runs"]["rl"] == found["rl"] and "greedy" in found["rl"] and record["excluded"] == {"lost": "failed"}
    text = (tmp_path / "report.html").read_text()
    assert "Small &amp; smaller" in text and "It ran." in text and "rl, step 3" in text and "<svg" in text
    assert (tmp_path / "training.png").stat().st_size > 10_000
