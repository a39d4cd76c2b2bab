"""Python's garbage collector is off while steps are taken, and as it was afterwards."""

import gc
import weakref

import pytest

from pipeline.garbage import collected_between_steps


class Node:
    """What only the collector can free: it holds itself."""

    def __init__(self):
        self.itself = self


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    gc.enable()
    gc.unfreeze()


def test_a_circle_that_is_made_inside_stays_until_it_is_collected():
    with collected_between_steps():
        assert not gc.isenabled()
        circle = weakref.ref(Node())
        for _ in range(3 * gc.get_threshold()[0]):
            Node()  # as many as would start it
        assert circle() is not None
        gc.collect(1)  # as the loop does between two steps
        assert circle() is None
    assert gc.isenabled()


def test_what_was_there_before_is_collected_once_and_then_left_alone():
    circle, kept = weakref.ref(Node()), Node()
    before = gc.get_freeze_count()
    with collected_between_steps():
        assert circle() is None
        assert gc.get_freeze_count() > before
        assert not any(each is kept for each in gc.get_objects())  # passes over it are what takes long
    assert gc.get_freeze_count() == 0
    assert any(each is kept for each in gc.get_objects())


def test_it_is_on_again_after_an_error():
    with pytest.raises(KeyError), collected_between_steps():
        raise KeyError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
