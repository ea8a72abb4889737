# SPDX-License-Identifier: Apache-2.0
"""Makes what the harness's own Hugging Face backend finds on a small model, for ``tests/evals/test_harness.py``.

    python -m tests.evals.golden.make        # needs torch==2.13.0, transformers, lm-eval and tokenizers

The model is ``tests/hf/golden/weights.py``'s drawing of a LLaMA; its tokenizer is trained here on fixed text and kept
in the golden, ``harness.json``, with versions, results and the answer to every single request.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.hf.golden import weights

HERE = Path(__file__).parent
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320, "hidden_size": 48,
    "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "rope_theta": 10_000.0, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32",
}  # fmt: skip
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A model of two layers knows nothing, and says so at length.",
    "Numbers such as 12, 144 and 1,728 are powers of twelve.",
    "To be, or not to be: that is the question.",
    "Tokens are counted, windows slide, and every probability adds up to one in the end, whatever a text says of it.",
]
TASKS = {
    "choose": {
        "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
        "doc_to_choice": [" yes", " no", " perhaps not"], "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "roll": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "write": {
        "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    c = CONFIG
    width, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"] * c["head_dim"]
    keys = c["num_key_value_heads"] * c["head_dim"]
    found = {"model.embed_tokens.weight": (c["vocab_size"], width), "model.norm.weight": (width,)}
    found["lm_head.weight"] = (c["vocab_size"], width)
    for layer in range(c["num_hidden_layers"]):
        begin = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{begin}{name}.weight"] = (width,)
        for name, out in (("q", heads), ("k", keys), ("v", keys)):
            found[f"{begin}self_attn.{name}_proj.weight"] = (out, width)
        found[f"{begin}self_attn.o_proj.weight"] = (width, heads)
        for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
            found[f"{begin}mlp.{name}_proj.weight"] = shape
    return found


def build(folder: Path, tokenizer: str) -> None:
    """The model's folder, and beside it the tasks with their documents."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    save_file(
        {name: np.ascontiguousarray(weights.draw(name, shape)) for name, shape in shapes().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(tokenizer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    documents = folder.parent / "documents.jsonl"
    lines = [
        {"text": text, "answer": number % 3, "target": text[:4]}
        for number, text in enumerate([*SENTENCES, *(s.upper() for s in SENTENCES[:3]), SENTENCES[4] * 3])
    ]
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task in TASKS.items():
        whole = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(documents)}},
            "test_split": "test", "metadata": {"version": 1}, **task,
        }  # fmt: skip
        (folder.parent / f"{name}.yaml").write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in whole.items()) + "\n")


def tokenizer() -> str:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(SENTENCES * 3, trainer)
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return library.to_str()


def answers(found: dict) -> dict:
    """Results, and of each request what the model gave."""
    kept = {
        task: {k: v for k, v in values.items() if isinstance(v, float)} for task, values in found["results"].items()
    }
    requests = {
        task: [[json.dumps(s["arguments"]), s["resps"]] for s in sorted(samples, key=lambda s: s["doc_id"])]
        for task, samples in found["samples"].items()
    }
    return {"results": kept, "requests": requests}


def main() -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    made = tokenizer()
    with tempfile.TemporaryDirectory() as temporary:
        build(Path(temporary) / "model", made)
        model = HFLM(str(Path(temporary) / "model"), dtype="float32", device="cpu", batch_size=3)
        manager = TaskManager(include_path=temporary, include_defaults=False)
        found = lm_eval.simple_evaluate(model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    versions = {name: version(name) for name in ("lm_eval", "transformers", "torch", "tokenizers")}
    record = {"versions": versions, "tokenizer": made, **answers(found)}
    (HERE / "harness.json").write_text(json.dumps(record, default=str) + "\n")
    print(json.dumps(record["results"], indent=1), file=sys.stderr)


if __name__ == "__main__":
    main()
