# SPDX-License-Identifier: Apache-2.0
"""Goldens of Hugging Face transformers: what its models compute with the weights of weights.py.

    python -m tests.hf.golden.make [CASE ...]                           # writes CASE.npz here; without names: all
    python -m tests.hf.golden.make check FOLDER CASE [FOLDER CASE ...]  # reads exported folders: the same logits?

Run it from the root of the repository with a python that has transformers, torch (CPU), safetensors and numpy; the
tests that read the goldens need numpy alone. A golden holds

    config          the config.json that transformers writes
    legacy_config   the same as older checkpoints have it (legacy.py); transformers gives the same logits with it
    tensors         JSON: name -> [shape, dtype] of the safetensors that transformers writes; the values are
                    weights.draw(name, shape), and ``digest`` is weights.digest of them all
    tokens, mask    [B, T] int32; mask is 1 for real tokens, as a tokenizer's attention_mask
    positions       [B, T] int32: the running count of real tokens, from 0
    logits          [B, T, V] float32; zeros where mask is 0, where they mean nothing
    margin          the smallest gap by which a router chose, infinite without one (see ``margins``)
    versions        JSON: what made it
"""

import argparse
import json
import math
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.hf.golden import weights
from tests.hf.golden.cases import CASES, LENGTH, Case
from tests.hf.golden.legacy import downgrade

HERE = Path(__file__).parent
ROWS = {"none": (LENGTH, LENGTH), "left": (LENGTH, 13, 5), "right": (LENGTH, 13, 5)}  # real tokens of each row
SAFE_MARGIN = 0.01  # a thousand times what float32 arithmetic in another order moves a router's scores by
TOLERANCE = 1e-4  # of ``check``, and what an option must move the logits by: the tanh form of GELU moves them by 1.5e-4
VERSIONS = {
    "transformers": transformers.__version__,
    "torch": torch.__version__,
    "safetensors": safetensors.__version__,
    "numpy": np.__version__,
    "python": sys.version.split()[0],
}

Batch = dict[str, np.ndarray]


def batch(case: Case, seed: int) -> Batch:
    """Random tokens, padded on the case's side; positions count the real tokens, as ``generate`` does."""
    rows = ROWS[case.padding]
    mask = np.zeros((len(rows), LENGTH), np.int32)
    for row, real in enumerate(rows):
        mask[row, LENGTH - real if case.padding == "left" else 0 :][:real] = 1
    tokens = np.random.default_rng(seed).integers(3, case.settings["vocab_size"], mask.shape)
    pad = case.settings.get("pad_token_id") or 0
    positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)
    return {
        "tokens": np.where(mask == 1, tokens, pad).astype(np.int32),
        "mask": mask,
        "positions": positions.astype(np.int32),
    }


def load(folder: Path) -> PreTrainedModel:
    """The model in a folder, in float32; not a tensor of the folder may be left over, nor be missing from it."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    wrong = {name: found for name, found in report.items() if found}
    if wrong:
        raise SystemExit(f"{folder}: tensors do not fit the config: {wrong}")
    return model.eval()


def logits(model: PreTrainedModel, data: Batch) -> np.ndarray:
    """[B, T, V], zeros at the padding."""
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(data["tokens"]).long(),
            attention_mask=torch.from_numpy(data["mask"]).long(),
            position_ids=torch.from_numpy(data["positions"]).long(),
            use_cache=False,
        )
    return np.where(data["mask"][..., None] == 1, out.logits.numpy(), 0.0)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, as a share of the largest logit."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def margins(model: PreTrainedModel, data: Batch) -> float:
    """The smallest gap, over layers and real tokens, between what a router took and the best that it left.

    Gaps between groups count too. They are in the router's logits; for DeepSeek V3, whose bias comes after the sigmoid,
    in biased scores. Infinite for a model without routers.
    """
    config, found, hooks = model.config, [], []

    def gap(scores: np.ndarray, k: int) -> float:
        ordered = -np.sort(-scores, axis=-1)
        finite = np.isfinite(ordered[:, k]) if k < ordered.shape[-1] else np.zeros(1, bool)
        return float((ordered[:, k - 1] - ordered[:, k])[finite].min()) if finite.any() else math.inf

    def look(router: torch.nn.Module, _: Any, out: tuple[torch.Tensor, ...]) -> None:
        scores = out[0].numpy()[data["mask"].reshape(-1) == 1]
        biased = config.model_type == "deepseek_v3"
        if biased:
            scores = 1 / (1 + np.exp(-scores)) + router.e_score_correction_bias.numpy()
        if biased or getattr(config, "topk_method", "") == "group_limited_greedy":
            members = np.sort(scores.reshape(len(scores), config.n_group, -1), axis=-1)
            groups = members[..., -2:].sum(-1) if biased else members[..., -1]
            found.append(gap(groups, config.topk_group))
            taken = np.argsort(-groups, axis=-1)[:, : config.topk_group]
            inside = np.zeros(groups.shape, bool)
            np.put_along_axis(inside, taken, True, axis=-1)
            scores = np.where(np.repeat(inside, members.shape[-1], axis=-1), scores, -np.inf)
        found.append(gap(scores, config.num_experts_per_tok))

    for name, module in model.named_modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            hooks.append((name, module.register_forward_hook(look)))
    logits(model, data)
    for _, hook in hooks:
        hook.remove()
    return min(found, default=math.inf)


def decided(name: str, case: Case, model: PreTrainedModel) -> tuple[Batch, float]:
    """A batch on which no choice of a router is close, and its margin."""
    best: tuple[Batch, float] = ({}, 0.0)
    for attempt in range(1000):
        data = batch(case, zlib.crc32(name.encode()) + attempt)
        margin = margins(model, data)
        best = max(best, (data, margin), key=lambda pair: pair[1])
        if best[1] > 2 * SAFE_MARGIN:
            break
    assert best[1] > SAFE_MARGIN, f"{name}: a router's choice hangs on {best[1]}"
    return best


def prepare(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """Lets transformers write a model of the case, then puts the drawn weights into its file."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model_type, **json.loads(json.dumps(case.settings)))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    drawn = {name: weights.draw(name, old.shape) for name, old in load_file(folder / "model.safetensors").items()}
    save_file(drawn, folder / "model.safetensors", metadata={"format": "pt"})
    return drawn


def same_after_saving(model: PreTrainedModel, drawn: dict[str, np.ndarray]) -> None:
    """That the model holds what was drawn, all of it: it writes the same again."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = load_file(Path(folder) / "model.safetensors")
    assert again.keys() == drawn.keys(), again.keys() ^ drawn.keys()
    assert all(np.array_equal(again[name], drawn[name]) for name in drawn)


def altered(case: Case, changes: dict[str, Any], drawn: dict[str, np.ndarray], data: Batch) -> np.ndarray:
    """The logits with the same weights and some options changed."""
    settings = case.settings | changes
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.for_model(case.model_type, **json.loads(json.dumps(settings)))
        config.save_pretrained(folder)
        save_file(drawn, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        return logits(load(Path(folder)), data)


def make(name: str, case: Case) -> str:
    """Writes one golden; returns a line about it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        drawn = prepare(case, folder)
        model = load(folder)
        same_after_saving(model, drawn)
        data, margin = decided(name, case, model)
        expected = logits(model, data)
        config = (folder / "config.json").read_text()
        legacy = json.dumps(downgrade(json.loads(config), case.legacy or {}), indent=2) + "\n"
        (folder / "config.json").write_text(legacy)
        difference = apart(logits(load(folder), data), expected)
        assert difference == 0.0, f"{name}: the legacy config gives other logits, by {difference}"
    moved = {json.dumps(change): apart(altered(case, change, drawn, data), expected) for change in case.matters}
    assert all(by > TOLERANCE for by in moved.values()), f"{name}: too little hangs on an option: {moved}"
    path = HERE / f"{name}.npz"
    tensors = {key: [list(value.shape), str(value.dtype)] for key, value in sorted(drawn.items())}
    np.savez_compressed(
        path,
        config=config,
        legacy_config=legacy,
        tensors=json.dumps(tensors),
        digest=weights.digest(drawn),
        logits=expected,
        margin=np.float32(margin),
        versions=json.dumps(VERSIONS),
        **data,
    )
    spread = np.std(expected[data["mask"] == 1])
    least = min(moved.values(), default=math.nan)
    return (
        f"{name:24} {path.stat().st_size / 1e3:5.1f} kB  logits {spread:.2f}  margin {margin:.3g}  options {least:.2g}"
    )


def check(folder: Path, name: str) -> bool:
    """Whether an exported folder gives the logits of a golden, when transformers reads it."""
    with np.load(HERE / f"{name}.npz") as golden:
        data = {field: golden[field] for field in ("tokens", "mask", "positions")}
        difference = apart(logits(load(folder), data), golden["logits"])
    print(f"{folder} {name}: {difference:.2g} {'as it should' if difference <= TOLERANCE else 'WRONG'}")
    return difference <= TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="CASE", help="cases; or: check FOLDER CASE [FOLDER CASE ...]")
    words = parser.parse_args().words
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if words[:1] == ["check"]:
        return (
            0 if all([check(Path(folder), name) for folder, name in zip(words[1::2], words[2::2], strict=True)]) else 1
        )
    unknown = [name for name in words if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    for name in words or CASES:
        print(make(name, CASES[name]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
