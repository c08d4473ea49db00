"""Collectives and barriers, on one process and on two ranks."""

from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import paddle
import pytest

from common import distributed
from common.errors import InputError
from helpers import ROOT, run_script


def test_on_one_process_nothing_is_exchanged() -> None:
    assert distributed.init_ranks() == (0, 1)
    distributed.barrier()
    distributed.announce_exit()
    distributed.barrier()
    distributed.wait_for_rank_0(100)
    own = object()
    assert distributed.broadcast_object(own) is own
    array, rows = np.ones(3), paddle.ones([2, 3])
    assert [gathered is array for gathered in distributed.all_gather_arrays(array)] == [True]
    assert [gathered is rows for gathered in distributed.gather_rows(rows, [2], 0)] == [True]
    weight = paddle.ones([2])
    weight.stop_gradient = False
    (3 * weight).sum().backward()
    assert distributed.all_reduce_gradients([weight], [0.5, 2]) == [0.5, 2]
    assert weight.grad.tolist() == [3, 3]
    vectors = np.arange(10, dtype=np.float32).reshape(5, 2)
    np.testing.assert_array_equal(distributed.encode_on_all_ranks(5, 2, lambda share: vectors[share]), vectors)


def test_ranks_that_cannot_connect_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as on a machine whose own name isn't known; and no launcher has started this process."""
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    monkeypatch.setenv("PADDLE_TRAINER_ID", "0")
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    fails = MagicMock(side_effect=ValueError("network pod-1: cannot be obtained\n  [Hint: ...]"))
    monkeypatch.setattr(distributed.dist, "init_parallel_env", fails)
    said = r"connect \(network pod-1: cannot be obtained\); .* add that to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo$"
    with pytest.raises(InputError, match=said):
        distributed.init_ranks()
    assert capsys.readouterr().err.startswith(
        "PADDLE_TRAINERS_NUM=2: waiting for the other processes; if nothing starts"
    )


ON_EACH_RANK = f"""
import sys
import time

sys.path.insert(0, {str(ROOT)!r})
from common.cli import run
from common.paddle_setup import set_up_paddle

set_up_paddle()
import numpy as np
import paddle

from common import distributed
from common.errors import InputError
from common.signals import Stopped


def parameter(values):
    made = paddle.to_tensor(values, dtype="float32")
    made.stop_gradient = False
    return made


def check_arrays_and_objects(rank):
    assert distributed.broadcast_object({{"from": rank, "名": [None, 1.5]}}) == {{"from": 0, "名": [None, 1.5]}}
    gathered = distributed.all_gather_arrays(np.full((2, 3), rank))
    assert [array.tolist() for array in gathered] == [[[0] * 3] * 2, [[1] * 3] * 2]
    for count in (0, 1, 4, 5):
        vectors = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
        asked = []
        found = distributed.encode_on_all_ranks(count, 2, lambda share: (asked.append(share), vectors[share])[1])
        np.testing.assert_array_equal(found, vectors)
        assert asked == [slice(rank, None, 2)]


def check_rows(rank):
    own = parameter([[1.0 + row, 10.0 * rank] for row in range([3, 1][rank])])
    rows = distributed.gather_rows(own, [3, 1], rank)
    assert [each.tolist() for each in rows] == [[[1, 0], [2, 0], [3, 0]], [[1, 10]]]
    paddle.concat(rows).sum().backward()
    assert own.grad.tolist() == [[1, 1]] * [3, 1][rank]


def check_gradients(rank):
    both, first, unused, fixed = parameter([1, 2]), parameter([[3]]), parameter([4]), paddle.ones([5])
    loss = (both * (rank + 1)).sum()
    if rank == 0:
        loss = loss + 7 * first.sum()
    loss.backward()
    sums = distributed.all_reduce_gradients([both, first, unused, fixed], [rank, 0.5])
    assert sums == [1, 1]
    assert both.grad.tolist() == [3, 3]
    assert first.grad.tolist() == [[7]]
    assert unused.grad is None


def check_parameters(rank):
    model = paddle.nn.Linear(2, 2)
    model.weight.set_value(paddle.full([2, 2], float(rank)))
    distributed.broadcast_parameters(model)
    assert model.weight.tolist() == [[0, 0], [0, 0]]


def check_waiting(rank):
    distributed.barrier()
    start = time.monotonic()
    if rank == 1:
        time.sleep(0.5)
    distributed.barrier()
    assert time.monotonic() - start > 0.45
    if rank == 1:
        distributed.announce_exit()
        return
    try:
        distributed.barrier()
    except Stopped:
        print("rank 0 was told")


def main():
    rank, ranks = distributed.init_ranks()
    assert ranks == 2
    for check in (check_arrays_and_objects, check_rows, check_gradients, check_parameters, check_waiting):
        check(rank)
        print(check.__name__, "on rank", rank, flush=True)
    distributed.wait_for_rank_0(20)
    return 0


run(main)
"""


@pytest.mark.process
def test_on_two_ranks(tmp_path: Path) -> None:
    """All in one start, which takes seconds: each check is named in the ranks' logs once it has passed."""
    script = tmp_path / "on_each_rank.py"
    script.write_text(ON_EACH_RANK, encoding="utf-8")
    done = run_script(script, ranks=2, log_dir=tmp_path / "log")
    logs = [path.read_text(encoding="utf-8") for path in sorted((tmp_path / "log").glob("workerlog.*"))]
    assert done.returncode == 0, logs
    checks = ("arrays_and_objects", "rows", "gradients", "parameters", "waiting")
    for rank, log in enumerate(logs):
        assert [line for line in log.splitlines() if line.startswith("check_")] == [
            f"check_{name} on rank {rank}" for name in checks
        ]
    assert "rank 0 was told" in logs[0]
    assert len(logs) == 2
