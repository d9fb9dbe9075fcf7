"""What a training step costs per image, as arithmetic on sizes: model FLOPs, parameters, memory.

Blocks and encoders are those of model.py, for every method; the step is CAPI's.
"""

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar


@dataclass(frozen=True)
class StepShape:
    """Sizes that decide what one CAPI step costs per image."""

    embed_dim: int
    encoder_depth: int
    decoder_depth: int
    num_heads: int
    num_registers: int
    patch_size: int
    num_patches: int
    num_visible: int
    """Patches that the student sees."""
    num_predict: int
    """Positions that it predicts."""
    num_clusters: int
    in_chans: int = 3
    drop_path_rate: float = 0.0
    """For drop_path_type=efficient, whose skipped branches cost nothing; leave it at 0 for naive."""
    predictor: str = "cross"
    """As `model.EncoderDecoder` has it: cross, split or fused."""
    student_head_dims: tuple[int, ...] = ()
    """Widths of the layers of the student's head between its first and its last one."""
    targets: str = "clustering"
    """As `capi.targets` has it: clustering, ema_head or latents."""
    queue: int = 0
    """Earlier batches of which the clustering head computes logits as well."""


NumberT = TypeVar("NumberT", int, float)
"""A number of tokens: a whole one, or a mean."""


def block_flops(d: int, queries: NumberT, context: NumberT, mlp_dim: int | None = None) -> NumberT:
    """Forward pass of one block: projections, attention, MLP. A multiply-add is 2 FLOPs.

    Args:
        d: channels.
        queries: tokens that attend.
        context: tokens that they attend to.
        mlp_dim: hidden width of the MLP; None for 4 d.
    """
    query_and_output, keys_and_values = 2 * d * d * queries, 2 * d * d * context
    mlp = 2 * d * (4 * d if mlp_dim is None else mlp_dim) * queries
    return 2 * (query_and_output + keys_and_values + 2 * queries * context * d + mlp)


def embedding_flops(num_patches: int, patch_size: int, embed_dim: int, in_chans: int = 3) -> int:
    """Forward pass of the patch embedding."""
    return 2 * num_patches * in_chans * patch_size**2 * embed_dim


def _embedding_flops(shape: StepShape) -> int:
    return embedding_flops(shape.num_patches, shape.patch_size, shape.embed_dim, shape.in_chans)


def encoder_flops_per_image(shape: StepShape) -> int:
    """FLOPs of the encoder's forward pass on all patches of an image: 1.70e11 for ViT-L/14 at 224 pixels."""
    num_tokens = shape.num_patches + shape.num_registers
    return _embedding_flops(shape) + shape.encoder_depth * block_flops(shape.embed_dim, num_tokens, num_tokens)


class _Tower(NamedTuple):
    """What runs in the student for every image: so many blocks, tokens that attend, and tokens that they attend to."""

    depth: int
    queries: int
    context: int


def _student_towers(shape: StepShape) -> list[_Tower]:
    """Encoder and predictor, as `model.EncoderDecoder` runs them."""
    shown, everything = shape.num_visible + shape.num_registers, shape.num_patches + shape.num_registers
    if shape.predictor == "fused":
        return [_Tower(shape.encoder_depth, everything, everything)]
    encoder = _Tower(shape.encoder_depth, shown, shown)
    if shape.predictor == "split":
        return [encoder, _Tower(shape.decoder_depth, shown + shape.num_predict, shown + shape.num_predict)]
    return [encoder, _Tower(shape.decoder_depth, shape.num_predict, shown)]


def step_flops_per_image(shape: StepShape, batch_size: int | None = None) -> dict[str, int | float]:
    """Model FLOPs of the parts of one CAPI step per image: matmuls alone, recomputation not counted.

    Args:
        shape: sizes of model and step.
        batch_size: images per forward pass, of which drop path keeps a whole number; None counts its expectation.

    Returns: `teacher`: forward on all patches. `clustering`: forward and weight gradient, as the head's input needs no
        gradient, and forward for the batches of the queue; or forward of a head that is an average. `student`: encoder
        on visible patches, predictor and head, forward and backward, a backward pass being two forward passes.
    """
    d = shape.embed_dim
    blocks = sum(depth * block_flops(d, queries, context) for depth, queries, context in _student_towers(shape))
    head = sum(2 * width * out for width, out in _head_layers(shape))  # per token
    logits = 2 * d * shape.num_clusters
    per_token = {"clustering": (2 + shape.queue) * logits, "ema_head": head, "latents": 0}
    # The image needs no gradient either: the student's embedding costs forward and weight gradient, of all patches.
    student = 2 * _embedding_flops(shape) + 3 * (_kept(shape, batch_size) * blocks + shape.num_predict * head)
    targets = shape.num_patches * per_token[shape.targets]
    return {"teacher": encoder_flops_per_image(shape), "clustering": targets, "student": student}


def _head_layers(shape: StepShape) -> list[tuple[int, int]]:
    """Widths before and after each layer of the student's head, of which the last one gives what is predicted."""
    return list(itertools.pairwise((shape.embed_dim, *shape.student_head_dims, _target_width(shape))))


def _target_width(shape: StepShape) -> int:
    return shape.embed_dim if shape.targets == "latents" else shape.num_clusters


def _kept(shape: StepShape, batch_size: int | None) -> float:
    """Fraction of the images on which a branch runs."""
    keep = 1.0 - shape.drop_path_rate
    return keep if batch_size is None or keep == 1 else max(int(batch_size * keep), 1) / batch_size


def training_flops_per_image(shape: StepShape, batch_size: int | None = None) -> int | float:
    """Model FLOPs of one CAPI step per image: the sum of `step_flops_per_image`."""
    return sum(step_flops_per_image(shape, batch_size).values())


def attention_recomputation_per_image(shape: StepShape, batch_size: int | None = None) -> int | float:
    """FLOPs that fused attention adds in the student's backward pass, which are no model FLOPs: the scores again."""
    scores = sum(depth * queries * context for depth, queries, context in _student_towers(shape))
    return _kept(shape, batch_size) * 2 * shape.embed_dim * scores


def num_backbone_parameters(shape: StepShape) -> int:
    """Parameters of `model.EncoderDecoder` with RMSNorm and blocks without biases (the defaults)."""
    d = shape.embed_dim
    matrices, norms, rotary_frequencies = 12 * d * d, 2 * d, 2 * (d // shape.num_heads)
    depth = sum(tower.depth for tower in _student_towers(shape))
    blocks = depth * (matrices + norms + rotary_frequencies)
    mask_token, patch_embedding = d, shape.in_chans * shape.patch_size**2 * d + d
    return blocks + patch_embedding + shape.num_registers * d + mask_token


def _kept_values(shape: StepShape, own: int, of_context: int) -> int:
    """Values per channel that blocks keep of an image: so many of each of their tokens, and, in the cross-attention
    predictor, of each context token."""
    values = sum(tower.depth * own * tower.queries for tower in _student_towers(shape))
    if shape.predictor == "cross":
        values += shape.decoder_depth * of_context * (shape.num_visible + shape.num_registers)
    return values


def _single_blocks(shape: StepShape) -> list[StepShape]:
    """Students of one block each, one of the encoder and one of the predictor."""
    return [replace(shape, encoder_depth=1, decoder_depth=0), replace(shape, encoder_depth=0, decoder_depth=1)]


def device_memory_estimate(
    shape: StepShape,
    *,
    batch_size: int,
    param_bytes: int,
    recompute: bool,
    world_size: int,
    num_earlier: int = 0,
    optimizer_bytes: int | None = None,
    offload: bool = False,
) -> dict[str, int | float]:
    """A rough estimate, for planning, of what one device holds: exact for weights, a factor 1.5 or so for the rest.

    Args:
        shape: sizes of model and step.
        batch_size: images per forward pass on this device.
        param_bytes: bytes of an activation: 2 for bfloat16, 4 for float32.
        recompute: whether blocks keep the results of matmuls and attention only.
        world_size: ranks among which weights, gradients, optimizer state and average are sharded.
        num_earlier: images of earlier batches whose features this device keeps; with them the head has all logits at
            once.
        optimizer_bytes: of the moments of student and clustering head, on all ranks; None for two float32 ones.
        offload: whether what blocks keep waits in the host's memory.

    Returns: `parameters` (backbone and both heads, a number), and in GiB: `state` (float32 weights, gradients and
        AdamW moments of student and clustering head, the average, and features of earlier batches), `activations` (of
        the student, kept for its backward pass), `clustering` (teacher features and logits), `total`, the state and
        the larger of those two; and `offloaded`, what is in the host's memory instead.
    """
    d = shape.embed_dim
    # With a bias; of the student's head, each output has a bias or a magnitude.
    head = shape.num_clusters * (d + 1) if shape.targets == "clustering" else 0
    student = num_backbone_parameters(shape) + sum((width + 1) * out for width, out in _head_layers(shape))
    if optimizer_bytes is None:
        optimizer_bytes = 2 * 4 * (student + head)
    state = (4 * (2 * (student + head) + student) + optimizer_bytes) / world_size
    # Values per channel that a block keeps of each of its tokens, and in the cross-attention predictor of each context
    # token (keys and values). Without recomputation they were counted on the model with saved_tensors_hooks.
    all_of_them = (28, 8)
    values, offloaded = _kept_values(shape, *(all_of_them if not recompute else (1, 1) if offload else (10, 2))), 0
    if offload:  # in the backward pass, all of one block at a time is back on the device
        values, offloaded = max(_kept_values(each, *all_of_them) for each in _single_blocks(shape)), values
    activations = batch_size * (values * d * param_bytes + 3 * 4 * shape.num_predict * _target_width(shape))
    logits = 4 * batch_size * shape.num_clusters  # of one position
    budget = 2**28 if world_size == 1 else 2**30  # as clustering.OnlineClustering takes them on a GPU
    chunk = min(max(budget, logits), logits * shape.num_patches)
    if shape.targets == "latents":
        chunk = 0
    elif num_earlier or shape.targets == "ema_head":  # all at once
        chunk = 4 * (batch_size + num_earlier) * shape.num_clusters * shape.num_patches
        state += 4 * num_earlier * shape.num_patches * d
    features = batch_size * (shape.num_patches + shape.num_registers) * d * (4 + 12 * param_bytes)
    clustering = 4 * chunk + features
    return {
        "parameters": student + head,
        "state": state / 2**30,
        "activations": activations / 2**30,
        "clustering": clustering / 2**30,
        "offloaded": batch_size * offloaded * d * param_bytes / 2**30,
        "total": (state + max(activations, clustering)) / 2**30,
    }
