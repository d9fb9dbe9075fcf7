"""The evaluations that `benchmark.py` runs if no others are named: their scripts, and keys of those scripts.

The literal below is read, not executed; a YAML file of the same structure can take its place (`evals_config_path=`).
"""

EVALS = {
    "in1k_classification": {
        "file": "eval_classification.py",
        "train_dataset_name": "hf://ILSVRC/imagenet-1k?split='train'&tgt_field='label'",
        "test_dataset_names": "hf://ILSVRC/imagenet-1k?split='validation'&tgt_field='label'",
    },
    "ade20k_segmentation": {
        "file": "eval_segmentation.py",
        "train_dataset_name": "custom://ADE20K?split='training'",
        "test_dataset_name": "custom://ADE20K?split='validation'",
        "resolution": 224,
    },
    "ade20k_pictures_224": {
        "file": "eval_visualizations.py",
        "dataset_name": "custom://ADE20K?split='training'",
        "resolution": 224,
    },
    "ade20k_pictures_448": {
        "file": "eval_visualizations.py",
        "dataset_name": "custom://ADE20K?split='training'",
        "resolution": 448,
    },
}
