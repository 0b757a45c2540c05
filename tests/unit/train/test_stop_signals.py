"""Signals: taken while training, once, and never from somebody else."""

import os
import signal

import pytest

from dynlora.train.stop_signals import StopSignals


@pytest.fixture(autouse=True)
def usual_interrupt():
    """Let SIGINT interrupt, as in a terminal: in the background a process begins without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def others():
    """Put somebody's handler on SIGTERM, and take it off again."""
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, before)


def test_the_first_signal_is_noted_with_a_word_and_the_second_interrupts(capsys):
    signals = StopSignals()
    with signals.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        assert "stopping after this step" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_somebody_elses_handler_stays(others):
    theirs = signal.getsignal(signal.SIGTERM)
    signals = StopSignals()
    with signals.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert others == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is theirs
    assert signal.getsignal(signal.SIGTERM) is theirs
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_is_listened_to_afterwards():
    with StopSignals().listening():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
