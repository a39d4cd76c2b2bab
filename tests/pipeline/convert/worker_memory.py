"""Convert in a process of its own and print its peak of resident memory, in bytes: ``worker_memory.py SRC DST TO``."""

import json
import resource
import sys
import time

from pipeline.convert.convert import convert

if __name__ == "__main__":
    started = time.monotonic()
    done = convert(*sys.argv[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": time.monotonic() - started, **done}))
