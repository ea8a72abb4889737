# SPDX-License-Identifier: Apache-2.0
# What a model solves of held-out problems: greedily, and by draws.

import jax
import pytest

from research.core.sharding import MeshSpec, make_mesh
from research.core.types import Context, Precision, UserError
from research.evals.solve import Solve
from research.evals.tasks.base import Response
from research.rl.respond import Speaker
from tests.rl import letters


def test_shares_are_those_of_the_answers(cache_dir):
    model = letters.MODEL
    bound = model.bind(model.init_params(jax.random.key(0), Precision()), model.init_buffers(), Precision())
    mesh = make_mesh(MeshSpec(), devices=jax.devices()[:1])
    context = Context(mesh, 0, cache_dir)
    with jax.set_mesh(mesh):
        found = Solve(letters.Letters(), letters.SPEECH, problems=12, samples=6, name="held").start(context)(bound, 0)
        again = Solve(letters.Letters(), letters.SPEECH, problems=12, samples=6, slots=5, name="held")
        assert again.start(context)(bound, 7) == found  # whatever else is in the batch, and at any step
        problems = [letters.Letters().problem("validation", index) for index in range(12)]
        speaker = Speaker(letters.SPEECH, cache_dir=cache_dir, temperature=0.0)
        greedy = list(speaker.ask(bound, problems, samples=1, seeds=(0, "solve")))
    verifier = letters.InAscii()
    right = [verifier.score(problems[a.problem], Response(a.response.text)) for a in greedy]
    assert found["held/greedy"] == sum(right) / 12
    assert found["held/length"] == sum(len(a.tokens) for a in greedy) / 12
    assert 0 < found["held/pass@1"] < found["held/pass@6"] <= 1


def test_mistakes_are_told():
    with pytest.raises(UserError, match="greedy responses or samples"):
        Solve(letters.Letters(), letters.SPEECH, greedy=False)
