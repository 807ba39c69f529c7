"""The pictures of the vision examples: drawn on the spot, or Fashion-MNIST.

--data drawn       ten made-up classes of 28 x 28, in no time and from nowhere
--data fashion     Fashion-MNIST (70,000 pictures, MIT), as Debian's dataset-fashion-mnist unpacks it
--data FILE.npz    a part of it in one file: train, train_labels, test, test_labels

python examples/pictures.py fashion.npz --train 12000 --test 4000     # such a file
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

FASHION = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
FOLDER = Path("/usr/share/datasets/fashion-mnist")


class Pictures(NamedTuple):
    """Grey pictures (n, 28, 28) of uint8 and the number of their class."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray

    def part(self, train: int, test: int) -> Pictures:
        """The first so many of each; Fashion-MNIST lies there shuffled."""
        for name, wanted, there in (("train", train, len(self.train)), ("test", test, len(self.test))):
            if wanted > there:
                raise SystemExit(f"--{name} {wanted}: there are {there:,} such pictures")
        return Pictures(self.train[:train], self.train_labels[:train], self.test[:test], self.test_labels[:test])


def read(data: str) -> Pictures:
    if data == "drawn":
        return drawn()
    if data == "fashion":
        return fashion()
    held = np.load(data)
    return Pictures(*(held[name] for name in Pictures._fields))


def fashion(folder: Path = FOLDER) -> Pictures:
    if not folder.is_dir():
        raise SystemExit(f"Fashion-MNIST is not in {folder}: apt install dataset-fashion-mnist, or use --data drawn")
    parts = []
    for split in ("train", "t10k"):
        parts.append(_idx(folder / f"{split}-images-idx3-ubyte.gz").reshape(-1, 28, 28))
        parts.append(_idx(folder / f"{split}-labels-idx1-ubyte.gz"))
    return Pictures(*parts)


def _idx(path: Path) -> np.ndarray:
    """The values of an IDX file: its fourth byte says how many sizes of four bytes stand before them."""
    content = gzip.decompress(path.read_bytes())
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])


def drawn(train: int = 240, test: int = 60, seed: int = 0, classes: int = 10) -> Pictures:
    """Each class is a blot of its own, moved and dimmed a little."""
    rng = np.random.default_rng(seed)
    blots = np.kron(rng.integers(0, 2, (classes, 7, 7)), np.ones((4, 4)))

    def some(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, classes, count).astype(np.uint8)
        moved = [np.roll(blots[label], rng.integers(-1, 2, 2), (0, 1)) for label in labels]
        dimmed = np.stack(moved) * rng.uniform(120, 220, (count, 1, 1)) + rng.uniform(0, 30, (count, 28, 28))
        return dimmed.astype(np.uint8), labels

    return Pictures(*some(train), *some(test))


def digits(data: str) -> tuple[np.ndarray, np.ndarray]:
    """Another task than that of the clothes: scikit-learn's 1,797 hand-written digits of 8 x 8; or other blots."""
    if data == "drawn":
        other = drawn(seed=1)
        return other.train, other.train_labels
    from sklearn.datasets import load_digits

    held = load_digits()
    return (held.images * (255 / 16)).round().astype(np.uint8), held.target


def rows(pictures: np.ndarray, labels: np.ndarray, names: tuple[str, ...] = FASHION) -> list[dict[str, Any]]:
    """As `veneer.train` takes them from memory."""
    return [{"image": picture, "label": names[label]} for picture, label in zip(pictures, labels, strict=True)]


# ------------------------------------------------------------------ scenes with several things on them


def scenes(
    things: np.ndarray, labels: np.ndarray, count: int, style: str, seed: int, size: int
) -> list[dict[str, Any]]:
    """Pictures of `size` with one to four things on each, at random places and scales, and a box around each thing.

    style "plain": light things on black, as they come. style "street": coloured things on a shaded, noisy ground, with
    bars across it that belong to nothing.
    """
    rng = np.random.default_rng([seed, 0 if style == "plain" else 1])
    return [_scene(things, labels, style, rng, size) for _ in range(count)]


def _scene(things: np.ndarray, labels: np.ndarray, style: str, rng: Any, size: int) -> dict[str, Any]:
    ground = np.zeros((size, size, 3)) if style == "plain" else _street(rng, size)
    boxes: list[tuple[int, int, int, int]] = []
    names = []
    for _ in range(rng.integers(1, 5)):
        number, edge = int(rng.integers(len(things))), int(rng.integers(size // 4, size // 2))
        mask = np.asarray(Image.fromarray(things[number]).resize((edge, edge), Image.Resampling.BILINEAR)) / 255
        seen = np.argwhere(mask > 0.1)
        if len(seen) < 9:
            continue
        (top, left), (bottom, right) = seen.min(0), seen.max(0) + 1
        mask = mask[top:bottom, left:right]
        high, wide = mask.shape
        for _ in range(20):  # places, until one is free
            x, y = (int(rng.integers(0, size - side + 1)) for side in (wide, high))
            if all(_overlap((x, y, x + wide, y + high), other) < 0.1 for other in boxes):
                break
        else:
            continue
        colour = np.array([255, 255, 255]) if style == "plain" else rng.uniform(60, 255, 3)
        cover = mask[..., None] if style == "plain" else np.clip(mask * 3, 0, 1)[..., None]
        shade = colour if style == "plain" else colour * (0.35 + 0.65 * mask[..., None])
        part = ground[y : y + high, x : x + wide]
        part[:] = part * (1 - cover) + shade * cover
        boxes.append((x, y, x + wide, y + high))
        names.append(FASHION[labels[number]])
    return {"image": ground.round().astype(np.uint8), "boxes": boxes, "labels": names}


def _street(rng: Any, size: int) -> np.ndarray:
    across, down = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    one, other = rng.uniform(40, 200, (2, 3))
    slope = (across * rng.uniform(-1, 1) + down * rng.uniform(-1, 1) + 1)[..., None] / 2
    ground = one * slope + other * (1 - slope) + rng.normal(0, 12, (size, size, 3))
    for _ in range(3):
        at, wide = int(rng.integers(0, size)), int(rng.integers(2, 7))
        bar = rng.uniform(20, 230, 3)
        if rng.integers(2):
            ground[at : at + wide] = bar
        else:
            ground[:, at : at + wide] = bar
    return ground.clip(0, 255)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """The shared area by the smaller one's."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, wide) * max(0, high) / smaller


def main() -> None:
    parser = argparse.ArgumentParser(description="Part of Fashion-MNIST in one file.")
    parser.add_argument("file")
    parser.add_argument("--train", type=int, default=12000)
    parser.add_argument("--test", type=int, default=4000)
    asked = parser.parse_args()
    np.savez_compressed(asked.file, **fashion().part(asked.train, asked.test)._asdict())
    print(f"{asked.file}: {Path(asked.file).stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
