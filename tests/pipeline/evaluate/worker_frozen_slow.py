"""One rank of two, whose collectives have 2 seconds and the closed form takes 4. worker_frozen_slow.py FOLDER"""

import datetime
import json
import sys
import time
from pathlib import Path

import torch.distributed as dist

from pipeline import distributed
from pipeline.evaluate import frozen
from pipeline.models import create_model
from shards.dataset import Dataset
from shards.ending import end_process

SECONDS = 2


def slow(*arguments):
    time.sleep(2 * SECONDS)
    return scores(*arguments)


distributed.start()
scores, frozen._scores = frozen._scores, slow
model = create_model("vit_ti8", embed_dim=24, num_heads=3, depth=1, image_size=16, num_classes=3, seed=3).eval()
sets = [Dataset.open(Path(sys.argv[1]) / name) for name in ("train", "val")]
distributed.everyone(None)  # both have come here
dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=SECONDS), dist.group.WORLD)
print(json.dumps(frozen.frozen_features_accuracy(model, *sets, [1])))
distributed.finish()
end_process(0)
