"""A Slurm cluster of two nodes for all tests here; where it cannot start, they fail."""

import os

import pytest

from tests.slurm.cluster import FOLDER, Cluster


@pytest.fixture(scope="session")
def cluster():
    """The cluster, beside the one of ``make slurm``; this process's commands of Slurm's are meant for it."""
    cluster = Cluster(FOLDER.with_name(f"{FOLDER.name}-tests"), port=17100)  # always there: one left over is found
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(cluster.conf)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        del os.environ["SLURM_CONF"]
        if before is not None:
            os.environ["SLURM_CONF"] = before


@pytest.fixture(autouse=True)
def _healthy(request):
    """After each test, no job is left and both nodes are there."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").start()
