"""Turn folders of images and masks into COCO's format: each connected part of a class becomes an object.

    python demo_data/coco_from_masks.py data/flower_beds/train data/flower_beds/val [--ignore 0 255] [--smallest 16]

A folder has `images` and `masks` with files of the same names but for their endings, as
`custom://Segmentation?root='...'` reads them, and in it or above it `classes.txt` with the name of each value in its
line, from 0 on. Writes `annotations.json` into each folder, with masks as run lengths and boxes around them, so that
`finetune_detection.py data.dataset=data/flower_beds/train` learns them.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm


def objects(mask: NDArray[np.uint8], ignore: Sequence[int], smallest: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """(class, where it is) of each part of `smallest` pixels or more whose pixels touch at a side or at a corner."""
    from scipy.ndimage import label

    for value in np.unique(mask):
        if value not in ignore:
            found: Any = label(mask == value, structure=np.ones((3, 3)))
            parts, num_parts = found
            for number in range(1, num_parts + 1):
                part = parts == number
                if part.sum() >= smallest:
                    yield int(value), part


def run_lengths(part: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's run lengths of a mask: of zeros and of ones in turn, column by column."""
    flat = part.T.reshape(-1)
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return {"size": list(part.shape), "counts": [0, *counts] if flat[0] else counts}


def annotate(folder: Path, ignore: Sequence[int], smallest: int) -> dict[str, Any]:
    """What the masks of a folder say, in COCO's format.

    Raises: ValueError for what is missing or does not fit.
    """
    listed = next((path for path in (folder / "classes.txt", folder.parent / "classes.txt") if path.is_file()), None)
    if listed is None:
        raise ValueError(f"{folder} has no classes.txt, in it or above it, with the name of each value of the masks")
    names = listed.read_text().splitlines()
    paths = sorted(path for path in (folder / "masks").rglob("*.png") if not path.name.startswith("."))
    if not paths:
        raise ValueError(f"{folder}/masks has no PNG files")
    files = {path.relative_to(folder / "images").with_suffix(""): path for path in (folder / "images").rglob("*.*")}
    images, annotations = [], []
    for path in tqdm(paths, folder.name, unit="image"):
        image = files.get(path.relative_to(folder / "masks").with_suffix(""))
        if image is None:
            raise ValueError(f"{path} has no image in {folder / 'images'}")
        mask = np.asarray(Image.open(path))
        height, width = mask.shape
        images.append({
            "id": len(images) + 1,
            "file_name": str(image.relative_to(folder)),
            "width": width,
            "height": height,
        })  # fmt: skip
        for value, part in objects(mask, ignore, smallest):
            if value >= len(names):
                raise ValueError(f"{path} has the value {value}, and {listed} names {len(names)}, from 0 on")
            rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
            left, top, right, bottom = (int(x) for x in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
            annotations.append({
                "id": len(annotations) + 1,
                "image_id": len(images),
                "category_id": value,
                "bbox": [left, top, right - left, bottom - top],
                "area": int(part.sum()),
                "iscrowd": 0,
                "segmentation": run_lengths(part),
            })  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(names) if name and i not in ignore]
    return {"images": images, "annotations": annotations, "categories": categories}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--ignore", type=int, nargs="*", default=[0, 255], help="values that are no objects")
    parser.add_argument("--smallest", type=int, default=16, help="pixels of an object (default: %(default)s)")
    given = parser.parse_args(arguments)
    for folder in given.folders:
        try:
            content = annotate(folder, given.ignore, given.smallest)
        except ValueError as error:
            parser.error(str(error))
        path = folder / "annotations.json"
        path.write_text(json.dumps(content) + "\n")
        objects_per_image = len(content["annotations"]) / len(content["images"])
        sys.stdout.write(f"{path}: {len(content['images'])} images, {objects_per_image:.1f} objects each\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
