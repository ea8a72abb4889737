# SPDX-License-Identifier: Apache-2.0
"""``lab eval``: tasks of EleutherAI's harness on a model from any folder."""

import argparse
import importlib.util
import json
import os

import jax

from launch.models import load, mesh_of
from research.core.types import UserError


def command(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lab eval needs the extra eval: pip install -c constraints.txt -e '.[eval]'.")
    if all(task.endswith((".yaml", ".yml")) for task in options.tasks):
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):  # what a task's file names lies here
            os.environ.setdefault(name, "1")
    from research.evals.harness import HarnessModel, evaluate

    loaded = load(options.model, mesh=mesh_of(options.mesh), dtype=options.dtype)
    if loaded.tokenizer is None:
        raise UserError(f"{options.model} has no tokenizer: put tokenizer.json or tokenizer.model beside its weights.")
    length = options.length or loaded.length
    with jax.set_mesh(loaded.mesh):
        model = HarnessModel(loaded.model, loaded.policy, loaded.tokenizer, rows=options.slots, length=length)
        how = dict(num_fewshot=options.fewshot, limit=options.limit, log_samples=options.out is not None)
        found = evaluate(model, options.tasks, **how)
    for task, metrics in found["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                metric, _, rule = name.partition(",")
                error = metrics.get(f"{metric}_stderr,{rule}")
                spread = f" +- {error:.4f}" if isinstance(error, float) else ""
                print(f"{task}  {metric}{f' ({rule})' if rule not in ('', 'none') else ''}: {value:.4f}{spread}")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2, default=str) + "\n")
    return 0
