"""Measures of generated digits, for the GAN study."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

DIGITS = 10
COMPONENTS = 20
COVERED = 0.02
"""Least share of the labels at which a digit is covered."""

Images = NDArray[np.float32]


class Judge:
    """Measures generated images against digits that nothing was trained on.

    Attributes:
        train: The training digits, shape ``(1078, 64)``, values from -1 to 1.
        floor: Fréchet distance of the training digits.
        mean_image: Fréchet distance of a generator whose every image is the mean training digit.
    """

    def __init__(self) -> None:
        digits, labels = load_digits(return_X_y=True)
        images = (digits / 8 - 1).astype(np.float32)
        self.train, held_out, train_labels, _ = train_test_split(
            images, labels, test_size=0.4, random_state=0, stratify=labels
        )
        self._pca = PCA(COMPONENTS, random_state=0).fit(self.train)
        self._classifier = LogisticRegression(max_iter=1000).fit(self.train, train_labels)
        self._held_out = self._pca.transform(held_out)
        self.floor = self.distance(self.train)
        self.mean_image = self.distance(np.repeat(self.train.mean(0, keepdims=True), 2, 0))

    def distance(self, images: Images) -> float:
        """Fréchet distance to the held-out digits.

        Args:
            images: Shape ``(images, 64)``.

        Returns:
            The distance, in squared units of the pixels.
        """
        return frechet_distance(self._pca.transform(images), self._held_out)

    def covered(self, images: Images) -> int:
        """How many digits have a share of the labels.

        Args:
            images: Shape ``(images, 64)``.

        Returns:
            Their number, at most ten.
        """
        counts = np.bincount(self._classifier.predict(images), minlength=DIGITS)
        return int((counts >= COVERED * len(images)).sum())


def frechet_distance(features: NDArray[Any], others: NDArray[Any]) -> float:
    """Fréchet distance between normal distributions fitted to two samples.

    ``‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2·(Σ₁·Σ₂)^(1/2))``; the root's trace is the sum of the roots of the eigenvalues.

    Args:
        features: Shape ``(samples, features)``.
        others: Shape ``(other samples, features)``.

    Returns:
        The distance, in squared units of the features.
    """
    covariance, other = np.cov(features, rowvar=False), np.cov(others, rowvar=False)
    roots = np.sqrt(scipy.linalg.eigvals(covariance @ other).real.clip(0))
    shift = features.mean(0) - others.mean(0)
    return float(shift @ shift + np.trace(covariance) + np.trace(other) - 2 * roots.sum())
