"""Score what a fine-tuned model predicts: accuracy, mean IoU or average precision, by what it was trained for.

    python eval_finetuned.py model_loader_kwargs.pretrained_weights=runs/flowers/model.pth \\
        test_dataset_name=/data/flowers/test output_dir=results/flowers

Images are prepared and predictions made as the script of the task has it (finetune_classification.py and so on). Writes
results_finetuned.json and pictures of predictions beside the truth.
"""

from utils import add_sources, command_line

with command_line(__doc__, __name__) as parser:
    add_sources(parser)

import sys
from dataclasses import dataclass, field

from config import COUNT, NOT_NEGATIVE, require
from evaluation import Evaluation, EvaluationConfig, FrozenModel, Results
from finetuning import Finetuned
from utils import UserError


@dataclass(frozen=True, kw_only=True)
class FinetunedConfig(EvaluationConfig):
    """Keys of `eval_finetuned.py`."""

    model_path: str = "finetuning.py"
    """Model file whose models predict: finetuning.py, which loads exports of a fine-tuning."""
    test_dataset_name: str = ""
    """Data URL of the images to predict, with what is known of them."""
    resolution: int | None = field(default=None, metadata=COUNT)
    """Side of the images, or of the windows of larger ones; null for that of training."""
    num_pictures: int = field(default=8, metadata=NOT_NEGATIVE)
    """Images in the picture of predictions."""

    free_keys = ("num_pictures",)


def evaluate(cfg: FinetunedConfig, model: FrozenModel, results: Results) -> None:
    """Predict and score all images, once."""
    require(bool(cfg.test_dataset_name), "test_dataset_name", cfg.test_dataset_name, "give the data to predict")
    module = model.module
    if not isinstance(module, Finetuned):
        raise UserError(f"model_path={cfg.model_path}: its models predict nothing; use finetuning.py")
    trained = module.cfg
    size = cfg.resolution or trained.data.images_size
    remedy = f"must be a multiple of the backbone's patches of {module.patch_size} pixels"
    require(size % module.patch_size == 0, "resolution", size, remedy)
    module.task.evaluate(cfg, model, results)


EVALUATION = Evaluation("finetuned", FinetunedConfig, evaluate, parser)
main = EVALUATION.main

if __name__ == "__main__":
    sys.exit(main())
