"""When training stops: after a signal, or without improvement in its log."""

import os
import signal

import pytest

from dynlora.train.stopping import Stopping


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
    signals = Stopping("loss", None)
    with signals.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        assert "stopping after this step" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with Stopping("loss", None).listening():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_somebody_elses_handler_stays(others):
    theirs = signal.getsignal(signal.SIGTERM)
    signals = Stopping("loss", None)
    with signals.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert others == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is theirs
    assert signal.getsignal(signal.SIGTERM) is theirs
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def log(metric, *values):
    """Return a log with training lines between the evaluations."""
    return [line for value in values for line in ({"loss": 1.0}, {f"eval_{metric}": value})]


@pytest.mark.parametrize(
    ("values", "over"),
    [
        ((), False),
        ((0.5,), False),
        ((0.5, 0.4), False),
        ((0.5, 0.4, 0.45), True),
        ((0.5, 0.4, 0.6, 0.5), False),
        ((0.5, 0.5, 0.5), True),  # equal is not better
    ],
)
def test_training_is_over_after_two_evaluations_without_improvement(values, over):
    assert Stopping("accuracy", 2).is_over(log("accuracy", *values)) is over
    lower = tuple(1 - value for value in values)
    assert Stopping("loss", 2).is_over(log("loss", *lower)) is over
    assert not Stopping("accuracy", 1).is_over(log("f1", *values))
    assert not Stopping("accuracy", None).is_over(log("accuracy", *values))
