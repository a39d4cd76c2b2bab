"""What the process imports of which tests/ranks.py forks its ranks: all that takes seconds, late imports too."""

# ruff: noqa: F401
import deepspeed.runtime.zero.muon.muon_optimizer  # by deepspeed.initialize; brings torch.compile's back end
import torch._dynamo  # by the first optimizer

import pipeline.engines.accelerate
import pipeline.engines.deepspeed
import pipeline.train
