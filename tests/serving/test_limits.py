import resource
from collections.abc import Sequence
from resource import RLIM_INFINITY

import pytest

from serving.limits import (
    BAD_REQUEST,
    OVERLOADED,
    STOPPING,
    Admission,
    Limits,
    RequestError,
    check_texts,
    connection_limit,
    order_texts,
    raise_open_files,
)

LIMITS = Limits(texts=2, characters=4, bytes=1000, queued_texts=3)


def test_texts_come_in_the_order_of_their_keys() -> None:
    assert order_texts(["1", "0"], ["b", "a"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (["0", "1"], ["a"], "2 keys and 1 values"),
        ([], [], "no texts"),
        (["0", "1", "2"], ["a", "b", "c"], "3 texts: send at most 2 in a request"),
        (["1"], ["a"], "wrong keys: 1 texts have the keys 0 to 0"),
        (["0", "0"], ["a", "b"], "wrong keys"),
        (["0", "1"], ["a", " \n"], "text 1 is empty"),
        (["0"], ["\ufeff"], "text 0 holds only invisible characters: leave it out"),
        (["0"], ["\u200b\u2060"], "text 0 holds only invisible characters"),
        (["0", "1"], ["a", "\u00ad \ufffd"], "text 1 holds only invisible characters"),
        (["0"], ["\x00\x1f"], "text 0 holds only invisible characters"),
        (["0"], ["abcde"], "text 0 has 5 characters: send at most 4"),
    ],
)
def test_a_bad_request_is_an_error(keys: Sequence[str], values: Sequence[str], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        check_texts(order_texts(keys, values), LIMITS)
    assert error.value.number == BAD_REQUEST


def test_a_text_may_hold_invisible_characters() -> None:
    check_texts(["\ufeffa\u200b"], LIMITS)


@pytest.mark.parametrize(
    ("limits", "raised_to", "room", "noted"),
    [
        ((64, 64), 64, 12, True),
        ((64, 4096), 240, 100, False),
        ((64, RLIM_INFINITY), 240, 100, False),
        ((239, 239), 239, 99, True),
        ((4096, 4096), 4096, 100, False),
        ((RLIM_INFINITY, RLIM_INFINITY), RLIM_INFINITY, 100, False),
        ((20, 20), 20, 1, True),
    ],
)
def test_connections_follow_the_limit_on_open_files(
    limits: tuple[int, int],
    raised_to: int,
    room: int,
    noted: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is raised as far as the system allows; where that isn't enough, a line says so."""
    current = [limits]
    monkeypatch.setattr(resource, "getrlimit", lambda _: current[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, value: current.append(value))
    raise_open_files(100)
    assert (current[-1], connection_limit(100)) == ((raised_to, limits[1]), room)
    line = f"note: ulimit -n leaves room for {room} connections on each port; ulimit -n 240 is enough\n"
    assert capsys.readouterr().err == (line if noted else "")


def test_texts_wait_up_to_the_limit_and_leave_when_they_are_answered() -> None:
    admission = Admission(LIMITS.queued_texts)
    with admission.admitted(2):
        with (
            pytest.raises(RequestError, match="2 texts are waiting already: try again later") as error,
            admission.admitted(2),
        ):
            pass
        assert error.value.number == OVERLOADED
        with admission.admitted(1):
            assert (admission.requests, admission.texts) == (2, 3)
    assert (admission.requests, admission.texts) == (0, 0)


def test_after_a_stop_nothing_is_admitted() -> None:
    admission = Admission(LIMITS.queued_texts)
    with admission.admitted(1):
        assert not admission.stop(0.01)
    assert admission.stop(0.01)
    with pytest.raises(RequestError, match="the service is stopping") as error, admission.admitted(1):
        pass
    assert error.value.number == STOPPING
