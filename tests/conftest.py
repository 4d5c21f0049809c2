"""What tests share: one thread a worker, fixed seeds, real data sets where there are any, the list of modules."""

import os
import random
from collections.abc import Callable
from pathlib import Path

# Before torch and matplotlib load, so that the processes which tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")

import hypothesis
import numpy as np
import pytest
import torch

from tests.processes import pools, processes  # noqa: F401  # fixtures

ROOT = Path(__file__).resolve().parents[1]

# pytest-xdist starts a worker a core; more threads than cores make the small tensors of tests slower, not faster.
torch.set_num_threads(1)

# A shared machine may pause for seconds, hence no deadline. In CI, the same examples each time and no database to leave behind.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("in-ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("in-ci" if os.environ.get("CI") else "here")


def importable_modules() -> list[str]:
    """Names of all modules of the package in this checkout, read from its files."""
    names = []
    for folder in ("lit_compress", "callbacks", "datamodules"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "lit_compress" else ("lit_compress", *parts)
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(names)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-surface", action="store_true", help="write tests/public_surface.txt anew instead of comparing")
    parser.addoption("--update-notebooks", action="store_true", help="store the outputs of this run in the notebooks")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case for each module for every test that takes `module_name`, so that a new file is tested without a new test."""
    if "module_name" in metafunc.fixturenames:
        metafunc.parametrize("module_name", importable_modules())


@pytest.fixture
def module_names() -> list[str]:
    return importable_modules()


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Global seeds, so that no result hangs on which test ran before in the same worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def data_dir() -> Callable[[str], Path]:
    """`data_dir("MNIST")` is the folder in which the real set's folder `MNIST` lies; without it, the test is skipped by name."""

    def find(name: str) -> Path:
        place = os.environ.get("LIT_COMPRESS_DATA")
        if place is None:
            pytest.skip(f"{name}: LIT_COMPRESS_DATA is not set")
        if not (Path(place) / name).exists():
            pytest.skip(f"{name}: not in LIT_COMPRESS_DATA")
        return Path(place)

    return find


@pytest.fixture
def offline_wandb(tmp_path, monkeypatch):
    """Runs of Weights & Biases stay in `tmp_path`. Called with their `save_dir`, it ends them and reads the only one's files."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    import wandb

    from tests.wandb_runs import OfflineRun

    def read(save_dir="."):
        wandb.finish()
        wandb.teardown()  # waits for the process that writes the files; `finish` alone returns before they are complete
        return OfflineRun(tmp_path / save_dir)

    yield read
    wandb.teardown()
