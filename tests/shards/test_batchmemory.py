from multiprocessing import Pipe

import numpy as np
import pytest

from shards.batchmemory import Borrower, Lender


@pytest.fixture
def both():
    lender, borrower = Pipe()
    with lender, borrower:
        registered = []
        yield Lender(lender), Borrower(borrower, lambda memory: registered.append(memory.nbytes)), registered


def test_what_is_lent_is_the_same_memory_and_serves_again_once_no_view_of_it_is_left(both):
    lender, borrower, registered = both
    made = lender.array((2, 3))
    made[:] = 7
    lent = lender.lend(made)
    found = borrower.array(lent)
    assert found.shape == (2, 3)
    made[1, 2] = 8  # which a lender must not do: it shows that nothing is copied
    assert found.tolist() == [[7, 7, 7], [7, 7, 8]]

    del made
    view = found.reshape(-1)[4:]
    del found
    assert borrower.let_go() == []
    other = lender.lend(lender.array((2, 3)))
    assert other.number != lent.number
    assert view.tolist() == [7, 8]
    del view
    assert borrower.let_go() == [lent.number]
    lender.take_back([lent.number])
    assert lender.lend(lender.array((3, 2))).number == lent.number
    assert registered == [6]


def test_what_is_made_and_not_lent_serves_again(both):
    lender, borrower, _ = both
    first = lender.array((5,))
    address = first.ctypes.data
    first[:] = 1
    del first
    again = lender.array((4,))
    assert again.ctypes.data == address
    assert borrower.array(lender.lend(again)).tolist() == [1, 1, 1, 1]


def test_memory_that_got_too_small_is_gone_on_both_sides(both):
    lender, borrower, registered = both
    for size in (3, 8):
        made = [lender.array((size,)) for _ in range(2)]
        for number, array in enumerate(made):
            array[:] = number
        found = [borrower.array(lender.lend(array)) for array in made]
        assert np.array(found).tolist() == [[0] * size, [1] * size]
        del made, array, found
        lender.take_back(borrower.let_go())
    assert registered == [3, 3, 8, 8]
    assert len(lender._memory) == len(borrower._memory) == 2
