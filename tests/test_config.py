"""config.py: YAML and dataclasses agree, and every mistake is explained."""

import dataclasses
import inspect
from typing import Any

import pytest
import yaml
from conftest import ROOT

import config
from config import DEFAULT_PRETRAIN_CONFIG, CapiConfig, changed_keys, load_config, to_yaml
from utils import UserError


def load(*sources: str) -> CapiConfig:
    return load_config(CapiConfig, DEFAULT_PRETRAIN_CONFIG, list(sources))


def keys_of_schema(schema: Any) -> dict[str, Any]:
    return {
        f.name: keys_of_schema(f.type) if dataclasses.is_dataclass(f.type) else None for f in dataclasses.fields(schema)
    }


def keys_of_yaml(tree: Any, like: Any) -> Any:
    """Keys of the YAML as deep as the schema has dataclasses; below that, values."""
    if like is None:
        return None
    return {key: keys_of_yaml(value, like.get(key)) for key, value in tree.items()}


def test_default_yaml_and_dataclasses_have_the_same_keys():
    schema = keys_of_schema(CapiConfig)
    assert keys_of_yaml(yaml.safe_load(DEFAULT_PRETRAIN_CONFIG.read_text()), schema) == schema


def test_dataclasses_have_no_defaults_so_that_values_live_in_yaml():
    for name, schema in inspect.getmembers(config, dataclasses.is_dataclass):
        for field in dataclasses.fields(schema):
            assert field.default is dataclasses.MISSING, f"{name}.{field.name}"


def test_default_is_the_published_recipe():
    cfg = load()
    assert cfg.optim.batch_size_per_gpu * cfg.launcher.num_nodes * 8 == 16384 == cfg.capi.num_clusters
    assert (cfg.data.mask_ratio, cfg.data.prediction_subsampling) == (0.65, 0.05)
    assert (cfg.capi.student_temp, cfg.capi.clustering_kwargs.target_temp) == (0.12, 0.06)
    assert (cfg.model.encoder_kwargs.depth, cfg.model.decoder_kwargs.depth) == (24, 12)
    assert cfg.efficiency.param_dtype == "bfloat16"


def test_later_sources_win_and_files_may_be_partial(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {total_iters: 10, weight_decay: 0.5}\n")
    (tmp_path / "b.yaml").write_text("optim: {total_iters: 20}\n")
    cfg = load(str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "optim.total_iters=30")
    assert cfg.optim.total_iters == 30
    assert cfg.optim.weight_decay == 0.5
    assert load("optim.total_iters=30", str(tmp_path / "b.yaml")).optim.total_iters == 20


def test_resolved_yaml_reads_back_to_the_same_object(tmp_path):
    cfg = load("optim.total_iters=77", "train.loggers=[tensorboard]", "evals=null")
    (tmp_path / "resolved.yaml").write_text(to_yaml(cfg))
    assert load(str(tmp_path / "resolved.yaml")) == cfg


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_load(path):
    load(str(path))


def test_total_iters_alone_scales_the_warm_ups():
    cfg = load("optim.total_iters=1000")
    assert cfg.optim.lr_schedule.warmup_steps(1000) == 100
    assert load("optim.lr_schedule.warmup_iters=7").optim.lr_schedule.warmup_steps(1000) == 7


def test_dots_inside_operator_names_and_quotes_inside_urls_survive():
    cfg = load("efficiency.rematerialization.policy.aten::mm=true", "data.dataset=custom://Images?root='/a b'&x=1")
    assert cfg.efficiency.rematerialization.policy["aten::mm"] is True
    assert cfg.data.dataset == "custom://Images?root='/a b'&x=1"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("optim.lr_shedule.base_value=1", r"unknown key optim\.lr_shedule; did you mean optim\.lr_schedule\?"),
        ("batch_size_per_gpu=1", r"did you mean optim\.batch_size_per_gpu\?"),
        ("zzz=1", r"unknown key zzz; known sections: launcher, train"),
        ("optim.total_iters=abc", r"optim\.total_iters.*abc"),
        ("optim.betas=[1]", r"betas"),
        ("optim=3", r"optim=3"),
        ("a..b=3", r"not an override"),
        ("=3", r"not an override"),
        ("data.crop_scale=[0.1,", r"data\.crop_scale=\[0\.1,.*not valid YAML"),
        ("data.crop_scale=[0.5,0.1]", r"data\.crop_scale"),
        ("optim.lr_schedule.warmup_iters=1.5", r"fraction"),
        ("optim.lr_schedule.warmup_iters=600000", r"does not fit into optim\.total_iters=500000.*fraction"),
        ("capi.clustering_optimizer.lr_schedule.warmup_iters=600000", r"capi\.clustering_optimizer\.lr_schedule"),
        ("model.transformers_kwargs.embed_dim=100", r"embed_dim=100: must be a multiple of 4 x num_heads = 64"),
        ("model.n_registers=3", r"model\.n_registers=3.*multiple of 4"),
        ("data.images_size=225", r"data\.images_size=225.*nearest is 224"),
        ("train.loggers=[tensorbored]", r"train\.loggers.*tensorbored"),
        ("efficiency.param_dtype=float16", r"efficiency\.grad_scaler"),
        ("efficiency.fsdp=fully", r"efficiency\.fsdp='fully'.*fully_shard"),
        ("evals.fast.period=soon", r"evals\.fast\.period"),
    ],
)
def test_mistakes_are_explained(source, message):
    with pytest.raises(UserError, match=message):
        load(source)


def test_changed_keys_are_dotted_and_complete():
    old = {"a": {"b": 1, "c": (1, 2)}, "d": 1}
    new = {"a": {"b": 2, "c": [1, 2]}, "e": 3}
    assert changed_keys(old, new) == {"a.b": (1, 2), "d": (1, None), "e": (None, 3)}


def test_a_file_may_have_an_equals_sign_in_its_path_and_an_override_any_length(tmp_path):
    path = tmp_path / "lr=1" / "mine.yaml"
    path.parent.mkdir()
    path.write_text("train: {seed: 7}\n")
    assert load(str(path)).train.seed == 7
    long = ",".join(["x"] * 500)
    assert load(f"launcher.setup=[{long}]").launcher.setup == ["x"] * 500
