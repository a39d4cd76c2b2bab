"""A rank whose clock goes its own way, and which alone is asked to stop; what it sees at each of 80 steps."""

import json

from pipeline import distributed, stop
from pipeline.lookout import Lookout


def main() -> None:
    """Look after each step."""
    distributed.start()
    now = 0.0
    watch, seen = Lookout(0.5, lambda: now), []
    for step in range(80):
        now += 1.0 if distributed.rank() == 0 else 2.3
        stop._asked = distributed.rank() == 1 and step >= 30
        found = watch.look(now=step % 17 == 0)
        seen.append((step, *found))
        if found.save:
            watch.saved()
    distributed.finish()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
