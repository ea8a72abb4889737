# SPDX-License-Identifier: Apache-2.0
"""Models that can be built: near the size that is asked for, in the multiples of their family."""

import math
from dataclasses import replace

import numpy as np
import pytest

from experiments import quickstart
from research.core.types import UserError
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.models.moe import Moe
from research.scaling import buildable, cost

RANGES = {"llama": (1e8, 1e12), "gpt": (3e7, 1e11), "small": (1e4, 2e6)}


def tiles(family: buildable.Family, model: Decoder) -> None:
    """Heads fill the width, and widths come in the family's multiples."""
    step = next(multiple for start, multiple in reversed(family.multiples) if model.d_model >= start)
    assert model.d_model % step == 0 and model.d_model == model.attention.num_heads * family.head_dim
    assert model.attention.width(model.d_model) == family.head_dim
    assert model.mlp.d_ff % family.ff_multiple == 0
    assert model.mlp.d_ff == pytest.approx(family.ff_ratio * model.d_model, abs=family.ff_multiple / 2 + 1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt"])
def test_sizes_are_near_and_tile(name):
    family = buildable.FAMILIES[name]()
    for params in np.geomspace(*RANGES[name], 7):
        model = buildable.nearest(family, params=params)
        assert cost.params(model).total == pytest.approx(params, rel=0.05), f"{params:.3g}"
        tiles(family, model)
        assert 1 / 2.1 < model.d_model / model.num_layers / family.aspect < 2.1


def test_of_a_fixed_depth_the_nearest_width_is_taken():
    family = buildable.small()
    sizes = [cost.params(family.model(width, 2)).total for width in family.widths(400)]
    for params in np.geomspace(*RANGES["small"], 15):
        model = buildable.nearest(family, params=params)
        tiles(family, model)
        assert model.num_layers == 2
        assert cost.params(model).total == min(sizes, key=lambda size: abs(math.log(size / params)))


@pytest.mark.parametrize("parameters", ["non_embedding", "with_head"])
def test_sizes_may_be_counted_otherwise(parameters):
    model = buildable.nearest(buildable.gpt(), params=1e8, parameters=parameters)
    assert buildable.count(model, parameters=parameters) == pytest.approx(1e8, rel=0.05)
    assert cost.params(model).total > 1.2e8
    head = model.vocab_size * model.d_model
    assert buildable.count(model, parameters="with_head") - buildable.count(model, parameters="non_embedding") == head
    assert buildable.count(model) == cost.params(model).total


def test_a_seventy_billion_llama_looks_like_one():
    model = buildable.nearest(buildable.llama(), params=7e10)
    assert 7168 <= model.d_model <= 9216 and 60 <= model.num_layers <= 100 and model.d_model % 512 == 0


def test_a_model_in_words():
    words = buildable.describe(buildable.llama().model(1024, 9))
    assert words.startswith("9 layers of width 1,024, 8 heads of 128, feed-forward 2,816, vocabulary 32,000: ")
    assert words.endswith(f"{cost.params(buildable.llama().model(1024, 9)).total:,} parameters")
    grouped = Decoder(512, 64, 2, Attention(num_heads=8, num_kv_heads=2), Mlp(d_ff=168))
    assert "8 heads of 8 (2 for keys and values)" in buildable.describe(grouped)


def test_a_study_s_family_is_found_in_its_models():
    models = [experiment.model for experiment in quickstart.sweep().values()]
    family = buildable.family_of(models)
    assert (family.head_dim, family.layers, family.multiples, family.aspect) == (8, 2, ((0, 8),), None)
    for model in models:
        assert buildable.nearest(family, params=cost.params(model).total) == model


def test_a_family_with_depth_and_shared_heads_is_found():
    shapes = ((128, 4, 2), (256, 8, 4), (384, 12, 6))
    models = [
        Decoder(
            512, width, depth, Attention(num_heads=heads, num_kv_heads=heads // 2), Mlp(d_ff=4 * width), head="tied"
        )
        for width, depth, heads in shapes
    ]
    family = buildable.family_of(models)
    assert (family.head_dim, family.aspect, family.layers, family.ff_ratio) == (64, 32.0, None, 4.0)
    for model in models:
        again = buildable.nearest(family, params=cost.params(model).total)
        assert replace(again, attention=model.attention) == model
        assert again.attention.kv_heads == model.attention.kv_heads and again.head == "tied"


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_heads_share_keys_and_values_at_every_size_as_in_the_base(kv_heads):
    base = Decoder(512, 64, 2, Attention(num_heads=8, num_kv_heads=kv_heads), Mlp(d_ff=168))
    family = replace(buildable.small(), base=base)
    for params in np.geomspace(3e4, 1e6, 20):
        attention = buildable.nearest(family, params=params).attention
        assert attention.kv_heads == (1 if kv_heads == 1 else attention.num_heads // 4)


def test_experts_have_no_family():
    routed = Decoder(512, 64, 2, Attention(num_heads=8), Moe(num_experts=4, d_ff=64))
    with pytest.raises(UserError, match="models have experts.*name one with --family"):
        buildable.family_of([routed])


def test_what_cannot_be_built_is_refused():
    with pytest.raises(UserError, match="smallest llama model has .* and 20,000 are asked for: name a smaller family"):
        buildable.nearest(buildable.llama(), params=2e4)
    with pytest.raises(UserError, match="largest llama model has .* and 100,000,000,000,000 are asked for"):
        buildable.nearest(buildable.llama(), params=1e14)
    for params in (0.0, -1e9, math.nan, math.inf):
        with pytest.raises(UserError, match="must be a positive number of parameters"):
            buildable.nearest(buildable.llama(), params=params)
