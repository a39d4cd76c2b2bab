"""One rank of several, which write every so-many-th row of a table, backwards. worker_rowfiles.py FOLDER"""

import json
import sys
from pathlib import Path

import numpy as np

from pipeline import distributed
from pipeline.evaluate.rowfiles import RowFiles
from shards.ending import end_process

ROWS = 1000
distributed.start()
values = {
    name: np.random.default_rng(size).standard_normal((ROWS, size), np.float32) for name, size in (("a", 3), ("b", 70))
}
files = RowFiles(Path(sys.argv[1]), ROWS, {name: each.shape[1] for name, each in values.items()})
for row in range(ROWS - 1 - distributed.rank(), -1, -distributed.world_size()):
    for name, each in values.items():
        files.write(name, row, each[row : row + 1])
tables = files.tables()
print(json.dumps({name: np.array_equal(tables[name], each) for name, each in values.items()}))
distributed.everyone(None)
distributed.finish()
end_process(0)
