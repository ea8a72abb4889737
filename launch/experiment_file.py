# SPDX-License-Identifier: Apache-2.0
"""Writes runs that were planned as a study file, ready for ``lab run`` and ``lab sweep``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent, wrap

from launch.study import Study
from research.core.files import write_atomically
from research.core.types import UserError
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.scaling import cost
from research.scaling.laws import DEEPSEEK_BATCH_TOKENS, DEEPSEEK_LEARNING_RATE
from research.train.experiment import Experiment

SEQUENCE_LENGTH = 2048
LINE = 110


@dataclass(frozen=True)
class Planned:
    """A run to write: a model, its training FLOPs, and the tokens that these are by the count of the runs it is
    from."""

    name: str
    model: Decoder
    flops: float
    tokens: float

    @property
    def mlp(self) -> Mlp:
        """The feed-forward of every layer. Raises UserError for experts: families are of dense models."""
        mlp = self.model.period[0][1]
        if not isinstance(mlp, Mlp):
            raise UserError(f"{self.name} has experts, and only dense models can be written to a file.")
        return mlp


@dataclass(frozen=True)
class Like:
    """The study that planned runs are like. reference: as ``launch.study.load`` takes it."""

    reference: str
    study: Study

    def nearest(self, params: float) -> str:
        """The name of the study's dense experiment that is nearest in size, of those of the largest budget first."""
        names = [name for name, e in self.study.experiments.items() if not cost.experts(e.model)] or list(
            self.study.experiments
        )

        def distance(name: str) -> tuple[float, float]:
            experiment = self.study.experiments[name]
            return abs(cost.params(experiment.model).total - params), -experiment.flops

        return min(names, key=distance)

    def experiment(self, params: float) -> Experiment:
        return self.study.experiments[self.nearest(params)]


def write(path: Path, planned: Sequence[Planned], *, like: Like | None, words: Sequence[str]) -> Path:
    """Writes a study file whose ``sweep()`` are the planned runs: as those of ``like``, or from scratch. Raises
    UserError for a path that does not end in .py."""
    path = checked(path)
    told = "\n\n".join("\n".join(wrap(plain(sentence), LINE)) for sentence in words)
    body = _from_study(planned, like) if like is not None else _from_scratch(planned)
    write_atomically(path, f'# SPDX-License-Identifier: Apache-2.0\n"""{told}\n"""\n\n{body}')
    return path


def checked(path: Path) -> Path:
    """The path. Raises UserError where it does not end in .py."""
    path = Path(path)
    if path.suffix != ".py":
        raise UserError(f"An experiment is written to a Python file: {path} does not end in .py.")
    return path


def plain(sentence: str) -> str:
    """The sentence without what would end a docstring, or mean something in one."""
    return sentence.replace("\\", "/").replace('"', "'")


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _from_study(planned: Sequence[Planned], like: Like) -> str:
    file, _, function = like.reference.partition(":")
    path = Path(file).resolve()
    inside = path.is_relative_to(Path.cwd())
    where = quoted(str(path.relative_to(Path.cwd()) if inside else path))
    calls, seeds = [], _seeds(planned, [experiment.model for experiment in like.study.experiments.values()])
    for run in planned:
        m = run.model
        calls.append(
            f'"{run.name}": planned(\n    "{run.name}", like={quoted(like.nearest(cost.params(m).total))}, '
            f"flops={run.flops:.6g}, seed={seeds[run.name]},\n"
            f"    d_model={m.d_model}, num_layers={m.num_layers}, num_heads={m.attentions[0].num_heads}, "
            f"num_kv_heads={_kv_heads(m)}, d_ff={run.mlp.d_ff},\n),"
        )
    return f"""from dataclasses import replace
from pathlib import Path

from launch.study import load_module
from research.scaling.ladder import with_heads
from research.train.experiment import Experiment, Flops

STUDY = load_module(Path({where}))  # the study these runs go on from; its settings hold but for model and length
ADJUST = getattr(STUDY, "adjust", lambda experiment: experiment)


def planned(
    name: str, *, like: str, flops: float, seed: int, d_model: int, num_layers: int, num_heads: int,
    num_kv_heads: int | None, d_ff: int,
) -> Experiment:
    base = STUDY.{function or "sweep"}()[like]
    attention = with_heads(base.model.attention, num_heads=num_heads, num_kv_heads=num_kv_heads)
    mlp = replace(base.model.mlp, d_ff=d_ff)
    model = replace(base.model, d_model=d_model, num_layers=num_layers, attention=attention, mlp=mlp)
    return ADJUST(replace(base, name=name, model=model, length=Flops(flops), seed=base.seed + seed))


def sweep() -> dict[str, Experiment]:
    return {{
{indent(chr(10).join(calls), " " * 8)}
    }}
"""


def _kv_heads(model: Decoder) -> int | None:
    return getattr(model.attentions[0], "num_kv_heads", None)


def _seeds(planned: Sequence[Planned], made: Sequence[Decoder] = ()) -> dict[str, int]:
    """A seed for each run, so that one made again, or of a model that has been trained (``made``), is another run."""
    seen: dict[tuple[Decoder, float], int] = {}
    found = {}
    for run in planned:
        found[run.name] = seen.get((run.model, run.flops), int(run.model in made))
        seen[(run.model, run.flops)] = found[run.name] + 1
    return found


def _from_scratch(planned: Sequence[Planned]) -> str:
    calls, seeds = [], _seeds(planned)
    for run in planned:
        m = run.model
        rate = float(DEEPSEEK_LEARNING_RATE(run.flops))
        rows = max(1, round(float(DEEPSEEK_BATCH_TOKENS(run.flops)) / SEQUENCE_LENGTH))
        model = (
            f"Decoder(\n    vocab_size=VOCABULARY, d_model={m.d_model}, num_layers={m.num_layers},\n"
            f"    attention=Attention(num_heads={m.attentions[0].num_heads}, num_kv_heads={_kv_heads(m)}),\n"
            f'    mlp=Mlp(d_ff={run.mlp.d_ff}, activation="{run.mlp.activation}"), remat="full",\n)'
        )
        calls.append(
            f'"{run.name}": planned(\n    "{run.name}", tokens={run.tokens:.6g}, '
            f"rate={rate:.3g}, rows={rows}, seed={seeds[run.name]},\n"
            f"    model={indent(model, '    ').lstrip()},\n),"
        )
    return f'''from research.data import sources
from research.data.pipeline import TextSource
from research.data.tokenizers import SentencePiece
from research.evals.validation import Validation
from research.models.attention import Attention
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.objectives.next_token import NextToken
from research.train.experiment import AdamW, Experiment, Tokens
from research.train.optimizers import Schedule, Share

CORPUS = sources.Stdlib()  # yours: sources.TextFolder("path/to/folder"), sources.Jsonl("file.jsonl"), ...
VOCABULARY = {planned[0].model.vocab_size}


def planned(name: str, *, tokens: float, rate: float, rows: int, seed: int, model: Decoder) -> Experiment:
    """Learning rate and batch are DeepSeek LLM's laws at this budget (Bi et al. 2024): tune them for your text."""
    tokenizer = SentencePiece(vocab_size=VOCABULARY)
    source = TextSource(corpus=CORPUS, tokenizer=tokenizer, batch_size=rows, sequence_length={SEQUENCE_LENGTH})
    return Experiment(
        name=name,
        model=model,
        objective=NextToken(),
        source=source,
        optimizer=AdamW(peak=rate, schedule=Schedule("cosine", warmup=Share(0.01))),
        length=Tokens(tokens),
        seed=seed,
        evals=(Validation(source.validation(num_batches=8), NextToken()),),
    )


def sweep() -> dict[str, Experiment]:
    return {{
{indent(chr(10).join(calls), " " * 8)}
    }}
'''
