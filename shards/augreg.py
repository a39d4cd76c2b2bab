"""AugReg's augmentation by name: "How to train your ViT?" (arXiv:2106.10270), figure 4 from left to right."""

from typing import NamedTuple


class Preset(NamedTuple):
    """How strong an augmentation is, after the crop.

    Attributes:
        layers: Operations of RandAugment on each image.
        magnitude: Of all of them, 0 to 20; 0 does not mean none.
        mixup: Both parameters of the Beta distribution of mixup; 0 means none.
    """

    layers: int
    magnitude: int
    mixup: float


PRESETS = {
    "light1": Preset(2, 0, 0.0),
    "light2": Preset(2, 10, 0.2),
    "medium1": Preset(2, 15, 0.2),
    "medium2": Preset(2, 15, 0.5),
    "strong1": Preset(2, 20, 0.5),
    "strong2": Preset(2, 20, 0.8),
}
