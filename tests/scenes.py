"""Pictures that look a little like photos, for those who have none: hills by day, and the sea by night.

`python -m tests.scenes FOLDER` draws 300 of them into FOLDER/day and FOLDER/night.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ('day', 'night')
EXIF_TURNED = 6  # the orientation of a picture whose camera was held upright


def scene(name: str, height: int, width: int, rng: np.random.RandomState) -> np.ndarray:
    """A picture of a class, uint8 (height, width, 3)."""
    y, x = np.mgrid[:height, :width] / min(height, width)
    horizon = rng.uniform(0.45, 0.7)
    if name == 'day':
        top = np.array([40, 110, 200]) + rng.randint(-30, 30, 3)
        low = np.array([200, 215, 235]) + rng.randint(-20, 20, 3)
        disc = np.array([255, 240, 170])
        ground = np.array([70, 120, 45]) + rng.randint(-35, 35, 3)
    else:
        top = np.array([8, 10, 40]) + rng.randint(0, 15, 3)
        low = np.array([90, 50, 110]) + rng.randint(-30, 30, 3)
        disc = np.array([235, 235, 225])
        ground = np.array([20, 35, 80]) + rng.randint(-12, 12, 3)

    # The sky, and the sun or the moon in it.
    share = np.clip(y / horizon, 0, 1)[..., None]
    pixels = top * (1 - share) + low * share
    centre_x = rng.uniform(0.2, 0.8) * width / min(height, width)
    centre_y = rng.uniform(0.12, 0.35)
    distance = np.hypot(x - centre_x, y - centre_y)
    glow = np.exp(-(distance / 0.25) ** 2)[..., None] * 0.5
    pixels = pixels * (1 - glow) + disc * glow
    pixels[distance < rng.uniform(0.05, 0.09)] = disc

    # Hills behind one another, or waves that mirror the moon.
    if name == 'day':
        for depth in range(3):
            phase = rng.uniform(0, 6, 2)
            edge = horizon + 0.13 * depth + 0.07 * np.sin(4 * x + phase[0]) + 0.03 * np.sin(9 * x + phase[1])
            pixels[y > edge] = ground * (1.25 - 0.3 * depth)
    else:
        below = np.clip(y - horizon, 0, None)
        waves = 0.5 + 0.5 * np.sin(90 * below ** 0.7 + 3 * np.sin(5 * x))
        path = np.exp(-((x - centre_x) / (0.06 + 0.3 * below)) ** 2) * waves
        sea = ground * (0.8 + 0.4 * waves[..., None]) + 170 * path[..., None]
        pixels = np.where((y > horizon)[..., None], sea, pixels)
    pixels += rng.normal(0, 5, (height, width, 1))
    return pixels.clip(0, 255).astype(np.uint8)


def draw(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` pictures as JPEG files of different sizes, by class; the first one lies on its side."""
    rng = np.random.RandomState(seed)
    for i in range(count):
        name = CLASSES[i % len(CLASSES)]
        height, width = rng.randint(120, 360, 2)
        image = Image.fromarray(scene(name, height, width, rng))
        exif = Image.Exif()
        if i == 0:
            exif[0x0112] = EXIF_TURNED
            image = image.transpose(Image.Transpose.ROTATE_90)
        (folder / name).mkdir(parents=True, exist_ok=True)
        image.save(folder / name / f'DSC_{i:04d}.JPG', quality=int(rng.randint(70, 96)), exif=exif)


if __name__ == '__main__':
    draw(Path(sys.argv[1]), 300)
