# SPDX-License-Identifier: Apache-2.0
"""``lab fit``, ``lab recommend`` and ``lab next``: a law from a study's runs, or from anybody's CSV."""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from launch import collect, experiment_file, study
from launch.experiment_file import Like, Planned
from research.core.files import write_atomically
from research.core.types import UserError
from research.models.decoder import Decoder
from research.models.mlp import Mlp
from research.scaling import allocation, buildable, columns, cost, design, forms, report
from research.scaling.advice import advise
from research.scaling.analysis import Settings, analyse
from research.scaling.corrections import Correction
from research.scaling.envelope import Curves
from research.scaling.page import finite
from research.scaling.table import Table
from research.train.places import is_remote

COLUMNS = ("params", "tokens", "flops", "loss", "name", "status")

FEWEST_RESAMPLES = 20


@dataclass(frozen=True)
class Loaded:
    """Runs to learn from. title: of a report. notes: how they were read. curves: training curves, where there are.
    like: the study they are of, None for a CSV file. conventions: of params, FLOPs, tokens and loss, where they are not
    the project's own. recounted: whether they are counted otherwise than the table has them."""

    table: Table
    title: str
    notes: tuple[str, ...]
    curves: Curves
    like: Like | None
    conventions: Mapping[str, str] = field(default_factory=dict)
    recounted: bool = False


def load(options: argparse.Namespace) -> Loaded:
    """The runs that the command names, with what is to be left out of them left out."""
    reference = str(options.runs_of)
    if Path(reference.partition(":")[0]).suffix == ".py":
        found = study.load(reference)
        directory = options.runs / found.name
        named = next((name for name in COLUMNS if getattr(options, f"{name}_column")), None)
        if named is not None:
            raise UserError(f"{reference} is a study, which has no columns to name: leave out --{named}-column.")
        table, notes = columns.without_highest(collect.table(found, directory), options.drop_highest_loss)
        loaded = Loaded(
            table, found.name, tuple(notes), report.training_curves(table, directory), Like(reference, found)
        )
    else:
        chosen = {name: getattr(options, f"{name}_column") for name in COLUMNS}
        imported = columns.read(reference, columns=chosen, drop_highest=options.drop_highest_loss)
        again = columns.clean(imported.table)[1]  # what every analysis says by itself
        notes = tuple(note for note in imported.notes if note not in again)
        conventions = {str(name): "as the CSV file has them" for name in COLUMNS[:4]}
        if imported.derived is not None:
            conventions[imported.derived] = "from FLOPs = 6 params tokens, for the CSV file has none"
        loaded = Loaded(imported.table, Path(reference).stem, notes, {}, None, conventions)
        if options.parameters == "non_embedding" and all(r.params == r.non_embedding_params for r in loaded.table):
            raise UserError(
                f"{reference} has one count of parameters: give those outside embeddings and head with "
                f"--params-column, and leave out --parameters."
            )
    correction = Correction(options.parameters, options.count_flops, options.max_warmup, options.drop_budgets)
    if correction == Correction():
        return loaded
    runs, notes = correction(loaded.table)
    left_out = [run for run in loaded.table if run.problem is not None]
    counted = f"Counted as: {options.parameters} parameters, FLOPs {options.count_flops}."
    table, dearer = Table((*runs, *left_out)), {run.name: run.flops / loaded.table[run.name].flops for run in runs}
    curves = {
        name: [(flops * dearer[name], loss) for flops, loss in line]
        for name, line in loaded.curves.items()
        if name in dearer
    }
    conventions = dict(loaded.conventions)
    if options.parameters != "total":
        conventions["params"] = report.PARAMETER_CONVENTION[options.parameters]
    if options.count_flops == "six_per_param":
        conventions["flops"] = "6 for each counted parameter and token"
    changed = {"notes": (*loaded.notes, counted, *notes), "conventions": conventions, "recounted": True}
    return replace(loaded, table=table, curves=curves, **changed)


def settings(options: argparse.Namespace, *, form: forms.Form = forms.CHINCHILLA) -> Settings:
    if options.flops is not None:
        allocation.check_flops(options.flops)
    if options.resamples and options.resamples < FEWEST_RESAMPLES:
        raise UserError(
            f"--resamples must be at least {FEWEST_RESAMPLES} for intervals that mean something, or 0 for none; given "
            f"{options.resamples}."
        )
    return Settings(
        parameters="total",  # as counted by ``load``
        target_flops=options.flops,
        delta=options.delta,
        resamples=options.resamples,
        seed_noise=options.seed_noise,
        form=form,
    )


def fit(options: argparse.Namespace) -> int:
    form = next(form for form in forms.FORMS if form.name == options.law)
    chosen = settings(options, form=form)
    loaded = load(options)
    if loaded.recounted:  # of the ways to count, one has been chosen
        chosen = replace(chosen, correct=False)
    found = report.write_report(
        loaded.table,
        options.out,
        title=f"Scaling law of {loaded.title}",
        notes=loaded.notes,
        curves=loaded.curves,
        settings=chosen,
        conventions=loaded.conventions,
    )
    print("\n".join((*loaded.notes, str(found.fit.law), *found.sentences)))
    print(f"The report is {options.out / 'report.html'}.")
    return 0


def recommend(options: argparse.Namespace) -> int:
    served, unique = (token_count(options, name) for name in ("served", "unique_tokens"))
    asked, loaded = replace(settings(options), correct=False), load(options)
    family = chosen_family(loaded, options.family)
    path = experiment_file.checked(options.out or here(options) / "recommended.py")
    found = analyse(loaded.table, settings=asked)
    print("\n".join((*loaded.notes, *found.sentences)))
    advice = advise(found, served=served, unique_tokens=unique)
    print("\n".join(advice.sentences))
    model = buildable.nearest(family, params=advice.params, parameters=options.parameters)
    size = buildable.count(model, parameters=options.parameters)
    counted = "" if options.parameters == "total" else f" ({size:,} {options.parameters.replace('_', ' ')} ones)"
    print(f"The nearest model of the {family.name} family that can be built: {buildable.describe(model)}{counted}.")
    print(advice.as_built(size))
    written = experiment_file.write(
        path,
        [plan("recommended", model, advice.train_flops, advice.tokens_of(size), loaded, options)],
        like=loaded.like,
        words=(
            f"A model for a budget of {options.flops:.3g} FLOPs, by the runs of {loaded.title}.",
            *advice.sentences,
        ),
    )
    print(f"The experiment is written to {written}: lab run {written} --only recommended")
    return 0


def token_count(options: argparse.Namespace, name: str) -> float | None:
    """A count of tokens as people write it, 2T or 5e11. Raises UserError where it is none."""
    given = getattr(options, name)
    if given is None:
        return None
    try:
        found = columns.number(given)
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and found > 0):
        raise UserError(
            f"--{name.replace('_', '-')} must be a positive number of tokens, as 2T or 5e11; given {given}."
        )
    return found


def chosen_family(loaded: Loaded, name: str | None) -> buildable.Family:
    """The family asked for; without one a study's own, and llama for a CSV file."""
    if name is None and loaded.like is not None:
        return buildable.family_of([experiment.model for experiment in loaded.like.study.experiments.values()])
    if (name or "llama") not in buildable.FAMILIES:
        raise UserError(f"There is no family {name!r}: choose one of {', '.join(buildable.FAMILIES)}.")
    base = buildable.FAMILIES[name or "llama"]
    if loaded.like is None:
        return base()
    like = loaded.like.experiment(1.0).model  # the shape is the family's, all else as the study has it
    if not isinstance(like.mlp, Mlp):
        raise UserError(f"The models of {loaded.title} have experts, and families are of dense models.")
    return replace(base(), base=like)


def plan(
    name: str, model: Decoder, flops: float, tokens: float, loaded: Loaded, options: argparse.Namespace
) -> Planned:
    """A run of so many FLOPs as the runs count them, for a file that counts them exactly."""
    if loaded.like is not None and options.count_flops != "exact":
        like = loaded.like.experiment(float(cost.params(model).total))
        flops = tokens * replace(like, model=model).flops_per_token
    return Planned(name, model, flops, tokens)


def here(options: argparse.Namespace) -> Path:
    """Where study files go by default: below --runs; where that is a bucket, which none is loaded from, below runs."""
    return Path("runs") if is_remote(options.runs) else options.runs


def suggest(options: argparse.Namespace) -> int:
    allocation.check_flops(options.budget)
    if options.out is not None and options.out.suffix == ".py":
        raise UserError(f"--out of lab next names a folder, for next.py and next.json; given {options.out}.")
    asked, loaded = replace(settings(options), correct=False), load(options)
    family = chosen_family(loaded, options.family)
    found = analyse(loaded.table, settings=asked)
    proposal = design.propose(
        found.fit,
        budget=options.budget,
        target_flops=found.target_flops,
        flops_per_token=found.flops_per_token,
        drawn=found.drawn,
    )
    planned = []
    for i, run in enumerate(proposal.runs):
        model = buildable.nearest(family, params=run.params, parameters=options.parameters)
        size = float(buildable.count(model, parameters=options.parameters))
        tokens = run.flops / float(found.flops_per_token(size))
        planned.append(plan(f"next-{i + 1}", model, run.flops, tokens, loaded, options))
    built = [f"{run.name}: {buildable.describe(run.model)}, {run.flops:.3g} FLOPs." for run in planned]
    print("\n".join((*loaded.notes, *found.remarks, *proposal.sentences, "The nearest that can be built:", *built)))
    folder = options.out or here(options)
    record = {"sentences": list(proposal.sentences), **asdict(proposal), "narrower": proposal.narrower}
    write_atomically(folder / "next.json", json.dumps(finite(record), indent=2, allow_nan=False) + "\n")
    path = folder / "next.py"
    target = f"The runs that most narrow the best size at {found.target_flops:.3g} FLOPs."
    words = (target, *proposal.sentences, "Below are the nearest that can be built.")
    print(f"The runs are written to {experiment_file.write(path, planned, like=loaded.like, words=words)}.")
    return 0
