"""Images with boxes, classes and masks of objects in COCO's format, and the average precision of detections.

A data set is a folder of images and one JSON file, `custom://COCO?images='/data/train'&annotations='/data/train.json'`,
or the path of a folder that holds both. The format: https://cocodataset.org/#format-data. Places are those of the
upright image, as its EXIF orientation has it. The file is read and checked once; what cannot be right is an error, and
boxes that are of no use are left out, counted and told.
"""

import functools
import hashlib
import importlib
import json
import logging
import math
import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, UInt8
from torch import Tensor

from reading.sources import (
    ArchivedImages,
    DataUrl,
    ImageDataset,
    PathList,
    Sample,
    archived_images,
    files_fingerprint,
    parse_data_url,
    paths_below,
    read_file,
    silent_decoders,
)
from utils import UserError

logger = logging.getLogger("coco")

OVERHANG = 1.0
"""Pixels by which a box may reach beyond its image, as roundings do, without being called wrong."""
POLYGON_NUMBERS = 6
"""Coordinates of the smallest polygon, a triangle."""


def optional(module: str) -> Any:
    """A module of pycocotools or faster-coco-eval.

    Raises: UserError that says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"masks and average precision need {module}, which is missing ({error}): pip install -e '.[finetuning]'"
        ) from error


# --- Annotations -----------------------------------------------------------------------------------------------------


class Objects(NamedTuple):
    """What is known of one image."""

    width: int
    """Of the image, in pixels, as the file says."""
    height: int
    boxes: Float64[Tensor, "n 4"]
    """Left, top, right and bottom in pixels; a pixel's own area is from its number to the next."""
    classes: Int64[Tensor, " n"]
    """From 0 on."""
    crowd: Bool[Tensor, " n"]
    """Whether a box is that of many objects, which are not told apart."""
    segmentations: list[Any]
    """Polygons or run lengths of each object, as the file has them; None where masks are not asked for."""


@dataclass(frozen=True)
class Annotations:
    """The content of a file, packed into tensors, which worker processes share instead of each holding a copy."""

    path: Path
    names: PathList
    """File of each image, relative to the folder of images."""
    image_ids: list[Any]
    sizes: Int64[Tensor, "images 2"]
    """Width and height."""
    class_names: list[str]
    category_ids: list[int]
    """That of each class from 0 on, ascending."""
    starts: Int64[Tensor, " images_and_1"]
    """Number of the first object of each image, and at the end how many there are."""
    boxes: Float64[Tensor, "n 4"]
    classes: Int64[Tensor, " n"]
    crowd: Bool[Tensor, " n"]
    areas: Float64[Tensor, " n"]
    """As the file has them, NaN where it does not: those by which objects count as small, medium or large."""
    segmentations: UInt8[Tensor, " bytes"]
    """JSON of each object."""
    spans: Int64[Tensor, "n 2"]
    """Where in these it begins and ends."""
    digest: str
    """SHA-256 of the file."""
    faults: Counter[str]
    """What was done to annotations that are wrong -> how many."""
    examples: dict[str, str]
    """The same -> the first of them."""


def read_annotations(path: Path, where: str, *, masks: bool) -> Annotations:
    """Read and check a file in COCO's format.

    Args:
        path: of the file.
        where: it comes from, as `key=value`, for messages.
        masks: whether every object has to have a mask.

    Raises: UserError naming file, key, value and remedy.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(
            f"{where}: {path} cannot be read: {error.strerror}; give a JSON file in COCO's format"
        ) from error
    return _read(path, where, masks, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=2)  # a training asks for its data several times
def _read(path: Path, where: str, masks: bool, _time: int, _size: int) -> Annotations:
    data = read_file(path)
    digest = hashlib.sha256(data).hexdigest()
    try:
        content = json.loads(data)
    except ValueError as error:
        raise UserError(f"{where}: {path} is no JSON: {error}; give a file in COCO's format") from error
    lists = {key: content.get(key) if isinstance(content, dict) else None for key in _KEYS}
    for key, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            found = "a list" if isinstance(content, list) else f"{key}={str(value)[:40]}"
            raise UserError(
                f"{where}: {path} is not in COCO's format: it has {found} and needs a list of entries under each of "
                f"{', '.join(_KEYS)}"
            )
    del data
    return _Reader(path, where, masks).read(lists, digest)


_KEYS = ("images", "annotations", "categories")


class _Rows:
    """Annotations in the order of the file, in a few bytes each: there may be millions."""

    def __init__(self) -> None:
        self.places, self.boxes, self.classes = array("q"), array("d"), array("q")
        self.crowd, self.areas = array("b"), array("d")
        self.text, self.ends = bytearray(), array("q")


class _Reader:
    """Checks the lists of one file."""

    def __init__(self, path: Path, where: str, masks: bool) -> None:
        self.path, self.where, self.masks = path, where, masks
        self.faults: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def fault(self, what: str, example: str) -> None:
        """Count an annotation that is wrong."""
        self.faults[what] += 1
        self.examples.setdefault(what, example)

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.where}: {self.path}: {problem}")

    def get(self, entry: Mapping[str, Any], key: str, what: str) -> Any:
        if key not in entry:
            raise self.error(f"{what} has no {key}; entries have those of COCO's format")
        return entry[key]

    def by_id(self, entries: Sequence[Mapping[str, Any]], kind: str) -> dict[Any, int]:
        """Place in the list of each id."""
        places: dict[Any, int] = {}
        for place, entry in enumerate(entries):
            identity = self.get(entry, "id", f"number {place} of {kind}")
            if isinstance(identity, bool) or not isinstance(identity, int | str):
                raise self.error(f"number {place} of {kind} has id={identity!r}, which is no number or text")
            if identity in places:
                raise self.error(f"two entries of {kind} have id={identity!r}; give each its own")
            places[identity] = place
        return places

    def read(self, lists: Mapping[str, Any], digest: str) -> Annotations:
        images, annotations, categories = (lists[key] for key in _KEYS)
        if not images:
            raise self.error("images is empty; give a file with images")
        place_of_image = self.by_id(images, "images")
        names, sizes = self.images(images)
        category_ids, class_names = self.categories(categories)
        class_of = {identity: number for number, identity in enumerate(category_ids)}

        rows = _Rows()
        annotations.reverse()
        for number in range(len(annotations)):
            self.read_entry(annotations.pop(), number, place_of_image, class_of, names, sizes, rows)  # and free it
        places = torch.tensor(rows.places, dtype=torch.int64)
        order = places.argsort(stable=True)
        counts = torch.bincount(places, minlength=len(images))
        ends = torch.tensor(rows.ends, dtype=torch.int64)
        text = torch.frombuffer(rows.text, dtype=torch.uint8) if rows.text else torch.empty(0, dtype=torch.uint8)
        return Annotations(
            path=self.path,
            names=PathList.pack([os.fsencode(name) for name in names]),
            image_ids=list(place_of_image),
            sizes=torch.tensor(sizes, dtype=torch.int64),
            class_names=class_names,
            category_ids=category_ids,
            starts=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
            boxes=torch.tensor(rows.boxes, dtype=torch.float64).view(-1, 4)[order],
            classes=torch.tensor(rows.classes, dtype=torch.int64)[order],
            crowd=torch.tensor(rows.crowd, dtype=torch.bool)[order],
            areas=torch.tensor(rows.areas, dtype=torch.float64)[order],
            segmentations=text,
            spans=torch.stack([torch.cat([torch.zeros(1, dtype=torch.int64), ends])[:-1], ends], dim=1)[order],
            digest=digest,
            faults=self.faults,
            examples=self.examples,
        )

    def read_entry(
        self,
        entry: Mapping[str, Any],
        number: int,
        place_of_image: Mapping[Any, int],
        class_of: Mapping[int, int],
        names: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        rows: "_Rows",
    ) -> None:
        """Check an annotation and add it to the rows, unless it is of no use."""
        what = f"annotation id={entry['id']!r}" if "id" in entry else f"annotation number {number}"
        image_id, category = self.get(entry, "image_id", what), self.get(entry, "category_id", what)
        if not isinstance(image_id, int | str) or image_id not in place_of_image:
            raise self.error(
                f"{what} has image_id={image_id!r}, which no entry of images has; add the image, or remove its "
                "annotations"
            )
        if not isinstance(category, int) or category not in class_of:
            raise self.error(
                f"{what} has category_id={category!r}, which no entry of categories has; add the category, or "
                "correct the id"
            )
        place = place_of_image[image_id]
        box = self.box(entry, what, names[place], sizes[place])
        if box is None:
            return
        segmentation = self.segmentation(entry, what, names[place], sizes[place]) if self.masks else None
        if self.masks and segmentation is None:
            return
        area = entry.get("area")
        rows.places.append(place)
        rows.boxes.extend(box)
        rows.classes.append(class_of[category])
        rows.crowd.append(bool(entry.get("iscrowd", 0)))
        rows.areas.append(area if isinstance(area, int | float) and not isinstance(area, bool) else math.nan)
        rows.text += json.dumps(segmentation, separators=(",", ":")).encode()
        rows.ends.append(len(rows.text))

    def images(self, images: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[tuple[int, int]]]:
        """Name, and width and height of each."""
        names, sizes = [], []
        for entry in images:
            what = f"image id={entry['id']!r}"
            name = self.get(entry, "file_name", what)
            size = self.get(entry, "width", what), self.get(entry, "height", what)
            if not isinstance(name, str) or not name:
                raise self.error(f"{what} has file_name={name!r}; give the name of a file below the folder of images")
            if not all(isinstance(side, int) and side > 0 for side in size):
                raise self.error(f"{what} has width={size[0]!r} and height={size[1]!r}; give whole numbers of pixels")
            names.append(name)
            sizes.append(size)
        return names, sizes

    def categories(self, categories: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[str]]:
        """Ids, ascending, and names."""
        if not categories:
            raise self.error("categories is empty; give the classes of the objects")
        entries = {}
        for identity, place in self.by_id(categories, "categories").items():
            if not isinstance(identity, int):
                raise self.error(f"categories has id={identity!r}; give whole numbers")
            entries[identity] = str(self.get(categories[place], "name", f"category id={identity}"))
        twice = [name for name, times in Counter(entries.values()).items() if times > 1]
        if twice:
            raise self.error(f"two categories have name={twice[0]!r}; give each its own, by which classes are matched")
        ids = sorted(entries)
        return ids, [entries[identity] for identity in ids]

    def box(self, entry: Mapping[str, Any], what: str, name: str, size: tuple[int, int]) -> list[float] | None:
        """Left, top, right and bottom; None for a box that is left out."""
        box = self.get(entry, "bbox", what)
        is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) for x in box)
        if not is_box or not all(map(math.isfinite, box)):
            raise self.error(f"{what} has bbox={box!r}; give left, top, width and height in pixels")
        left, top, width, height = map(float, box)
        corners = [left, top, left + width, top + height]
        told = f"{what} of {name}: bbox={box} in an image of {size[0]}x{size[1]}"
        if width <= 0 or height <= 0:
            self.fault("have a box of no area and are left out", told)
            return None
        inside = [min(max(x, 0.0), float(side)) for x, side in zip(corners, (*size, *size), strict=True)]
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            self.fault("have a box outside of their image and are left out", told)
            return None
        if max(abs(a - b) for a, b in zip(corners, inside, strict=True)) > OVERHANG:
            self.fault("have a box that reaches beyond its image and is clipped to it", told)
            return inside
        return corners

    def segmentation(self, entry: Mapping[str, Any], what: str, name: str, size: tuple[int, int]) -> Any:
        """Polygons or run lengths; None for an object that is left out because its mask has no area."""
        found = entry.get("segmentation")
        if found is None or found == []:
            raise self.error(f"{what} has no segmentation; give one, or train on boxes alone: detection.masks=false")
        if isinstance(found, dict):
            stored = found.get("size")
            if stored != [size[1], size[0]] or not isinstance(found.get("counts"), list | str):
                raise self.error(
                    f"{what} has a segmentation of size={stored!r}, the image {name} has "
                    f"[height, width]={[size[1], size[0]]}; give counts and size of run lengths for the whole image"
                )
            if isinstance(found["counts"], list) and sum(found["counts"]) != size[0] * size[1]:
                raise self.error(
                    f"{what}: the run lengths of its segmentation add up to {sum(found['counts'])}, not to the "
                    f"{size[0] * size[1]} pixels of {name}"
                )
            return found
        if not isinstance(found, list) or not all(isinstance(polygon, list) for polygon in found):
            raise self.error(f"{what} has segmentation={str(found)[:40]}; give a list of polygons, or run lengths")
        for polygon in found:
            if len(polygon) % 2 or not {*map(type, polygon)} <= {int, float} or not math.isfinite(sum(polygon)):
                raise self.error(f"{what} has a polygon {str(polygon)[:40]}; give x1, y1, x2, y2, ...")
        # pycocotools would take one of four numbers for a box.
        polygons = [polygon for polygon in found if len(polygon) >= POLYGON_NUMBERS]
        if not polygons:
            self.fault("have a mask of fewer than three corners and are left out", f"{what} of {name}")
            return None
        return polygons


def decode_mask(segmentation: Any, height: int, width: int) -> UInt8[np.ndarray, "height width"]:
    """The mask of polygons or run lengths, 0 and 1."""
    lengths = run_lengths(segmentation, height, width)
    with silent_decoders():  # numpy warns of what pycocotools does
        return optional("pycocotools.mask").decode(lengths)


def run_lengths(segmentation: Any, height: int, width: int) -> Any:
    """Polygons or run lengths as pycocotools' compressed run lengths."""
    mask = optional("pycocotools.mask")
    if isinstance(segmentation, list):
        return mask.merge(mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask.frPyObjects(segmentation, height, width)
    return segmentation


# --- The data set ----------------------------------------------------------------------------------------------------


class CocoImages(ImageDataset):
    """Images of a folder or archive, whose target is what the file of annotations says of them, as `Objects`.

    Args:
        annotations: of the images.
        root: folder of the images, which may be one in an archive.
        where: the data, as `key=value`, for messages.
        rows: which images; None for all.
        archived: images of the archive, and the number there of each in the file of annotations; None for a folder.
    """

    def __init__(
        self,
        annotations: Annotations,
        root: Path,
        where: str,
        rows: Sequence[int] | None = None,
        archived: tuple[ArchivedImages, Int64[Tensor, " images"]] | None = None,
    ) -> None:
        self.annotations, self.root, self.where, self.archived = annotations, root, where, archived
        self.rows = torch.arange(len(annotations.names)) if rows is None else torch.tensor(rows, dtype=torch.int64)

    def with_objects(self) -> "CocoImages":
        """Those images that have objects to learn.

        Raises: UserError if there are none.
        """
        starts, crowd = self.annotations.starts, self.annotations.crowd
        learned = torch.cat([torch.zeros(1, dtype=torch.int64), (~crowd).long().cumsum(0)])[starts]
        rows = [row for row in self.rows.tolist() if learned[row + 1] > learned[row]]
        if not rows:
            raise UserError(
                f"{self.where}: no image of {self.annotations.path} has an object to learn; annotations is empty, or "
                "all of it is left out or of crowds (iscrowd)"
            )
        return CocoImages(self.annotations, self.root, self.where, rows, self.archived)

    @property
    def class_names(self) -> list[str]:
        """Names of the categories in the order of their ids."""
        return self.annotations.class_names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        target = functools.partial(self.objects, index)
        row = int(self.rows[index])
        if self.archived is not None:
            images, row_in = self.archived
            image = images[int(row_in[row])]
            return Sample(image.name, image.read, target)
        path = self.root / self.annotations.names[row]
        return Sample(str(path), functools.partial(read_file, path), target)

    def objects(self, index: int) -> Objects:
        """What is known of an image."""
        a, row = self.annotations, int(self.rows[index])
        first, last = int(a.starts[row]), int(a.starts[row + 1])
        width, height = a.sizes[row].tolist()
        segmentations = []
        for start, end in a.spans[first:last].tolist():
            segmentations.append(json.loads(a.segmentations[start:end].numpy().tobytes()))
        own = slice(first, last)
        return Objects(width, height, a.boxes[own], a.classes[own], a.crowd[own], segmentations)

    def image_id(self, index: int) -> Any:
        """The id of an image in the file."""
        return self.annotations.image_ids[int(self.rows[index])]

    def fingerprint(self) -> str:
        """A hash of the file of annotations and of images, as `files_fingerprint` takes them, or of their archive."""
        a = self.annotations
        if self.archived is not None:
            about = f"{a.digest} {self.archived[0].fingerprint()} {self.archived[1][self.rows].tolist()}"
            return hashlib.sha256(about.encode()).hexdigest()
        paths = [self.root / a.names[row] for row in self.rows.tolist()]
        return files_fingerprint(paths, a.digest.encode())

    def log_faults(self) -> None:
        """Say what was wrong with annotations, and what was done about it."""
        for what, number in self.annotations.faults.items():
            told = (number, self.annotations.path, what, self.annotations.examples[what])
            logger.warning("%d annotation(s) of %s %s; the first is %s", *told)


def open_coco(url: str, key: str, *, masks: bool) -> CocoImages:
    """The data set of a data URL, `custom://COCO?images='FOLDER'&annotations='FILE'`, or of a folder that holds both.

    The images may be in an archive: 'data.zip', or a folder of it, 'data.zip/train'.

    Args:
        url: as the user gave it.
        key: configuration key that it comes from, for messages.
        masks: whether every object has to have a mask.

    Raises: UserError naming key, file, value and remedy.
    """
    parsed = parse_data_url(url, key)
    where = f"{key}={url}"
    if (parsed.source, parsed.name) == ("custom", "Images"):
        root = parsed.folder("root")
        path = _only_json(parsed, root)
    elif (parsed.source, parsed.name) == ("custom", "COCO"):
        parsed.take(("images", "annotations"))
        root, path = parsed.folder("images"), parsed.folder("annotations")
    else:
        raise parsed.error(
            "detection reads COCO's format: give custom://COCO?images='FOLDER'&annotations='FILE.json', or a folder "
            "with the images and one JSON file"
        )
    images = archived_images(parsed, root)
    if images is None and not root.is_dir():
        raise parsed.error(f"there is no folder {root}; give that of the images, or an archive of them")
    annotations = read_annotations(path, where, masks=masks)
    if images is not None:
        rows = _find_archived(annotations, images, root, where)
        return CocoImages(annotations, root, where, archived=(images, rows))
    _check_files(annotations, root, where)
    return CocoImages(annotations, root, where)


def _only_json(url: DataUrl, folder: Path) -> Path:
    if folder.is_file():
        raise url.error(
            f"{folder} is no folder; unpack the annotations, and give custom://COCO?images='{folder}'"
            "&annotations='FILE.json'"
        )
    found = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if len(found) != 1:
        listed = f": {', '.join(path.name for path in found[:5])}" if found else ""
        raise url.error(
            f"{folder} has {len(found)} JSON files{listed}; give custom://COCO?images='FOLDER'&annotations='FILE.json'"
        )
    return found[0]


def _check_files(annotations: Annotations, root: Path, where: str) -> None:
    """Look for all image files, by one listing of each folder."""
    inside: dict[str, set[str]] = {}
    missing, example = 0, ""
    for row, name in enumerate(annotations.names):
        folder, base = os.path.split(name)  # a Path for each of many names is slow
        if folder not in inside:
            inside[folder] = set(os.listdir(root / folder)) if (root / folder).is_dir() else set()  # noqa: PTH208
        if base not in inside[folder]:
            missing += 1
            example = example or f"file_name={name!r} of image id={annotations.image_ids[row]!r}"
    if missing:
        raise _missing(annotations, root, where, missing, example)


def _find_archived(
    annotations: Annotations, images: ArchivedImages, root: Path, where: str
) -> Int64[Tensor, " images"]:
    """The number in an archive of each image of a file of annotations."""
    row_of = {path: row for row, path in enumerate(paths_below(images))}
    rows, missing, example = [], 0, ""
    for row, name in enumerate(annotations.names):
        rows.append(row_of.get(name, -1))
        if rows[-1] < 0:
            missing += 1
            example = example or f"file_name={name!r} of image id={annotations.image_ids[row]!r}"
    if missing:
        raise _missing(annotations, root, where, missing, f"{example}, where one is called {next(iter(row_of))!r}")
    return torch.tensor(rows, dtype=torch.int64)


def _missing(annotations: Annotations, root: Path, where: str, number: int, example: str) -> UserError:
    return UserError(
        f"{where}: {number} of {len(annotations.names)} images of {annotations.path} are not in {root}, the first "
        f"is {example}; give the folder that file_name begins in, or remove these images from the file"
    )


# --- Average precision -----------------------------------------------------------------------------------------------

SCORES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
"""As COCO names and orders them."""


def ground_truth(data: CocoImages) -> dict[str, Any]:
    """The data set as a dict in COCO's format, with numbers from 1 on for ids: that 0 stands for nothing in places."""
    annotations = []
    for index in range(len(data)):
        row = int(data.rows[index])
        known = data.objects(index)
        areas = data.annotations.areas[int(data.annotations.starts[row]) : int(data.annotations.starts[row + 1])]
        for box, label, crowd, area, segmentation in zip(
            known.boxes.tolist(), known.classes.tolist(), known.crowd.tolist(), areas.tolist(), known.segmentations,
            strict=True,
        ):  # fmt: skip
            sides = [box[2] - box[0], box[3] - box[1]]
            entry = {
                "id": len(annotations) + 1,
                "image_id": index + 1,
                "category_id": label + 1,
                "bbox": [*box[:2], *sides],
                "iscrowd": int(crowd),
                "area": sides[0] * sides[1],
            }
            if segmentation is not None:
                entry["segmentation"] = run_lengths(segmentation, known.height, known.width)
                entry["area"] = float(optional("pycocotools.mask").area(entry["segmentation"]))
            if not math.isnan(area):
                entry["area"] = area
            annotations.append(entry)
    sizes = data.annotations.sizes[data.rows].tolist()
    return {
        "info": {},
        "images": [{"id": i + 1, "width": width, "height": height} for i, (width, height) in enumerate(sizes)],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(data.class_names)],
        "annotations": annotations,
    }


def average_precision(truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], kind: str) -> dict[str, float]:
    """COCO's average precision, a fraction, by faster-coco-eval.

    Args:
        truth: of `ground_truth`.
        detections: dicts with `image_id` and `category_id` as there, `bbox` [left, top, width, height], `score` and,
            for masks, `segmentation`, compressed run lengths.
        kind: `bbox` or `segm`.

    Returns: by `SCORES`, without those of sizes of which there are no objects.
    """
    package = optional("faster_coco_eval")
    # Both add entries to what they are given. Masks have an area of their own, which that of a box would hide.
    kept = {"bbox": ("bbox",), "segm": ("segmentation",)}[kind]
    results = [{key: each[key] for key in ("image_id", "category_id", "score", *kept)} for each in detections]
    known = {**truth, "annotations": [dict(entry) for entry in truth["annotations"]]}
    coco = package.COCO(known)
    evaluation = package.COCOeval_faster(coco, coco.loadRes(results), iouType=kind, print_function=_say_nothing)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {name: float(x) for name, x in zip(SCORES, evaluation.stats[: len(SCORES)], strict=True) if x >= 0}


def _say_nothing(*_: Any) -> None:
    pass
