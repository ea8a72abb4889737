# SPDX-License-Identifier: Apache-2.0
"""``lab fit``, ``lab recommend`` and ``lab next``: a law from a study's runs, or from anybody's CSV."""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launch import collect, experiment_file, study
from launch.experiment_file import Like, Planned
from research.core.files import write_atomically
from research.core.types import UserError
from research.scaling import allocation, buildable, columns, cost, design, forms, report
from research.scaling.advice import advise
from research.scaling.analysis import Settings, analyse
from research.scaling.corrections import Correction
from research.scaling.envelope import Curves
from research.scaling.page import finite
from research.scaling.table import Table


@dataclass(frozen=True)
class Loaded:
    """Runs to learn from. title: of a report. notes: how they were read. curves: training curves, where there are.
    like: the study they are of, None for a CSV file."""

    table: Table
    title: str
    notes: tuple[str, ...]
    curves: Curves
    like: Like | None


def load(options: argparse.Namespace) -> Loaded:
    """The runs that the command names, with what is to be left out of them left out."""
    reference = str(options.runs_of)
    if Path(reference.partition(":")[0]).suffix == ".py":
        found = study.load(reference)
        directory = options.runs / found.name
        table = collect.table(found, directory)
        loaded = Loaded(table, found.name, (), report.training_curves(table, directory), Like(reference, found))
    else:
        names = ("params", "tokens", "flops", "loss", "name", "status")
        chosen = {name: getattr(options, f"{name}_column") for name in names}
        imported = columns.read(reference, columns=chosen, drop_highest=options.drop_highest_loss)
        loaded = Loaded(imported.table, Path(reference).stem, imported.notes, {}, None)
    correction = Correction(options.parameters, options.count_flops, options.max_warmup, options.drop_budgets)
    if correction == Correction():
        return loaded
    runs, notes = correction(loaded.table)
    left_out = [run for run in loaded.table if run.problem is not None]
    counted = f"Counted as: {options.parameters} parameters, FLOPs {options.count_flops}."
    table = Table((*runs, *left_out))
    return Loaded(table, loaded.title, (*loaded.notes, counted, *notes), loaded.curves, loaded.like)


def settings(options: argparse.Namespace, *, form: forms.Form = forms.CHINCHILLA) -> Settings:
    return Settings(
        parameters="total",  # as counted by ``load``
        target_flops=options.flops,
        delta=options.delta,
        resamples=options.resamples,
        seed_noise=options.seed_noise,
        form=form,
    )


def fit(options: argparse.Namespace) -> int:
    loaded = load(options)
    form = next(form for form in forms.FORMS if form.name == options.law)
    conventions = (
        {} if loaded.like is not None else {name: "as the CSV file has them" for name in ("loss", "flops", "tokens")}
    )
    if options.parameters != "total":
        conventions["params"] = report.PARAMETER_CONVENTION[options.parameters]
    elif loaded.like is None:
        conventions["params"] = "as the CSV file has them"
    found = report.write_report(
        loaded.table,
        options.out,
        title=f"Scaling law of {loaded.title}",
        notes=loaded.notes,
        curves=loaded.curves,
        settings=settings(options, form=form),
        conventions=conventions,
    )
    print("\n".join((*loaded.notes, str(found.fit.law), *found.sentences)))
    print(f"The report is {options.out / 'report.html'}.")
    return 0


def recommend(options: argparse.Namespace) -> int:
    allocation.check_flops(options.flops)
    loaded = load(options)
    found = analyse(loaded.table, settings=replace(settings(options), correct=False))
    print("\n".join((*loaded.notes, *found.sentences)))
    advice = advise(found, served=options.served, unique_tokens=options.unique_tokens)
    print("\n".join(advice.sentences))
    family = chosen_family(loaded, options.family)
    model = buildable.nearest(family, params=advice.params)
    print(f"The nearest model of the {family.name} family that can be built: {buildable.describe(model)}.")
    print(advice.as_built(cost.params(model).total))
    path = options.out or options.runs / "recommended.py"
    written = experiment_file.write(
        path,
        [Planned("recommended", model, advice.train_flops, advice.tokens_of(cost.params(model).total))],
        like=loaded.like,
        words=(
            f"The model that {options.flops:.3g} FLOPs are best spent on, by the runs of {loaded.title}.",
            *advice.sentences,
        ),
    )
    print(f"The experiment is written to {written}: lab run {written} --only recommended")
    return 0


def chosen_family(loaded: Loaded, name: str | None) -> buildable.Family:
    """The family asked for; without one a study's own, and llama for a CSV file."""
    if name is None and loaded.like is not None:
        return buildable.family_of([experiment.model for experiment in loaded.like.study.experiments.values()])
    if (name or "llama") not in buildable.FAMILIES:
        raise UserError(f"There is no family {name!r}: choose one of {', '.join(buildable.FAMILIES)}.")
    base = buildable.FAMILIES[name or "llama"]
    return base() if loaded.like is None else base(vocab_size=loaded.like.experiment(1.0).model.vocab_size)


def suggest(options: argparse.Namespace) -> int:
    loaded = load(options)
    found = analyse(loaded.table, settings=replace(settings(options), correct=False))
    proposal = design.propose(
        found.fit,
        budget=options.budget,
        target_flops=found.target_flops,
        flops_per_token=found.flops_per_token,
        drawn=found.drawn,
    )
    print("\n".join((*loaded.notes, *found.remarks, *proposal.sentences)))
    if options.out is not None:
        record = {"sentences": list(proposal.sentences), **asdict(proposal), "narrower": proposal.narrower}
        write_atomically(options.out / "next.json", json.dumps(finite(record), indent=2, allow_nan=False) + "\n")
    family = chosen_family(loaded, options.family)
    planned = [
        Planned(f"next-{i + 1}", buildable.nearest(family, params=run.params), run.flops, run.tokens)
        for i, run in enumerate(proposal.runs)
    ]
    path = (options.out or options.runs) / "next.py"
    words = (f"The runs that most narrow the best size at {found.target_flops:.3g} FLOPs.", *proposal.sentences)
    print(f"The runs are written to {experiment_file.write(path, planned, like=loaded.like, words=words)}.")
    return 0
