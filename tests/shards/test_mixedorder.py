from fractions import Fraction
from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.hashing import hash_int
from shards.mixedorder import PERIODS, MixedOrder, choose_period, choose_shuffles, quotas, source_seed
from shards.order import ORDER_VERSION, Order, Shuffle, choose_shuffle, rank_positions

quick = settings(max_examples=40, deadline=None)
shard_sizes = st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any)
parts = st.lists(st.tuples(shard_sizes, st.floats(0.5, 3)), min_size=1, max_size=4)


def mixed(sources, lanes, period, chunk=3, block=4):
    shuffle = Shuffle(lanes, chunk, block)
    orders = [Order(sizes, source_seed(8, s), shuffle) for s, (sizes, _) in enumerate(sources)]
    return MixedOrder(orders, [weight for _, weight in sources], 8, period)


def located(order, positions):
    return list(zip(*(part.tolist() for part in order.locate(np.asarray(positions))), strict=True))


def naive(mixture, count):
    """The law of shards/mixedorder.py once more, in lists: (source, position in it) of the first positions."""
    lanes, period, drawn, found = mixture.lanes, mixture.period, {}, []
    for position in range(count):
        row, lane = divmod(position, lanes)
        number, row = divmod(row, period)
        places = sorted(range(period), key=lambda t: (hash_int(8, 3, lane, number, t) >> 32, t))
        source = [s for s, quota in enumerate(mixture.quotas) for _ in range(quota)][places[row]]
        drawn[source, lane] = drawn.get((source, lane), -1) + 1
        found.append((source, drawn[source, lane] * lanes + lane))
    return found


@given(parts, st.integers(1, 5), st.integers(20, 30))
@quick
def test_order_follows_the_law(sources, lanes, period):
    mixture, count = mixed(sources, lanes, period), 2 * period * lanes + 7
    source, own = mixture.draw(np.arange(count))
    want = naive(mixture, count)
    assert list(zip(source.tolist(), own.tolist(), strict=True)) == want
    first = np.cumsum([0, *(len(sizes) for sizes, _ in sources)])
    samples = [(e, s + first[k], i) for k, p in want for e, s, i in located(mixture.orders[k], [p])]
    assert located(mixture, np.arange(count)) == samples


@given(parts, st.integers(1, 5), st.integers(20, 30), st.integers(0, 400))
@quick
def test_what_lanes_have_drawn_is_what_came_before(sources, lanes, period, position):
    mixture = mixed(sources, lanes, period)
    drawn = np.zeros((lanes, len(sources)), dtype=int)
    for p, (source, _) in enumerate(naive(mixture, position)):
        drawn[p % lanes, source] += 1
    assert mixture.drawn(position).tolist() == drawn.tolist()


@given(parts, st.integers(1, 6), st.integers(20, 40))
@quick
def test_quotas_are_exact_and_sources_go_through_whole_epochs(sources, lanes, period):
    mixture = mixed(sources, lanes, period)
    source, own = mixture.draw(np.arange(3 * period * lanes))
    drawn = source.reshape(3, period, lanes)
    for s, quota in enumerate(mixture.quotas):
        assert ((drawn == s).sum(axis=1) == quota).all()
        assert sorted(own[source == s].tolist()) == list(range(3 * quota * lanes))  # each once, none left out


@given(parts, st.integers(1, 9), st.integers(20, 70), st.integers(0, 10**12), st.data())
@quick
def test_any_position_alone_is_the_same_as_in_bulk_and_is_found_again(sources, lanes, period, start, data):
    positions = np.arange(start, start + 90)
    bulk = located(mixed(sources, lanes, period), positions)
    mixture = mixed(sources, lanes, period)
    for k in data.draw(st.lists(st.integers(0, 89), min_size=1, max_size=8)):
        assert located(mixture, [start + k]) == [bulk[k]]
    assert (mixture._positions(*mixture.draw(positions)) == positions).all()


@given(parts, st.sampled_from([1, 2, 3]), st.integers(1, 2), st.integers(20, 40), st.data())
@quick
def test_next_use_is_nearly_what_a_search_finds(sources, world_size, times, period, data):
    """Lanes of one period are not drawn in step: another of the chunk may come earlier in it, even before this one."""
    mixture = mixed(sources, world_size * times, period)
    rank, position = data.draw(st.integers(0, world_size - 1)), data.draw(st.integers(0, 500))
    got = int(mixture.next_use(np.array([position]), [rank], world_size, epochs=2)[0])
    end = int(mixture.needed_until(np.array([position]))[0])
    chunks = [(s, i // 3) for _, s, i in located(mixture, np.arange(max(got, position) + 1))]
    assert chunks[got] == chunks[position]
    slack = period * mixture.lanes
    assert got > end - slack
    earlier = [p for p in range(end + slack, got - slack) if chunks[p] == chunks[position] and p % world_size == rank]
    assert not earlier or got % world_size != rank


def test_ranks_share_the_same_positions_and_keep_to_their_lanes_of_every_source():
    sources = [([70, 65], 3.0), ([40], 1.0)]
    mixture = mixed(sources, 12, 16)
    whole = located(mixture, np.arange(1200))
    for world_size in (2, 3, 4):
        for rank in range(world_size):
            mine = rank_positions(0, 1200, rank, world_size)
            fresh = mixed(sources, 12, 16)
            assert located(fresh, mine) == [whole[p] for p in mine]
            source, own = fresh.draw(mine)
            for s, order in enumerate(fresh.orders):
                epoch, inside = np.divmod(own[source == s], order.samples)
                lanes = inside % 12  # of a rank they shift each epoch
                assert not ((lanes - rank + epoch * order.samples) % gcd(world_size, 12)).any()


@given(parts, st.integers(1, 4), st.integers(20, 30))
@quick
def test_stand_ins_are_of_the_same_source_and_block(sources, lanes, period):
    mixture = mixed(sources, lanes, period)
    for position in (0, 17, 3 * period * lanes + 5):
        (source,), (own,) = (x.tolist() for x in mixture.draw(np.array([position])))
        for attempt in (1, 2, 9):
            other = mixture.draw(np.array([mixture.stand_in(position, attempt)]))
            assert [x.tolist() for x in other] == [[source], [mixture.orders[source].stand_in(own, attempt)]]


@given(parts, st.integers(1, 5), st.integers(20, 30), st.integers(1, 9), st.integers(1, 12))
@quick
def test_chunks_are_needed_until_the_last_block_that_holds_some_of_them(sources, lanes, period, chunk, block):
    mixture = mixed(sources, lanes, period, chunk, block)
    positions = np.arange(4 * period * lanes)
    source, own = mixture.draw(positions)
    _, shard, index = mixture.locate(positions)
    until = mixture.needed_until(positions)
    uses = {}
    samples = np.array([order.samples for order in mixture.orders])[source]
    for p, *name in zip(
        positions, source, own // samples, own % samples % lanes, shard, index // mixture.chunk_sizes[shard],
        strict=True,
    ):  # fmt: skip
        uses.setdefault(tuple(map(int, name)), []).append(int(p))
    for same in uses.values():
        assert until[same].min() >= same[-1]
        assert (until[same] == until[same[0]]).all()


def test_sources_of_one_size_show_different_places_at_a_time():
    mixture = mixed([([50, 50], 1.0), ([50, 50], 1.0)], 4, 64)
    a, b = (located(order, np.arange(100)) for order in mixture.orders)
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 10


def test_a_source_smaller_than_the_lanes_comes_round_whole():
    mixture = mixed([([3], 1.0), ([1000], 1.0)], 48, 64)
    source, _ = mixture.draw(np.arange(48 * 64))
    small = [sample for sample, s in zip(located(mixture, np.arange(48 * 64)), source, strict=True) if s == 0]
    assert sorted(small) == [(e, 0, i) for e in range(32 * 48 // 3) for i in range(3)]


def test_quotas_by_largest_remainder():
    assert quotas([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert quotas([0.5, 0.3, 0.2], 64).tolist() == [32, 19, 13]


@pytest.mark.parametrize(
    ("weights", "period"),
    [([1], 64), ([3, 1], 64), ([0.75, 0.25], 64), ([0.9, 0.1], 70), ([1, 1, 1], 66), ([999, 1], 1000),
     ([0.7, 0.2, 0.1], 70)],
)  # fmt: skip
def test_the_period_meets_the_weights(weights, period):
    assert choose_period(weights) == period
    exact = [Fraction(str(w)) / sum(Fraction(str(w)) for w in weights) for w in weights]
    assert quotas(weights, period).tolist() == [period * share for share in exact]


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=5))
@settings(max_examples=15, deadline=None)
def test_any_weights_are_met_within_some_percent(weights):
    period = choose_period(weights)
    assert period in PERIODS
    shares = np.array(weights) / sum(weights)
    assert np.abs(quotas(weights, period) / period / shares - 1).max() < 0.02


def test_shuffles_of_a_mixture_share_the_window_and_the_lanes():
    small, large = choose_shuffles([10_000, 300_000_000], [1e5, 1e5], [1, 3])
    assert small.lanes == large.lanes == choose_shuffle(300_010_000, 1e5).lanes == 960
    assert large == choose_shuffle(300_000_000, 1e5, 12e9, lanes=960)
    assert 2 * small.chunk * 960 <= 10_000  # so a lane edge cuts few chunks
    assert (large.window + small.window) * 1e5 <= 16e9
    assert choose_shuffles([50, 60], [1, 1], [1, 1], lanes=7, chunk=2, block=9) == [Shuffle(7, 2, 9)] * 2


def test_golden_order():
    """If this fails, every checkpoint of a mixture would resume on other data: raise ORDER_VERSION."""
    assert ORDER_VERSION == 2
    assert source_seed(42, 1) == 13754804994954577439
    orders = [Order([7, 0, 13, 5], 42, Shuffle(4, 3, 5)), Order([9], 1, Shuffle(4, 2, 4))]
    mixture = MixedOrder(orders, [2, 1], 42, 6)
    assert [x.tolist() for x in mixture.locate(np.array([0, 1, 5, 40, 123, 10**12]))] == [
        [0, 0, 0, 1, 4, 26666666666],
        [2, 0, 4, 3, 4, 2],
        [3, 0, 6, 4, 8, 5],
    ]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: quotas([1, 0], 8), ["weights", "[1, 0]", "positive"]),
        (lambda: choose_period([1, float("nan")]), ["weights", "nan", "positive"]),
        (lambda: choose_period([1, 2, 3000]), ["[1, 2, 3000]", "0.00033 of", "1/1024", "raise"]),
        (lambda: MixedOrder([Order([5], 0, Shuffle(1, 1, 1))] * 2, [1, 1000], 0, 8), ["[0, 8] of 8", "raise"]),
        (lambda: MixedOrder([Order([5], 0, Shuffle(n, 1, 1)) for n in (1, 2)], [1, 1], 0), ["[1, 2] lanes"]),
        (lambda: MixedOrder([Order([5], 0, Shuffle(1, 1, 1))], [1, 1], 0), ["1 sources", "2 weights"]),
    ],
)
def test_mistakes_are_named(wrong, words):
    with pytest.raises(UserError) as error:
        wrong()
    assert all(word in str(error.value) for word in words)
