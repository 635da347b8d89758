"""What every test gets: one thread, its own cache and suspend settings, and the same random numbers each time.

Nothing here imports torch or numpy, so a test of what Cofire imports sees a clean process.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

# Before torch is imported anywhere, and for the processes that tests start: workers share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this test run, shared by its workers: a corpus is tokenised once."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = root / "cofire-cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> None:
    """Keep the user's cache and settings out of the tests, and the tests out of the user's cache."""
    monkeypatch.setenv("COFIRE_CACHE", str(shared_cache))
    for name in ("COFIRE_SUSPEND_FILE", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Seed the generators of those libraries that are loaded."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
