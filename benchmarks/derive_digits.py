"""MNIST's ten thousand test images as a task of its own: 4,000 to learn, 500 and 1,000 to judge by.

    python -m benchmarks.derive_digits DATA OUT

DATA holds img_mnist_t10k/t10k.npz with the arrays `images` and `labels`.
"""

import argparse
from pathlib import Path

import numpy as np

ROWS = {"train": 4000, "validation": 500, "test": 1000}


def main() -> None:
    """Write the task's splits, drawn by a fixed seed, to `OUT/digits`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    folder = options.out / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(options.data / "img_mnist_t10k" / "t10k.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    order, start = np.random.default_rng(0).permutation(len(labels)), 0
    for split, count in ROWS.items():
        rows, start = order[start : start + count], start + count
        np.savez(folder / f"{split}.npz", images=images[rows], labels=labels[rows])
        print(f"{split}: {count} images")


if __name__ == "__main__":
    main()
