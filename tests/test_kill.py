"""A run that is killed at any moment loses nothing but the time since its last checkpoint."""

import functools
import hashlib
import os
import random
import signal
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer, seed_everything

from lit_compress.callbacks import PFAPruning, pruning
from tests.modules import Theirs, every_epoch, new_trainer, train_loader, val_loader

EPOCHS = 5
# What a phase begins with; a kill comes a random time after the first such call.
PHASES = {
    "analysis": (pruning, "analyze"),
    "cut": (pruning, "cut"),
    "saving": (Trainer, "save_checkpoint"),
    "training": (Theirs, "training_step"),
}


def fit(folder):
    """Train, from the newest file there is; leaves the digest of the weights, and the seconds that each phase took."""
    seed_everything(3, verbose=False)
    files = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    module = Theirs()
    cuts = PFAPruning(keep_params=0.5, every_n_epochs=2, max_cuts=2)
    trainer = new_trainer(
        folder, cuts, every_epoch(folder), max_epochs=EPOCHS, enable_checkpointing=True, accumulate_grad_batches=2
    )
    trainer.fit(module, train_loader(), val_loader(), ckpt_path=files[-1] if files else None)
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    (folder / "digest").write_text(digest.hexdigest())


def in_child(function, *arguments) -> int:
    """The signal that ended a process with the function, 0 if none; its failure is this one's."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not come along
            function(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed; its traceback is above"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def killed(folder, phase, call, delay):
    """Train, and die in the given call of a phase, after a delay."""
    owner, name = PHASES[phase]
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def counting(*arguments, **options):
        calls.append(phase)
        if len(calls) == call:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return original(*arguments, **options)

    setattr(owner, name, counting)
    fit(folder)


def timing(original, seconds):
    @functools.wraps(original)  # Lightning reads its signature
    def call(*arguments, **options):
        start = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - start)

    return call


def timed(folder):
    """Train, and write how long a call of each phase takes."""
    seconds = {}
    for phase, (owner, name) in PHASES.items():
        setattr(owner, name, timing(getattr(owner, name), seconds.setdefault(phase, [])))
    fit(folder)
    (folder / "seconds").write_text("\n".join(f"{phase} {len(all_of)} {max(all_of)}" for phase, all_of in seconds.items()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("tries", [4, pytest.param(100, marks=pytest.mark.long)])
def test_a_killed_run_ends_as_one_that_was_left_alone(tries, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = tmp_path / "alone"
        alone.mkdir()
        assert in_child(timed, alone) == 0
        expected = (alone / "digest").read_text()
        lines = [line.split() for line in (alone / "seconds").read_text().splitlines()]
        phases = {phase: (int(calls), float(seconds)) for phase, calls, seconds in lines}
        assert phases.keys() == PHASES.keys()
        chance = random.Random(0)
        deaths = 0
        for number in range(tries):
            folder = tmp_path / str(number)
            folder.mkdir()
            phase = list(PHASES)[number % len(PHASES)]
            calls, seconds = phases[phase]
            deaths += in_child(killed, folder, phase, chance.randint(1, calls), chance.uniform(0, seconds)) == signal.SIGKILL
            files = [torch.load(path, weights_only=True) for path in Path(folder).glob("*.ckpt")]  # none is half written
            assert all(file["state_dict"] for file in files)
            assert in_child(fit, folder) == 0
            assert (folder / "digest").read_text() == expected, (number, phase)
        assert deaths >= 0.9 * tries  # the last calls may be over before the kill comes
    finally:
        torch.set_num_threads(threads)
