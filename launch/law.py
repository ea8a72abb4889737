# SPDX-License-Identifier: Apache-2.0
"""``lab fit``, ``lab recommend`` and ``lab next``: a law from a study's runs, or from anybody's CSV."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from launch import collect, study
from research.core.types import UserError
from research.scaling import columns, forms, report
from research.scaling.analysis import Settings
from research.scaling.corrections import Correction
from research.scaling.envelope import Curves
from research.scaling.table import Table


@dataclass(frozen=True)
class Loaded:
    """Runs to learn from. title: of a report. notes: how they were read. curves: training curves, where there are."""

    table: Table
    title: str
    notes: tuple[str, ...]
    curves: Curves
    is_study: bool


def load(options: argparse.Namespace) -> Loaded:
    """The runs that the command names, with what is to be left out of them left out."""
    reference = str(options.runs_of)
    if Path(reference.partition(":")[0]).suffix == ".py":
        found = study.load(reference)
        directory = options.runs / found.name
        table = collect.table(found, directory)
        loaded = Loaded(table, found.name, (), report.training_curves(table, directory), True)
    else:
        names = ("params", "tokens", "flops", "loss", "name", "status")
        chosen = {name: getattr(options, f"{name}_column") for name in names}
        imported = columns.read(reference, columns=chosen, drop_highest=options.drop_highest_loss)
        loaded = Loaded(imported.table, Path(reference).stem, imported.notes, {}, False)
    correction = Correction(options.parameters, options.count_flops, options.max_warmup, options.drop_budgets)
    if correction == Correction():
        return loaded
    runs, notes = correction(loaded.table)
    left_out = [run for run in loaded.table if run.problem is not None]
    counted = f"Counted as: {options.parameters} parameters, FLOPs {options.count_flops}."
    table = Table((*runs, *left_out))
    return Loaded(table, loaded.title, (*loaded.notes, counted, *notes), loaded.curves, loaded.is_study)


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
    conventions = {} if loaded.is_study else {name: "as the CSV file has them" for name in ("loss", "flops", "tokens")}
    if options.parameters != "total":
        conventions["params"] = report.PARAMETER_CONVENTION[options.parameters]
    elif not loaded.is_study:
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
    raise UserError("not yet")


def suggest(options: argparse.Namespace) -> int:
    raise UserError("not yet")
