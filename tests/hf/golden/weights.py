# SPDX-License-Identifier: Apache-2.0
"""The parameters of the goldens: a function of a tensor's name and shape, in numpy alone.

A golden holds no weights. Its script and the tests that read it draw the same ones here, so that a golden stays small
and the test suite needs no torch. Only uniform numbers are used: their stream is the simplest to keep.
"""

import hashlib
import json

import numpy as np

CONV1D = (".c_attn.", ".c_fc.", ".c_proj.")  # GPT-2 stores these as [in, out], everybody else as [out, in]
ROUTERS = (".mlp.gate.weight", ".block_sparse_moe.gate.weight")


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of this name in a checkpoint, float32.

    Norm weights lie around 1/2, between Gemma's neutral 0 and the others' 1, so that one rule serves both and taking w
    for 1 + w shows. Linear layers keep activations near 1, routers spread their scores, and no bias is zero.
    """
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest(), "little")))
    unit = np.sqrt(3.0) * (2.0 * rng.random(tuple(shape)) - 1.0)  # mean 0, variance 1
    if name.endswith("e_score_correction_bias"):
        value = 0.2 * unit
    elif name.endswith("bias"):
        value = 0.3 * unit
    elif len(shape) == 1:
        value = 0.5 + 0.2 * unit
    elif "wpe" in name:
        value = 0.3 * unit
    elif any(word in name for word in ("embed_tokens", "embed_in", "wte", "word_embeddings")):
        value = 0.5 * unit
    else:
        fan_in = shape[0] if any(word in name for word in CONV1D) else shape[-1]
        gain = 4.0 if name.endswith(("lm_head.weight", "embed_out.weight", *ROUTERS)) else 2.0
        value = gain / np.sqrt(fan_in) * unit
    return value.astype(np.float32)


def checkpoint(tensors: str) -> dict[str, np.ndarray]:
    """All tensors of a golden, from its ``tensors`` field: JSON of name to [shape, dtype]."""
    return {name: draw(name, tuple(shape)) for name, (shape, _) in json.loads(tensors).items()}


def digest(arrays: dict[str, np.ndarray]) -> str:
    """Sixteen hex digits of all arrays, by name: equal to a golden's ``digest`` where the same weights were drawn."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return total.hexdigest()[:16]
