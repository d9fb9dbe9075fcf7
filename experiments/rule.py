"""The rule that the presets follow: what to train with, given how many images a machine can see in the time there is.

    python experiments/rule.py --images 76800 --dataset-images 9469 [--patches 64]

Prints the keys as YAML, to be given to train_capi.py beside a configuration that has the model. `--images` is what the
training sees, repetitions included: images per second of a first try, times the seconds. experiments/presets/README.md
says where each part of the rule comes from.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository is not installed

from utils import command_line

with command_line(__doc__, __name__) as parser:
    parser.add_argument("--images", required=True, type=int, help="that the training sees")
    parser.add_argument("--dataset-images", required=True, type=int, help="in the data set")
    parser.add_argument("--patches", type=int, default=256, help="of an image (default: %(default)s)")

import math
from collections.abc import Sequence
from typing import Any

from config import dump_yaml, require
from utils import UserError, ending_in_words

PUBLISHED = 16_384
"""Images of a step, and prototypes."""
LONG = 20_000
"""Steps from which on schedules are the published ones."""


def recommended(num_images: int, dataset_images: int, num_patches: int) -> dict[str, Any]:
    """Keys of a training, as a nested configuration; the batch is all in one forward pass.

    Args:
        num_images: that the training sees, repetitions included.
        dataset_images: in the data set.
        num_patches: of one image.

    Raises: UserError if that is too little for a training, or if an image has no patches.
    """
    if num_images < 1000 or dataset_images < 100:
        raise UserError(
            f"{num_images} images of {dataset_images} are too few for any training; 1000 of 100 are the least"
        )
    require(num_patches >= 1, "--patches", num_patches, "must be at least 1")
    batch = min(_power_of_two(math.sqrt(num_images) / 2), PUBLISHED)
    steps = round(num_images / batch)
    averaged_steps = min(1000.0, 4 * math.sqrt(steps))
    momentum = 1 - float(f"{1 / averaged_steps:.2g}")
    is_long = steps >= LONG
    return {
        "capi": {
            "num_clusters": min(4 * batch, PUBLISHED, _power_of_two(dataset_images / 4)),
            "clustering_optimizer": {"lr_schedule": {"base_value": 5e-4 if is_long else 1e-3}},
        },
        "optim": {
            "total_iters": steps,
            "batch_size_per_gpu": batch,
            "lr_schedule": {"base_value": 1e-3, "warmup_iters": 0.1},
            "momentum_schedule": {
                "start_warmup_value": 1.0 if is_long else round(momentum, 6),
                "base_value": round(momentum, 6),
            },
        },
        "data": {"prediction_subsampling": min(1.0, max(0.2, round(12 / (0.65 * num_patches), 1)))},
    }


def _power_of_two(number: float) -> int:
    """The largest one that is not above."""
    return 2 ** math.floor(math.log2(number))


@ending_in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    args = parser.parse_args(arguments)
    sys.stdout.write(dump_yaml(recommended(args.images, args.dataset_images, args.patches)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
