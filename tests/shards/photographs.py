"""Pictures with the spectrum of photographs, for tests that compare images."""

import io

import numpy as np
from PIL import Image


def photographs(count: int, side: int = 160, seed: int = 0) -> list[np.ndarray]:
    """Return uint8 [side, side, 3] noise whose spectrum falls with the frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    images = []
    for _ in range(count):
        waves = rng.standard_normal((2, *frequency.shape))
        plane = np.fft.irfft2((waves[0] + 1j * waves[1]) / frequency, (side, side))
        grey = (plane / plane.std() * 45 + 128).clip(0, 255).astype(np.uint8)
        images.append(np.stack([grey, grey, np.roll(grey, 3)], axis=2))
    return images


def jpeg(image: np.ndarray, quality: int) -> bytes:
    """Encode RGB pixels."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, "JPEG", quality=quality)
    return file.getvalue()
