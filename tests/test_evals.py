"""Evaluations during training: they land in the run's metrics, they pick up where they were, they never stop it."""

import json
import shutil
import textwrap

import pytest
import yaml
from conftest import ROOT, run_cli
from runs import FAKE_EVALUATION, make_images, metrics_of, run_main, tiny

from config import DEFAULT_PRETRAIN_CONFIG, CapiConfig, EvalConfig, load_config
from default_eval_config import EVALS
from evals import OF_RANKS, EvalRuns, chosen_evals
from launch import StopRequest
from utils import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("evals")
    make_images(root / "images")
    (root / "eval_fake.py").write_text(textwrap.dedent(FAKE_EVALUATION.format(root=str(ROOT))))
    return root


def write_sets(place, path, **sets):
    """A config file whose evaluation sets run the fake script."""
    common = {"model_to_eval": "student_ema", "model_setup_script": "model.py", "period": 0, "final": False}
    entry = {"file": str(place / "eval_fake.py")}
    content = {
        name: common
        | {"where": "process"}
        | changes
        | {"eval_config": {"fake": entry | changes.get("eval_config", {})}}
        for name, changes in sets.items()
    }
    off = dict.fromkeys(("fast", "slow", "full"))  # those of the default config
    path.write_text(yaml.safe_dump({"evals": content | off}))
    return path


def command(place, config, output_dir, *more):
    arguments = [each for each in tiny(place / "images", output_dir, *more) if each != "evals=null"]
    return [str(config), *arguments]


def eval_records(output_dir):
    return [record for record in metrics_of(output_dir) if "eval_step" in record]


def sum_of(path):
    from model import load_model

    model = load_model(pretrained_weights=path)
    return sum(float(p.detach().double().sum()) for p in model.parameters())


@pytest.fixture(scope="module")
def finished(place):
    config = write_sets(
        place,
        place / "config.yaml",
        often={"period": 3, "where": "inline"},
        last={"final": True, "model_to_eval": "student"},
        broken={"final": True, "eval_config": {"fails": True}},
    )
    run = place / "run"
    # Two processes, as torchrun starts them: the evaluation must not take itself for a third.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = command(place, config, run, "optim.batch_size_per_gpu=2")
    done = run_cli(*launcher, "train_capi.py", *arguments, OMP_NUM_THREADS="1", timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def test_scores_land_in_the_metrics_beside_the_step_they_are_of(finished):
    records = eval_records(finished)
    often = {r["eval_step"]: r["eval/often/fake/sum/top1"] for r in records if "eval/often/fake/sum/top1" in r}
    assert sorted(often) == [3, 6]
    assert often[3] != often[6]
    assert often[6] == pytest.approx(sum_of(finished / "student_ema.pth"), abs=1e-6)
    (last,) = [r for r in records if "eval/last/fake/sum/top1" in r]
    assert last["eval/last/fake/sum/top1"] == pytest.approx(sum_of(finished / "student.pth"), abs=1e-6)
    assert not any("not" in key or "seconds" in key for record in records for key in record), "only scores"


def test_inline_means_the_next_step_waits(finished):
    records = metrics_of(finished)
    steps = [(r["step"], "eval_step" in r) for r in records]
    assert steps.index((3, True)) < steps.index((4, False))


def test_a_failed_evaluation_does_not_stop_the_training(finished):
    folder = finished / "evals" / "broken" / "step_000000006"
    assert "exit code 1" in (folder / "failed").read_text()
    assert "as asked" in (folder / "log.txt").read_text()
    assert "evals.broken of step 6 failed, training goes on" in (finished / "log.txt").read_text()
    assert (finished / "student_ema.pth").is_file() and metrics_of(finished)[-1]["step"] == 6


def test_exported_weights_are_kept_only_where_they_are_needed_again(finished):
    kept = sorted(path.relative_to(finished).parts[1] for path in finished.glob("evals/*/*/weights.pth"))
    assert kept == ["broken"]
    assert len(list(finished.glob("evals/*/*/results/report.html"))) == 4


def no_slurm(number):
    raise UserError("squeue does not answer")


def test_what_did_not_land_before_a_kill_starts_anew(finished, place, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lost = [line for line in lines if '"eval/last' in line]
    assert lost
    (run / "metrics.jsonl").write_text("".join(line for line in lines if line not in lost))
    shutil.copy(run / "student.pth", run / "evals" / "last" / "step_000000006" / "weights.pth")
    shutil.copy(run / "student.yaml", run / "evals" / "last" / "step_000000006" / "weights.yaml")
    # It was a Slurm job, and the run goes on where there is no Slurm to ask about it.
    (run / "evals" / "last" / "step_000000006" / "slurm_job").write_text("17")
    (run / "evals" / "last" / "step_000000006" / "results" / "report.html").unlink()
    monkeypatch.setattr("evals.job_state", no_slurm)
    assert run_main(command(place, place / "config.yaml", run, "optim.batch_size_per_gpu=4")) == 0
    again = [record for record in eval_records(run) if "eval/last/fake/sum/top1" in record]
    assert again == [json.loads(line) for line in lost]
    assert len(eval_records(run)) == len(eval_records(finished)), "what had landed, or failed, is not done again"


def test_not_even_a_disk_that_takes_no_note_of_a_failure_stops_the_training(place, tmp_path, caplog):
    script = {"file": str(place / "eval_fake.py")}
    cfg = EvalConfig(1, False, "student", "model.py", {"fake": script}, "process")
    launcher = load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, ["data.dataset=x"]).launcher
    runs = EvalRuns(tmp_path, {"mine": cfg}, launcher, device="cpu", kept_step=0)

    def export(name, path):
        (path.parent / "failed").mkdir(parents=True)  # stands for a file that cannot be written

    runs.launch_due(1, export, StopRequest())
    assert "evals.mine of step 1 failed, training goes on" in caplog.text
    assert "could not be marked as failed" in caplog.text
    assert runs.finished() == []


def test_a_set_may_name_evaluations_of_the_defaults_and_change_them():
    chosen = chosen_evals({"ade20k_segmentation": {"resolution": 448}, "mine": {"file": "x.py"}})
    assert chosen["ade20k_segmentation"] == EVALS["ade20k_segmentation"] | {"resolution": 448}
    assert chosen["mine"] == {"file": "x.py"}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{where: somewhere}", ("where='somewhere'", "inline")),
        ("{model_to_eval: teacher}", ("model_to_eval='teacher'", "student_ema")),
        ("{eval_config: {cifar: {}}}", ("eval_config.cifar", "file", "ade20k_segmentation")),
        ("{perod: 3}", ("perod", "period")),
    ],
)
def test_mistakes_in_a_set_are_found_before_training(entry, words):
    with pytest.raises(UserError) as caught:
        load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, ["data.dataset=x", f"evals.fast={entry}"])
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_evaluation_does_not_see_the_variables_of_ranks():
    hidden = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "GROUP_RANK"]
    assert all(OF_RANKS.search(name) for name in hidden)
    assert not any(OF_RANKS.search(name) for name in ("PATH", "HOME", "CUDA_VISIBLE_DEVICES", "HF_TOKEN", "TORCH_HOME"))
