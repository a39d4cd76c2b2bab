import pyarrow as pa
import pytest

from shards.tuples import Tuples

LISTS = [[3], [], [1, 2, 5], None, [4], [7, 7]]


@pytest.mark.parametrize("type_", [pa.int32(), pa.float32()])
@pytest.mark.parametrize("cut", [slice(0, 6), slice(1, 4), slice(3, 4), slice(6, 6)])
def test_tuples_are_those_of_the_column(type_, cut):
    whole = pa.chunked_array([pa.array(part, pa.list_(type_)) for part in (LISTS[:2], [], LISTS[2:])])
    wanted = [tuple(each or ()) for each in LISTS[cut]]
    tuples = Tuples(whole.slice(cut.start, cut.stop - cut.start))
    assert len(tuples) == len(wanted)
    assert list(tuples) == wanted
    assert [tuples[i - len(wanted)] for i in range(len(wanted))] == wanted
    with pytest.raises(IndexError):
        tuples[len(wanted)]


def test_no_row_group_is_no_tuple():
    assert list(Tuples(pa.chunked_array([], pa.list_(pa.int32())))) == []
