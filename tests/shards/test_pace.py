from shards.pace import Pace


def test_moments_follow_the_last_batches_without_the_first(monkeypatch):
    clock = [10**18]
    monkeypatch.setattr("time.time_ns", lambda: clock[0])

    def pass_batches(pace, position, count, nanoseconds):
        for _ in range(count):
            clock[0] += nanoseconds
            position += 8
            pace.at(position)
        return position

    pace = Pace()
    pace.at(1000)
    assert clock[0] < pace.moment(1001) < pace.moment(1002)  # a guess
    position = pass_batches(pace, 1000, 1, 60 * 10**9)
    position = pass_batches(pace, position, 2, 800)
    assert pace.moment(position + 50) == clock[0] + 50 * 100
    pace.jump()
    pace.at(0)
    assert pace.moment(50) == clock[0] + 50 * 100
    position = pass_batches(pace, 0, 1200, 1600)
    assert pace.moment(position + 10**9) == clock[0] + 200 * 10**9
