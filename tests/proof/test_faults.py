from collections import Counter

import pytest

from tests.proof.faults import CHANGING, DISK, KILLS, RANKS, STAGES, STEADY, schedule

LENGTHS = dict.fromkeys(STAGES, 12000)


@pytest.mark.parametrize("faults", [8, 12, 50])
@pytest.mark.parametrize("seed", range(5))
def test_a_seed_draws_what_comes_when(seed, faults):
    drawn = schedule(seed, faults, LENGTHS)
    assert drawn == schedule(seed, faults, LENGTHS) != schedule(seed + 1, faults, LENGTHS)
    assert len(drawn) == faults
    assert [fault.stage for fault in drawn] == sorted((fault.stage for fault in drawn), key=STAGES.index)
    each = Counter(fault.stage for fault in drawn).values()
    assert max(each) - min(each) <= 1
    for one in STAGES:
        moments = [fault.samples for fault in drawn if fault.stage == one]
        assert moments == sorted(moments)
        assert max(moments) <= LENGTHS[one] / 2
    assert [fault.stage for fault in drawn if fault.kind == RANKS] == [CHANGING] * max(1, faults // 16)
    assert [fault.stage for fault in drawn if fault.kind == DISK] == [STEADY]
    assert abs(sum(fault.kind in KILLS for fault in drawn) - 3 / 8 * faults) < 1
