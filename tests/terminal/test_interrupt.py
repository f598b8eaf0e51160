"""Ctrl-C at the worst moments, without a process of its own."""

import os
import signal

import pytest

from kvjax.terminal.interrupt import insisting


class Finalised:
    def __init__(self, then):
        self.then = then

    def __del__(self):
        self.then()


def press():
    os.kill(os.getpid(), signal.SIGINT)


def fail():
    raise ZeroDivisionError


@pytest.fixture
def said(monkeypatch):
    """What Python says that it drops."""
    kinds = []
    monkeypatch.setattr("sys.unraisablehook", lambda dropped: kinds.append(dropped.exc_type))
    return kinds


def test_a_press_inside_a_finaliser_still_ends_the_block_and_says_nothing(said):
    with pytest.raises(KeyboardInterrupt), insisting():
        Finalised(press)
    assert said == []


def test_other_failures_of_a_finaliser_are_said(said):
    with insisting():
        Finalised(fail)
    assert said == [ZeroDivisionError]
