"""Processes of a gloo group that stay for many tests, since starting one takes seconds."""

import multiprocessing
import os
import queue
import socket
import traceback

import pytest
import torch

SECONDS = 90  # after which a test fails instead of waiting for a rank that hangs


def _serve(rank, size, port, tasks, results):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"GROUP_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)  # as Lightning finds it
    while (task := tasks.get()) is not None:
        function, arguments = task
        try:
            results.put((rank, True, function(*arguments)))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))


class Processes:
    """Runs a function on every rank of a gloo group and returns what each has returned."""

    def __init__(self, size):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.tasks, self.results = [context.Queue() for _ in range(size)], context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(rank, size, port, self.tasks[rank], self.results), daemon=True)
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function, *arguments):
        for tasks in self.tasks:
            tasks.put((function, arguments))
        found = {}
        try:
            while len(found) < len(self.tasks):
                rank, fine, result = self.results.get(timeout=SECONDS)
                assert fine, f"Rank {rank}: {result}"
                found[rank] = result
        except queue.Empty:
            self.stop()
            pytest.fail(f"Only ranks {sorted(found)} came back within {SECONDS} s.")
        except AssertionError:
            self.stop()
            raise
        return [found[rank] for rank in sorted(found)]

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def alive(self):
        return all(process.is_alive() for process in self.processes)


@pytest.fixture(scope="module")
def pools():
    held = {}
    yield held
    for pool in held.values():
        pool.stop()


@pytest.fixture
def processes(pools):
    """`processes(2)` runs functions on two ranks."""

    def get(size):
        if size not in pools or not pools[size].alive:
            pools[size] = Processes(size)
        return pools[size]

    return get
