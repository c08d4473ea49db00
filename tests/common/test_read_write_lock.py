"""The lock of readers and writers, with real threads."""

import threading
import time

import pytest

from common.read_write_lock import ReadWriteLock


class Log:
    """What happened, in order; `until` waits for it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.changed = threading.Condition()

    def add(self, event: str) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def until(self, event: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: event in self.events, timeout=30), self.events


def waiting(lock: ReadWriteLock, readers: int, writers: int) -> None:
    """Returns when so many threads wait for the lock."""
    for _ in range(3000):
        if (lock._waiting_readers, lock._waiting_writers) == (readers, writers):
            return
        time.sleep(0.01)
    raise AssertionError("they don't wait")


def start(log: Log, lock: ReadWriteLock, name: str, until: str) -> threading.Thread:
    """A thread that holds the lock until an event; a name that begins with w writes."""

    def hold() -> None:
        with lock.writing() if name.startswith("w") else lock.reading():
            log.add(name)
            log.until(until)

    thread = threading.Thread(target=hold)
    thread.start()
    return thread


def test_readers_read_at_the_same_time() -> None:
    log, lock = Log(), ReadWriteLock()
    threads = [start(log, lock, name, "end") for name in ("r1", "r2")]
    log.until("r1")
    log.until("r2")
    log.add("end")
    for thread in threads:
        thread.join()


def test_readers_and_writers_take_turns() -> None:
    """A reader waits for the writer that came before it, and goes before the next one."""
    log, lock = Log(), ReadWriteLock()
    threads = [start(log, lock, "r1", "end r1")]
    log.until("r1")
    threads.append(start(log, lock, "w1", "end w1"))
    waiting(lock, 0, 1)
    threads.append(start(log, lock, "r2", "end r2"))
    waiting(lock, 1, 1)
    log.add("end r1")
    log.until("w1")
    threads.append(start(log, lock, "w2", "end w2"))
    waiting(lock, 1, 1)
    log.add("end w1")
    log.until("r2")
    threads.append(start(log, lock, "r3", "end r3"))
    waiting(lock, 1, 1)
    log.add("end r2")
    log.until("w2")
    log.add("end w2")
    log.until("r3")
    log.add("end r3")
    for thread in threads:
        thread.join()
    assert [event for event in log.events if not event.startswith("end")] == ["r1", "w1", "r2", "w2", "r3"]


def test_nobody_sees_a_half_made_change_and_all_get_their_turn() -> None:
    """Six threads, of which two write."""
    lock, numbers = ReadWriteLock(), [0, 0]

    def read() -> None:
        for _ in range(300):
            with lock.reading():
                assert numbers[0] == numbers[1]

    def write() -> None:
        for _ in range(300):
            with lock.writing():
                numbers[0] += 1
                time.sleep(0)
                numbers[1] += 1

    threads = [threading.Thread(target=target) for target in (read, write, read, read, write, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert numbers == [600, 600]


def test_the_lock_is_free_after_an_error() -> None:
    lock = ReadWriteLock()
    for hold in (lock.writing, lock.reading, lock.writing):
        with pytest.raises(KeyError), hold():
            raise KeyError
    with lock.writing():
        pass
