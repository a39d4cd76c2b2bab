import pytest

from pipeline import distributed


@pytest.fixture
def alone(monkeypatch):
    """A process group of this process alone."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    distributed.start()
    yield
    distributed.finish()
