"""The processes of `data.prepare`: however a run ends, what is done is kept, no process is left."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest
import raw
from conftest import odd_decoder

from data import prepare

HANGS = {"busy": "time.sleep(9999)", "deaf": "ctypes.PyDLL(None).sleep(9999)"}    # keeps the lock


@pytest.fixture
def hanging(request, tmp_path):
    """A run of two workers whose last items never end, once all others are done."""
    raw.modelnet(tmp_path / "raw", n=4)
    body = f"if item.id.endswith('0003'): {HANGS[getattr(request, 'param', 'busy')]}"
    process = subprocess.Popen(**odd_decoder(tmp_path, body, 2), stderr=subprocess.PIPE,
                               start_new_session=True)
    state = tmp_path / "out/modelnet40.partial/state.npy"
    process.done = lambda: (np.load(state) == prepare.DONE).sum() if state.exists() else 0
    wait(lambda: process.done() == 6)
    yield process
    for pid in of(process):
        os.kill(pid, signal.SIGKILL)


def wait(until, seconds=60):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def of(process, what=""):
    """Numbers of the processes of a run's group (it leads one) that still are and hold `what`."""
    listed = subprocess.run(["ps", "-Aww", "-o", "pid=,pgid=,stat=,args="], capture_output=True,
                            text=True).stdout
    rows = [line.split(None, 3) for line in listed.splitlines()]
    return [int(pid) for pid, leader, state, command in rows
            if int(leader) == process.pid and "Z" not in state and what in command]


@pytest.mark.parametrize("hanging,number,code", [
    ("deaf", signal.SIGINT, 130), ("busy", signal.SIGTERM, 143)], indirect=["hanging"])
def test_an_interrupt_ends_it_at_once(hanging, number, code):
    start = time.monotonic()
    send = os.killpg if number == signal.SIGINT else os.kill        # Ctrl-C reaches all, `kill` one
    send(hanging.pid, number)
    _, error = hanging.communicate(timeout=30)
    assert hanging.returncode == code and time.monotonic() - start < 5
    assert "interrupted; what was finished is kept" in error and "Traceback" not in error
    assert hanging.done() == 6
    wait(lambda: not of(hanging), 5)


def test_a_worker_that_is_killed_ends_it_in_one_line(hanging):
    assert len(of(hanging, "spawn_main")) == 2
    os.kill(of(hanging, "spawn_main")[0], signal.SIGKILL)
    _, error = hanging.communicate(timeout=30)
    assert hanging.returncode == 2 and "Traceback" not in error
    assert "a worker process was ended from outside" in error
    assert hanging.done() == 6
    wait(lambda: not of(hanging), 5)


def test_no_worker_outlives_its_parent(hanging):
    os.kill(hanging.pid, signal.SIGKILL)
    hanging.wait()
    wait(lambda: not of(hanging), 5)


def test_a_worker_has_one_thread(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(prepare, "work", threads)
    answers = list(prepare.decode_all("modelnet40", [None] * 3, range(3), {}, tmp_path, 1))
    assert sorted(answers) == [(0, 1), (1, 1), (2, 1)]


def threads(*_):
    import torch
    return torch.get_num_threads()


def test_nothing_to_do_starts_nothing(tmp_path):
    assert list(prepare.decode_all("modelnet40", [], [], {}, tmp_path, 4)) == []
