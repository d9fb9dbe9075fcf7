"""config.py: YAML and dataclasses agree, and every mistake is explained."""

import argparse
import dataclasses
import inspect
import math
import typing
from typing import Any

import pytest
import yaml
from conftest import ROOT

import benchmark
import config
import eval_classification
import eval_segmentation
import eval_visualizations
import evaluation
import extract_features
import finetune_classification
import finetuning
import train_cae
import train_capi
import train_ijepa
from config import DEFAULT_PRETRAIN_CONFIG, MISSING, allowed_of, argument, changed_keys, load_config, to_yaml
from train_capi import CapiConfig, ModelConfig
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
        if schema.__module__ != "config" or schema is config.Allowed:  # says what the others may hold
            continue
        for field in dataclasses.fields(schema):
            assert field.default is dataclasses.MISSING, f"{name}.{field.name}"


def test_default_is_the_published_recipe():
    cfg = load()
    assert cfg.optim.batch_size_per_gpu * cfg.launcher.num_nodes * 8 == 16384 == cfg.capi.num_clusters
    assert (cfg.data.mask_ratio, cfg.data.prediction_subsampling) == (0.65, 0.05)
    assert (cfg.capi.student_temp, cfg.capi.clustering_kwargs.target_temp) == (0.12, 0.06)
    assert (cfg.model.encoder_kwargs.depth, cfg.model.decoder_kwargs.depth) == (24, 12)
    assert cfg.efficiency.param_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("schema", "default"),
    [
        (train_ijepa.IjepaConfig, train_ijepa.DEFAULT_CONFIG),
        (train_cae.CaeConfig, train_cae.DEFAULT_CONFIG),
        (finetune_classification.FinetuneClassificationConfig, finetuning.DEFAULT_CONFIG),
    ],
)
def test_a_length_in_steps_is_not_overruled_by_epochs_in_silence(tmp_path, schema, default):
    """The one that is said last counts; a configuration with both, as exports have it, is that of so many epochs."""
    for name in ("steps", "epochs", "both"):
        said = {"steps": {"total_iters": 7}, "epochs": {"epochs": 3}, "both": {"total_iters": 7, "epochs": 3}}[name]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"optim": said}))
    steps, epochs, both = (str(tmp_path / f"{name}.yaml") for name in ("steps", "epochs", "both"))
    own = [] if default != finetuning.DEFAULT_CONFIG else [finetuning.default_sources(finetune_classification.TASK)[1]]

    def load(*sources: str) -> Any:
        return load_config(schema, default, [*own, *sources]).optim

    for sources in ((both,), (steps, epochs), (steps, "optim.epochs=3"), ("optim={total_iters: 7, epochs: 3}",)):
        assert load(*sources).epochs == 3, sources
    for sources in ((steps, "optim.epochs=null"), ("optim.epochs=null", steps), (epochs, "optim.epochs=null", steps)):
        assert (load(*sources).total_iters, load(*sources).epochs) == (7, None), sources
    for sources in ((epochs, steps), (both, "optim.total_iters=7"), ("optim.epochs=3", "optim={total_iters: 7}")):
        with pytest.raises(
            UserError, match=r"total_iters.*7.*: the length is that of optim.epochs=3.*optim.epochs=null"
        ):
            load(*sources)


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
        ("capi.clustering_kernel=fast", r"capi\.clustering_kernel='fast': must be one of auto, torch, triton, plain"),
        ("evals.fast.period=soon", r"evals\.fast\.period"),
        ("optim.total_iters=12:30", r"^optim\.total_iters=12:30: must be a whole number"),
        ("optim.total_iters=1e3", r"^optim\.total_iters=1e3: must be a whole number"),
        ("optim.total_iters=", r"^optim\.total_iters=: must be a whole number"),
        ("model.n_registers=[1]", r"^model\.n_registers=\[1\]: must be a whole number"),
        ("optim.betas=[0.9]", r"^optim\.betas=\[0\.9\]: must be a list of 2 numbers"),
        ("optim.lr_schedule.warmup_iters=null", r"warmup_iters=null: must be a number$"),
        ("data.do_hflip=2", r"^data\.do_hflip=2: must be true or false"),
        ("data.do_hflip=maybe", r"^data\.do_hflip=maybe: must be true or false"),
        ("capi=null", r"^capi=null: must be `key: value` pairs"),
        ("train.loggers=tensorboard", r"^train\.loggers=tensorboard: must be a list of texts"),
        ("train.loggers=[[a]]", r"^train\.loggers\.0=\['a'\]: must be a text"),
        ("launcher.setup=[a #b]", r"(?s)not valid YAML.*put texts with special characters in quotes"),
        ("evals=[a]", r"^evals=\['a'\]: must be `key: value` pairs.* or null"),
        ("evals=5", r"^evals=5: must be `key: value` pairs"),
        ("evals.fast=3", r"^evals\.fast=3: must be `key: value` pairs"),
        ("evals.fast.eval_config=[a]", r"^evals\.fast\.eval_config=\['a'\]: must be `key: value` pairs"),
        ("evals.fast.eval_config.x=3", r"^evals\.fast\.eval_config\.x=3: must be `key: value` pairs.* or null"),
        ("evals.mine.period=3", r"^evals\.mine\.final= must be given"),
        ("train.output_dir=???", r"^train\.output_dir= must be given"),
        ("data.dataset=", r"^data\.dataset='': must not be empty"),
        ("data.dataset= ", r"^data\.dataset=' ': must not be empty"),
        ("train.output_dir=a\nb", r"^train\.output_dir='a\\nb': must not contain line breaks"),
        ('launcher.setup=["a\\nb"]', r"^launcher\.setup='a\\nb': must not contain line breaks"),
        ("model.norm_layer_type=Foo", r"^model\.norm_layer_type='Foo': must be one of RMSNorm, LayerNorm"),
        ("model.norm_layer_type=Linear", r"^model\.norm_layer_type='Linear': must be one of"),
        ("model.norm_layer_kwargs.eps=0", r"^model\.norm_layer_kwargs\.eps=0: must be a number above 0"),
        ("model.norm_layer_kwargs.eps=nan", r"^model\.norm_layer_kwargs\.eps='nan': must be a number above 0"),
        ("model.final_norm_kwargs.bias=false", r"^model\.final_norm_kwargs\.bias=False: RMSNorm takes eps"),
        ("model.final_norm_kwargs.elementwise_affine=3", r"elementwise_affine=3: must be true or false"),
        ("model.out_layer=25", r"^model\.out_layer=25: must lie in \[-25, 24\]"),
        ("optim.momentum_schedule.base_value=1.5", r"^optim\.momentum_schedule\.base_value=1\.5: must lie in \[0, 1\]"),
        ("data.crop_scale=[0.9,0.1]", r"^data\.crop_scale=\[0\.9, 0\.1\]: must be ascending"),
        ("optim.weight_decay=1e400", r"^optim\.weight_decay=inf: must be a finite number"),
        ("train.output_dir='sweep'", r"^train\.output_dir='sweep': .*quotes.*train\.output_dir=sweep$"),
    ],
)
def test_mistakes_are_explained(source, message):
    with pytest.raises(UserError, match=message):
        load(source)


ODD_TEXTS = [
    "sweep #2", "2024_11_05", "2024-11-05", "12:30", "007", "1_000", "0x10", "1e3", ".inf", "on", "yes", "null", "~",
    "true", "[a]", "{a}", "[a", "a: b", "a=b", "- a", "@x", "*x", "&x", "%x", "!x", "|", ">", "`x`", "it's", '"',
    "a\\n", " x", "x ", "a${b}", "${b}", "a${b", "$HOME", "ü", "x#y", "x # y", "\U0001f600",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_text_is_taken_letter_for_letter_and_survives_being_written(text, tmp_path):
    cfg = load(f"train.output_dir={text}")
    assert cfg.train.output_dir == text
    (tmp_path / "resolved.yaml").write_text(to_yaml(cfg))
    assert load(str(tmp_path / "resolved.yaml")) == cfg
    assert yaml.safe_load(to_yaml(cfg))["train"]["output_dir"] == text, "other readers of YAML see another text"
    assert text == "null" or load(f"train.init_from={text}").train.init_from == text


def test_null_and_nothing_are_no_text_where_null_is_allowed():
    assert load("train.init_from=x", "train.init_from=null").train.init_from is None
    assert load("train.init_from=x", "train.init_from=").train.init_from is None


@pytest.mark.parametrize("text", ["2024_11_05", "12:30", "007", "1_000", "on", "1e3", "2024-11-05", "a${b", "0x10"])
def test_a_file_gives_a_text_as_it_is_written(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"train:\n  output_dir: {text}\nlauncher:\n  setup:\n    - {text}\n")
    cfg = load(str(path))
    assert cfg.train.output_dir == text
    assert cfg.launcher.setup == [text]


def test_where_no_type_is_declared_only_plain_numbers_switches_and_null_are_no_texts():
    kwargs = ["a=1", "b=1e-3", "c=true", "d=null", "e=[1,x]", "f=007", "g=2024_11_05", "h=12:30", "i=on", "j='1'",
              "k=sweep #2", "l=a: b", "m=-0.5"]  # fmt: skip
    cfg = load(*(f"data.masking_generator_kwargs.{kwarg}" for kwarg in kwargs))
    assert cfg.data.masking_generator_kwargs == {
        "roll": True, "a": 1, "b": 1e-3, "c": True, "d": None, "e": [1, "x"], "f": "007", "g": "2024_11_05",
        "h": "12:30", "i": "on", "j": "1", "k": "sweep #2", "l": "a: b", "m": -0.5,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["007", "2024_11_05", "123", "1e3", "sweep #2/w.pth", "a${b}", "x.pth"])
def test_the_texts_among_the_arguments_of_a_loader_are_texts(text, tmp_path):
    key = "model_loader_kwargs.pretrained_weights"
    cfg = benchmark.read_config([f"pretrained_weights={text}"])
    assert cfg.model_loader_kwargs == {"pretrained_weights": text}
    (tmp_path / "mine.yaml").write_text(config.dump_yaml({"model_loader_kwargs": cfg.model_loader_kwargs}))
    cfg = load_config(evaluation.EvaluationConfig, None, [str(tmp_path / "mine.yaml")])
    assert cfg.model_loader_kwargs == {"pretrained_weights": text}
    assert load_config(evaluation.EvaluationConfig, None, [f"{key}=null"]).model_loader_kwargs == {
        "pretrained_weights": None
    }


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "nan", "many", ""])
def test_numbers_on_other_command_lines_have_ranges_too(text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=argument(int, at_least=1))
    assert parser.parse_args(["--repeats", "3"]).repeats == 3
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([f"--repeats={text}"])
    assert "argument --repeats: it=" in capsys.readouterr().err


def test_single_quotes_of_a_data_url_are_part_of_it():
    url = "hf://parquet?data_files='x y.parquet'&split='train'&img_field='image'"
    assert load(f"data.dataset={url}").data.dataset == url
    assert load("data.dataset=custom://Images?root='/my images'").data.dataset == "custom://Images?root='/my images'"
    with pytest.raises(UserError, match="letter for letter"):
        load("data.dataset='custom://Images'")


def test_numbers_are_what_python_reads_in_them():
    assert load("train.seed=1_000").train.seed == 1000
    assert load("train.seed=010").train.seed == 10, "not YAML's octal 8"
    assert load("optim.weight_decay=1e-3").optim.weight_decay == 1e-3
    assert isinstance(load("optim.weight_decay=1").optim.weight_decay, float)
    assert load("optim.lr_schedule.warmup_iters=1").optim.lr_schedule.warmup_steps(1000) == 1
    assert load("optim.lr_schedule.warmup_iters=1.0").optim.lr_schedule.warmup_steps(1000) == 1000


def test_errors_of_a_file_name_it_and_yaml_features_hold(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("x: &x {seed: 3}\n")
    with pytest.raises(UserError, match=r"mine\.yaml: unknown key x"):
        load(str(path))
    path.write_text("train:\n  seed: soon\n")
    with pytest.raises(UserError, match=r"mine\.yaml: train\.seed=soon: must be a whole number"):
        load(str(path))
    path.write_text("train: {seed: 1, seed: 2}\n")
    with pytest.raises(UserError, match=r"not valid YAML: .*twice"):
        load(str(path))
    path.write_text("train: {output_dir: !!python/name:os.system }\n")
    with pytest.raises(UserError, match=r"not valid YAML: the tag .* is not supported"):
        load(str(path))
    path.write_text(
        "optim:\n  lr_schedule: &s {base_value: 0.1, final_value: 0}\n"
        "capi: {clustering_optimizer: {lr_schedule: {<<: *s, final_value: 0.05}}}\n"
    )
    schedule = load(str(path)).capi.clustering_optimizer.lr_schedule
    assert (schedule.base_value, schedule.final_value) == (0.1, 0.05)
    path.write_text("")
    assert load(str(path)) == load()
    path.write_text("evals: &e {fast: *e}\n")
    with pytest.raises(UserError, match=r"(?s)not valid YAML: .*an alias is part of what it stands for"):
        load(str(path))


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", ".hidden", "a\nb", "a b", "-x", "x" * 300])
@pytest.mark.parametrize("where", ["evals", "evals.fast.eval_config"])
def test_names_that_become_folders_are_checked(where, name, tmp_path):
    entry: Any = {"file": "eval_segmentation.py"} if "." in where else None
    tree = {name: entry}
    for part in reversed(where.split(".")):
        tree = {part: tree}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="a name is also that of a folder") as caught:
        load(str(path))
    assert str(caught.value).startswith(where), "the key is not named"


SCHEMAS = sorted(
    {
        schema
        for module in (config, benchmark, evaluation, eval_classification, eval_segmentation, eval_visualizations,
                       extract_features, train_capi)
        for name, schema in inspect.getmembers(module, dataclasses.is_dataclass)
        if name.endswith(("Config", "Launcher"))
    },
    key=lambda schema: schema.__name__,
)  # fmt: skip


def holds_numbers(kind: Any) -> bool:
    return kind in (int, float) or any(holds_numbers(each) for each in typing.get_args(kind))


NUMERIC = [
    pytest.param(schema, name, kind, id=f"{schema.__name__}.{name}")
    for schema in SCHEMAS
    for name, kind in typing.get_type_hints(schema).items()
    if holds_numbers(kind)
]


def test_the_schemas_of_all_programs_are_looked_at():
    names = {schema.__name__ for schema in SCHEMAS}
    assert names >= {"CapiConfig", "LauncherConfig", "BenchmarkLauncher", "BenchmarkConfig", "SegmentationConfig",
                     "ClassificationConfig", "VisualizationsConfig", "FeaturesConfig", "ScheduleConfig"}  # fmt: skip
    assert len(NUMERIC) > 100


@pytest.mark.parametrize(("schema", "name", "kind"), NUMERIC)
def test_every_number_states_a_range_and_refuses_what_is_outside(schema, name, kind):
    allowed = allowed_of(schema, name)
    assert allowed is not None, "no range is stated"
    lowest, highest = max(allowed.at_least, allowed.above), min(allowed.at_most, allowed.below)
    outside: list[float] = [math.nan, math.inf, -math.inf, 2**63]
    if (schema, name) != (ModelConfig, "out_layer"):  # whose range is the depth of another key
        assert lowest > -math.inf, "nothing is too small"
    outside += [lowest - 1] if lowest > -math.inf else []
    outside += [allowed.above] if allowed.above > -math.inf else []
    outside += [highest + 1] if highest < math.inf else []
    outside += [allowed.below] if allowed.below < math.inf else []
    is_list = any(typing.get_origin(each) in (list, tuple) for each in (kind, *typing.get_args(kind)))
    for number in outside:
        value = [number] * (allowed.size or 2) if is_list else number
        with pytest.raises(UserError, match="must") as caught:
            config.build(kind, value, f"section.{name}", allowed)
        assert str(caught.value).startswith(f"section.{name}={value!r}: "), caught.value
    if allowed.size:
        with pytest.raises(UserError, match="must be"):
            config.build(kind, [0.5] * (allowed.size + 1), name, allowed)


@pytest.mark.parametrize(
    "schema", [s for s in SCHEMAS if s.__module__ not in ("config", "train_capi")], ids=lambda s: s.__name__
)
@pytest.mark.parametrize("value", ["nan", "-inf", "-1", "zero", "[]", "1:30"])
def test_numbers_of_evaluations_and_tools_are_checked_as_they_are_typed(schema, value):
    given = [f"{each.name}=x" for each in dataclasses.fields(schema) if each.default == MISSING]
    for name, kind in typing.get_type_hints(schema).items():
        allowed = allowed_of(schema, name)
        is_list = "list[" in str(kind)
        if holds_numbers(kind) and not (value == "[]" and is_list and not (allowed.not_empty or allowed.size)):
            with pytest.raises(UserError, match=rf"^{name}="):
                load_config(schema, None, [*given, f"{name}={value}"])


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: s.__name__)
def test_defaults_are_in_range(schema):
    for each in dataclasses.fields(schema):
        allowed = allowed_of(schema, each.name)
        if allowed is not None and not allowed.names and not allowed.texts:
            if each.default is not dataclasses.MISSING:
                allowed.check(each.name, each.default)
            elif each.default_factory is not dataclasses.MISSING:
                allowed.check(each.name, each.default_factory())


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: s.__name__)
def test_switches_refuse_what_is_neither_true_nor_false(schema):
    for name, kind in typing.get_type_hints(schema).items():
        if kind is bool or bool in typing.get_args(kind):
            key = f"{name}.x" if typing.get_origin(kind) is dict else name
            for text in ("2", "maybe", "-1", "1.0"):
                with pytest.raises(UserError, match=rf"^{key}={text}: must be true or false"):
                    load_config(schema, None, [f"{key}={text}"])


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
