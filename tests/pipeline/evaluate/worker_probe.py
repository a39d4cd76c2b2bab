"""One rank: probe a fixed model under several engines. worker_probe.py FOLDER ENGINE-STAGE ..."""

import json
import sys

import torch

from pipeline import distributed
from pipeline.engines import create_engine
from pipeline.evaluate.probe import Probe
from pipeline.models import create_model
from pipeline.models.initial import initial_value
from shards.ending import end_process
from tests.pipeline.evaluate.test_probe import settings

MODEL = {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1, "image_size": 16, "num_classes": 3}


def main(folder: str, *engines: str) -> None:
    found = {}
    with torch.device("meta"):
        template = create_model(**MODEL, seed=None)
    for each in engines:
        kind, stage = each.split("-")
        engine = {"kind": kind, "zero_stage": int(stage)}
        chosen = settings(f"{folder}/train", f"{folder}/test", distributed.world_size(), engine)
        engine = create_engine(
            lambda: create_model(**MODEL, seed=None),
            lambda name, shape: initial_value(template, name, shape, seed=3),
            chosen,
        )
        found[each] = Probe(chosen).measure(engine.model, 0, None)
    print(json.dumps(found))


if __name__ == "__main__":
    distributed.start()
    main(*sys.argv[1:])
    distributed.finish()
    end_process(0)
