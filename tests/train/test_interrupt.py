# SPDX-License-Identifier: Apache-2.0
"""Signals: the first asks to save and leave; only a person's second one hurries."""

import os
import signal

import pytest

from research.train.interrupt import Interrupt


def test_a_machine_that_is_shut_down_may_ask_twice():
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.asked() == signal.SIGTERM


def test_a_second_ctrl_c_leaves_at_once():
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
