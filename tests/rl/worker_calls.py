# SPDX-License-Identifier: Apache-2.0
"""What tests have worker processes do. They import this; it imports nothing of ours."""

import contextlib
import os
import signal
import sys
import time

CALLS: list[int] = []


def add(a, b):
    return a + b


def pid():
    return os.getpid()


def slow_pid(seconds):
    time.sleep(seconds)
    return os.getpid()


def environment():
    return [name for name in ("jax", "flax", "research.core.types") if name in sys.modules] + [
        name for name in os.environ if name.startswith(("JAX", "XLA"))
    ]


def loop():
    while True:
        pass


def swallow():
    while True:
        with contextlib.suppress(BaseException):
            loop()


def swallow_once():
    with contextlib.suppress(BaseException):
        loop()
    return "done"


def never_back_to_python():
    return sum(range(10**15))


def hoard():
    kept = []
    while True:
        kept.append(bytes(1 << 28))  # which, unlike a bytearray, takes room without touching it


def crash():
    os._exit(7)


def crash_the_second_time():
    CALLS.append(1)
    if len(CALLS) > 1:
        os._exit(7)
    return "first"


def hoard_the_second_time():
    CALLS.append(1)
    return bytearray(1 << 34 if len(CALLS) > 1 else 1) == b"\0"


def alarm():
    class Rung(Exception):
        pass

    def ring(*_):
        raise Rung

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(30)
    except Rung:
        return "rung"
    return "slept"


def leave_an_alarm():
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0.2)


def chatter():
    print("noise" * 1000)
    os.write(1, b'{"value": 1}\n')
    os.write(2, b"noise\n")
    return [input() if sys.stdin.read(1) else "silence"]


def long_result():
    return "x" * (1 << 22)


def no_json():
    return {1, 2}


def bad_words():
    class Bad(Exception):
        def __str__(self):
            raise RuntimeError("no words")

    raise Bad


def leave():
    sys.exit("gone")


def write(path):
    open(path, "w").close()


def write_low(path):
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def run(path):
    import subprocess

    subprocess.run(["touch", path], check=True)


def shell(path):
    os.system(f"touch {path}")


def remove(path):
    os.unlink(path)


def read(path):
    with open(path) as file:
        return file.read()
