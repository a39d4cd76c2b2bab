import numpy as np
import pytest
import torch

from pipeline.losses import class_targets
from shards.evaluation import EvaluationBatch
from shards.manylabels import stacked


@pytest.mark.parametrize("labels", [((1,), (0.5,)), ((), ()), ((1,), ())])
@pytest.mark.parametrize("images", [1, 3])
def test_one_image_with_one_weighted_label_or_none(labels, images):
    nothing = np.zeros(images)
    batch = EvaluationBatch(nothing, stacked([labels] * images, "any"), nothing, nothing)
    found = class_targets(batch, 3, "sigmoid", torch.device("cpu"))
    if labels == ((1,), ()):
        assert found.tolist() == [1] * images
    else:
        assert found.tolist() == [[0, sum(labels[1]), 0]] * images
