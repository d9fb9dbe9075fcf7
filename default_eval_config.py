"""The evaluations that `benchmark.py` runs if no others are named: their scripts, and keys of those scripts.

The literal below is read, not executed; a YAML file of the same structure can take its place (`evals_config_path=`).
"""

EVALS = {
    "in1k_classification": {
        "script": "eval_classification.py",
        "train_dataset": "hf://ILSVRC/imagenet-1k?split='train'&img_field='jpg'&tgt_field='label'",
        "test_datasets": "hf://ILSVRC/imagenet-1k?split='validation'&img_field='jpg'&tgt_field='label'",
    },
    "ade20k_segmentation": {
        "script": "eval_segmentation.py",
        "train_dataset": "custom://ADE20K?split='training'",
        "test_dataset": "custom://ADE20K?split='validation'",
        "resolution": 224,
    },
    "ade20k_pictures_224": {
        "script": "eval_visualizations.py",
        "dataset": "custom://ADE20K?split='training'",
        "resolution": 224,
    },
    "ade20k_pictures_448": {
        "script": "eval_visualizations.py",
        "dataset": "custom://ADE20K?split='training'",
        "resolution": 448,
    },
}
