# SPDX-License-Identifier: Apache-2.0
"""Models of every family against the logits that transformers gave for the same weights (``golden/make.py``)."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from research.core import sharding
from research.core.sharding import MeshSpec
from research.core.types import Precision, UserError
from research.hf import convert
from research.hf.config import Config, canonical
from research.hf.multimodal import language_part
from tests.hf.golden import weights

FOLDER = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in FOLDER.glob("*.npz"))
FEW = (
    "gpt2", "gpt_neox", "llama", "llama_rope_yarn", "mistral_window", "qwen2_window", "qwen3", "gemma", "gemma2",
    "gemma3", "mixtral", "phi3_window", "deepseek_v3_yarn", "llama_tied", "llama_rope_llama3",
)  # fmt: skip


class Drawn:
    """Files that hold the weights of a golden."""

    def __init__(self, golden):
        self.arrays = weights.checkpoint(str(golden["tensors"]))
        self.shapes = {name: (array.shape, "F32") for name, array in self.arrays.items()}

    def read(self, name):
        return self.arrays[name]


def golden(case):
    return np.load(FOLDER / f"{case}.npz")


def logits_of(model, params, buffers, found):
    batch = {"tokens": found["tokens"], "positions": found["positions"], "segment_ids": found["mask"]}
    batch = {name: np.asarray(x, np.int32) for name, x in batch.items()}

    def run(params, buffers):
        bound = model.bind(params, buffers, Precision())
        return bound.logits(bound.forward(batch).hidden)

    return np.asarray(jax.jit(run)(params, buffers))


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in FEW)) for c in CASES])
def test_logits_are_those_of_transformers(case):
    found = golden(case)
    files, config = Drawn(found), Config(json.loads(str(found["config"])))
    assert weights.digest(files.arrays) == str(found["digest"])
    family, model = convert.described(config, files.shapes)
    assert convert.described(Config(json.loads(str(found["legacy_config"]))), files.shapes) == (family, model)
    mesh = sharding.make_mesh(MeshSpec(data=1), jax.devices()[:1])
    params, buffers = convert.load(family, model, files, mesh=mesh, precision=Precision())
    wanted, real = found["logits"], found["mask"] > 0
    gap = np.abs(logits_of(model, params, buffers, found) - wanted)[real].max() / np.abs(wanted).max()
    assert gap < 2e-5, gap
    back, exported = convert.fitting(model, 64)  # another family may describe the same model
    assert canonical(back.model(Config(exported))) == canonical(model)
    for name, shape, fetch in convert.tensors(family, model, params, buffers):
        np.testing.assert_array_equal(fetch(), files.arrays[name])
        assert shape == files.arrays[name].shape


@pytest.mark.parametrize(
    "names", [("language_model.model.", "vision_tower.x"), ("model.language_model.", "model.vision_tower.x")]
)
def test_the_language_model_of_one_that_sees_pictures(names):
    """Gemma 3 from 4B on: its config nested, its tensors under longer names, and those of pictures beside them."""
    found = golden("gemma3")
    plain, config = Drawn(found), json.loads(str(found["config"]))
    nested = Drawn(found)
    nested.arrays = {name.replace("model.", names[0], 1): array for name, array in plain.arrays.items()}
    nested.arrays |= {names[1]: np.zeros(3, np.float32)}
    nested.shapes = {name: (array.shape, "F32") for name, array in nested.arrays.items()}
    whole = Config({"model_type": "gemma3", "text_config": config, "vision_config": {}, "mm_tokens_per_image": 256})
    part, files = language_part(whole, nested)
    assert dict(files.shapes) == plain.shapes
    assert convert.described(part, files.shapes) == convert.described(Config(config), plain.shapes)
    for name, array in plain.arrays.items():
        np.testing.assert_array_equal(files.read(name), array)
    short = {name: config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "model_type")}
    _, model = convert.described(*language_part(Config({**whole.values, "text_config": short}), nested)[:1], [])
    assert model.vocab_size == 262_208 and model.attentions[0].num_heads == 8  # what the files leave out
    with pytest.raises(UserError, match="text_config of 'llama'"):
        language_part(Config({"model_type": "gemma3", "text_config": {"model_type": "llama"}}), nested)
