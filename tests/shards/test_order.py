import tracemalloc
from itertools import chain, pairwise
from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.hashing import hash_array, hash_int
from shards.order import (
    ORDER_VERSION,
    Order,
    Shuffle,
    check_batch,
    choose_shuffle,
    kept_to_raw,
    rank_positions,
    read_factor,
)

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
shuffles = st.builds(Shuffle, st.integers(1, 60), st.integers(1, 16), st.integers(1, 48))
quick = settings(max_examples=80, deadline=None)


def located(order, positions):
    return list(zip(*(part.tolist() for part in order.locate(np.asarray(positions))), strict=True))


def naive_epoch(sizes, seed, shuffle, epoch):
    """The law of shards/order.py once more, in lists: the samples of an epoch by position."""

    def by_hash(items, *words):
        return [x for _, x in sorted((hash_int(*words, i) >> 32, x) for i, x in enumerate(items))]

    def permuted(size, key):
        """The law of shards/permutation.py: pairs, ten times a hash of one half added to the other, until inside."""
        a = next(a for a in range(1, size + 1) if a * a >= size)
        b = next(b for b in range(1, a + 1) if a * b >= size)

        def once(x):
            left, right = x // b, x % b
            for number in range(10):
                if number % 2:
                    right = (right + hash_int(*key, number, left)) % b
                else:
                    left = (left + hash_int(*key, number, right)) % a
            return left * b + right

        for x in range(size):
            x = once(x)
            while x >= size:
                x = once(x)
            yield x

    chunks = [
        [(s, i) for i in range(a, min(a + shuffle.chunk, n))]
        for s, n in enumerate(sizes)
        for a in range(0, n, shuffle.chunk)
    ]
    sequence = list(chain.from_iterable(chunks[x] for x in permuted(len(chunks), (seed, 1, epoch))))
    short, longer = divmod(len(sequence), shuffle.lanes)
    lanes = []
    for lane in range(shuffle.lanes):
        mine = [sequence.pop(0) for _ in range(short + (lane < longer))]
        first = max(1, shuffle.block * (lane + 1) // shuffle.lanes)
        edges = [0, *range(first, max(first, len(mine)) + shuffle.block, shuffle.block)]
        blocks = [mine[a:b] for a, b in pairwise(edges)]
        lanes.append([x for k, b in enumerate(blocks) for x in by_hash(b, seed, 2, epoch, lane, k)])
    return [lanes[p % shuffle.lanes][p // shuffle.lanes] for p in range(sum(sizes))]


@given(shard_sizes, shuffles, st.integers(0, 2**64 - 1), st.integers(0, 5))
@quick
def test_order_follows_the_law_and_gives_every_sample_once(sizes, shuffle, seed, epoch):
    order = Order(sizes, seed, shuffle)
    n = sum(sizes)
    got = located(order, np.arange(epoch * n, (epoch + 1) * n))
    assert [e for e, _, _ in got] == [epoch] * n
    got = [where for _, *where in got]
    assert sorted(got) == [[s, i] for s, size in enumerate(sizes) for i in range(size)]
    assert got == [list(where) for where in naive_epoch(sizes, seed, shuffle, epoch)]


@pytest.mark.parametrize("lanes", [240, 3840])
@pytest.mark.parametrize("sizes", [[1000], [997], [333, 0, 333, 334]])
def test_every_sample_once_in_awkward_sizes(sizes, lanes):
    n = sum(sizes)
    for epoch in (0, 7):
        order = Order(sizes, 5, Shuffle(lanes, 8, 16))
        _, shard, index = order.locate(np.arange(epoch * n, (epoch + 1) * n))
        assert len(set(zip(shard.tolist(), index.tolist(), strict=True))) == n


@given(shard_sizes, shuffles, st.integers(0, 10**15), st.data())
@quick
def test_any_position_alone_is_the_same_as_in_bulk(sizes, shuffle, start, data):
    bulk = located(Order(sizes, 3, shuffle), np.arange(start, start + 60))
    order = Order(sizes, 3, shuffle)
    for k in data.draw(st.lists(st.integers(0, 59), min_size=1, max_size=8)):
        assert located(order, [start + k]) == [bulk[k]]


@given(shard_sizes, shuffles, st.integers(0, 1000))
@quick
def test_find_is_the_inverse_of_locate(sizes, shuffle, epoch):
    order, n = Order(sizes, 6, shuffle), sum(sizes)
    positions = np.arange(epoch * n, (epoch + 3) * n)
    assert order.find(*order.locate(positions)).tolist() == positions.tolist()


@given(shard_sizes, shuffles, st.integers(1, 8), st.integers(0, 3), st.integers(1, 3), st.data())
@quick
def test_next_use_is_what_a_search_finds(sizes, shuffle, world_size, epoch, epochs, data):
    ranks = data.draw(st.lists(st.integers(0, world_size - 1), min_size=1, unique=True))
    n = sum(sizes)
    asked = data.draw(st.lists(st.integers(epoch * n, (epoch + 1) * n - 1), min_size=1, max_size=5))
    order = Order(sizes, 7, shuffle)
    chunks = [(s, i // shuffle.chunk) for _, s, i in located(order, np.arange((epoch + epochs + 1) * n))]
    until = order.needed_until(np.array(asked)).tolist()
    expected = []
    for position, end in zip(asked, until, strict=True):
        same = [p for p, chunk in enumerate(chunks) if chunk == chunks[position]]
        expected.append(next((p for p in same if p > end and p % world_size in ranks), same[-1]))
    got = Order(sizes, 7, shuffle).next_use(np.array(asked), ranks, world_size, epochs)
    assert got.tolist() == expected


def test_a_seek_makes_only_the_blocks_it_needs():
    order = Order(np.full(1000, 1000), 1, Shuffle(240, 64, 128))
    order.plan(0)
    tracemalloc.start()
    order.locate(np.array([654_321]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


@given(
    shard_sizes,
    shuffles,
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=1, max_size=6),
)
@quick
def test_ranks_share_the_same_batches_whatever_their_number(sizes, shuffle, steps):
    position, stream = 0, []
    for world_size, each in steps:  # ranks and batch size change at every step
        batch = world_size * each
        parts = [rank_positions(position, batch, r, world_size) for r in range(world_size)]
        assert {len(part) for part in parts} == {each}
        order = Order(sizes, 9, shuffle)
        found = {p: w for part in parts for p, w in zip(part.tolist(), located(order, part), strict=True)}
        stream += [found[p] for p in range(position, position + batch)]
        position += batch
    assert stream == located(Order(sizes, 9, shuffle), np.arange(position))


def test_epochs_seeds_and_blocks_differ():
    shuffle = Shuffle(12, 8, 16)
    first, second = (located(Order([500, 500], 0, shuffle), np.arange(a, a + 1000)) for a in (0, 1000))
    other = located(Order([500, 500], 1, shuffle), np.arange(1000))
    same = [sum(a[1:] == b[1:] for a, b in zip(first, x, strict=True)) for x in (second, other)]
    assert max(same) < 10


@given(st.integers(2, 24), st.sampled_from([1, 6, 12, 48]), st.integers(0, 3))
@quick
def test_read_law(world_size, lanes, epoch):
    """Enumerates the chunks that each rank touches: how often the cluster reads every byte."""
    sizes, shuffle = [700, 650, 1], Shuffle(lanes, 10, 20)
    order, n = Order(sizes, 2, shuffle), 1351
    factor = read_factor(world_size, lanes)
    chunks_of_lane, readers, owners = {}, {}, [set() for _ in range(lanes)]
    for rank in range(world_size):
        mine = np.arange(epoch * n, (epoch + 1) * n)
        mine = mine[mine % world_size == rank]
        lane = (mine - epoch * n) % lanes
        for each in set(lane.tolist()):
            owners[each].add(rank)
        _, shard, index = order.locate(mine)
        for a, s, i in zip(lane.tolist(), shard.tolist(), index.tolist(), strict=True):
            chunks_of_lane.setdefault(a, set()).add((s, i // 10))
            readers.setdefault((a, s, i // 10), set()).add(rank)
    step, shift = gcd(world_size, lanes), epoch * n  # ranks own absolute positions, so their lanes shift each epoch
    law = [{rank for rank in range(world_size) if (lane - rank + shift) % step == 0} for lane in range(lanes)]
    assert owners == law
    assert [len(ranks) for ranks in owners] == [factor] * lanes
    assert all(ranks <= law[lane] for (lane, _, _), ranks in readers.items())
    reads = sum(map(len, readers.values()))
    chunks = 70 + 65 + 1
    if factor == 1:
        assert reads <= chunks + lanes - 1  # each chunk once, and once more where a lane edge cuts it
    assert reads <= factor * (chunks + lanes - 1)


def test_stand_ins_go_round_the_block_and_then_on():
    sizes, shuffle = [101], Shuffle(4, 5, 10)
    order = Order(sizes, 0, shuffle)
    position = 101 + 4 * 7 + 2  # epoch 1, lane 2, offset 7: its blocks are [0, 7), [7, 17) and [17, 25)
    others = [order.stand_in(position, k) for k in range(1, 10)]
    assert others == [position + 4 * k for k in range(1, 10)]
    middle = position + 4 * 6
    assert order.stand_in(middle, 3) == middle + 12
    assert order.stand_in(middle, 4) == position
    assert order.stand_in(middle, 10) == middle + 40


@given(st.integers(1, 60), st.sets(st.integers(0, 59)))
@quick
def test_kept_to_raw(n, drop):
    dropped = sorted(x for x in drop if x < n)
    kept = [i for i in range(n) if i not in drop]
    assert kept_to_raw(np.arange(len(kept)), np.array(dropped)).tolist() == kept


def test_drop_list_keeps_the_law():
    raw_sizes, dropped = [10, 6], [[0, 3, 9], [1]]
    order = Order([n - len(d) for n, d in zip(raw_sizes, dropped, strict=True)], 4, Shuffle(3, 2, 4))
    _, shard, index = order.locate(np.arange(12))
    got = {(s, int(kept_to_raw([i], dropped[s])[0])) for s, i in zip(shard.tolist(), index, strict=True)}
    assert got == {(s, i) for s, n in enumerate(raw_sizes) for i in range(n) if i not in dropped[s]}


@pytest.mark.parametrize("samples", [1, 2, 47, 95, 96, 100, 1000, 12_345, 1_281_167, 300_000_000])
@pytest.mark.parametrize("mean_bytes", [500, 5e4, 2e6])
def test_chosen_shuffle_fits_data_and_window(samples, mean_bytes):
    for window in (16e9, 1e9):
        s = choose_shuffle(samples, mean_bytes, window)
        assert s.block >= 2 * s.chunk
        assert s.chunk * mean_bytes <= 8e6 or s.chunk == 1
        if samples >= 96:
            assert s.lanes in (48, 240, 960, 3840, 15360)
            assert s.window <= min(samples, window / mean_bytes)
        assert choose_shuffle(samples, mean_bytes, window, 7, 3, 11) == Shuffle(7, 3, 11)


def test_window_of_a_large_set_is_well_used():
    assert choose_shuffle(300_000_000, 1e5) == Shuffle(960, 41, 166)


def test_hash_is_the_same_for_integers_and_arrays():
    """The first outputs of SplitMix64 seeded with 0 are published with its reference code."""
    assert hash_int(0) == 0xE220A8397B1DCDAF
    words = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert hash_array(hash_int(7), words).tolist() == [hash_int(7, int(w)) for w in words]


def test_golden_order():
    """If this fails, every checkpoint would resume on other data: raise ORDER_VERSION."""
    order = Order([7, 0, 13, 5], 42, Shuffle(4, 3, 5))
    assert ORDER_VERSION == 2
    epoch, shard, index = order.locate(np.array([0, 1, 2, 3, 4, 11, 24, 25, 26, 10**12]))
    assert epoch.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 40_000_000_000]
    assert [shard.tolist(), index.tolist()] == [
        [2, 0, 2, 3, 2, 0, 2, 3, 0, 2],
        [3, 0, 6, 4, 1, 3, 2, 0, 5, 3],
    ]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: check_batch(100, 8), ["100", "8 ranks", "96 or 104"]),
        (lambda: check_batch(3, 8), ["3", "8 ranks", "use 8"]),
        (lambda: Order([0, 0], 0, Shuffle(1, 1, 1)), ["no sample"]),
        (lambda: Shuffle(0, 1, 1), ["lanes", "0"]),
    ],
)
def test_mistakes_are_named(wrong, words):
    with pytest.raises(UserError) as error:
        wrong()
    assert all(word in str(error.value) for word in words)
