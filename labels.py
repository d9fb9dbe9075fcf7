"""Labels of images: reading them, matching the classes of several data sets, splits, and balanced draws."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from distributed import gather_objects, rank
from evaluation import my_share, open_dataset
from reading.sources import BadImageError, ClassFolders, HubDataset, ImageDataset, TorchvisionDataset, match_classes
from utils import RGB8, Bands, UserError

logger = logging.getLogger("labels")

SPLIT_SEED = 42


# ---------------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Labelled:
    """A data set and the labels of its images, for all of them before any image is needed."""

    where: str
    """`key=url`, for messages."""
    dataset: ImageDataset
    labels: Int64[Tensor, "n l"]
    """Each image's labels, padded with -1; only -1 if it has none."""
    class_names: list[str]
    numbers: Int64[Tensor, " c"] | None = None
    """What each number that the data set itself gives means in `labels`; None if these are the same."""

    def renumbered(self, numbers: Int64[Tensor, " c"], class_names: list[str]) -> "Labelled":
        """The same images, label i of which is class `numbers[i]` of those named."""
        labels = renumber(self.labels, numbers)
        return Labelled(self.where, self.dataset, labels, class_names, numbers)

    @property
    def labelled(self) -> Int64[Tensor, " labelled"]:
        """Indices of the images that have a label."""
        return (self.labels >= 0).any(1).nonzero().squeeze(1)

    def name_of(self, label: int) -> str:
        """The number of a class, and its name if it has one, for messages."""
        names = self.class_names
        return f"{label} ({names[label]})" if label < len(names) else str(label)


def open_labelled(url: str, key: str, bands: Bands = RGB8) -> Labelled:
    """A data set with its labels, of images for a model of these bands.

    Raises: UserError if it has none, or some that are not whole numbers from 0 on.
    """
    dataset = open_dataset(url, key, bands)
    where = f"{key}={url}"
    labels = pad([label_list(target, where) for target in _read_targets(dataset, where)])
    if labels.shape[1] > 1 and ((labels == 0) | (labels == 1)).all():
        raise UserError(
            f"{where}: each image has {labels.shape[1]} labels, all 0 or 1, as if there were one for each class; "
            "labels are the numbers of an image's classes: [1, 4] instead of [0, 1, 0, 0, 1]"
        )
    if not (labels >= 0).any():
        raise UserError(
            f"{where}: no image has a label; give a data set with labels, such as torchvision://ImageFolder"
        )
    return Labelled(where, dataset, labels, dataset.class_names)


def pad(rows: list[list[int]], width: int = 1) -> Int64[Tensor, "n l"]:
    """Lists of labels as the rows of a tensor, at least `width` wide and filled up with -1."""
    width = max([width, *map(len, rows)])
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64).view(-1, width)


def join(*parts: Int64[Tensor, "_ _"]) -> Int64[Tensor, "n l"]:
    """Labels of several sets of images one below the other, all as wide as the widest."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1]), value=-1) for part in parts])


def renumber(labels: Int64[Tensor, "*n"], numbers: Int64[Tensor, " c"]) -> Int64[Tensor, "*n"]:
    """`numbers[i]` for each label i, and -1 for -1."""
    return torch.where(labels >= 0, numbers[labels.clamp_min(0)], -1)


def first_labels(labels: Int64[Tensor, "n l"]) -> Int64[Tensor, " n"]:
    """The first label of each image, each of which has one, as far as methods for a single label go."""
    return labels.gather(1, (labels >= 0).int().argmax(1, keepdim=True)).squeeze(1)


def label_list(target: Any, where: str) -> list[int]:
    """The labels of an image, from what a data set gives: a whole number, several, or none.

    Raises: UserError, beginning with `where`, if a label is something else or below -1, which means no label.
    """
    if isinstance(target, Tensor | np.ndarray | np.generic):
        target = target.tolist()
    labels = [] if target is None else list(target) if isinstance(target, list | tuple) else [target]
    wrong = [label for label in labels if not isinstance(label, int) or isinstance(label, bool)]
    if wrong:
        raise UserError(f"{where}: a label is {str(wrong[0])[:60]!r}; labels are whole numbers, or lists of them")
    if min(labels, default=0) < -1:
        raise UserError(f"{where}: label {min(labels)} is out of range; classes count from 0, and -1 means no label")
    return [label for label in labels if label >= 0]


def _read_targets(dataset: ImageDataset, where: str) -> Sequence[Any]:
    column = _targets_at_once(dataset, where)
    if column is not None:
        return column
    share = tqdm(my_share(len(dataset)), "labels", disable=rank() > 0 or None)
    return [target for part in gather_objects([_target(dataset, i, where) for i in share]) for target in part]


def _target(dataset: ImageDataset, index: int, where: str) -> Any:
    try:
        return dataset[index].target()
    except BadImageError as error:
        raise UserError(f"{where}: {error}; repair or remove the file: an evaluation leaves none out") from error


def _targets_at_once(dataset: ImageDataset, where: str) -> Sequence[Any] | None:
    """All targets without reading an image, or None if there is no such list."""
    if isinstance(dataset, HubDataset):
        name = dataset.fields.target
        if name is None:
            columns = ", ".join(map(repr, dataset.dataset.column_names))
            raise UserError(f"{where}: needs tgt_field=, the column with the labels; there are: {columns}")
        return dataset.dataset.select_columns([name])[:][name]
    if isinstance(dataset, ClassFolders):
        return dataset.labels.tolist()
    if isinstance(dataset, TorchvisionDataset):
        for name in ("targets", "labels", "_labels"):
            column = getattr(dataset.dataset, name, None)
            if isinstance(column, list | Tensor | np.ndarray) and len(column) == len(dataset) > 0:
                # These names are a custom, not a promise.
                ends = (0, len(dataset) - 1)
                if all(label_list(column[i], where) == label_list(_target(dataset, i, where), where) for i in ends):
                    return list(column)
    return None


# -------------------------------------------------------------------------------------------- class matching


def own_mapping(other: Labelled) -> Int64[Tensor, " c"] | None:
    """`get_imagenet_class_mapping()` of a data set that has it: the training class of each of its classes."""
    for holder in (other.dataset, getattr(other.dataset, "dataset", None)):
        mapping = getattr(holder, "get_imagenet_class_mapping", None)
        if mapping is not None:
            return torch.as_tensor(np.asarray(mapping()), dtype=torch.int64)
    return None


def mapping_by_name(other: Labelled, train: Labelled) -> Int64[Tensor, " c"] | None:
    """The training class of each class of another set, or None if they are the same; see `sources.match_classes`."""
    numbers = match_classes(other.class_names, other.where, train.class_names, train.where)
    return None if numbers in (None, list(range(len(train.class_names)))) else torch.tensor(numbers)


@dataclass(frozen=True)
class TestSet:
    """A test set."""

    data: Labelled
    mapping: Int64[Tensor, " c"] | None
    """If given, only these classes can be predicted, and a label is a position in it: see `readouts.any_match`."""


# ---------------------------------------------------------------------------------------------------- splits


@dataclass(frozen=True)
class Splits:
    """Which images are for what. Images without a label are in none of it."""

    train: Labelled
    fit: Int64[Tensor, " fit"]
    val: Labelled
    val_indices: Int64[Tensor, " val"]
    tests: dict[str, TestSet]
    """By the suffix of the result's name; a single test set has none."""
    num_classes: int

    @property
    def val_is_part_of_train(self) -> bool:
        """Whether the validation images were split off the training set."""
        return self.val is self.train


def open_splits(
    train_dataset_name: str,
    val_dataset_name: str | None,
    test_dataset_names: str | Mapping[str, str],
    *,
    val_proportion: float,
    num_classes: int | None,
    all_classes: bool,
    only_test_classes: bool = False,
    bands: Bands = RGB8,
) -> Splits:
    """Open all data sets and check that their labels fit together. Arguments are named as keys are in messages.

    Args:
        train_dataset_name: data URL of the images that are learned from.
        val_dataset_name: data URL of the validation images; None for a part of the training images.
        test_dataset_names: a data URL, or several by name.
        val_proportion: that part, the same one each time; a random one, or, if a class were missing in it, one drawn
            by class.
        num_classes: None for as many as the training set names, or its largest label + 1.
        all_classes: whether each class must occur on both sides, in training and in validation.
        only_test_classes: whether no other classes are predicted of a test set than those that it names. Of a set with
            `get_imagenet_class_mapping()` none are in any case.
        bands: of the model.

    Raises: UserError for a single class, a label out of range, or a part that lacks a class.
    """
    train = open_labelled(train_dataset_name, "train_dataset_name", bands)
    num_classes = num_classes or max(len(train.class_names), int(train.labels.max()) + 1)
    _check_range(train, num_classes)
    classes = train.labels[train.labels >= 0].unique()
    if len(classes) < 2:
        raise UserError(
            f"{train.where}: all images are of class {train.name_of(int(classes[0]))}; classification needs two or more"
        )
    val, fit, val_indices = train, train.labelled, None
    if val_dataset_name is not None:
        val = open_labelled(val_dataset_name, "val_dataset_name", bands)
        mapping = own_mapping(val)
        val = _renumbered(val, mapping_by_name(val, train) if mapping is None else mapping, train)
        _check_range(val, num_classes)
        val_indices = val.labelled
    else:
        fit, val_indices = (fit[part] for part in _split(train, fit, val_proportion))
    if all_classes:
        _check_classes(train, fit, val, val_indices, classes, val_proportion)
    urls = {"": test_dataset_names} if isinstance(test_dataset_names, str) else test_dataset_names
    tests = {}
    for name, url in urls.items():
        data = open_labelled(url, f"test_dataset_names.{name}" if name else "test_dataset_names", bands)
        mapping = own_mapping(data)
        if mapping is None:
            mapping = mapping_by_name(data, train)
            if not only_test_classes:
                data, mapping = _renumbered(data, mapping, train), None
        _check_range(data, num_classes if mapping is None else len(mapping))
        if mapping is not None and int(mapping.max()) >= num_classes:
            raise UserError(
                f"{data.where}: it is mapped to class {int(mapping.max())} of {num_classes} training classes"
            )
        tests[f"/{name}" if name else ""] = TestSet(data, mapping)
    return Splits(train, fit, val, val_indices, tests, num_classes)


def _renumbered(data: Labelled, mapping: Int64[Tensor, " c"] | None, train: Labelled) -> Labelled:
    if mapping is None:
        return data
    _check_range(data, len(mapping))
    return data.renumbered(mapping, train.class_names)


def _split(train: Labelled, labelled: Tensor, val_proportion: float) -> tuple[Tensor, Tensor]:
    """Rows of `labelled` to fit on and for validation: a random part, or one drawn by class if that lacks a class."""
    labels = train.labels[labelled]
    classes, columns = labels.unique(return_inverse=True)
    has_class = torch.zeros(len(labels), len(classes), dtype=torch.bool).scatter_(1, columns, value=True)
    parts = split_off(len(labels), val_proportion, SPLIT_SEED, has_class[:, classes >= 0])
    alone = classes[has_class.sum(dim=0) == 1]
    alone = [train.name_of(label) for label in alone[alone >= 0].tolist()]
    if alone:
        logger.warning(
            "%s: %d classes have one image, which is trained on and not validated: %s",
            *(train.where, len(alone), ", ".join(alone[:5])),
        )
    return parts


def _check_range(data: Labelled, num_classes: int) -> None:
    largest = int(data.labels.max())
    if largest >= num_classes:
        raise UserError(
            f"{data.where}: label {largest} is out of range: there are {num_classes} classes, counted from 0; "
            "set num_classes, or use data sets with the same classes"
        )


def _check_classes(
    train: Labelled, fit: Tensor, val: Labelled, val_indices: Tensor, classes: Tensor, val_proportion: float
) -> None:
    remedy = (
        f"change val_proportion={val_proportion:g}, give more images, or give val_dataset_name"
        if val is train
        else "use a validation set with the classes of the training set"
    )
    for what, data, indices in (("validation", val, val_indices), ("training", train, fit)):
        missing = classes[~torch.isin(classes, data.labels[indices])].tolist()
        if val is train:  # a class of one image is on one side
            missing = [label for label in missing if (train.labels == label).any(dim=1).sum() > 1]
        if missing:
            named = ", ".join(train.name_of(label) for label in missing[:5])
            raise UserError(
                f"{data.where}: the {what} part of {len(indices)} images has none of class {named}"
                f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}; {remedy}"
            )


def split_off(
    num: int, fraction: float, seed: int, has_class: Bool[Tensor, "num c"] | None = None
) -> tuple[Int64[Tensor, " kept"], Int64[Tensor, " held_out"]]:
    """A random permutation of `num` images in two parts, the second with `fraction` of them (at least one).

    If a class would be missing in a part, the parts are drawn by class instead, and the log says so. The only image of
    a class is kept.

    Args:
        num: how many images there are.
        fraction: the part of them that is held out.
        seed: decides on the permutation.
        has_class: whether an image is of a class, which it may be of several; None if that is unknown.

    Raises: UserError if nothing would be left to fit.
    """
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    num_held_out = max(1, round(fraction * num))
    if num_held_out >= num:
        raise UserError(f"of {num} training images, {fraction:.0%} for validation leave none; give more images")
    kept, held_out = order[:-num_held_out], order[-num_held_out:]
    if has_class is None:
        return kept, held_out
    in_kept, in_held_out, in_several = has_class[kept].any(dim=0), has_class[held_out].any(dim=0), has_class.sum(0) > 1
    if (in_held_out & ~in_kept).any() or (in_several & ~in_held_out).any():
        logger.info("a random %.3g%% for validation would miss a class, so it is drawn by class", 100 * fraction)
        kept, held_out = _split_by_class(has_class, fraction, order)
    if not len(held_out):
        raise UserError("every class has one training image, which leaves none for validation; give more images")
    return kept, held_out


def _split_by_class(has_class: Bool[Tensor, "num c"], fraction: float, order: Tensor) -> tuple[Tensor, Tensor]:
    """Class by class, the rarest first, as their images come in `order`: a part of them, but one at least of two."""
    held_out = torch.zeros(len(order), dtype=torch.bool)
    undecided = torch.ones(len(order), dtype=torch.bool)
    counts = has_class.sum(dim=0)
    for label in counts.argsort(stable=True).tolist():
        count = int(counts[label])
        wanted = min(max(1, round(fraction * count)), count - 1)
        members = order[has_class[order, label]]
        free = members[undecided[members]]
        missing = wanted - int(held_out[members].sum())
        held_out[free[: max(0, missing)]] = True
        undecided[free] = False
    return order[~held_out[order]], order[held_out[order]]


# -------------------------------------------------------------------------------------------- balanced draws


def choose_rows(labels: Int64[Tensor, "n l"], per_class: int | float, seed: int, data: Labelled) -> Int64[Tensor, " f"]:
    """Numbers of random rows, ascending, with equally many images, or an equal part of the images, of each class.

    Args:
        labels: those of the images to choose from, padded with -1; the first label of an image counts.
        per_class: how many of each class, or what fraction of them, at least one; the key labels_per_class.
        seed: decides on the choice.
        data: where the images are from, for messages.

    Raises: UserError if a class has fewer.
    """
    first = first_labels(labels)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in first.unique().tolist():
        rows = (first == label).nonzero().squeeze(1)
        wanted = per_class if isinstance(per_class, int) else max(1, round(per_class * len(rows)))
        if wanted > len(rows):
            raise UserError(
                f"labels_per_class={per_class}: class {data.name_of(label)} of {data.where} has {len(rows)} images to "
                f"fit on; use at most that many"
            )
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:wanted]])
    return torch.cat(chosen).sort().values


class ImageList(NamedTuple):
    """Images that a text file names."""

    indices: Int64[Tensor, " f"]
    """In the data set, ascending."""
    sha256: str
    """Of the names, sorted and joined by newlines: equal for equal lists, in whatever order."""


def read_image_list(path: str, data: Labelled, key: str) -> ImageList:
    """The images of a data set whose names a text file has, a name a line: the end of the path of the image's file.

    Args:
        path: of the text file; a name is `n04235860_14959.JPEG`, or `n04235860/n04235860_14959.JPEG`.
        data: the images to choose from.
        key: the key that holds `path`, for messages.

    Raises: UserError if the file cannot be read, or a name in it does not stand for one labelled image.
    """
    where = f"{key}={path}"
    try:
        names = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{where} cannot be read ({error}); give a text file with the name of an image a line"
        ) from error
    if not names or len(set(names)) < len(names):
        what = "has a name twice" if names else "is empty"
        raise UserError(f"{where} {what}; give a text file with the name of an image a line")
    if isinstance(data.dataset, HubDataset):
        raise UserError(f"{where}: images of {data.where} have no files; use torchvision://ImageFolder, or null")
    depths = {len(Path(name).parts) for name in names}
    found: dict[str, list[int]] = {name: [] for name in names}
    for index in data.labelled.tolist():
        parts = Path(data.dataset[index].name).parts
        for depth in depths:
            found.get("/".join(parts[-depth:]), []).append(index)
    for name, indices in found.items():
        if len(indices) != 1:
            raise UserError(
                f"{where}: {len(indices)} labelled images of {data.where} have the name {name}; it must be one"
            )
    digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
    return ImageList(torch.tensor(sorted(index for (index,) in found.values())), digest)


def choose_images(has_class: Bool[Tensor, "n c"], num: int, seed: int) -> list[int]:
    """Numbers of images in which classes occur equally often, as far as that goes; all as soon as `num` allows.

    One after the other: the image with the most of those classes that have occurred least so far; among equals, the
    first in a random order.

    Args:
        has_class: whether an image is, or has pixels, of a class.
        num: how many images to choose, at most n.
        seed: decides on the random order.
    """
    order = torch.randperm(len(has_class), generator=torch.Generator().manual_seed(seed))
    has_class = has_class[order]
    is_free = torch.ones(len(order), dtype=torch.bool)
    times = torch.zeros(has_class.shape[1], dtype=torch.int64)
    chosen = []
    for _ in range(num):
        is_left = has_class[is_free].any(dim=0)
        least = times[is_left].min() if is_left.any() else 0
        gains = (has_class & is_left & (times == least)).sum(dim=1).where(is_free, -1)
        best = int(gains.argmax())
        is_free[best] = False
        times += has_class[best]
        chosen.append(int(order[best]))
    return chosen
