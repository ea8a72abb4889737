# SPDX-License-Identifier: Apache-2.0
"""Models that can be built: near the size that is asked for, in the multiples of their family."""

import numpy as np
import pytest

from experiments import quickstart
from research.core.types import UserError
from research.scaling import buildable, cost

RANGES = {"llama": (2e8, 1e12), "gpt": (1e8, 1e11), "small": (2e4, 2e6)}


@pytest.mark.parametrize("name", RANGES)
def test_sizes_are_near_and_tile(name):
    family = buildable.FAMILIES[name]()
    for params in np.geomspace(*RANGES[name], 9):
        model = buildable.nearest(family, params=params)
        assert cost.params(model).total == pytest.approx(params, rel=0.12 if name == "small" else 0.06)
        assert model.d_model == model.attention.num_heads * family.head_dim
        step = next(multiple for start, multiple in reversed(family.multiples) if model.d_model >= start)
        assert model.d_model % step == 0 and model.mlp.d_ff % family.ff_multiple == 0
        if family.aspect is not None:
            assert 1 / 2.1 < model.d_model / model.num_layers / family.aspect < 2.1


def test_a_seventy_billion_llama_looks_like_one():
    model = buildable.nearest(buildable.llama(), params=7e10)
    assert 7168 <= model.d_model <= 9216 and 60 <= model.num_layers <= 100 and model.d_model % 512 == 0
    words = buildable.describe(model)
    assert f"{model.num_layers} layers of width {model.d_model:,}" in words and "heads of 128" in words


def test_a_study_s_family_is_found_in_its_models():
    models = [experiment.model for experiment in quickstart.sweep().values()]
    family = buildable.family_of(models)
    assert (family.head_dim, family.layers, family.multiples) == (8, 2, ((0, 8),))
    for model in models:
        again = buildable.nearest(family, params=cost.params(model).total)
        assert (again.d_model, again.attention.num_heads) == (model.d_model, model.attention.num_heads)


def test_too_small_a_model_is_refused():
    with pytest.raises(UserError, match="smallest llama model has .* and 20,000 are asked for: name a smaller family"):
        buildable.nearest(buildable.llama(), params=2e4)
