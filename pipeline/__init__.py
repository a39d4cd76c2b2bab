"""Models, objectives, engines, the training loop, checkpoints, conversion, evaluation. May import shards."""
