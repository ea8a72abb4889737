# SPDX-License-Identifier: Apache-2.0
"""What a run shows: a bar on a terminal, plain lines elsewhere."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest

from research.train import progress
from tests.conftest import ROOT

STUDY = ROOT / "tests" / "launch" / "tiny_study.py"
VALUES = {"loss": 3.25, "tokens_per_second": 12345.6, "peak_share": 0.42}
WATCHED = """
from research.train import progress
shown = progress.choose()
shown.start("tiny[lr=3e-4]", total=1000, step=0)
shown.note("a word besides: /tmp/[abc]/x")
for step in range(1, 4):
    shown.update(step, {"loss": 3.25, "tokens_per_second": 12345.6, "peak_share": 0.42})
shown.stop()
"""


def on_a_terminal(arguments, columns, **environment):
    """The exit code of a Python command in a terminal of its own, and its lines as they stood, without colours."""
    changed = {"TERM": "xterm", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment}
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    both = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen([sys.executable, *arguments], env={**kept, **changed}, cwd=ROOT, **both)
    os.close(theirs)
    written = b""
    while piece := read(ours):
        written += piece
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    return process.wait(), [line.rstrip() for line in re.split(r"[\r\n]+", text)]


def read(terminal):
    """What the other side writes; nothing more once it has gone, which Linux calls an error."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_on_a_terminal_a_bar_shows_loss_speed_share_of_peak_and_time_left():
    code, lines = on_a_terminal(["-c", WATCHED], columns=80)
    assert code == 0 and "a word besides: /tmp/[abc]/x" in lines, lines
    last = [line for line in lines if line.startswith("tiny[lr=3e-4]")][-1]
    assert re.fullmatch(r"tiny\[lr=3e-4\] ━+ +3/1000 loss 3\.2500, 12,346 tokens/s, 42% of peak \d:\d\d:\d\d", last), (
        last
    )


@pytest.mark.slow
def test_a_run_on_a_terminal_ends_with_a_full_bar(tmp_path):
    """Its speed and share of peak are measured: only that they are shown is known."""
    arguments = ["-m", "launch.cli", "--runs", str(tmp_path / "runs"), "run", str(STUDY), "--only", "tiny"]
    cache = {"LAB_CACHE": str(tmp_path / "cache"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    code, lines = on_a_terminal(arguments, columns=100, **cache)
    bars = [line for line in lines if line.startswith("tiny ━")]
    assert code == 0 and bars[0].endswith("0/30 compiling -:--:--"), lines
    shown = r"tiny ━+ 30/30 loss \d\.\d{4}, [\d,]+ tokens/s, \d+% of peak 0:00:00"
    assert re.fullmatch(shown, bars[-1]), bars[-1]


def test_elsewhere_the_first_and_last_steps_are_lines_with_the_time_left(capsys):
    shown = progress.choose()
    shown.start("tiny", total=200, step=100)
    for step in range(101, 201):
        shown.update(step, VALUES)
    shown.stop()
    first, *between, last = capsys.readouterr().err.splitlines()
    assert first == "tiny: step 101/200, loss 3.2500, 12,346 tokens/s, 42% of peak"
    assert last == "tiny: step 200/200, loss 3.2500, 12,346 tokens/s, 42% of peak, 0 s left"
    assert not between


def test_the_time_left_is_that_of_the_steps_after_the_first(capsys, monkeypatch):
    """Ten seconds a step after a first one of a hundred, on a clock that the test turns."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    shown = progress.Lines()
    shown.start("tiny", total=5, step=0)
    for step, seconds in enumerate((100, 4, 4, 4, 4), start=1):
        now[0] += seconds
        shown.update(step, VALUES)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"tiny: step {step}/5" for step in (1, 4, 5)]
    assert lines[1].endswith(", 4 s left")


def test_an_unknown_peak_is_left_out():
    assert progress.describe({**VALUES, "peak_share": None}) == "loss 3.2500, 12,346 tokens/s"
