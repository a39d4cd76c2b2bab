"""One rank: how many cores it has, bound to some or not. worker_cores.py [CORES,... of rank 0, of rank 1, ...]"""

import json
import os
import sys

from pipeline import distributed
from shards.ending import end_process

distributed.start()
if len(sys.argv) > 1:
    os.sched_setaffinity(0, map(int, sys.argv[1 + distributed.rank()].split(",")))
print(json.dumps(distributed.cores_each()))
distributed.finish()
end_process(0)
