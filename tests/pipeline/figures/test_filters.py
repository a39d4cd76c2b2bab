import numpy as np
import pytest
import torch

from pipeline.figures.filters import patch_filters, principal_components
from pipeline.models import create_model


def test_components_are_those_of_the_covariance():
    filters = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    filters[:, 0] *= 3
    pictures, shares = principal_components(filters, 7)
    rows = filters.double().numpy().reshape(40, 48)
    values, vectors = np.linalg.eigh(np.cov(rows, rowvar=False))
    values, vectors = values[::-1], vectors[:, ::-1]
    assert shares.numpy() == pytest.approx(values[:7] / values.sum(), rel=1e-9)
    assert pictures.shape == (7, 4, 4, 3)
    assert (pictures.amin((1, 2, 3)) == 0).all()
    assert (pictures.amax((1, 2, 3)) == 1).all()
    for number, picture in enumerate(pictures.numpy()):
        vector = vectors[:, number]
        vector = vector * np.sign(vector[np.abs(vector).argmax()])
        assert picture.transpose(2, 0, 1).ravel() == pytest.approx((vector - vector.min()) / np.ptp(vector), abs=1e-7)


@pytest.mark.parametrize(
    ("name", "shape"), [("vit_ti16", (192, 3, 16, 16)), ("r50_vit_b16", (64, 3, 7, 7)), ("bit_r50x1", (64, 3, 7, 7))]
)
def test_the_filters_are_of_the_layer_that_sees_pixels(name, shape):
    with torch.device("meta"):
        assert patch_filters(create_model(name, seed=None)).shape == shape


def test_fewer_filters_than_components():
    pictures, shares = principal_components(torch.randn(5, 3, 2, 2))
    assert len(pictures) == len(shares) == 5
