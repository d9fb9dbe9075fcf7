"""extract_features.py: every image once, in files that survive interruptions, on any number of processes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import files_limited_to, run_cli
from methods import METHODS, write_export
from PIL import Image
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from samples import encode, photo

import extract_features
from extract_features import FeaturesConfig, Shard, read_shard
from model import load_model

RESOLUTION = 8
TINY: dict[str, Any] = {
    "patch_size": 4,
    "n_registers": 4,
    "transformers_kwargs": {"embed_dim": 32, "block_kwargs": {"attn_kwargs": {"num_heads": 2}}},
    "encoder_kwargs": {"depth": 1},
    "decoder_kwargs": {"depth": 1},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Ten images of different shapes in two folders, and one that is none."""
    root = tmp_path_factory.mktemp("data") / "images"
    (root / "b").mkdir(parents=True)
    for number in range(10):
        picture = photo(number).resize((20 + number, 16))
        (root / ("b" if number % 2 else ".") / f"{number}.png").write_bytes(encode(picture))
    (root / "5-broken.jpg").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.manual_seed(1)
    torch.save(load_model(config_override={"model": TINY}).state_dict(), path)
    path.with_suffix(".yaml").write_text(json.dumps({"model": TINY}))
    return path


def arguments(data: Path | str, weights: Path, output_dir: Path, *extra: str) -> list[str]:
    return [
        f"dataset={data}",
        f"output_dir={output_dir}",
        f"model_loader_kwargs.pretrained_weights={weights}",
        f"resolution={RESOLUTION}",
        "device=cpu",
        "num_workers=0",
        "batch_size=3",
        "shard_size=4",
        *extra,
    ]


def extract(*args: Any) -> int:
    return extract_features.main(arguments(*args))


def shards(output_dir: Path) -> list[Shard]:
    return [read_shard(path) for path in sorted((output_dir / "shards").iterdir())]


def joined(output_dir: Path, kind: str) -> torch.Tensor:
    return torch.cat([shard.features[kind] for shard in shards(output_dir) if kind in shard.features])


def contents(output_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output_dir / "shards").iterdir())}


@pytest.mark.parametrize("file_format", ["safetensors", "parquet"])
def test_features_are_those_of_the_model(images, weights, tmp_path, file_format):
    out = tmp_path / "out"
    kinds = "features=[global,mean_patch,patches,registers]"
    assert extract(images, weights, out, kinds, f"format={file_format}", "fit=squash") == 0
    model = load_model(pretrained_weights=weights)
    names = [name for shard in shards(out) for name in shard.names]
    assert [Path(name).name for name in names] == sorted((f"{n}.png" for n in range(10)), key=lambda n: int(n[0]) % 2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    squares = [extract_features.prepare(Image.open(name).convert("RGB"), RESOLUTION, "squash") for name in names]
    with torch.no_grad():
        expected = model((torch.stack(squares) / 255 - mean) / std)
    for kind, want in {
        "global": expected.global_repr,
        "mean_patch": expected.feature_map.mean((1, 2)),
        "patches": expected.feature_map,
        "registers": expected.registers,
    }.items():
        torch.testing.assert_close(joined(out, kind), want, atol=1e-5, rtol=0, msg=kind)


@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_images_are_seen_in_a_shape_that_is_no_square(images, weights, tmp_path, fit):
    assert extract(images, weights, tmp_path, "features=[patches]", "resolution=[8,24]", f"fit={fit}") == 0
    assert joined(tmp_path, "patches").shape == (10, 2, 6, 32)
    picture = photo(3, 90, 60)
    box = (0, 15, 90, 45) if fit == "crop" else (0, 0, 90, 60)
    oracle = np.asarray(picture.resize((24, 8), Image.Resampling.BICUBIC, box), float)
    seen = extract_features.prepare(picture, (8, 24), fit).movedim(0, -1).numpy()
    assert np.abs(seen - oracle).mean() < 2


def test_other_programs_read_the_files(images, weights, tmp_path):
    assert extract(images, weights, tmp_path / "a", "feature_dtype=float16") == 0
    tensors = load_file(tmp_path / "a" / "shards" / "000001.safetensors")
    assert {key: (tensor.dtype, list(tensor.shape)) for key, tensor in tensors.items()} == {
        "global": (torch.float16, [4, 32]),
        "mean_patch": (torch.float16, [4, 32]),
        "index": (torch.int64, [4]),
    }
    assert extract(images, weights, tmp_path / "b", "format=parquet", "features=[patches]") == 0
    table = pq.read_table(tmp_path / "b" / "shards")  # a folder of files is one table
    assert table.num_rows == 10
    assert len(table["patches"][0].as_py()) == 2 * 2 * 32
    assert table["name"][0].as_py().endswith(".png")


def test_what_cannot_be_read_is_left_out_and_listed(images, weights, tmp_path, caplog):
    assert extract(images, weights, tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results_features.json").read_text())
    assert results["results"]["num_images"] == 10
    assert [Path(each["name"]).name for each in results["results"]["skipped"]] == ["5-broken.jpg"]
    assert "not an image" in results["results"]["skipped"][0]["reason"]
    assert results["results"]["shards"] == [f"00000{i}.safetensors" for i in range(3)]
    assert sorted(torch.cat([shard.indices for shard in shards(tmp_path / "out")]).tolist()) == [
        i for i in range(11) if i != broken_number(images)
    ]


def broken_number(images: Path) -> int:
    from reading.sources import make_dataset

    dataset = make_dataset(str(images), key="dataset")
    return next(i for i in range(len(dataset)) if "broken" in dataset[i].name)


@pytest.mark.parametrize("file_format", ["safetensors", "parquet"])
def test_a_shard_of_unreadable_images_has_the_columns_of_the_others(weights, tmp_path, file_format):
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(b"no")
    (tmp_path / "images" / "9.png").write_bytes(encode(photo(0)))
    kinds = "features=[global,patches,registers]"
    more = [kinds, f"format={file_format}", "feature_dtype=float16"]
    assert extract(tmp_path / "images", weights, tmp_path / "out", *more) == 0
    empty, other = shards(tmp_path / "out")
    assert [len(shard.names) for shard in (empty, other)] == [0, 1]
    for kind, rows in other.features.items():
        assert (empty.features[kind].dtype, empty.features[kind].shape) == (rows.dtype, (0, *rows.shape[1:]))
    if file_format == "parquet":
        table = pq.read_table(tmp_path / "out" / "shards")  # by the columns of the first file
        assert table.num_rows == 1 and {"global", "patches", "registers"} <= set(table.column_names)


@pytest.mark.parametrize("source", ["folder", "stream"])
def test_an_interrupted_extraction_goes_on_with_what_is_missing(images, weights, tmp_path, source, monkeypatch):
    data = images if source == "folder" else stream_of(images, tmp_path)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert extract(data, weights, straight) == 0
    expected = contents(straight)
    assert len(expected) >= 3

    written = []
    write = extract_features.Writer.write

    def write_once(self, path: Path, **kwargs: Any) -> None:
        if written:
            raise KeyboardInterrupt
        write(self, path, **kwargs)
        written.append(path)

    with monkeypatch.context() as patched:
        patched.setattr(extract_features.Writer, "write", write_once)
        assert extract(data, weights, resumed) == 130, "Ctrl-C ends in the exit code of its signal"
    assert contents(resumed) == {written[0].name: expected[written[0].name]}
    before = written[0].stat().st_mtime_ns
    assert extract(data, weights, resumed) == 0
    assert contents(resumed) == expected
    assert written[0].stat().st_mtime_ns == before, "what was there was computed again"


def stream_of(images: Path, folder: Path, at: int = 9) -> str:
    """Two Parquet files, the first with so many images, more than two shards', as a stream."""
    datasets: Any = pytest.importorskip("datasets")
    files = sorted(images.rglob("*.png"))
    for number, part in enumerate((files[:at], files[at:])):
        rows = [{"image": {"bytes": file.read_bytes(), "path": None}} for file in part]
        table = datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image()}))
        table.to_parquet(folder / f"{number}.parquet")
    return f"hf://parquet?data_files='{folder}/*.parquet'&split='train'&streaming=True"


def test_a_stream_gives_the_features_of_its_images(images, weights, tmp_path):
    assert extract(stream_of(images, tmp_path), weights, tmp_path / "stream", "fit=squash") == 0
    assert extract(images, weights, tmp_path / "folder", "fit=squash") == 0
    files = [f"000000-00000{i}.safetensors" for i in range(3)] + ["000001-000000.safetensors"]
    assert sorted(contents(tmp_path / "stream")) == files
    a, b = (joined(tmp_path / name, "global").sort(dim=0).values for name in ("stream", "folder"))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("file_format", ["safetensors", "parquet"])
@pytest.mark.parametrize("source", ["folder", "stream"])
def test_numbers_are_of_one_image_each(images, weights, tmp_path, source, file_format):
    data = images if source == "folder" else stream_of(images, tmp_path)
    assert extract(data, weights, tmp_path / "out", f"format={file_format}") == 0
    assert {shard.part for shard in shards(tmp_path / "out")} == ({None} if source == "folder" else {0, 1})
    keys = ["index"] if source == "folder" else ["part", "index"]
    rows = []
    for path in (tmp_path / "out" / "shards").iterdir():
        columns = pq.read_table(path).to_pydict() if file_format == "parquet" else load_file(path)
        assert ("part" in columns) == (source == "stream")
        rows += zip(*(map(int, columns[key]) for key in keys), strict=True)
    assert len(rows) == len(set(rows)) == 10


def test_a_stream_whose_end_is_that_of_a_shard_is_not_begun_again(images, weights, tmp_path):
    stream = stream_of(images, tmp_path)
    out = tmp_path / "out"
    assert extract(stream, weights, out, "shard_size=3") == 0  # nine images in the first part
    first = contents(out)
    assert extract(stream, weights, out, "shard_size=3") == 0
    assert contents(out) == first
    assert [shard.is_last for shard in shards(out)] == [False, False, True, True]


def on_this_rank(args: list[str]) -> list[str]:
    """Files that this rank wrote."""
    from config import load_config

    written, write = [], extract_features.Writer.write
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            extract_features.Writer,
            "write",
            lambda self, path, **kwargs: (written.append(path.name), write(self, path, **kwargs)),
        )
        cfg = load_config(FeaturesConfig, None, args)
        extract_features.EVALUATION.run(cfg, torch.device("cpu"))
    return written


@pytest.mark.parametrize("source", ["folder", "stream"])
def test_processes_that_read_change_nothing(images, weights, tmp_path, source):
    data = images if source == "folder" else stream_of(images, tmp_path)
    assert extract(data, weights, tmp_path / "none", "num_workers=0") == 0
    assert extract(data, weights, tmp_path / "two", "num_workers=2") == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "none")


@pytest.mark.parametrize("source", ["folder", "stream"])
def test_few_files_may_be_open(images, weights, tmp_path, source):
    """A batch is one tensor between processes: each takes a descriptor, of which a shell often gives 1024."""
    program = "import resource as r, sys, extract_features as e; r.setrlimit(r.RLIMIT_NOFILE, (150, 150))"
    (tmp_path / "images").mkdir()
    for number in range(240):
        shutil.copyfile(images / "0.png", tmp_path / "images" / f"{number}.png")
    data = tmp_path / "images" if source == "folder" else stream_of(tmp_path / "images", tmp_path, at=231)
    more = ["num_workers=2", "batch_size=120", "shard_size=240"]
    command = arguments(data, weights, tmp_path / "out", *more)
    done = run_cli("-c", f"{program}; sys.exit(e.main(sys.argv[1:]))", *command, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(joined(tmp_path / "out", "global")) == 240


@pytest.mark.parametrize("source", ["folder", "stream"])
def test_two_ranks_write_the_files_of_one(images, weights, tmp_path, source):
    data = images if source == "folder" else stream_of(images, tmp_path)
    assert extract(data, weights, tmp_path / "one") == 0
    first, second = run_on_ranks(on_this_rank, 2, arguments(data, weights, tmp_path / "two"))
    assert first
    assert second
    assert sorted(first + second) == sorted(contents(tmp_path / "one"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_other_weights_or_other_data_do_not_mix_with_what_is_there(images, weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert extract(images, weights, out) == 0
    other = tmp_path / "other.pth"
    torch.manual_seed(2)
    torch.save(load_model(config_override={"model": TINY}).state_dict(), other)
    other.with_suffix(".yaml").write_text(json.dumps({"model": TINY}))
    assert extract(images, other, out) == 2
    assert "results of another model" in capsys.readouterr().err
    assert extract(images, weights, out, "fit=squash") == 2
    assert "fit was 'crop', is 'squash'" in capsys.readouterr().err
    for batch_size in (1, 7):
        assert extract(images, weights, out, f"batch_size={batch_size}") == 0


@pytest.mark.parametrize("change", ["weights", "model", "resolution", "format", "shard_size", "data", "old", "nothing"])
def test_shards_say_what_they_were_made_of_also_when_the_results_are_deleted(images, tmp_path, capsys, change):
    weights, data, out = tmp_path / "tiny.pth", tmp_path / "images", tmp_path / "out"
    shutil.copytree(images, data)

    def save(seed, **model):
        torch.manual_seed(seed)
        torch.save(load_model(config_override={"model": TINY}).state_dict(), weights)
        weights.with_suffix(".yaml").write_text(json.dumps({"model": TINY | model}))

    save(1)
    assert extract(data, weights, out) == 0
    (out / "results_features.json").unlink()
    more = {"resolution": ["resolution=12"], "format": ["format=parquet"], "shard_size": ["shard_size=5"]}.get(
        change, []
    )
    if change == "weights":
        save(2)
    elif change == "model":  # other features of the same weights
        save(1, norm_layer_kwargs={"eps": 0.1})
    elif change == "data":
        (data / "0.png").write_bytes(encode(photo(77).resize((20, 16))))
    elif change == "old":
        path = out / "shards" / "000000.safetensors"
        save_file(load_file(path), path, {"images": json.dumps({"names": [], "skipped": [], "is_last": True})})
    before = contents(out)
    assert extract(data, weights, out, *more) == (0 if change == "nothing" else 2)
    if change != "nothing":
        message = capsys.readouterr().err
        key = {
            "weights": "weights_sha256 was",
            "model": "loader_sha256 was",
            "data": "data of dataset was",
            "old": "it does not say of what",
        }.get(change, f"{change} was")
        assert key in message and f"or delete {out}/shards to extract them anew" in message
    assert contents(out) == before


def test_a_folder_whose_images_were_replaced_is_not_called_done(images, weights, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images")
    assert extract(tmp_path / "images", weights, tmp_path / "out") == 0
    (tmp_path / "images" / "0.png").write_bytes(encode(photo(77).resize((20, 16))))
    assert extract(tmp_path / "images", weights, tmp_path / "out") == 2
    assert f"what is at dataset={tmp_path}/images has changed since" in capsys.readouterr().err


def test_a_folder_that_has_changed_is_not_mixed_with_what_it_was(weights, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(encode(photo(number)))
        assert extract(tmp_path / "images", weights, tmp_path / "out") == (2 if number else 0)
    assert "has 3 images, and had 1 when" in capsys.readouterr().err


@pytest.mark.parametrize("file_format", ["safetensors", "parquet"])
def test_a_full_disk_is_explained_and_the_same_command_goes_on(images, weights, tmp_path, capsys, file_format):
    command = (images, weights, tmp_path / "out", f"format={file_format}", "features=[patches]", "shard_size=100")
    with files_limited_to(4000):
        assert extract(*command) == 2
    assert f"000000.{file_format} could not be written: [Errno 27] " in capsys.readouterr().err
    assert extract(*command) == 0
    assert joined(tmp_path / "out", "patches").shape == (10, 2, 2, 32)


def test_an_attempt_that_failed_does_not_keep_the_next_from_its_folder(images, tmp_path, capsys):
    weights, _ = write_export(METHODS["ijepa"], tmp_path / "run")
    others = ["model_path=ijepa.py", "resolution=32"]
    assert extract(images, weights, tmp_path / "out", *others, "features=[registers]") == 2
    assert "ijepa.py has no registers; leave them out" in capsys.readouterr().err
    assert extract(images, weights, tmp_path / "out", *others) == 0


def test_without_a_readable_image_the_command_fails_and_goes_on_once_they_are_repaired(weights, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(b"no")
    assert extract(tmp_path / "images", weights, tmp_path / "out") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "none of 5 images can be read" in message and "images/0.jpg: not an image of a known format" in message
    (tmp_path / "images" / "0.jpg").write_bytes(encode(photo(0)))
    assert extract(tmp_path / "images", weights, tmp_path / "out", "fit=squash") == 0


@pytest.mark.parametrize("file_format", ["safetensors", "parquet"])
def test_features_beyond_the_range_of_their_type_are_refused(images, tmp_path, capsys, file_format):
    (tmp_path / "large.py").write_text(LARGE)
    own = [f"dataset={images}", f"output_dir={tmp_path / 'out'}", f"model_path={tmp_path / 'large.py'}"]
    command = [*own, "resolution=8", "device=cpu", "num_workers=0", f"format={file_format}"]
    assert extract_features.main([*command, "feature_dtype=float16"]) == 2
    said = "feature_dtype=float16: global features of .*large.py reach 1e+05, and float16 ends at 6.55e+04; use float32"
    assert re.search(said.replace("+", "\\+"), capsys.readouterr().err)
    assert not list(tmp_path.glob("out/shards/*"))
    for dtype in ("float32", "bfloat16")[: 2 if file_format == "safetensors" else 1]:
        assert extract_features.main([*command, f"output_dir={tmp_path / dtype}", f"feature_dtype={dtype}"]) == 0
        assert joined(tmp_path / dtype, "global").isfinite().all()


LARGE = """
import torch

class Large(torch.nn.Module):
    patch_size = 4

    def forward(self, images):
        b, _, h, w = images.shape
        return torch.full((b, 2), -1e5), None, torch.ones(b, h // 4, w // 4, 2)

__model_loader__ = Large
"""


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("features=[globl]", "must be one of global, mean_patch, patches, registers"),
        ("features=[]", "name at least one of"),
        ("resolution=10", "resolution=10: must be a multiple of 4, the patch size of"),
        ("feature_dtype=bfloat16", "parquet has no such type"),
        ("dataset=/no/such/folder", "dataset=/no/such/folder"),
        ("shard_size=0", "shard_size=0: must be at least 1"),
    ],
)
def test_mistakes_are_explained(images, weights, tmp_path, capsys, extra, message):
    assert extract(images, weights, tmp_path / "out", "format=parquet", extra) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/shards/*"))


def test_memory_is_that_of_one_shard(images, weights, tmp_path, monkeypatch):
    """Room for features is made for the images of a shard, once per shard and kind, and never for all images."""
    sizes = []
    empty = torch.empty
    monkeypatch.setattr(extract_features.torch, "empty", lambda *a, **k: sizes.append(a) or empty(*a, **k))
    assert extract(images, weights, tmp_path / "out", "features=[patches]") == 0
    assert [size for size in sizes if len(size) == 4] == [(4, 2, 2, 32), (4, 2, 2, 32), (3, 2, 2, 32)]
