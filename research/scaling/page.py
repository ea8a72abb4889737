# SPDX-License-Identifier: Apache-2.0
"""The report's page: one HTML file with its pictures inside, from the record that law.json holds."""

import base64
import html as escape
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from research.scaling.table import COLUMNS, Table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1080px; margin: 2rem auto; padding: 0
1rem; } h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; } code { background: #f3f3f3; padding: .1em .3em; }
.law { font-size: 1.25rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
td, th { padding: .25em .7em; border-bottom: 1px solid #e2e2e2; text-align: right; white-space: nowrap; }
td:first-child, th:first-child, .words td, .words th { text-align: left; white-space: normal; }
.out td { color: #888; } .remarks { background: #fff6e5; padding: .6em 1em .6em 2em; }
"""


def finite(value: Any) -> Any:
    """The same plain value with None for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def html(record: Mapping[str, Any], table: Table, pictures: Mapping[str, bytes]) -> str:
    """The whole page; ``pictures`` are PNGs by file name, put inside."""
    sections = [
        *(f"<p>{_text(note)}</p>" for note in record["notes"]),
        _law(record),
        _findings(record),
        f'<p><img alt="overview" src="{_inline(pictures["overview.png"])}"></p>',
        _held_out(record["held_out"]),
        _isoflop(record["isoflop"]),
        _fit(record),
        _conventions(record),
        _runs(record, table),
        "<h2>Pictures</h2>",
        *(
            f'<p><img alt="{_text(name)}" src="{_inline(png)}"></p>'
            for name, png in pictures.items()
            if name != "overview.png"
        ),
    ]
    return _document(record["title"], sections)


def effective_html(record: Mapping[str, Any], picture: bytes) -> str:
    """The page of a study of experts, from what effective.json holds."""
    rows = [
        (
            run["name"],
            *(_number(run[name]) for name in ("flops", "params", "active_params", "tokens", "loss", "dense_loss")),
            _number(run["dense_params"] and round(run["dense_params"])) or "none",
            _number(run["times"]),
            _number(run["dense_flops"]) or "none",
            _number(run["times_flops"]),
        )
        for run in record["worth"]
    ]
    names = ("run", "FLOPs", "params", "active params", "tokens", "loss", "dense loss", "effective dense size", "times")
    words = "".join(f"<p>{_text(sentence)}</p>" for sentence in record["sentences"])
    meaning = "".join(f"<p>{_text(sentence)}</p>" for sentence in record["meaning"].values())
    left_out = [f"{name}: {reason}" for name, reason in record["excluded"].items()]
    sections = [
        *(f"<p>{_text(note)}</p>" for note in record["notes"]),
        f"<h2>What it says</h2>{words}",
        f'<p><img alt="experts against dense" src="{_inline(picture)}"></p>',
        "<h2>Effective dense size</h2>" + meaning,
        f'<div class="scroll">{_table((*names, "dense FLOPs", "times"), rows)}</div>',
        "<h2>Dense runs</h2>",
        _table(
            ("run", "FLOPs", "params", "tokens", "loss"),
            [[_number(run[name]) for name in ("name", "flops", "params", "tokens", "loss")] for run in record["dense"]],
        ),
        f"<p>Left out: {_text('; '.join(left_out))}.</p>" if left_out else "",
    ]
    return _document(record["title"], sections)


def _document(title: str, sections: Iterable[str]) -> str:
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{STYLE}</style>'
    body = "\n".join(part for part in (f"<h1>{_text(title)}</h1>", *sections) if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _law(record: Mapping[str, Any]) -> str:
    law = record["law"]
    equation = (
        f"loss = {law['E']:.4g} + {law['A']:.4g} / params<sup>{law['alpha']:.4g}</sup> "
        f"+ {law['B']:.4g} / tokens<sup>{law['beta']:.4g}</sup>"
    )
    rows = [
        (
            name,
            _number(law[name]),
            *(_number(record["intervals_95"].get(name, {}).get(end)) for end in ("low", "high")),
        )
        for name in ("E", "A", "B", "alpha", "beta")
    ]
    intervals = _table(("", "value", "2.5%", "97.5%"), rows)
    return f'<h2>The law</h2><p class="law">{equation}</p>{intervals}<p>Intervals are bootstraps over runs.</p>'


def _findings(record: Mapping[str, Any]) -> str:
    found = [part["sentence"] for part in record["recommendation"].values() if part]
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
        f"Fitted to {held_out['num_runs']} runs below {held_out['flops']:.3g} FLOPs. Carrying the best loss "
        f"of {held_out['carried_flops']:.3g} FLOPs ({held_out['carried_loss']:.4f}) forward is off by "
        f"{held_out['carried_error']:+.4f} on the best held-out run, the law by "
        f"{held_out['best_error']:+.4f}."
    )
    return f"<h2>Held-out budget</h2>{_table(names, rows)}<p>{facts}</p>"


def _isoflop(record: Mapping[str, Any]) -> str:
    rows = []
    for curve in record["curves"]:
        found = curve["problem"] is None
        cells = (f"{curve['params']:,.0f}", f"{curve['tokens']:,.0f}", f"{curve['loss']:.4f}") if found else ("",) * 3
        rows.append((f"{curve['flops']:.3g}", str(len(curve["sizes"])), *cells, curve["problem"] or "bracketed"))
    text = "<h2>IsoFLOP minima</h2>" + _table(
        ("FLOPs", "runs", "params at minimum", "tokens at minimum", "loss at minimum", ""), rows
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
    return f'<h2>The fit</h2><div class="words">{_table(("", ""), rows)}</div>'


def _conventions(record: Mapping[str, Any]) -> str:
    rows = [(name, text) for name, text in record["conventions"].items()]
    for corpus in record["corpora"]:
        size = f"{corpus['bytes']:,} bytes" if corpus["bytes"] is not None else "size not recorded"
        rows.append(("corpus", f"{size}, content hash {corpus['hash'] or 'not recorded'}"))
    return f'<h2>Conventions</h2><div class="words">{_table(("", ""), rows)}</div>'


def _runs(record: Mapping[str, Any], table: Table) -> str:
    residuals = record["fit"]["residuals"]
    rows, classes = [], []
    for run in table:
        residual = residuals.get(run.name)
        cells = [_number(getattr(run, column)) for column in COLUMNS]
        rows.append([*cells, "" if residual is None else f"{residual:+.3%}"])
        classes.append("out" if residual is None else "")
    names = [column.replace("_", " ") for column in COLUMNS] + ["log residual"]
    body = _table(names, rows, classes=classes)
    return f'<h2>All runs</h2><p>Runs in grey are left out of the fits.</p><div class="scroll">{body}</div>'


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], *, classes: Sequence[str] | None = None) -> str:
    rows = list(rows)
    head = "".join(f"<th>{_text(name)}</th>" for name in names) if any(names) else ""
    lines = []
    for index, row in enumerate(rows):
        kind = f' class="{classes[index]}"' if classes and classes[index] else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>")
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{''.join(lines)}</table>"


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _text(value: str) -> str:
    return escape.escape(str(value))
