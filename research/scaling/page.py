# SPDX-License-Identifier: Apache-2.0
"""The report's page: one HTML file with its pictures inside, from the record that law.json holds."""

import html as escape
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from research.scaling.table import COLUMNS, Table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1080px; margin: 2rem auto; padding: 0
1rem; } h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
svg { max-width: 100%; height: auto; } code { background: #f3f3f3; padding: .1em .3em; }
.law { font-size: 1.25rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { padding: .25em .7em; border-bottom: 1px solid #e2e2e2; text-align: right; white-space: nowrap; }
td:first-child, th:first-child, .words td, .words th { text-align: left; white-space: normal; }
.out td { color: #666; } g.run { pointer-events: bounding-box; } g.run:hover { stroke: #000; stroke-width: 3; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1rem; }
.remarks { background: #fff6e5; padding: .6em 1em .6em 2em; }
"""


def finite(value: Any) -> Any:
    """The same plain value with None for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def html(record: Mapping[str, Any], table: Table, pictures: Mapping[str, str]) -> str:
    """The whole page; ``pictures`` are SVGs by name, put inside: a pointer on a point shows its run."""
    drawn = "".join(f"<div>{picture}</div>" for picture in pictures.values())
    sections = [
        *(f"<p>{_text(note)}</p>" for note in record["notes"]),
        _findings(record),
        f'<h2>Pictures</h2><p>Rest the pointer on a point to see its run.</p><div class="pictures">{drawn}</div>',
        _law(record),
        _approaches(record),
        _corrections(record),
        _held_out(record["held_out"]),
        _isoflop(record["isoflop"]),
        _fit(record),
        _conventions(record),
        _runs(record, table),
    ]
    return _document(record["title"], sections)


def words_html(record: Mapping[str, Any], picture: str, *parts: str) -> str:
    """A page of what a record says, with its picture (an SVG) and further parts in HTML."""
    sections = [
        *(f"<p>{_text(note)}</p>" for note in record["notes"]),
        "<h2>What it says</h2>" + "".join(f"<p>{_text(sentence)}</p>" for sentence in record["sentences"]),
        f"<div>{picture}</div>",
        *parts,
        _left_out(record["excluded"]),
    ]
    return _document(record["title"], sections)


def effective_html(record: Mapping[str, Any], picture: str) -> str:
    """The page of a study of experts, from what effective.json holds."""
    rows = [
        (
            run["name"],
            *(number(run[name]) for name in ("flops", "params", "active_params", "tokens", "loss", "dense_loss")),
            number(run["dense_params"] and round(run["dense_params"])) or "none",
            f"{number(run['times'])} ({_span(run['times_interval_95']) or 'no interval'})",
            number(run["dense_flops"]) or "none",
            number(run["times_flops"]),
        )
        for run in record["worth"]
    ]
    names = (
        "run",
        "FLOPs",
        "params",
        "active params",
        "tokens",
        "loss",
        "dense loss",
        "effective dense size",
        "times (95%)",
    )
    meaning = "".join(f"<p>{_text(sentence)}</p>" for sentence in record["meaning"].values())
    worth = table_of((*names, "dense FLOPs", "times"), rows)
    dense = table_of(
        ("run", "FLOPs", "params", "tokens", "loss"),
        [[number(run[name]) for name in ("name", "flops", "params", "tokens", "loss")] for run in record["dense"]],
    )
    return words_html(
        record,
        picture,
        f'<h2>Effective dense size</h2>{meaning}<div class="scroll">{worth}</div>',
        f"<h2>Dense runs</h2>{dense}",
    )


def tuning_html(record: Mapping[str, Any], picture: str) -> str:
    """The page of a study of learning rates and batches, from what tuning.json holds."""
    rows = [
        (
            *(number(best[name]) for name in ("flops", "params", "tokens", "learning_rate", "batch_tokens", "loss")),
            best["problem"] or f"off by {best['rms_residual']:.2%}",
        )
        for best in record["best"]
    ]
    names = ("FLOPs", "params", "tokens", "best learning rate", "best batch (tokens)", "loss there", "surface")
    return words_html(record, picture, f"<h2>Optima</h2>{table_of(names, rows)}")


def _left_out(excluded: Mapping[str, str]) -> str:
    told = "; ".join(f"{name}: {reason}" for name, reason in excluded.items())
    return f"<p>Left out: {_text(told)}.</p>" if told else ""


def _document(title: str, sections: Iterable[str]) -> str:
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{STYLE}</style>'
    body = "\n".join(part for part in (f"<h1>{_text(title)}</h1>", *sections) if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _law(record: Mapping[str, Any]) -> str:
    law = {name: value for name, value in record["law"].items() if name != "form"}
    rows = []
    for name in [*law, *sorted(set(record["intervals_95"]) - set(law))]:
        value = law.get(name, (record["exponents"] or {}).get(name))
        spans = (record[f"{kind}intervals_95"].get(name) for kind in ("", "profile_"))
        rows.append((name, number(value), *(_span(span) for span in spans)))
    intervals = table_of(("", "value", "95% by bootstrap", "95% by profile likelihood"), rows)
    optimum = [
        (
            name,
            *(number((record["recommendation"]["law"] or {}).get(name)),),
            _span(record["profile_intervals_95"].get(name)),
        )
        for name in ("params", "tokens", "loss")
        if name in record["profile_intervals_95"]
    ]
    optima = table_of(("", "optimum", "95% by profile likelihood"), optimum)
    at = f"<p>At {record['target_flops']:.3g} FLOPs:</p>{optima}"
    projected = record["variable_projection"]
    text = f'<h2>The law</h2><p class="law">{_text(record["law"]["form"])}</p>{intervals}{at if optimum else ""}'
    if record["resamples"]:
        lost = record["resamples_lost"]
        lost = f"; {lost:,} refits did not converge" if lost else ""
        text += f"<p>The bootstrap drew {record['resamples']:,} times from the runs{lost}.</p>"
    if record["profile_intervals_95"]:
        text += "<p>The profile takes errors of log loss as normal: its middle is the fit of least squares.</p>"
    if projected:
        others = ", ".join(f"{name} {number(value)}" for name, value in projected["law"].items())
        text += f"<p>Variable projection, a fit of relative errors by least squares: {_text(others)}.</p>"
    return text


def _span(span: Mapping[str, float | None] | None) -> str:
    """An interval in words; an end that is not finite was not found."""
    if span is None:
        return ""
    low, high = span["low"], span["high"]
    if low is None and high is None:
        return "not identified"
    ends = (number(low) if low is not None else "no end"), (number(high) if high is not None else "no end")
    return f"{ends[0]} to {ends[1]}"


def _approaches(record: Mapping[str, Any]) -> str:
    """The exponents of the optimum in compute by the three approaches of Hoffmann et al. 2022."""
    envelope, isoflop, exponents = record["envelope"], record["isoflop"], record["exponents"]
    names, long = ("params", "tokens"), ("params_in_compute", "tokens_in_compute")
    found = []
    if envelope:
        slopes = [envelope[f"{name}_law"]["exponent"] for name in names]
        found.append(("1: envelope of training curves", slopes, [envelope["intervals_95"].get(n) for n in long]))
    if isoflop["params_law"]:
        slopes = [isoflop[f"{name}_law"]["exponent"] for name in names]
        found.append(("2: IsoFLOP profiles", slopes, [isoflop["exponent_intervals_95"].get(n) for n in names]))
    if exponents:
        spans = [record["intervals_95"].get(n) for n in long]
        found.append(("3: parametric law", [exponents[n] for n in long], spans))
    rows = [
        (name, *(f"{slope:.3f} ({_span(span) or 'no interval'})" for slope, span in zip(slopes, spans, strict=True)))
        for name, slopes, spans in found
    ]
    heads = ("approach", "params in compute (95%)", "tokens in compute (95%)")
    return f'<h2>Three approaches</h2><div class="words">{table_of(heads, rows)}</div>' if rows else ""


def _corrections(record: Mapping[str, Any]) -> str:
    rows = [
        (
            v["name"],
            str(v["num_runs"]),
            f"{v['params_in_compute']:.3f}",
            _span(v["interval_95"]),
            f"{v['rms_residual']:.2%}",
        )
        for v in record["corrections"]
    ]
    names = ("counted", "runs", "params in compute", "95%", "residual")
    text = (
        "<p>The exponent of optimal params in compute by the parametric law, where the same runs are counted "
        "otherwise.</p>"
    )
    return f'<h2>What counting does</h2>{text}<div class="words">{table_of(names, rows)}</div>' if rows else ""


def _findings(record: Mapping[str, Any]) -> str:
    given = record["recommendation"]
    found = [given[name]["sentence"] for name in ("law", "isoflop") if given[name]]
    found += [given["belief"]] if given["belief"] else []
    text = "<h2>What it says</h2>" + "".join(f"<p>{_text(sentence)}</p>" for sentence in found)
    if record["held_out"]:
        text += f"<p>{_text(record['held_out']['sentence'])}</p>"
    if record["remarks"]:
        items = "".join(f"<li>{_text(remark)}</li>" for remark in record["remarks"])
        text += f'<ul class="remarks">{items}</ul>'
    return text


def _held_out(held_out: Mapping[str, Any] | None) -> str:
    if not held_out:
        return ""
    rows = [
        (
            p["name"],
            f"{p['params']:,.0f}",
            f"{p['tokens']:,.0f}",
            f"{p['measured']:.4f}",
            f"{p['predicted']:.4f}",
            f"{p['relative_error']:+.2%}",
        )
        for p in held_out["predictions"]
    ]
    names = ("run", "params", "tokens", "measured", "predicted", "error")
    facts = (
        f"Fitted to {held_out['num_runs']} runs below {held_out['budgets'][0]:.3g} FLOPs. Carrying the best loss "
        f"of {held_out['carried_flops']:.3g} FLOPs ({held_out['carried_loss']:.4f}) forward is off by "
        f"{held_out['carried_error']:+.4f} on the best held-out run, the law by "
        f"{held_out['best_error']:+.4f}."
    )
    return f"<h2>Held-out budget</h2>{table_of(names, rows)}<p>{facts}</p>"


def _isoflop(record: Mapping[str, Any]) -> str:
    rows = []
    for curve in record["curves"]:
        found = curve["problem"] is None
        spans = curve["intervals_95"]
        cells = [
            f"{number(round(curve[name]) if name != 'loss' else curve[name])} "
            f"({_span(spans.get(name)) or 'no interval'})"
            if found
            else ""
            for name in ("params", "tokens", "loss")
        ]
        rows.append((f"{curve['flops']:.3g}", str(len(curve["sizes"])), *cells, curve["problem"] or "bracketed"))
    text = "<h2>IsoFLOP minima</h2>" + table_of(
        ("FLOPs", "runs", "params at minimum (95%)", "tokens at minimum (95%)", "loss at minimum (95%)", ""), rows
    )
    laws = [
        f"{name} = {law['coefficient']:.3g} compute<sup>{law['exponent']:.3f}</sup>"
        for name, law in ((name, record[f"{name}_law"]) for name in ("params", "tokens", "loss"))
        if law
    ]
    return text + (f"<p>Through the minima: {'; '.join(laws)}.</p>" if laws else "")


def _fit(record: Mapping[str, Any]) -> str:
    fit, convergence = record["fit"], record["convergence"]
    rows = [
        ("runs in the fit", str(fit["num_runs"])),
        ("objective", f"{fit['objective']:.6e}, {fit['objective_form']}, delta = {fit['delta']:g}"),
        ("converged", f"{'yes' if convergence['converged'] else 'NO'}: {convergence['message']}"),
        (
            "residuals",
            f"{fit['rms_residual']:.3%} root mean square, {fit['largest_residual']:.3%} at most, in log loss",
        ),
    ]
    return f'<h2>The fit</h2><div class="words">{table_of(("", ""), rows)}</div>'


def _conventions(record: Mapping[str, Any]) -> str:
    rows = [(name, text) for name, text in record["conventions"].items()]
    for corpus in record["corpora"]:
        size = f"{corpus['bytes']:,} bytes" if corpus["bytes"] is not None else "size not recorded"
        rows.append(("corpus", f"{size}, content hash {corpus['hash'] or 'not recorded'}"))
    return f'<h2>Conventions</h2><div class="words">{table_of(("", ""), rows)}</div>'


def _runs(record: Mapping[str, Any], table: Table) -> str:
    residuals = record["fit"]["residuals"]
    rows, classes = [], []
    for run in table:
        residual = residuals.get(run.name)
        cells = [number(getattr(run, column)) for column in COLUMNS]
        rows.append([*cells, "" if residual is None else f"{residual:+.3%}"])
        classes.append("out" if residual is None else "")
    names = [column.replace("_", " ") for column in COLUMNS] + ["log residual"]
    body = table_of(names, rows, classes=classes)
    return f'<h2>All runs</h2><p>Runs in grey are left out of the fits.</p><div class="scroll">{body}</div>'


def table_of(names: Sequence[str], rows: Iterable[Sequence[str]], *, classes: Sequence[str] | None = None) -> str:
    rows = list(rows)
    head = "".join(f"<th>{_text(name)}</th>" for name in names) if any(names) else ""
    lines = []
    for index, row in enumerate(rows):
        kind = f' class="{classes[index]}"' if classes and classes[index] else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>")
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{''.join(lines)}</table>"


def number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"


def _text(value: str) -> str:
    return escape.escape(str(value))
