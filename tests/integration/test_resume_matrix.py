"""Any shape of a run goes on from a checkpoint of any other: a few pairs, and as a slow test the whole matrix."""

import re

import pytest

from tests.integration.resume_matrix import (
    BEGIN,
    END,
    PAGE,
    SHAPES,
    TOLERANCE,
    Pair,
    Shape,
    all_pairs,
    mixed_pairs,
    run,
    table,
)


@pytest.mark.long
def test_another_stage_offload_engine_and_number_of_ranks_go_on_with_the_same_batches_and_moments(tmp_path):
    pairs = [
        Pair(Shape("ZeRO 3, offloaded", 2), Shape("Accelerate", 1)), Pair(Shape("ZeRO 1", 2), Shape("ZeRO 2", 1)),
        Pair(Shape("ZeRO 3, offloaded", 2), Shape("ZeRO 1, offloaded", 1)),
    ]  # fmt: skip
    for pair, far in run(tmp_path, pairs).items():
        assert far < TOLERANCE, pair


def test_the_matrix_has_every_shape_on_both_sides():
    pairs = all_pairs()
    assert {pair.writer for pair in pairs} == {pair.reader for pair in pairs} == set(SHAPES)
    assert len(mixed_pairs()) == 24
    cells = re.findall(r"\de[-+]\d\d", PAGE.read_text().partition(BEGIN)[2].partition(END)[0])
    assert len(cells) == 2 * len(SHAPES) + 24  # of the page, which the command writes
    assert max(map(float, cells)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_matrix(tmp_path):
    found = run(tmp_path, all_pairs())
    print(table(found))
    assert max(found.values()) < TOLERANCE
