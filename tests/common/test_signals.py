"""What SIGINT and SIGTERM do to a script."""

import signal

import pytest

from common.signals import Stopped, StopSignals, Terminated, terminate

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def test_sigterm_is_handled_like_ctrl_c() -> None:
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(KeyboardInterrupt) as error:
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert type(error.value) is Terminated


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_only_noted(number: int) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopSignals() as signals:
        assert signals.received is None
        signal.raise_signal(number)
        assert signals.received == number
        for other in SIGNALS:
            signal.raise_signal(other)
        assert signals.received == number
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_signal_interrupts_work_that_can_be_dropped() -> None:
    with StopSignals() as signals:
        with pytest.raises(Stopped), signals.raised():
            signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)  # doesn't raise outside the block


def test_a_signal_that_came_before_interrupts_too() -> None:
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        reached = False
        with pytest.raises(Stopped), signals.raised():
            reached = True
        assert not reached


def test_a_second_signal_leaves_the_reaction_to_the_first_alone() -> None:
    cleaned = []

    def work(signals: StopSignals) -> None:
        with signals.raised():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                cleaned.append(True)

    with StopSignals() as signals:
        with pytest.raises(Stopped):
            work(signals)
        assert cleaned
        assert signals.received == signal.SIGINT


def test_work_without_a_signal_ends_as_usual() -> None:
    with StopSignals() as signals:
        with signals.raised():
            pass
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
