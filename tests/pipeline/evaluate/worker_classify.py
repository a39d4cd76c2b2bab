"""One rank: evaluate a fixed random model. worker_classify.py DATASET BATCH"""

import json
import sys

from pipeline import distributed
from pipeline.evaluate.classify import classify
from pipeline.models import create_model
from pipeline.models.initial import initial_value
from shards.dataset import Dataset

distributed.start()
dataset = Dataset.open(sys.argv[1])
model = create_model("vit_ti8", embed_dim=24, num_heads=3, depth=1, image_size=16, num_classes=3, seed=3).eval()
model.head.weight.data = initial_value(model, "blocks.0.mlp.fc1.weight", (3, 24), 5)
print(json.dumps(classify(model, dataset, 16, int(sys.argv[2]))))
distributed.finish()
distributed.end_process(0)
