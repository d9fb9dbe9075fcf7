"""train_capi.py: the step against the golden trajectory, and the loop as a user meets it."""

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from commands import (
    KillableRun,
    assert_same_but_for_values,
    assert_same_run,
    logged_steps,
    make_images,
    metrics_of,
    rewrite_config,
    run_forked,
    run_main,
    tiny,
    untrained,
)
from conftest import ROOT, load_golden_json, needs_fp8_on_a_cpu, run_cli, seeded
from golden import DROP_PATH, GOLDEN_CONFIG, NAIVE, frequencies, golden_batches, golden_part, golden_state
from torch import Tensor

import train_capi
import training
from checkpoint import SavedState
from clustering import OnlineClustering
from config import DEFAULT_PRETRAIN_CONFIG, load_config
from data import derive_seed
from metrics import read_metrics
from model import Residual
from train_capi import CapiConfig, hyper_at, panels, warn_if_changed

FP8 = "efficiency.teacher_fp8=true"
KERNEL = "capi.clustering_kernel"
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU, which is tested")


@pytest.mark.parametrize(
    ("accumulation_steps", "overrides"),
    [
        (1, ["efficiency.rematerialization.enabled=false"]),
        (1, ["efficiency.rematerialization.enabled=true"]),
        (1, ["efficiency.rematerialization.enabled=true", "efficiency.rematerialization.policy={}"]),
        (1, ["capi.clustering_chunk=7"]),
        (2, []),
        (3, ["capi.clustering_chunk=1"]),
        (1, [f"{KERNEL}=plain"]),
        (3, [f"{KERNEL}=plain"]),
        (1, [f"{KERNEL}=torch"]),
        pytest.param(1, [f"{KERNEL}=triton"], marks=[interpreted, pytest.mark.long]),
    ],
)
def test_eight_steps_reproduce_the_golden_trajectory(accumulation_steps, overrides):
    state = golden_state(*overrides)
    for parameter in frequencies(state):
        parameter.requires_grad_()  # the golden norm of the gradients has theirs in it
    for i, expected in enumerate(load_golden_json("trajectory_default")):
        hyper = hyper_at(i, state.cfg)
        scalars = train_capi.train_step(state, golden_batches(i, accumulation_steps), hyper)
        state.step += 1
        assert scalars["capi_loss"].item() == pytest.approx(expected["capi_loss"], rel=1e-6)
        assert scalars["clustering_loss"].item() == pytest.approx(expected["clustering_loss"], rel=1e-6)
        assert scalars["target_entropy"].item() == pytest.approx(expected["target_entropy"], rel=1e-5)
        assert scalars["grad_norm"].item() == pytest.approx(expected["student_grad_norm"], rel=1e-5)
        assert hyper.lr == pytest.approx(expected["lr"])
        assert hyper.momentum == pytest.approx(expected["momentum"])
        assert hyper.clustering_lr == pytest.approx(expected["clustering_lr"])
    for name, module in state.modules.items():
        for key, value in golden_part(f"final.{name}.").items():
            torch.testing.assert_close(module.state_dict()[key], value, atol=1e-5, rtol=0, msg=f"{name}.{key}")


@pytest.mark.parametrize("precision", [[], ["efficiency.param_dtype=float16", "efficiency.grad_scaler=true"]])
def test_the_plain_kernel_logs_what_the_other_one_logs(precision):
    """Accumulation, usage counts and the loss scale included."""
    plain, torch_kernel = (golden_state(f"{KERNEL}={name}", *precision) for name in ("plain", "torch"))
    for state in (plain, torch_kernel):
        state.scaler._init_scale = 1024.0
    for i in range(3):
        a, b = (
            train_capi.train_step(state, golden_batches(i, 2), hyper_at(i, state.cfg), with_usage=True)
            for state in (plain, torch_kernel)
        )
        assert a.keys() == b.keys() and "prototypes_used" in a
        for name in a:
            assert a[name].item() == pytest.approx(b[name].item(), rel=1e-5 if not precision else 1e-2), name


def test_frequencies_whose_learning_rate_is_0_get_no_gradient_and_change_that_of_nothing_else():
    frozen, trained = golden_state(), golden_state("optim.rope_lr_mult=0.5")
    before = [parameter.clone() for parameter in frequencies(frozen)]
    for state in (frozen, trained):
        train_capi.train_step(state, golden_batches(0, 1), hyper_at(1, state.cfg))
    assert len(before) == 5 and all(parameter.grad is None for parameter in frequencies(frozen))
    assert all(map(torch.equal, frequencies(frozen), before))
    assert not any(map(torch.equal, frequencies(trained), before))
    for (name, p), q in zip(frozen.student.named_parameters(), trained.student.parameters(), strict=True):
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_a_run_whose_frequencies_had_a_gradient_continues_without(images, tmp_path):
    assert run_main(tiny(images, tmp_path, "optim.total_iters=2", "optim.rope_lr_mult=1.0")) == 0
    assert run_main(tiny(images, tmp_path, "optim.total_iters=3")) == 0
    assert logged_steps(tmp_path) == 3


def test_gradient_clipping_bounds_the_update_and_reports_the_norm_before():
    state, clipped = golden_state(), golden_state("optim.clip_grad=0.5")
    a = train_capi.train_step(state, golden_batches(0, 1), hyper_at(1, state.cfg))
    b = train_capi.train_step(clipped, golden_batches(0, 1), hyper_at(1, clipped.cfg))
    assert a["grad_norm"] == b["grad_norm"]
    norm = torch.stack([p.grad.norm() for p in clipped.student.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(0.5, rel=1e-4)


def weights(state: train_capi.CapiState) -> dict[str, Tensor]:
    return {f"{n}.{k}": v.clone() for n, m in state.modules.items() for k, v in m.state_dict().items()}


def test_an_overflow_in_float16_skips_student_average_and_clustering_head():
    state = golden_state("efficiency.param_dtype=float16", "efficiency.grad_scaler=true")
    before = weights(state)
    state.scaler._init_scale = 2.0**127
    scalars = train_capi.train_step(state, golden_batches(0, 1), hyper_at(2, state.cfg))
    assert "grad_norm" not in scalars
    assert scalars["loss"].isfinite()
    assert all(torch.equal(value, before[key]) for key, value in weights(state).items())
    assert state.scaler.get_scale() == 2.0**126


def test_float16_with_the_scaler_is_close_to_float32():
    plain, scaled = golden_state(), golden_state("efficiency.param_dtype=float16", "efficiency.grad_scaler=true")
    scaled.scaler._init_scale = 1024.0  # the default starts high and skips its first steps
    for i in range(3):
        a = train_capi.train_step(plain, golden_batches(i, 1), hyper_at(i, plain.cfg))
        b = train_capi.train_step(scaled, golden_batches(i, 1), hyper_at(i, plain.cfg))
        assert b["loss"].item() == pytest.approx(a["loss"].item(), rel=1e-2)
        assert b["grad_norm"].item() == pytest.approx(a["grad_norm"].item(), rel=5e-2)
    torch.testing.assert_close(scaled.clustering.layer.weight, plain.clustering.layer.weight, atol=2e-3, rtol=0)


def test_bfloat16_is_close_to_float32_and_keeps_float32_weights():
    plain, half = golden_state(), golden_state("efficiency.param_dtype=bfloat16")
    a = train_capi.train_step(plain, golden_batches(0, 1), hyper_at(1, plain.cfg))
    b = train_capi.train_step(half, golden_batches(0, 1), hyper_at(1, plain.cfg))
    assert b["loss"].item() == pytest.approx(a["loss"].item(), rel=2e-2)
    assert {p.dtype for p in half.student.parameters()} == {torch.float32}


@needs_fp8_on_a_cpu
def test_a_teacher_in_fp8_changes_the_targets_a_little_and_the_student_not_at_all():
    half, coarse = (golden_state("efficiency.param_dtype=bfloat16", *more) for more in ([], [FP8]))
    images = golden_batches(0, 1)[0].images
    a, b = (state.do_teacher(state.student_ema["backbone"], images, state.dtype) for state in (half, coarse))
    assert 0.005 < (a - b).norm() / a.norm() < 0.1
    a, b = (state.student["backbone"](images).feature_map for state in (half, coarse))
    assert torch.equal(a, b), "what is trained and exported is not rounded"
    a, b = (train_capi.train_step(s, golden_batches(0, 1), hyper_at(1, s.cfg)) for s in (half, coarse))
    assert a["loss"].item() != b["loss"].item() == pytest.approx(a["loss"].item(), rel=5e-2)


def test_fp8_needs_bfloat16(tmp_path, capsys):
    assert run_main(tiny("/nowhere", tmp_path, FP8)) == 2
    assert "efficiency.teacher_fp8=True: results are bfloat16; set efficiency.param_dtype" in capsys.readouterr().err


def test_drop_path_of_a_step_depends_on_seed_and_step_alone():
    losses = []
    for noise in (0, 1):
        state = golden_state(DROP_PATH)
        torch.manual_seed(noise)
        state.step = 5
        losses.append(train_capi.train_step(state, golden_batches(0, 1), hyper_at(1, state.cfg))["capi_loss"])
    assert losses[0] == losses[1]
    state.step = 6
    assert train_capi.train_step(state, golden_batches(0, 1), hyper_at(1, state.cfg))["capi_loss"] != losses[0]


def plain_drop_path(self, x, *others, drawn=None):
    """The definition: every image runs through the branch, and what is dropped is multiplied by 0."""
    b = len(x)
    if not self.training or self.keep_prob == 1:
        return x + self.branch(x, *others)
    if self.drop_path_type == "naive":
        weights = drawn / self.keep_prob
    else:
        num_kept = max(int(b * self.keep_prob), 1)
        weights = torch.zeros(b).index_fill(0, drawn[:num_kept], b / num_kept)
    return x + weights.view(b, 1, 1) * self.branch(x, *others)


@pytest.mark.parametrize("overrides", [[], ["efficiency.rematerialization.enabled=false"], [NAIVE]])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_steps_with_drop_path_are_those_of_its_plain_definition(monkeypatch, overrides, accumulation_steps):
    """Images that are drawn by hand from seed, step and rank, in the order of forward passes, blocks and branches."""
    actual, expected = (golden_state(DROP_PATH, *overrides) for _ in range(2))
    do_student, given = expected.do_student, []

    def draw(b):
        return torch.rand(b, generator=random) < 0.7 if NAIVE in overrides else torch.randperm(b, generator=random)

    def with_images_by_hand(student, images, visible, predict, targets, _drop_path, *rest):
        given.append(torch.stack([draw(len(images)) for _ in range(2 * 5)]))
        return do_student(student, images, visible, predict, targets, given[-1].unflatten(0, (5, 2)), *rest)

    expected.do_student = with_images_by_hand
    for i in range(3):
        hyper = hyper_at(i, actual.cfg)
        a = train_capi.train_step(actual, golden_batches(i, accumulation_steps), hyper)
        random = torch.Generator().manual_seed(derive_seed(actual.cfg.train.seed, "drop-path", i, 0))
        with monkeypatch.context() as patched:
            patched.setattr(Residual, "forward", plain_drop_path)
            b = train_capi.train_step(expected, golden_batches(i, accumulation_steps), hyper)
        actual.step += 1
        expected.step += 1
        for name in ("capi_loss", "clustering_loss", "grad_norm"):
            assert a[name].item() == pytest.approx(b[name].item(), rel=1e-5), f"{name} at step {i}"
    assert not any(torch.equal(x, y) for x, y in itertools.combinations(given, 2)), "forward passes share their draw"
    for (name, p), q in zip(actual.student.named_parameters(), expected.student.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0, msg=name)


def test_the_teacher_is_the_average_and_gets_no_gradient():
    state = golden_state()
    with torch.no_grad():
        state.student_ema["backbone"].patch_embed.weight.add_(1)
    changed = train_capi.train_step(state, golden_batches(0, 1), hyper_at(0, state.cfg))
    assert changed["clustering_loss"].item() != pytest.approx(9.921250343322754, rel=1e-4)
    assert all(p.grad is None for p in state.student_ema.parameters())


# --- The loop --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("finished")
    assert run_main(tiny(images, output_dir)) == 0
    return output_dir


def test_a_run_leaves_checkpoints_metrics_config_log_and_exports(finished):
    steps = [path.name for path in sorted((finished / "checkpoints").glob("step_*"))]
    assert steps == ["step_000000002", "step_000000004", "step_000000006"]
    assert [record["step"] for record in metrics_of(finished)] == [1, 2, 3, 4, 5, 6]
    for name in ("config.yaml", "log.txt", "student.pth", "student.yaml", "student_ema.pth", "student_ema.yaml"):
        assert (finished / name).stat().st_size > 0, name


def test_metrics_say_what_a_healthy_run_is_judged_by(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    always = {
        "capi_loss", "clustering_loss", "loss", "target_entropy", "target_entropy_rel", "prototypes_used",
        "prototype_perplexity", "lr", "clustering_lr", "momentum", "grad_norm", "images_per_s", "data_wait",
        "memory_gib",
    }  # fmt: skip
    health = {"teacher_rank", "feature_norm_median", "feature_norm_max"}
    for record in records:
        assert always <= record.keys()
        assert (health <= record.keys()) == (record["step"] % 3 == 0), record["step"]
        assert 0 < record["target_entropy_rel"] < 1
        assert 1 <= record["prototypes_used"] <= 16
        assert 1 <= record["prototype_perplexity"] <= 16.001


def test_an_export_loads_as_a_model_with_its_config_beside_it(finished):
    from model import load_model

    model = load_model(pretrained_weights=finished / "student_ema.pth")
    assert_same_but_for_values(untrained(load_model, finished / "student_ema.pth"), model)
    assert model.patch_size == 4
    out = model(torch.zeros(1, 3, 16, 24))
    assert out.feature_map.shape == (1, 4, 6, 32)
    state = torch.load(finished / "student_ema.pth", weights_only=True)
    assert {"head.last_layer.weight_g", "head.last_layer.weight_v", "backbone.mask_token"} <= state.keys()


def test_a_finished_run_started_again_changes_nothing(images, finished):
    before = (finished / "metrics.jsonl").read_bytes()
    assert run_main(tiny(images, finished)) == 0
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_export_on_demand_writes_the_newest_checkpoint(images, finished, tmp_path, capsys):
    expected = torch.load(finished / "student.pth", weights_only=True)
    (finished / "student.pth").unlink()
    assert run_main([*tiny(images, finished), "--export"]) == 0
    assert str(finished / "student.pth") in capsys.readouterr().out
    actual = torch.load(finished / "student.pth", weights_only=True)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert run_main([*tiny(images, tmp_path), "--export"]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def hub_source(images: Path, kind: str, tmp_path: Path) -> str:
    """The images as a folder, or as a stream of two parquet shards."""
    if kind == "folder":
        return str(images)
    import datasets

    rows = [{"image": {"bytes": path.read_bytes(), "path": None}} for path in sorted(images.iterdir())]
    features = datasets.Features({"image": datasets.Image()})
    for shard in range(2):
        path = tmp_path / f"part-{shard}.parquet"
        datasets.Dataset.from_list(rows[shard::2], features=features).to_parquet(path)
    files = [str(tmp_path / f"part-{shard}.parquet") for shard in range(2)]
    return f"hf://parquet?data_files={files!r}&split='train'&img_field='image'&streaming=True".replace(" ", "")


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["folder", "stream"])
def test_a_run_killed_at_any_moment_ends_like_one_never_interrupted(images, tmp_path, kind, num_workers):
    extra = [
        "optim.total_iters=9",  # 36 images: the fourth pass over the ten of them
        f"efficiency.dataloader_num_workers={num_workers}",
        "train.log_loss_every=2",  # windows of log and checkpoint differ: averages in the middle must survive
        "train.checkpointing.period=3",
        DROP_PATH,
    ]
    source = hub_source(images, kind, tmp_path)
    straight, killed = (tiny(source, tmp_path / name, *extra) for name in ("straight", "killed"))
    assert run_main(straight) == 0
    for at_step in (2, 4, 6, 8):
        run = KillableRun(killed, tmp_path / "killed")
        run.wait_for(lambda at_step=at_step: logged_steps(tmp_path / "killed") >= at_step)
        run.signal(signal.SIGKILL)
        assert run.join() == -signal.SIGKILL
    assert run_main(killed) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_saves_and_leaves_at_the_next_step(images, tmp_path, number):
    arguments = tiny(images, tmp_path / "run", "optim.total_iters=100000", "train.checkpointing.period=100000")
    run = KillableRun(arguments, tmp_path / "run")
    run.wait_for(lambda: logged_steps(tmp_path / "run") >= 3)
    run.signal(number)
    assert run.join() == 0
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    step = int(saved.name.removeprefix("step_"))
    assert logged_steps(tmp_path / "run") == step, "it went on after the save"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"stopped by {number.name} after {step} of 100000 steps" in log


def test_saving_in_the_background_changes_nothing(images, tmp_path):
    asynchronous = ["train.checkpointing.async_save=true"]
    assert run_main(tiny(images, tmp_path, *asynchronous, "optim.total_iters=3")) == 0
    assert run_main(tiny(images, tmp_path, *asynchronous)) == 0
    assert run_main(tiny(images, tmp_path / "plain", "optim.total_iters=3")) == 0
    assert run_main(tiny(images, tmp_path / "plain")) == 0
    assert_same_run(tmp_path, tmp_path / "plain")


VARIANTS = {
    "split": ["model.predictor=split"],
    "fused": ["model.predictor=fused"],
    "mlp": ["capi.student_head=mlp"],
    "queue": ["capi.queue=3", "optim.accumulation_steps=2"],
    "ema_head": ["capi.targets=ema_head", "optim.accumulation_steps=2"],
    "latents": ["capi.targets=latents", "optim.accumulation_steps=2"],
}
"""The paper's other choices, by their names here."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_with_another_choice_of_the_paper_resumes_exactly_and_its_export_loads(images, tmp_path, variant):
    from model import load_model

    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert run_main(tiny(images, straight, *VARIANTS[variant], DROP_PATH)) == 0
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_000000006")  # as if it had been killed after step 4
    assert run_main(tiny(images, resumed, *VARIANTS[variant], DROP_PATH)) == 0
    assert_same_run(resumed, straight)
    out = load_model(pretrained_weights=straight / "student_ema.pth")(torch.zeros(1, 3, 16, 24))
    assert out.feature_map.shape == (1, 4, 6, 32)


def test_a_step_balances_with_the_steps_before_it(monkeypatch):
    """The first step has none before it; later ones are handed the features that earlier ones saw."""
    sizes = ["optim.batch_size_per_gpu=6", f"{KERNEL}=plain"]
    alone, queued = golden_state(*sizes), golden_state(*sizes, "capi.queue=2")
    handed, step_of_head = [], queued.clustering.step

    def step_and_remember(x, *args, earlier, **kwargs):
        handed.append(
            (torch.nn.functional.normalize(x, dim=-1, eps=1e-7), None if earlier is None else earlier.clone())
        )
        return step_of_head(x, *args, earlier=earlier, **kwargs)

    monkeypatch.setattr(queued.clustering, "step", step_and_remember)
    for step in range(4):
        a, b = (
            train_capi.train_step(state, golden_batches(step, 1), hyper_at(step, state.cfg))
            for state in (alone, queued)
        )
        alone.step = queued.step = step + 1
        assert (a["target_entropy"] == b["target_entropy"]) == (step == 0)
    assert handed[0][1] is None
    for step, before in ((1, [0]), (2, [0, 1]), (3, [2, 1])):
        assert torch.equal(handed[step][1], torch.cat([handed[i][0] for i in before], dim=1)), f"step {step}"


def test_a_queue_of_batches_of_another_size_is_refused(images, tmp_path, capsys):
    arguments = tiny(images, tmp_path, "capi.queue=1", "optim.total_iters=2")
    assert run_main(arguments) == 0
    for change, words in (
        ("optim.batch_size_per_gpu=2", "of 4 images of 16 px, and those of this run have 2 of 16 px"),
        ("data.images_size=24", "of 4 images of 16 px, and those of this run have 4 of 24 px"),
        ("capi.queue=2", "capi.queue is 1 there and 2 now"),
    ):
        assert run_main([*arguments, "optim.total_iters=3", change]) == 2
        assert words in capsys.readouterr().err
    same = ["optim.batch_size_per_gpu=2", "optim.accumulation_steps=2"]
    assert run_main([*arguments, "optim.total_iters=3", *same]) == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_another_choice_of_the_paper_trains_in_each_precision_with_and_without_recomputation(variant, precision):
    losses = []
    for recomputes in ("true", "false"):
        options = [f"efficiency.param_dtype={precision}", f"efficiency.rematerialization.enabled={recomputes}"]
        options += ["optim.batch_size_per_gpu=3", "optim.accumulation_steps=2"]
        cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*GOLDEN_CONFIG, *VARIANTS[variant], *options])
        state = train_capi.CapiState(cfg, torch.device("cpu"))
        for step in range(3):
            scalars = train_capi.train_step(state, golden_batches(step, 2), hyper_at(step, state.cfg))
            state.step += 1
        losses.append([scalars[name].item() for name in ("capi_loss", "loss", "grad_norm")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("targets", ["ema_head", "latents"])
def test_targets_without_a_clustering_head_follow_from_teacher_and_average(targets):
    """One batch in two steps against the definition, written out: which feature belongs to which prediction too."""
    options = [f"capi.targets={targets}", "optim.batch_size_per_gpu=3", "optim.accumulation_steps=2"]
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*GOLDEN_CONFIG, *options])
    state = train_capi.CapiState(cfg, torch.device("cpu"))
    assert state.modules.keys() == {"student", "student_ema"} == {*state.optimizers, "student_ema"}
    with torch.no_grad():
        for parameter in state.student_ema.parameters():  # an average that is not the student
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=seeded(0)))
    batches = golden_batches(0, 2)
    targets_of, expected = [], torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        features = torch.cat([state.encode(batch.images) for batch in batches]).double()
        if targets == "latents":
            channels = features - features.mean(-1, keepdim=True)
            made = channels / (channels.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        else:
            head = state.student_ema["head"].last_layer
            rows = head.weight_v.double()
            logits = torch.nn.functional.cosine_similarity(features[..., None, :], rows, dim=-1) * head.weight_g[:, 0]
            made = (logits / state.cfg.capi.clustering_kwargs.target_temp).exp()
            for _ in range(3):
                made = made / made.sum(0, keepdim=True)  # over the images of each position
                made = made / made.sum(-1, keepdim=True)
        for batch, of_batch in zip(batches, made.split(3), strict=True):
            masks = batch.masks
            _, predictions = state.student["backbone"].forward_pretrain(
                batch.images, masks["visible_indices"], masks["predict_indices"], do_prediction=True
            )
            predicted = state.student["head"](predictions).double()
            wanted = of_batch.flatten(0, 1)[masks["predict_indices"]]
            targets_of.append(wanted)
            if targets == "latents":
                error = (predicted - wanted).abs()
                loss = torch.where(error < 1, error.square() / 2, error - 0.5).mean(-1)
            else:
                loss = -(wanted * (predicted / state.cfg.capi.student_temp).log_softmax(-1)).sum(-1)
            expected += loss.sum()
    scalars = train_capi.train_step(state, batches, hyper_at(1, state.cfg), with_usage=True)
    wanted = torch.cat(targets_of)
    assert scalars["capi_loss"].item() == scalars["loss"].item() == pytest.approx(float(expected) / len(wanted), 1e-5)
    if targets == "ema_head":
        entropy = -(wanted * wanted.log()).sum(-1).mean()
        assert scalars["target_entropy"].item() == pytest.approx(float(entropy), rel=1e-4)
        assert 1 <= scalars["prototypes_used"] <= state.cfg.capi.num_clusters
    absent = {"clustering_loss", "clustering_grad_norm"}
    absent |= {"target_entropy", "target_entropy_rel", "prototypes_used"} if targets == "latents" else set()
    assert not absent & scalars.keys()


@pytest.mark.parametrize(
    ("targets", "line", "heads"),
    [
        ("ema_head", "  capi {:.3f}  entropy ", "64 prototypes in the head"),
        ("latents", "  capi {:.3f}  lr", "32 channels to predict"),
    ],
)
def test_log_metrics_and_dry_run_show_what_a_step_without_clustering_head_has(
    images, tmp_path, capsys, targets, line, heads
):
    command = tiny(images, tmp_path, f"capi.targets={targets}", "capi.num_clusters=64", "train.log_loss_every=1")
    assert run_main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert heads in said
    assert "clustering lr" not in said
    assert ("small for capi.num_clusters" in said) == (targets == "ema_head")
    assert run_main(command) == 0
    (*_, last) = read_metrics(tmp_path / "metrics.jsonl")
    assert not [name for name in last if name.startswith("clustering")]
    assert line.format(last["capi_loss"]) in (tmp_path / "log.txt").read_text()
    shown = {key for panel in panels(64, targets) for key in panel.keys}
    assert not {key for key in shown if key not in last} - {"teacher_rank"}


def test_two_runs_cannot_share_an_output_directory(images, tmp_path, capsys):
    arguments = tiny(images, tmp_path / "run", "optim.total_iters=100000")
    run = KillableRun(arguments, tmp_path / "run")
    run.wait_for(lambda: logged_steps(tmp_path / "run") >= 1)
    try:
        assert run_main(arguments) == 2
        assert "is in use by another run (process" in capsys.readouterr().err
    finally:
        run.signal(signal.SIGKILL)
        run.join()


def test_resuming_with_another_model_names_the_keys(images, finished, capsys):
    assert run_main(tiny(images, finished, "model.encoder_kwargs.depth=3", "optim.total_iters=8")) == 2
    error = capsys.readouterr().err
    assert "model.encoder_kwargs.depth is 2 there and 3 now" in error
    assert "Traceback" not in error


def test_a_checkpoint_from_before_a_key_resumes_as_what_it_trained(images, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for checkpoint in (run / "checkpoints").iterdir():
        earlier = (checkpoint / "config.yaml").read_text()
        for line in ("  predictor: cross\n", "  targets: clustering\n", "  queue: 0\n", "  student_head: linear\n"):
            assert line in earlier
            earlier = earlier.replace(line, "")
        rewrite_config(checkpoint, earlier)
    assert run_main(tiny(images, run, "optim.total_iters=8", "model.predictor=split")) == 2
    assert "model.predictor is 'cross' there and 'split' now" in capsys.readouterr().err
    assert run_main(tiny(images, run, "optim.total_iters=8")) == 0
    assert logged_steps(run) == 8


def warnings_on_resume(caplog, *changes: str, step: int = 100, world_size: int = 1) -> str:
    """What is said when a run of 1000 steps continues after `step` of them with changes."""
    before = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*GOLDEN_CONFIG, "optim.total_iters=1000"])
    saved = SavedState(Path("x"), step, {}, [], world_size, dataclasses.asdict(before))
    caplog.clear()
    warn_if_changed(
        saved, load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*GOLDEN_CONFIG, "optim.total_iters=1000", *changes])
    )
    return "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")


def test_a_resume_with_another_course_of_training_warns_and_says_what_moves(caplog):
    said = warnings_on_resume(caplog, "optim.total_iters=300")
    cfg = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, [*GOLDEN_CONFIG, "optim.total_iters=1000"])
    before = hyper_at(100, cfg).lr
    after = hyper_at(100, dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, total_iters=300))).lr
    assert "optim.total_iters 1000 -> 300" in said
    assert f"learning rate {before:.4g} -> {after:.4g}" in said
    assert before != after
    for key in ("optim.lr_schedule.base_value=0.5", "optim.momentum_schedule.truncate_cos=0.1", "optim.weight_decay=7",
                "capi.student_temp=0.3", "capi.clustering_optimizer.lr_schedule.final_value=0.1",
                "capi.clustering_kwargs.target_temp=0.3"):  # fmt: skip
        name, value = key.split("=")
        assert re.search(rf"{re.escape(name)} \S+ -> {float(value)}[,;]", warnings_on_resume(caplog, key)), key


def test_a_resume_that_keeps_the_course_says_nothing(caplog):
    per_gpu = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, GOLDEN_CONFIG).optim.batch_size_per_gpu
    assert warnings_on_resume(caplog) == ""
    assert warnings_on_resume(caplog, "train.log_loss_every=7", "data.dataset=/elsewhere") == ""
    halved = f"optim.batch_size_per_gpu={2 * per_gpu}"
    assert warnings_on_resume(caplog, halved, world_size=2) == "", "the global batch is the same"
    assert f"images of one update, on all ranks, {2 * per_gpu} -> {per_gpu}" in warnings_on_resume(caplog, world_size=2)
    assert f"on all ranks, {per_gpu} -> {2 * per_gpu}" in warnings_on_resume(caplog, halved)


def test_auto_resume_off_does_not_mix_two_runs(images, finished, capsys):
    assert run_main(tiny(images, finished, "train.auto_resume=false")) == 2
    assert "has checkpoints of an earlier run" in capsys.readouterr().err


def test_resume_from_an_older_checkpoint_gives_the_same_end(images, finished, tmp_path):
    older = finished / "checkpoints" / "step_000000002"
    assert run_main(tiny(images, tmp_path / "again", f"train.resume_from={older}")) == 0
    expected = torch.load(finished / "student.pth", weights_only=True)
    actual = torch.load(tmp_path / "again" / "student.pth", weights_only=True)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_going_back_to_an_older_checkpoint_keeps_the_other_history(images, tmp_path):
    assert run_main(tiny(images, tmp_path)) == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    older = tmp_path / "checkpoints" / "step_000000002"
    assert run_main(tiny(images, tmp_path, f"train.resume_from={older}", "optim.lr_schedule.base_value=0.1")) == 0
    assert (tmp_path / "metrics.set-aside-1.jsonl").read_bytes() == before
    assert (tmp_path / "metrics.jsonl").read_bytes() != before
    set_aside = sorted(path.name for path in (tmp_path / "checkpoints").glob("*set-aside*"))
    assert set_aside == ["step_000000004.set-aside-1", "step_000000006.set-aside-1"]


def test_an_unreadable_newest_checkpoint_is_never_a_silent_fresh_start(images, tmp_path, capsys):
    assert run_main(tiny(images, tmp_path)) == 0
    newest = sorted((tmp_path / "checkpoints").glob("step_*"))[-1]
    victim = next(path for path in newest.iterdir() if path.suffix == ".distcp")
    victim.write_bytes(victim.read_bytes()[:-7])
    assert run_main(tiny(images, tmp_path, "optim.total_iters=8")) == 2
    error = capsys.readouterr().err
    assert "step_000000006" in error
    assert "train.resume_from=" in error
    assert "step_000000004" in error
    assert (
        run_main(tiny(images, tmp_path, "optim.total_iters=8", f"train.resume_from={newest.parent / 'step_000000004'}"))
        == 0
    )


def test_a_non_finite_loss_stops_the_run_naming_step_and_last_checkpoint(images, tmp_path, capsys):
    arguments = tiny(images, tmp_path, "optim.total_iters=40", "train.nan_check_period=5")
    assert run_main([*arguments, "optim.total_iters=4"]) == 0
    diverging = [
        "optim.lr_schedule.base_value=1e38",
        "optim.lr_schedule.warmup_iters=0",
        "train.checkpointing.period=100",
    ]
    assert run_main([*arguments, *diverging]) == 2
    error = capsys.readouterr().err
    assert "capi_loss" in error
    assert "step" in error
    assert "step_000000004" in error
    newest = sorted((tmp_path / "checkpoints").glob("step_*"))[-1]
    assert newest.name == "step_000000004", "a broken state was saved"


def poison(monkeypatch, module: str, step: int, value: float = float("nan"), *, stays: bool = False) -> None:
    """Make one gradient of `module` not finite in the update that finishes `step`; the losses of it are finite."""
    average, calls = training.average_gradients_, {"student": 0, "clustering": 0}

    def averaged(which, sharding):
        average(which, sharding)
        name = "clustering" if isinstance(which, OnlineClustering) else "student"
        calls[name] += 1
        if name == module and (calls[name] == step or (stays and calls[name] > step)):
            next(p.grad for p in which.parameters() if p.grad is not None).view(-1)[0] = value

    monkeypatch.setattr(training, "average_gradients_", averaged)


def checkpoint_names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("module", "bad_step", "extra"),
    [
        ("student", 3, ["train.nan_check_period=1"]),
        ("student", 4, ["train.nan_check_period=0"]),  # the very step that is saved, and nobody looks in between
        ("student", 4, ["train.checkpointing.async_save=true", "optim.clip_grad=1.0"]),
        ("clustering", 3, ["train.nan_check_period=100"]),
        (
            "clustering",
            4,
            ["train.checkpointing.period=100", "optim.accumulation_steps=2", "optim.batch_size_per_gpu=2"],
        ),
    ],
)
def test_a_non_finite_gradient_is_never_saved_nor_called_good(
    images, tmp_path, monkeypatch, capsys, module, bad_step, extra
):
    keep_one = "train.checkpointing.max_to_keep=1"
    arguments = tiny(images, tmp_path, keep_one, *extra)
    assert run_main([*arguments, "optim.total_iters=2"]) == 0
    exported = (tmp_path / "student_ema.pth").read_bytes()
    poison(monkeypatch, module, bad_step - 2, float("inf") if bad_step == 3 else float("nan"))
    capsys.readouterr()
    assert run_main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    norm = {"student": "grad_norm", "clustering": "clustering_grad_norm"}[module]
    assert error.startswith(f"error: {norm} became {'+infinity' if bad_step == 3 else 'NaN'} at step {bad_step}"), error
    assert f"train.resume_from={tmp_path / 'checkpoints' / 'step_000000002'} and" in error
    assert checkpoint_names(tmp_path) == ["step_000000002"], "a broken state was saved, or the good one deleted"
    assert (tmp_path / "student_ema.pth").read_bytes() == exported


def test_a_stop_right_after_a_bad_step_saves_nothing(images, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, "student", 3)
    step = train_capi.train_step

    def stopped_after_3(state, *args, **kwargs):
        scalars = step(state, *args, **kwargs)
        if state.step == 2:  # finished updates before this one
            signal.raise_signal(signal.SIGTERM)
        return scalars

    monkeypatch.setattr(train_capi, "train_step", stopped_after_3)
    assert run_main(tiny(images, tmp_path, "train.nan_check_period=100")) == 2
    assert "grad_norm became NaN at step 3" in capsys.readouterr().err
    assert checkpoint_names(tmp_path) == ["step_000000002"]


def test_weights_thrown_out_of_range_by_a_finite_gradient_are_not_saved(images, tmp_path, monkeypatch, capsys):
    step = train_capi.train_step

    def throws(state, *args, **kwargs):
        scalars = step(state, *args, **kwargs)
        if state.step == 3:
            with torch.no_grad():
                next(state.student_ema.parameters()).view(-1)[0] = float("inf")
        return scalars

    monkeypatch.setattr(train_capi, "train_step", throws)
    assert run_main(tiny(images, tmp_path)) == 2
    assert "weights became +infinity at step 4" in capsys.readouterr().err
    assert checkpoint_names(tmp_path) == ["step_000000002"]


def test_weights_that_are_not_finite_are_not_exported_for_an_evaluation(images, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, "student", 3)
    mine = "period: 3, final: false, model_to_eval: student, model_setup_script: model.py, where: process"
    evals = f"evals.mine={{{mine}, eval_config: {{ade20k_segmentation: {{}}}}}}"
    arguments = [each for each in tiny(images, tmp_path, "train.checkpointing.period=100") if each != "evals=null"]
    off = [f"evals.{name}=null" for name in ("fast", "slow", "full")]
    assert run_main([*arguments, *off, evals, "train.nan_check_period=100"]) == 2
    assert "grad_norm became NaN at step 3" in capsys.readouterr().err
    assert not (tmp_path / "evals").exists()


def test_an_old_checkpoint_of_nan_weights_is_refused_and_the_good_one_named(images, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as old:  # a version that does not look
        poison(old, "student", 3)
        old.setattr(training.FiniteWatch, "check", lambda *_: None)
        run_main(tiny(images, tmp_path))
    assert checkpoint_names(tmp_path)[-1] == "step_000000006"
    capsys.readouterr()
    assert run_main(tiny(images, tmp_path, "optim.total_iters=8")) == 2
    error = capsys.readouterr().err
    newest, good = (tmp_path / "checkpoints" / f"step_00000000{step}" for step in (6, 2))
    assert f"The checkpoint '{newest}' holds weights or optimizer state that are NaN or infinite" in error
    assert f"train.resume_from={good} " in error, "step 4 is as bad, and no better for its hashes"


def test_float16_gradients_that_overflow_in_every_step_end_the_run(images, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, "student", 3, float("inf"), stays=True)
    half = ["efficiency.param_dtype=float16", "efficiency.grad_scaler=true", "optim.total_iters=100"]
    assert run_main(tiny(images, tmp_path, *half, "train.checkpointing.period=3", "train.nan_check_period=10")) == 2
    error = capsys.readouterr().err
    assert "gradients" in error and "efficiency.param_dtype" in error and "step_0000000" in error
    state = torch.load(tmp_path / "student.pth", weights_only=True) if (tmp_path / "student.pth").exists() else {}
    assert state == {}, "the run did not finish"


def test_a_worker_that_is_killed_costs_no_finished_step(images, tmp_path, monkeypatch, capsys):
    following = train_capi.PretrainLoader.__next__

    def kills_a_worker_after_3(loader):
        if loader.state_dict()["samples"] == 12:
            for worker in loader.workers:
                worker.kill()
        return following(loader)

    monkeypatch.setattr(train_capi.PretrainLoader, "__next__", kills_a_worker_after_3)
    arguments = tiny(images, tmp_path, "efficiency.dataloader_num_workers=1", "train.checkpointing.period=100")
    assert run_main([*arguments, "optim.total_iters=40"]) == 2
    assert "a process that reads images was killed" in capsys.readouterr().err.splitlines()[-1]
    assert checkpoint_names(tmp_path) == ["step_000000003"]


@pytest.mark.parametrize("waits_at", [0, 3])
def test_a_wait_for_a_batch_gives_way_to_a_signal(images, tmp_path, monkeypatch, waits_at):
    following = train_capi.PretrainLoader.__next__

    def waits_for_ever(loader):
        if loader.state_dict()["samples"] == 4 * waits_at:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the wait went on")
        return following(loader)

    monkeypatch.setattr(train_capi.PretrainLoader, "__next__", waits_for_ever)
    assert run_main(tiny(images, tmp_path, "train.checkpointing.period=100")) == 0
    assert f"stopped by SIGTERM after {waits_at} of 6 steps" in (tmp_path / "log.txt").read_text()
    assert waits_at == 0 or checkpoint_names(tmp_path) == ["step_000000003"]


def test_metrics_that_cannot_be_written_end_the_run_with_a_checkpoint(images, tmp_path, monkeypatch, capsys):
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert run_main(tiny(images, straight)) == 0
    append, full = training.Metrics.append, [3, 6]

    def appends_unless_full(meters, step, values):
        if full and step == full[0]:
            full.pop(0)
            raise OSError(errno.ENOSPC, "No space left on device")  # as from a write, which names no file
        return append(meters, step, values)

    monkeypatch.setattr(training.Metrics, "append", appends_unless_full)
    arguments = tiny(images, run, "train.checkpointing.period=100")
    for saved in (4, 6):  # at the next step, where all ranks agree; the last step has none after it
        capsys.readouterr()
        assert run_main(arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error == (
            f"error: train.output_dir={str(run)!r} cannot be written: No space left on device; make room on that disk"
        )
        assert f"step_00000000{saved}" in checkpoint_names(run)
    assert not (run / "student.pth").exists()
    assert run_main(arguments) == 0
    for name in ("student", "student_ema"):
        assert (run / f"{name}.pth").read_bytes() == (straight / f"{name}.pth").read_bytes()


@pytest.mark.parametrize("becomes", ["moved", "removed", "replaced"])
def test_a_folder_that_goes_away_is_explained_and_not_made_anew(images, tmp_path, monkeypatch, capsys, becomes):
    run, step = tmp_path / "run", train_capi.train_step

    def goes_away_after_3(state, *args, **kwargs):
        scalars = step(state, *args, **kwargs)
        if state.step == 2:  # finished updates before this one
            shutil.rmtree(run) if becomes == "removed" else run.rename(tmp_path / "elsewhere")
            if becomes == "replaced":
                run.mkdir()
        return scalars

    monkeypatch.setattr(train_capi, "train_step", goes_away_after_3)
    assert run_main(tiny(images, run)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "Traceback" not in error
    assert str(run) in error and "moved or deleted while" in error and "bring it back" in error, error
    assert not (run / "checkpoints").exists()
    if becomes == "moved":
        (tmp_path / "elsewhere").rename(run)
        monkeypatch.undo()
        assert run_main(tiny(images, run)) == 0


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("checkpoints", "file", ["checkpoints", "move it away"]),
        ("log.txt", "folder", ["log.txt", "move it away"]),
        ("metrics.jsonl", "folder", ["metrics.jsonl", "move it away"]),
        ("config.yaml", "folder", ["config.yaml", "move it away"]),
        ("evals", "file", []),
        ("compile_cache", "file", []),
        (".tmp-config.yaml", "folder", []),
        (".tmp-student.pth", "link", []),
        ("checkpoints/.tmp-step_000000002", "link", []),
        ("checkpoints/.trash-step_000000001-1", "file", []),
        ("checkpoints/.replaced-step_000000002", "link", []),
        ("checkpoints/step_000000002", "link", []),
        ("metrics.jsonl", "[1, 2]\n3\n", ["metrics.jsonl, line 1", "move the file away"]),
    ],
)
def test_what_stands_where_the_run_writes_is_named_or_replaced_and_never_followed(
    images, tmp_path, capsys, name, kind, words
):
    path, outside = tmp_path / "run" / name, tmp_path / "outside"
    path.parent.mkdir(parents=True)
    outside.mkdir()
    (outside / "precious").write_text("as it was")
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(outside if "step" in name else outside / "precious")
    else:
        path.write_text("" if kind == "file" else kind)
    code = run_main(tiny(images, tmp_path / "run", "optim.total_iters=2"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == (2 if words else 0), error
    assert all(word in error for word in words), error
    assert [each.name for each in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "as it was"


def test_profiling_writes_a_trace(images, tmp_path):
    assert run_main(tiny(images, tmp_path, "train.profiling=true")) == 0
    assert (tmp_path / "profile" / "trace.json").stat().st_size > 0


def test_accumulation_over_the_loader_gives_every_image_once(images, tmp_path):
    arguments = tiny(
        images, tmp_path, "optim.accumulation_steps=2", "optim.total_iters=3", "optim.batch_size_per_gpu=2"
    )
    assert run_main(arguments) == 0
    state = json.loads((tmp_path / "checkpoints" / "step_000000003" / "state.json").read_text())
    assert state["rank_extra"][0]["data"]["samples"] == 12


@pytest.mark.parametrize("size", ["s", "b", "l", "h", "g"])
def test_every_size_runs_dry(images, tmp_path, size, capsys):
    config = ROOT / "configs" / f"vit{size}14.yaml"
    arguments = [str(config), f"data.dataset={images}", f"train.output_dir={tmp_path}", "train.device=cpu", "--dry-run"]
    assert run_main(arguments) == 0
    out = capsys.readouterr().out
    assert "10 images" in out
    assert "16 x 16 = 256 patches" in out
    assert "90 visible, 166 masked, 8 of them predicted" in out
    expected = {"s": "32.", "b": "127.", "l": "453.", "h": "944.", "g": "1,4"}[size]
    assert f"parameters   {expected}".replace(".", ",") in out, out
    assert [path.name for path in tmp_path.iterdir()] == ["dry_run.png"], "a dry run wrote more than its pictures"


def test_dry_run_shows_the_milestones_of_the_schedules(images, capsys):
    assert run_main([f"data.dataset={images}", "train.device=cpu", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "50000        0.001" in out
    assert "GiB" in out


BAD_INPUT: list[tuple[list[str], list[str]]] = [
    (["optim.lr_shedule.base_value=1"], ["optim.lr_shedule", "did you mean optim.lr_schedule?"]),
    (["total_iters=5"], ["total_iters", "did you mean optim.total_iters?"]),
    (["optim.total_iters=many"], ["optim.total_iters", "many"]),
    (["optim.total_iters=0"], ["optim.total_iters=0", "at least 1"]),
    (["data.images_size=18"], ["data.images_size=18", "multiple of model.patch_size=4"]),
    (["data.mask_ratio=0.01"], ["data.mask_ratio", "0.01"]),
    (["data.mask_ratio=1.5"], ["data.mask_ratio=1.5"]),
    (["data.prediction_subsampling=0.001"], ["data.prediction_subsampling", "0.001"]),
    (["data.dataset=/no/such/folder"], ["data.dataset", "/no/such/folder"]),
    (["data.dataset=imagenet://x"], ["imagenet", "custom"]),
    (["data.masking_generator=Blocky"], ["data.masking_generator", "InverseBlock"]),
    (["capi.queue=1", f"{KERNEL}=torch"], [f"{KERNEL}='torch'", "capi.queue=0"]),
    (["capi.targets=ema_head", f"{KERNEL}=torch"], [f"{KERNEL}='torch'", "targets=clustering", "auto or plain"]),
    (["capi.targets=latents", "capi.queue=2"], ["capi.queue=2", "targets=clustering"]),
    (["capi.targets=latents", "capi.student_head=mlp"], ["capi.student_head='mlp'", "use linear"]),
    (["capi.targets=ibot"], ["capi.targets='ibot'", "clustering, ema_head, latents"]),
    (["capi.student_head=dino"], ["capi.student_head='dino'", "linear, mlp"]),
    (["model.predictor=mlp"], ["model.predictor='mlp'", "cross, split, fused"]),
    (["model.n_registers=6"], ["model.n_registers=6", "multiple of 4"]),
    (["train.device=tpu"], ["train.device", "tpu"]),
    (["train.loggers=[tensorbord]"], ["train.loggers", "tensorbord"]),
    (
        ["efficiency.rematerialization.enabled=true", "efficiency.rematerialization.policy.aten::nope=true"],
        ["aten::nope"],
    ),
    (["nothere.yaml"], ["nothere.yaml"]),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "named"), BAD_INPUT, ids=lambda value: value[0][:40])
def test_bad_input_names_the_key_and_leaves_no_traceback(images, tmp_path, capsys, wrong, named):
    assert run_main([*tiny(images, tmp_path / "run"), *wrong]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error
    for text in named:
        assert text in error, error


def test_unreadable_yaml_names_the_file(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("optim: {total_iters: 3\n")
    assert run_main([str(tmp_path / "broken.yaml")]) == 2
    assert "broken.yaml" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- a\n")
    assert run_main([str(tmp_path / "list.yaml")]) == 2
    assert "list.yaml" in capsys.readouterr().err


def test_an_output_directory_that_cannot_be_written_is_named(images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_main(tiny(images, tmp_path / "file" / "run")) == 2
    assert "train.output_dir" in capsys.readouterr().err


def test_a_folder_without_images_is_named(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("no picture")
    assert run_main(tiny(tmp_path / "data", tmp_path / "run")) == 2
    assert str(tmp_path / "data") in capsys.readouterr().err


def test_misspelt_key_on_the_command_line_as_a_user_types_it(images, tmp_path):
    done = run_forked("train_capi.py", *tiny(images, tmp_path), "optim.lr_shedule.base_value=1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "did you mean optim.lr_schedule?" in done.stderr


def test_help_says_how_to_use_it():
    done = run_forked("train_capi.py", "--help")
    assert done.returncode == 0
    assert "a.b=c" in done.stdout
    assert "--dry-run" in done.stdout


def test_config_file_then_overrides_on_the_command_line_as_a_user_types_it(images, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("optim: {total_iters: 50}\n")
    done = run_cli("train_capi.py", *tiny(images, tmp_path / "run"), config, "optim.total_iters=2")
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stderr
    assert "exported" in done.stderr
