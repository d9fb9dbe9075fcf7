"""A probe: what the teacher's features say about a small labelled set, in between training steps.

Scores on mean patch features: `probe_knn`, the weighted vote of DINO (arXiv:2104.14294), and `probe_linear`, a ridge
regression on one-hot labels, which needs no search and no iterations. Both are top-1 accuracies; the classes of the two
sets are matched by name where both have names. They tell whether a run is getting better; numbers to report come from
eval_classification.py.
"""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from PIL import Image, ImageOps
from torch import Tensor

from config import ProbeConfig
from data import normalizer
from distributed import all_gather_rows, rank, world_size
from reading.bands import resized
from reading.sources import BadImageError, ImageStream, make_dataset, match_classes
from readouts import nearest, weighted_vote
from utils import Bands, Normalisation, UserError

logger = logging.getLogger("probe")

TEMPERATURE = 0.07
RIDGE = 1e-2
"""Penalty as a fraction of the mean variance of the features."""


class Probe:
    """Both sets in memory, decoded once, and how they are scored. All ranks build and call it together.

    Args:
        cfg: what is probed.
        images_size: images are resized and cropped to squares of this many pixels.
        batch_size: images per forward pass of a rank.
        device: where features are computed.
        normalisation: of the network.

    Raises: UserError if a set cannot be read or has no class labels, both have but one class, or the test set has some
        classes of the training set and others.
    """

    def __init__(
        self,
        cfg: ProbeConfig,
        *,
        images_size: int,
        batch_size: int,
        device: torch.device,
        normalisation: Normalisation = Normalisation(),  # noqa: B008  # frozen
    ) -> None:
        self.cfg, self.batch_size, self.device = cfg, batch_size, device
        self._normalize = normalizer(normalisation)
        bands = Bands(len(normalisation.mean), normalisation.value_range)
        train, test = (
            _read(getattr(cfg, key), f"train.probe.{key}", cfg.max_images, images_size, bands)
            for key in ("train_dataset", "test_dataset")
        )
        mapping = match_classes(test.class_names, test.where, train.class_names, train.where)
        if mapping is not None:
            test = test._replace(labels=torch.tensor(mapping)[test.labels])
        unseen = sorted({*test.labels.tolist()} - {*train.labels.tolist()})
        if unseen:
            names = ", ".join(train.class_names[label] if train.class_names else str(label) for label in unseen[:5])
            logger.warning(
                "%s: %d of its classes, such as %s, are not among the %d training images, so they cannot be found",
                *(test.where, len(unseen), names, len(train.labels)),
            )
        self.train, self.test = train, test
        self.num_classes = int(max(train.labels.max(), test.labels.max())) + 1
        if self.num_classes < 2:
            raise UserError(f"train.probe.train_dataset={cfg.train_dataset}: has one class; a probe needs two")

    def __call__(self, encode: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Score the patch features [b, n, d] that `encode` computes from normalised images [b, 3, h, w]."""
        started = time.monotonic()
        (train_x, train_y), (test_x, test_y) = (
            (self._features(data.images, encode), data.labels.to(self.device)) for data in (self.train, self.test)
        )
        similarity, rows = nearest(test_x, train_x, min(self.cfg.k, len(train_x)), "cosine")
        votes = weighted_vote(similarity, train_y[rows].unsqueeze(2), self.num_classes, TEMPERATURE)
        linear = ridge_scores(train_x, train_y, test_x, self.num_classes)
        return {
            "probe_knn": float((votes.argmax(dim=1) == test_y).double().mean()),
            "probe_linear": float((linear.argmax(dim=1) == test_y).double().mean()),
            "probe_s": time.monotonic() - started,
        }

    @torch.no_grad()
    def _features(self, images: Shaped[Tensor, "b c h w"], encode: Callable[[Tensor], Tensor]) -> Float[Tensor, "b d"]:
        # Equally many images per rank, so that sharded weights are gathered equally often; repeats are cut off.
        share = -(-len(images) // world_size())
        own = torch.arange(rank() * share, (rank() + 1) * share).clamp_max(len(images) - 1)
        parts = [
            encode(self._normalize(images[rows].to(self.device))).float().mean(dim=1)
            for rows in own.split(self.batch_size)
        ]
        return all_gather_rows(torch.cat(parts))[: len(images)]


class _Labelled(NamedTuple):
    images: Shaped[Tensor, "b c h w"]
    labels: Int64[Tensor, " b"]
    class_names: list[str]
    where: str
    """`key=url`, for messages."""


def _read(url: str | None, key: str, max_images: int, size: int, bands: Bands) -> _Labelled:
    assert url is not None
    dataset = make_dataset(url, key=key)
    if isinstance(dataset, ImageStream):
        raise UserError(f"{key}={url}: a probe needs random access; leave streaming=True out")
    chosen = torch.linspace(0, len(dataset) - 1, min(max_images, len(dataset))).round().long().tolist()
    images, labels = [], []
    for index in chosen:
        try:
            image, label = dataset[index].picture(bands), dataset[index].target()
        except BadImageError as error:
            raise UserError(f"{key}={url}: {error}; repair or remove the file") from error
        if not isinstance(label, int) or label < 0:
            raise UserError(f"{key}={url}: {dataset[index].name} has the label {label!r}; a probe needs class numbers")
        images.append(fitted(image, size))
        labels.append(label)
    names = dataset.class_names
    if names and max(labels) >= len(names):
        raise UserError(f"{key}={url}: has the label {max(labels)} and names {len(names)} classes, counted from 0")
    return _Labelled(torch.stack(images), torch.tensor(labels), names, f"{key}={url}")


def fitted(image: Image.Image | Tensor, size: int) -> Shaped[Tensor, "c size size"]:
    """The largest square in the middle of an image, as `size` pixels a side."""
    if isinstance(image, Tensor):
        side = min(image.shape[1:])
        top, left = ((length - side) // 2 for length in image.shape[1:])
        return resized(image[:, top : top + side, left : left + side], size, size)
    square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(square).copy()).movedim(-1, 0)


def ridge_scores(
    train_x: Float[Tensor, "n d"], train_y: Int64[Tensor, " n"], test_x: Float[Tensor, "q d"], num_classes: int
) -> Float[Tensor, "q k"]:
    """Scores of each class for rows of `test_x`: a ridge regression on one-hot labels, with an intercept.

    Its penalty is `RIDGE` times the mean square of the centred features.
    """
    mean = train_x.mean(dim=0)
    x = train_x - mean
    gram = x.T @ x
    # The minimum is for features that have collapsed to one point, of which the scores shall tell.
    gram.diagonal().add_((RIDGE * gram.diagonal().mean()).clamp_min(1e-6))
    targets = F.one_hot(train_y, num_classes).to(x.dtype)
    bias = targets.mean(dim=0)
    return (test_x - mean) @ torch.linalg.solve(gram, x.T @ (targets - bias)) + bias
