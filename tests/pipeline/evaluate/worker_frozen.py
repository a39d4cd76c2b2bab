"""One rank: what the frozen features of a fixed random model are worth. worker_frozen.py FOLDER [TEMPORARY [apart]]

With "apart", TEMPORARY is another folder to rank 1, as on another machine.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline import distributed
from pipeline.evaluate.frozen import frozen_features_accuracy
from pipeline.models import create_model
from shards.dataset import Dataset
from shards.ending import end_process

distributed.start()
if "apart" in sys.argv and distributed.rank() == 1:
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS: mounts of its own
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "tmpfs", sys.argv[2]]):
        subprocess.run(command, timeout=10, check=True)
tempfile.tempdir = sys.argv[2] if len(sys.argv) > 2 else None
model = create_model("vit_ti8", embed_dim=24, num_heads=3, depth=1, image_size=16, num_classes=3, seed=3).eval()
train, val = (Dataset.open(Path(sys.argv[1]) / name) for name in ("train", "val"))
print(json.dumps(frozen_features_accuracy(model, train, val, [1, 4], 5, linear=True)))
distributed.finish()
end_process(0)
