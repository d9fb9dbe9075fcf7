"""Time and peak memory of whole training steps on this machine, on made-up images.

    python bench/step.py [config.yaml ...] [a.b=c ...]

Default: ViT-S/14 at 224 px, batch 16, 16384 prototypes, float32, eager.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from config import DEFAULT_PRETRAIN_CONFIG, CapiConfig, load_config
from data import Batch
from masking import draw_positions, make_masking_generator
from metrics import peak_memory_gib, training_flops_per_image
from optim import hyper_at
from train_capi import TrainState, mask_plan, pick_device, step_shape, train_step

ROOT = Path(__file__).parent.parent
DEFAULT = [
    str(ROOT / "configs" / "vits14.yaml"),
    "optim.batch_size_per_gpu=16",
    "efficiency.param_dtype=float32",
    "efficiency.compilation.do_teacher.disable=true",
    "efficiency.compilation.do_student.disable=true",
]
NUM_STEPS = 5


def make_batch(cfg: CapiConfig, device: torch.device) -> Batch:
    """Noise, with masks as in training."""
    plan, size, b = mask_plan(cfg), cfg.data.images_size, cfg.optim.batch_size_per_gpu
    generator = make_masking_generator(cfg.data.masking_generator, **cfg.data.masking_generator_kwargs)
    random = torch.Generator().manual_seed(0)
    drawn = [draw_positions(plan, generator, random) for _ in range(b)]
    visible, predict = (torch.cat([d[k] + i * plan.num_patches for i, d in enumerate(drawn)]) for k in (0, 1))
    images = torch.randn(b, cfg.model.in_chans, size, size, generator=random)
    ids = torch.arange(b)
    batch = Batch(
        images=images,
        visible_indices=visible,
        predict_indices=predict,
        host_predict_indices=predict,
        sample_ids=ids,
    )
    return batch.to(device)


def main() -> None:
    """Print one line."""
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*DEFAULT, *sys.argv[1:]])
    device = pick_device(cfg.train.device)
    state, batch, seconds = TrainState(cfg, device), make_batch(cfg, device), []
    for i in range(NUM_STEPS + 1):  # the first one allocates, and compiles
        start = time.perf_counter()
        train_step(state, [batch], hyper_at(i, cfg))["loss"].item()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    b, flops = cfg.optim.batch_size_per_gpu, training_flops_per_image(step_shape(cfg))
    sys.stdout.write(
        f"{device}, {torch.get_num_threads()} threads, {cfg.efficiency.param_dtype}: batch {b}, {median:.2f} s/step "
        f"(median of {NUM_STEPS}), {b / median:.1f} images/s, {b * flops / median / 1e9:.0f} GFLOP/s, "
        f"peak memory {peak_memory_gib(device):.2f} GiB\n"
    )


if __name__ == "__main__":
    main()
