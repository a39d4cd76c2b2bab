"""One rank: evaluate a fixed random model in both ways. worker_classify.py DATASET BATCH"""

import json
import sys

from pipeline import distributed
from pipeline.evaluate.classify import classify
from pipeline.evaluate.predict import predict
from pipeline.evaluate.scores import Scores
from pipeline.models import create_model
from pipeline.models.initial import initial_value
from shards.augment import Resize
from shards.dataset import Dataset
from shards.ending import end_process

distributed.start()
dataset, batch = Dataset.open(sys.argv[1]), int(sys.argv[2])
model = create_model("vit_ti8", embed_dim=24, num_heads=3, depth=1, image_size=16, num_classes=3, seed=3).eval()
model.head.weight.data = initial_value(model, "blocks.0.mlp.fc1.weight", (3, 24), 5)
predictions = predict(model, dataset, Resize(16), batch)
scored = {**Scores(predictions, dataset).summary(), "best": predictions.ranked[:, 0].tolist()}
print(json.dumps([classify(model, dataset, Resize(16), batch), scored]))
distributed.finish()
end_process(0)
