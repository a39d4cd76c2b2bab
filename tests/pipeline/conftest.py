import os

import pytest

from pipeline import distributed

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="session")
def _group():
    """One process group of this process alone for all tests: DeepSpeed keeps the first that it meets."""
    before = {name: os.environ.pop(name, None) for name in NAMES}
    distributed.start()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    yield
    distributed.finish()


@pytest.fixture
def alone(monkeypatch, _group):
    """A process group of this process alone."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
