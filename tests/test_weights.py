"""Files of weights: what is read, what is refused, and downloads, from a server on this machine."""

import argparse
import contextlib
import errno
import fractions
import hashlib
import http.server
import io
import os
import pickle
import struct
import threading
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import files_limited_to
from safetensors.torch import save_file

from utils import UserError
from weights import load_backbone_weights, published_key, read_state_dict, save_safetensors

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1, dtype=torch.int64)}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Server:
    """Serves `files` by path; `truncate` ends the connection early."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.truncate = False
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                body = outer.files.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if outer.truncate else body)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def hub_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def weights_file(tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def assert_are_the_weights(loaded):
    assert loaded.keys() == WEIGHTS.keys()
    for key, value in WEIGHTS.items():
        assert torch.equal(loaded[key], value)


def test_reads_pth_of_both_formats_safetensors_and_file_urls(weights_file, tmp_path):
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    for name in ("w.pth", "old.pth", "w.safetensors"):
        assert_are_the_weights(read_state_dict(tmp_path / name))
        assert_are_the_weights(read_state_dict(str(tmp_path / name)))
    assert_are_the_weights(read_state_dict(weights_file.as_uri()))


def test_safetensors_may_be_read_by_whom_any_new_file_may(tmp_path):
    (tmp_path / "any").touch()
    save_safetensors(WEIGHTS, tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
    assert_are_the_weights(read_state_dict(tmp_path / "w.safetensors"))


def test_safetensors_on_a_full_disk_are_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match="File too large") as caught, files_limited_to(100):
        save_safetensors({"w": torch.zeros(1000)}, tmp_path / "w.safetensors")
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"], "something else was left behind"


def test_a_missing_file_is_named_with_the_key_by_which_it_was_given(tmp_path):
    with pytest.raises(UserError, match=r"train.init_from='.*nothing.pth': there is no such file"):
        read_state_dict(tmp_path / "nothing.pth", key="train.init_from")


def test_a_file_that_does_not_hash_to_the_given_value_is_refused_and_kept(weights_file):
    actual = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    assert_are_the_weights(read_state_dict(weights_file, sha256=actual.upper()))
    with pytest.raises(UserError) as caught:
        read_state_dict(weights_file, sha256="0" * 64)
    for part in (str(weights_file), actual, "0" * 64):
        assert part in str(caught.value)
    assert weights_file.is_file()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["zip", "old", "pickle 2", "pickle 4"])
def test_a_payload_is_refused_by_name_and_never_runs(tmp_path, how):
    file, trace = tmp_path / "evil.pth", tmp_path / "it-ran"
    content = {"a": torch.zeros(1), "b": Payload(trace)} if how in ("zip", "old") else {"b": Payload(trace)}
    if how in ("zip", "old"):
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    else:
        file.write_bytes(pickle.dumps(content, protocol=int(how[-1])))
    with pytest.raises(UserError) as caught:
        read_state_dict(file)
    assert not trace.exists()
    assert "evil.pth' is refused" in str(caught.value)
    assert f"would execute {os.mkdir.__module__}.mkdir" in str(caught.value)
    assert "safe_globals" not in str(caught.value), "no way to run it may be recommended"


@pytest.mark.parametrize("new_format", [True, False])
def test_no_way_is_shown_to_allow_what_is_not_known_to_be_harmless(tmp_path, new_format):
    """Neither for names that torch would take a word for, nor beside one that is harmless."""
    for others in ({"b": fractions.Fraction(1, 2)}, {"b": fractions.Fraction(1, 2), "args": argparse.Namespace()}):
        torch.save({"a": ROW} | others, tmp_path / "w.pth", _use_new_zipfile_serialization=new_format)
        with pytest.raises(UserError, match=r"is refused: .*would execute .*fractions.Fraction") as caught:
            read_state_dict(tmp_path / "w.pth")
        assert "safe_globals" not in str(caught.value)


@pytest.mark.parametrize("new_format", [True, False])
def test_an_old_training_file_says_which_names_it_needs_and_loads_with_them(tmp_path, new_format):
    file = tmp_path / "old.pth.tar"
    content = {"state_dict": WEIGHTS, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match=r"safe_globals\(\[argparse.Namespace\]\)"):
        read_state_dict(file)
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = read_state_dict(file)
    assert_are_the_weights(loaded["state_dict"])


def test_a_module_is_read_as_its_state_dict_if_its_package_is_named(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.BatchNorm1d(3))
    torch.save(module, tmp_path / "module.pth")
    loaded = read_state_dict(tmp_path / "module.pth", module_packages=("torch.nn.modules",))
    assert loaded.keys() == module.state_dict().keys()
    assert all(torch.equal(loaded[key], x) for key, x in module.state_dict().items())
    with pytest.raises(UserError, match=r"is refused: .* would execute .*torch\.nn\.modules\.linear\.Linear"):
        read_state_dict(tmp_path / "module.pth")


def test_a_damaged_module_is_read_or_refused_and_nothing_else(tmp_path):
    file, random = tmp_path / "module.pth", Random(0)
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 3)), file)
    good = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        pickled = archive.read("module/data.pkl")
    for _ in range(200):
        damaged = bytearray(pickled)
        for _ in range(random.choice([1, 3])):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        with zipfile.ZipFile(file, "w") as archive, zipfile.ZipFile(io.BytesIO(good)) as old:
            for part in old.namelist():
                archive.writestr(part, bytes(damaged) if part == "module/data.pkl" else old.read(part))
        with contextlib.suppress(UserError):
            read_state_dict(file, module_packages=("torch.nn.modules",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>404</html>", "no file of weights, or damaged"),
        (b"", "ends too early"),
        (pickle.dumps([1, 2], protocol=2), "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_state_dict(tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w.safetensors' cannot be read"):
        read_state_dict(tmp_path / "w.safetensors")


def test_a_file_that_holds_no_dict_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds a list, not a dict"):
        read_state_dict(tmp_path / "w.pth")


def test_a_flipped_bit_anywhere_in_an_archive_is_found_and_the_remedy_said(tmp_path):
    file = tmp_path / "w.pth"
    torch.save({"a": torch.randn(100), "b": torch.ones(3, dtype=torch.bfloat16)}, file)
    good = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    starts = {
        part.filename: part.header_offset + 30 + sum(struct.unpack("<HH", good[part.header_offset + 26 :][:4]))
        for part in parts
    }
    assert any(name.endswith("data/0") for name in starts)
    for part in parts:
        for place in {0, part.file_size // 2, part.file_size - 1} if part.file_size else ():
            damaged = bytearray(good)
            damaged[starts[part.filename] + place] ^= 4
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=r"w.pth' cannot be read: Bad CRC-32 for file .*; get it again"):
                read_state_dict(file)
    file.write_bytes(good)
    read_state_dict(file)


def test_an_archive_that_has_no_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_are_the_weights(read_state_dict(tmp_path / "w.pth"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_with_random_damage_is_read_or_refused_and_nothing_else(tmp_path, new_format):
    """Also the format without checksums: an unpickler meets random bytes then, and any line of it may be the first."""
    file, random = tmp_path / "w.pth", Random(0)
    torch.save({"model": dict(WEIGHTS), "epoch": 3}, file, _use_new_zipfile_serialization=new_format)
    good = file.read_bytes()
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(random.choice([1, 1, 3, 30])):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        file.write_bytes(damaged[: random.choice([len(damaged), random.randrange(len(damaged))])])
        with contextlib.suppress(UserError):
            read_state_dict(file)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)


def net_weights(**changes: Any) -> dict[str, Any]:
    return Net().state_dict() | {f"fc.{key}": value for key, value in changes.items()}


ROW = torch.ones(2, 3)
NOT_WEIGHTS: dict[str, tuple[Any, str]] = {
    "integers": (net_weights(weight=ROW.long()), r"fc.weight \(int64\)"),
    "8 bits": (
        net_weights(weight=ROW.to(torch.uint8), bias=ROW[:, 0].bool()),
        r"fc.weight \(uint8\), fc.bias \(bool\)",
    ),
    "complex": (net_weights(weight=ROW.to(torch.complex64)), r"fc.weight \(complex64\)"),
    "8-bit floats": (net_weights(weight=ROW.to(torch.float8_e4m3fn)), r"fc.weight \(float8_e4m3fn\)"),
    "sparse": (net_weights(weight=ROW.to_sparse()), r"fc.weight \(sparse\)"),
    "no values": (net_weights(weight=ROW.to("meta")), r"fc.weight \(without values, on the device meta\)"),
    "NaN": (net_weights(bias=torch.tensor([torch.nan, 1])), r"not all finite: fc.bias \(1 of 2 values\)"),
    "infinite": (net_weights(weight=-ROW * torch.inf), r"fc.weight \(6 of 6 values\)"),
    "beyond float32": (net_weights(weight=ROW.double() * 1e300), r"fc.weight \(6 of 6 values\)"),
    "none": (net_weights(weight=None), r"no tensors: fc.weight \(NoneType\)"),
    "lists": (net_weights(weight=[1.0]) | {"epoch": 3}, r"no tensors: fc.weight \(list\), epoch \(int\)"),
    "a checkpoint": (
        {"optimizer": {"state": {}}, "model": net_weights(), "epoch": 3},
        r"one level down.*'optimizer', 'model'.*\['model'\]",
    ),
    "two networks": ({"student": net_weights(), "teacher": net_weights()}, r"one level down.*'student', 'teacher'"),
    "numbers as names": ({0: ROW}, r"keys like 0, not names"),
    "nothing": ({}, r"2 missing: fc.bias, fc.weight"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch 2.11
@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_what_cannot_be_weights_is_refused_by_name(tmp_path, kind):
    content, message = NOT_WEIGHTS[kind]
    torch.save(content, tmp_path / "w.pth")
    net = Net()
    before = net.fc.weight.clone()
    with pytest.raises(UserError, match=message) as caught:
        load_backbone_weights(net, read_state_dict(tmp_path / "w.pth"), str(tmp_path / "w.pth"))
    assert "w.pth" in str(caught.value)
    assert torch.equal(net.fc.weight, before), "a part of it was loaded"


@pytest.mark.filterwarnings("ignore:.*quantized.*:UserWarning", "ignore::DeprecationWarning")
def test_quantised_tensors_are_refused_by_name():
    weights = net_weights(weight=torch.quantize_per_tensor(ROW, 0.1, 0, torch.qint8))
    with pytest.raises(UserError, match=r"fc.weight \(quantised\)"):
        load_backbone_weights(Net(), weights, "w.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_weights(dtype):
    net, weights = Net(), {key: value.to(dtype) for key, value in net_weights(bias=torch.tensor([3e4, 1])).items()}
    load_backbone_weights(net, weights, "w.pth")
    assert torch.equal(net.fc.weight.to(dtype), weights["fc.weight"])


def test_large_finite_weights_are_weights():
    """Their norm is not finite."""
    net = Net()
    load_backbone_weights(net, net_weights(weight=ROW * 3e38), "w.pth")
    assert net.fc.weight[0, 0] == torch.tensor(3e38)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", b"", "w.pth' ends too early"),
        ("w.safetensors", b"", "cannot be read: it is empty"),
        ("w.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer that git-lfs leaves"),
        ("w.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "pointer that git-lfs leaves"),
        ("w.pth", b"\n<!DOCTYPE html><html>", "it is a web page"),
        ("w.pth", b"hello", "no file of weights, or damaged"),
        ("w.bin", b"\x08\0\0\0\0\0\0\0{}      ", "in the format of .safetensors: call it so"),
        ("w.safetensors", b"PK\x03\x04" + bytes(99), "what torch.save writes: call it .pth"),
        ("w.pth", b"PK\x03\x04" + bytes(99), "w.pth' cannot be read: .*; get it again"),
    ],
)
def test_files_that_are_something_else_are_told_apart(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_state_dict(tmp_path / name)


def test_a_folder_is_no_file_and_its_weights_are_named(tmp_path):
    with pytest.raises(UserError, match=r"pretrained_weights='.*' is a folder; give a file of weights"):
        read_state_dict(tmp_path)
    (tmp_path / "student_ema.pth").touch()
    with pytest.raises(UserError, match=r"is a folder; give a file, '.*student_ema.pth'"):
        read_state_dict(tmp_path)


def test_names_that_are_not_utf_8_are_read_and_too_long_ones_explained(tmp_path):
    path = tmp_path / os.fsdecode(b"w\xff.pth")
    with path.open("wb") as file:
        torch.save(WEIGHTS, file)
    assert_are_the_weights(read_state_dict(path))
    with pytest.raises(UserError, match="names in UTF-8 alone; rename it"):
        read_state_dict(path.rename(path.with_suffix(".safetensors")))
    with pytest.raises(UserError, match=r"pretrained_weights='w{300}': .*File name too long"):
        read_state_dict("w" * 300)


def test_a_truncated_file_is_refused(weights_file):
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"w.pth' cannot be read"):
        read_state_dict(weights_file)


def test_a_download_is_kept_and_not_repeated(server, weights_file, hub_dir, capfd):
    server.files["/models/w.pth"] = weights_file.read_bytes()
    sha256 = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    for _ in range(2):
        assert_are_the_weights(read_state_dict(f"{server.url}/models/w.pth", sha256=sha256))
    assert server.requests == ["/models/w.pth"]
    assert "w.pth" in capfd.readouterr().err, "no progress was shown"
    kept = [path for path in hub_dir.rglob("*") if path.is_file() and not path.name.startswith(".lock-")]
    assert [path.name for path in kept] == ["w.pth"]


def test_equal_names_at_different_places_are_different_files(server, weights_file, tmp_path):
    other = {"a": torch.zeros(1)}
    torch.save(other, tmp_path / "other.pth")
    server.files |= {
        "/one/model.pth": weights_file.read_bytes(),
        "/two/model.pth": (tmp_path / "other.pth").read_bytes(),
        "/one/model.pth?version=2": (tmp_path / "other.pth").read_bytes(),
    }
    assert_are_the_weights(read_state_dict(f"{server.url}/one/model.pth"))
    for path in ("/two/model.pth", "/one/model.pth?version=2"):
        assert read_state_dict(server.url + path).keys() == other.keys()


@pytest.mark.parametrize("problem", ["truncated", "other content", "not found"])
def test_a_failed_download_leaves_no_file_and_says_where_to_put_one(server, weights_file, hub_dir, problem):
    url = f"{server.url}/w.pth"
    server.truncate = problem == "truncated"
    if problem != "not found":
        server.files["/w.pth"] = weights_file.read_bytes()
    with pytest.raises(UserError) as caught:
        read_state_dict(url, sha256="0" * 64 if problem == "other content" else None)
    message = str(caught.value)
    assert url in message
    assert not [path for path in hub_dir.rglob("*") if path.is_file() and not path.name.startswith(".lock-")]
    if problem == "other content":
        assert "0" * 64 in message
        return
    assert {"truncated": "ended after", "not found": "404"}[problem] in message
    by_hand = Path(message.split("'")[-2])
    by_hand.write_bytes(weights_file.read_bytes())
    assert_are_the_weights(read_state_dict(url))


def test_an_unreachable_host_is_named():
    url = "http://127.0.0.1:9/capi.pth"
    with pytest.raises(
        UserError, match=r"http://127.0.0.1:9/capi.pth could not be downloaded: .*place the file by hand"
    ):
        read_state_dict(url)


def test_processes_that_want_the_same_file_download_it_once(server, weights_file):
    server.files["/w.pth"] = weights_file.read_bytes()
    threads = [threading.Thread(target=read_state_dict, args=(f"{server.url}/w.pth",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests == ["/w.pth"]


def test_only_final_norms_of_a_backbone_have_had_other_names():
    renamed = {
        "encoder.norm.weight": "enc_norm.weight",
        "backbone.decoder.norm.bias": "backbone.dec_norm.bias",
        "optimizers.a.backbone.encoder.norm.weight.exp_avg": "optimizers.a.backbone.enc_norm.weight.exp_avg",
    }
    for key, name in renamed.items():
        assert published_key(key) == name
    for key in (
        "predictor.decoder.norm.weight",
        "student.predictor.decoder.norm.weight",
        "backbone.encoder.norm1.bias",
    ):
        assert published_key(key) == key
