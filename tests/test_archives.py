"""archives.py, and what sources.py makes of it: tar and zip files read in place, remote places, mixtures."""

import functools
import http.server
import io
import json
import logging
import os
import pickle
import re
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from finetunes import write_coco, write_masks
from samples import MemoryDataset, MemoryStream, encode, folder_url, ids, make_config, photo, take, through_json

import finetune_classification
from data import EpochOrder, MixtureOrder
from labels import open_labelled
from reading import archives
from reading.archives import expand_braces, split_place
from reading.sources import BadImageError, Mixture, is_folder, is_on_disk, make_dataset, make_mixture, share_out
from tasks.coco import open_coco
from train_capi import main, make_loader
from utils import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of two classes, with a long name, a hidden file and labels beside the images."""
    root = tmp_path_factory.mktemp("images")
    for index in range(10):
        path = root / "ab"[index % 2] / f"{'long' * 40 * (index == 3)}{index}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(photo(index)))
        path.with_suffix(".json").write_text("{}")
    (root / "a" / "._0.png").write_bytes(b"of macOS")
    return root


def files_of(root):
    return [path for path in sorted(root.rglob("*")) if path.is_file()]


def write_tar(path, root, files=None, **kwargs):
    with tarfile.open(path, "w", **kwargs) as archive:
        for file in reversed(files or files_of(root)):  # archives are in any order
            archive.add(file, str(file.relative_to(root)))
    return path


def write_zip(path, root, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in reversed(files_of(root)):
            info = zipfile.ZipInfo.from_file(file, file.relative_to(root))
            info.compress_type = method
            with archive.open(info, "w", force_zip64=True) as member:  # which has extra fields in its header
                member.write(file.read_bytes())
    return path


def old(path):
    os.utime(path, (1e9, 1e9))
    return path


def contents(dataset, below):
    """Name relative to a place, and pixels, of every image."""
    samples = [dataset[index] for index in range(len(dataset))]
    return [(sample.name.removeprefix(f"{below}/"), sample.pixels().numpy().tobytes()) for sample in samples]


def refusal(url):
    with pytest.raises(UserError) as error:
        make_dataset(url)
    assert str(error.value).startswith("data.dataset="), error.value
    return str(error.value)


# --------------------------------------------------------------------------------------------------- archives


MAKERS = {
    "gnu": functools.partial(write_tar, format=tarfile.GNU_FORMAT),
    "pax": functools.partial(write_tar, format=tarfile.PAX_FORMAT),
    "stored": write_zip,
    "deflated": functools.partial(write_zip, method=zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_an_archive_is_what_the_folder_is_that_it_was_made_of(root, kind, tmp_path, caplog):
    archive = tmp_path / ("all.zip" if kind in ("stored", "deflated") else "all.tar")
    MAKERS[kind](archive, root)
    folder = make_dataset(str(root))
    with caplog.at_level(logging.INFO):
        dataset = make_dataset(str(archive))
    assert contents(dataset, archive) == contents(folder, root)
    assert "left out: 10 .json" in caplog.text
    assert contents(pickle.loads(pickle.dumps(dataset)), archive) == contents(folder, root), "for worker processes"
    within = make_dataset(f"{archive}/a")
    assert contents(within, f"{archive}/a") == contents(make_dataset(str(root / "a")), root / "a")
    straight = take(make_loader(make_config(f"data.dataset={root}")), 6)
    config = make_config(f"data.dataset={archive}")
    assert take(make_loader(config), 6) == straight
    with make_loader(config) as loader:
        first = [next(loader) for _ in range(3)]
        position = through_json(loader.state_dict())
    assert len(first) == 3
    assert take(make_loader(config, position=position), 3) == straight[3:], "resumed past an epoch"


def test_forked_workers_read_what_none_reads_though_the_archive_is_open(root, tmp_path):
    archive = write_tar(tmp_path / "all.tar", root)
    straight = take(make_loader(make_config(f"data.dataset={archive}")), 6)
    config = make_config(f"data.dataset={archive}", workers=2)
    assert take(make_loader(config, start_method="fork"), 6) == straight


def test_shards_are_named_by_braces_a_folder_or_one_by_one(root, tmp_path):
    files = files_of(root)
    for number in range(3):
        write_tar(tmp_path / f"shard-{number:03d}.tar", root, files[number::3])
    braces = make_dataset(f"{tmp_path}/shard-{{000..002}}.tar")
    names = [name for name, _ in contents(braces, tmp_path)]
    assert names == sorted(names)
    assert [name.split("/", 1)[1] for name in names] != sorted(name.split("/", 1)[1] for name in names)
    assert contents(make_dataset(str(tmp_path)), tmp_path) == contents(braces, tmp_path)
    assert make_dataset(str(tmp_path)).fingerprint() == braces.fingerprint()
    assert len(braces) == 10
    listed = make_mixture([f"{tmp_path}/shard-{number:03d}.tar" for number in range(3)], key="data.dataset")
    config = make_config(f"data.dataset={tmp_path}")
    assert take(make_loader(config, dataset=listed), 4) == take(make_loader(config), 4), "a list is their union"
    message = refusal(f"{tmp_path}/shard-{{000..004}}.tar")
    assert f"2 of 5 archives cannot be opened, first {tmp_path}/shard-003.tar: there is no such file" in message


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("x", ["x"]),
        ("s-{8..11}.tar", ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]),
        ("s-{008..010}", ["s-008", "s-009", "s-010"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
    ],
)
def test_braces_stand_for_names(text, names):
    assert expand_braces(text) == names


@pytest.mark.parametrize("text", ["{a..c}", "{3..1}", "{x}", "{0..1", "0}", "{0..9999999}", "{0..9999}{0..9999}", "{}"])
def test_wrong_braces_are_refused(text):
    assert text in refusal(f"/data/{text}.tar")


def test_a_tar_file_whose_first_name_begins_as_a_zip_file_does_is_a_tar_file(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "PK.png").write_bytes(encode(photo(0)))
    assert len(make_dataset(str(write_tar(tmp_path / "x.tar", tmp_path / "images")))) == 1


def test_a_name_with_braces_that_is_there_is_taken_as_it_is(root, tmp_path):
    assert len(make_dataset(str(write_tar(tmp_path / "{0..3}.tar", root)))) == 10


@pytest.mark.parametrize(
    ("place", "split"),
    [
        ("/d/all.tar", ("/d/all.tar", "")),
        ("/d/all.ZIP/x/y/", ("/d/all.ZIP", "x/y")),
        ("s3://b/all.tar/x", ("s3://b/all.tar", "x")),
        ("https://h/all.tar?key=1/2", ("https://h/all.tar?key=1/2", "")),
        ("/d/all.tarx", None),
        ("/d/x", None),
    ],
)
def test_a_place_may_go_on_within_an_archive(place, split):
    assert split_place(place) == split


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_that_is_cut_short_anywhere_is_named(root, kind, tmp_path):
    archive = (write_tar if kind == "tar" else write_zip)(tmp_path / f"all.{kind}", root)
    whole, cut = archive.read_bytes(), tmp_path / f"cut.{kind}"
    # What ends a tar file are zeros, of which one block is enough.
    end = whole.rstrip(b"\0").__len__() if kind == "tar" else len(whole) - 1
    for size in sorted({*range(0, end, 512), *np.random.default_rng(0).integers(0, end, 40).tolist(), end}):
        cut.write_bytes(whole[:size])
        message = refusal(str(cut))
        assert str(cut) in message.removeprefix(f"data.dataset={cut}"), (size, message)
        assert "copy it again" in message, (size, message)


def test_a_damaged_header_does_not_end_a_tar_file_in_silence(root, tmp_path):
    archive = write_tar(tmp_path / "all.tar", root)
    with tarfile.open(archive) as opened:
        middle = opened.getmembers()[8].offset
    with archive.open("r+b") as file:
        file.seek(middle)
        file.write(b"x" * 512)
    message = refusal(str(archive))
    assert f"{archive} is damaged" in message
    assert "copy" in message


def test_archives_damaged_at_random_give_errors_of_ours_or_bad_images(root, tmp_path):
    rng = np.random.default_rng(0)
    for kind, make in (("tar", write_tar), ("zip", functools.partial(write_zip, method=zipfile.ZIP_DEFLATED))):
        whole = make(tmp_path / f"all.{kind}", root).read_bytes()
        for number in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, len(whole), 12):
                damaged[place] = rng.integers(256)
            path = tmp_path / f"{number}.{kind}"
            path.write_bytes(damaged)
            try:
                dataset = make_dataset(str(path))
            except UserError as error:
                assert str(path) in str(error)
                continue
            for index in range(len(dataset)):
                try:
                    dataset[index].pixels()
                except BadImageError as error:
                    assert str(path) in error.name


def test_a_damaged_member_is_counted_and_named_like_a_damaged_file(root, tmp_path):
    archive = write_zip(tmp_path / "all.zip", root)
    with zipfile.ZipFile(archive) as opened:
        start = next(info.header_offset for info in opened.infolist() if info.filename == "a/4.png")
    with archive.open("r+b") as file:  # within its pixels: Pillow alone would not always notice
        file.seek(start + 200)
        file.write(b"\0\0\0\0")
    loader = make_loader(
        make_config(f"data.dataset={archive}", "data.max_bad_fraction=1"), bad_files_path=tmp_path / "bad.jsonl"
    )
    shown = ids(loader, 5)
    assert len(shown) == 20
    (record,) = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    assert record["file"] == f"{archive}/a/4.png"
    assert "checksum" in record["reason"]


def test_what_cannot_be_read_in_place_is_refused_with_a_remedy(root, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as opened:
        opened.add(root, ".")
    for path in (tmp_path / "all.tar.gz", (tmp_path / "all.tar.gz").rename(tmp_path / "named.tar")):
        assert "is compressed as a whole" in refusal(str(path))
        assert "gunzip" in refusal(str(path))
    message = refusal(str(write_zip(tmp_path / "lzma.zip", root, zipfile.ZIP_LZMA)))
    assert "is compressed by method 14 of zip" in message
    assert "zip -0" in message
    secret = bytearray(write_zip(tmp_path / "secret.zip", root).read_bytes())
    secret[secret.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "secret.zip").write_bytes(secret)
    assert "secret.zip is encrypted" in refusal(str(tmp_path / "secret.zip"))
    archive = write_tar(tmp_path / "all.tar", root)
    assert f"no images below c in {archive}" in refusal(f"{archive}/c")
    assert "cache= is for remote places" in refusal(f"custom://Images?root='{archive}'&cache='/x'")
    assert "cache= is for remote places" in refusal(f"custom://Images?root='{root}'&cache='/x'")
    assert "several folders are a list" in refusal(f"{root}/{{a,b}}")
    assert f"no images below images in {archive}" in refusal(f"custom://Segmentation?root='{archive}'")
    assert "copy them, and give" in refusal("custom://Segmentation?root='s3://bucket/x'")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A folder of label images and one of annotations, and the archives of all or parts of them."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "all").mkdir()
    train = write_masks(folder / "all") / "train"
    write_coco(folder / "coco")
    for unused in (train / "masks", folder / "coco" / "part"):  # so that numbers differ
        shutil.copy(unused / "0.png", unused / "00.png")
    old(write_zip(folder / "all.zip", folder / "all"))
    write_tar(folder / "train.tar", train)
    for kind in ("images", "masks"):
        write_tar(train / f"{kind}.tar", train / kind)
    write_zip(folder / "coco.zip", folder / "coco", zipfile.ZIP_DEFLATED)
    return folder


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ("root='{}/all.zip/train'", True),
        ("root='{}/train.tar'", False),
        ("root='{}/all/train'&images='images.tar'&masks='masks.tar'", True),
        ("root='{}/all/train'&masks='masks.tar'", True),
    ],
)
def test_label_images_in_archives_are_those_of_the_folder(labelled, place, names):
    plain = make_dataset(f"custom://Segmentation?root='{labelled}/all/train'")
    url = f"custom://Segmentation?{place.format(labelled)}"
    packed = pickle.loads(pickle.dumps(make_dataset(url)))
    assert is_folder(url) and len(packed) == len(plain) > 1
    for one, other in zip(packed, plain, strict=True):
        assert one.read() == other.read()
        assert np.array_equal(one.target(), other.target())
    assert packed.class_names == (plain.class_names if names else [])
    assert packed.ignore_labels == (plain.ignore_labels if names else [255])
    assert packed.fingerprint() == make_dataset(url).fingerprint() != plain.fingerprint()


def test_what_is_wrong_with_archived_label_images_is_named(labelled, tmp_path):
    train = labelled / "all" / "train"
    first = train / "masks" / "0.png"
    archive = write_tar(tmp_path / "x.tar", train, [p for p in files_of(train) if p != first and p.suffix == ".png"])
    assert f"1 images have no mask of the same name in {archive}/masks, such as {first.name}" in refusal(
        f"custom://Segmentation?root='{archive}'"
    )
    damaged = bytearray(first.read_bytes())
    damaged[60] ^= 255
    content = (labelled / "all.zip").read_bytes()
    (tmp_path / "bad.zip").write_bytes(content.replace(first.read_bytes(), damaged))  # its copy too
    sample = make_dataset(f"custom://Segmentation?root='{tmp_path}/bad.zip/train'")[0]
    sample.read()
    with pytest.raises(BadImageError, match=r"label: .*checksum"):
        sample.target()
    (tmp_path / "classes.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"x\.tar.*classes\.txt cannot be read: .*as UTF-8"):
        make_dataset(f"custom://Segmentation?root='{write_tar(tmp_path / 'x.tar', train)}'")


def test_annotated_images_in_archives_are_those_of_the_folder(labelled):
    annotations = f"annotations='{labelled}/coco/annotations.json'"
    plain = open_coco(str(labelled / "coco"), "x", masks=True)
    url = f"custom://COCO?images='{labelled}/coco.zip'&{annotations}"
    packed = pickle.loads(pickle.dumps(open_coco(url, "x", masks=True))).with_objects()
    assert len(packed) == len(plain.with_objects()) > 1
    for one, other in zip(packed, plain.with_objects(), strict=True):
        assert one.read() == other.read()
        assert torch.equal(one.target().boxes, other.target().boxes)
    assert packed.fingerprint() != plain.with_objects().fingerprint()
    with pytest.raises(UserError, match=r"are not in .*coco\.zip/part, .*file_name='part/0\.png'.* called '0\.png'"):
        open_coco(f"custom://COCO?images='{labelled}/coco.zip/part'&{annotations}", "x", masks=True)
    with pytest.raises(UserError, match=r"coco\.zip is no folder; unpack the annotations"):
        open_coco(f"{labelled}/coco.zip", "x", masks=True)


def test_links_in_a_tar_file_are_counted_and_a_later_member_replaces_an_earlier_one(tmp_path, caplog):
    first, second = encode(photo(0)), encode(photo(1))
    with tarfile.open(tmp_path / "x.tar", "w") as opened:
        for name, content in (("./x.png", first), ("y.png", first), ("x.png", second), ("a/.cache/h.png", first)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("z.png")
        link.type, link.linkname = tarfile.SYMTYPE, "y.png"
        opened.addfile(link)
    with caplog.at_level(logging.INFO):
        dataset = make_dataset(str(tmp_path / "x.tar"))
    assert [Path(dataset[index].name).name for index in range(len(dataset))] == ["x.png", "y.png"]
    assert dataset[0].read() == second
    assert "1 .png that are links" in caplog.text


def test_hard_links_in_a_tar_file_are_the_images_that_they_lead_to(root, tmp_path, caplog):
    folder = tmp_path / "images"
    shutil.copytree(root, folder)
    (folder / "a" / "again.png").hardlink_to(folder / "a" / "0.png")
    (folder / "c").mkdir()
    (folder / "c" / "0.png").hardlink_to(folder / "a" / "0.png")
    (folder / "c" / "once.json").hardlink_to(folder / "b" / "1.png")  # the archive has the image as this file
    archive = write_tar(tmp_path / "all.tar", folder)
    with tarfile.open(archive) as opened:
        assert sum(info.islnk() for info in opened) == 3, "the program that writes them has changed"
    with caplog.at_level(logging.INFO):
        dataset = make_dataset(str(archive))
    assert contents(dataset, archive) == contents(make_dataset(str(folder)), folder)
    assert "that are links" not in caplog.text
    with tarfile.open(archive, "a") as opened:
        lost = tarfile.TarInfo("lost.png")
        lost.type, lost.linkname = tarfile.LNKTYPE, "nowhere.png"
        opened.addfile(lost)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert len(make_dataset(str(archive))) == len(dataset)
    assert "1 .png that are links to nothing" in caplog.text


@pytest.mark.parametrize("cached", [False, True])
def test_arrays_are_images_where_there_are_no_others_in_archives_and_remote_places_too(tmp_path, cached, caplog):
    folder, memory = tmp_path / "arrays", fsspec.filesystem("memory")
    for name in ("a/0.npy", "b/1.npy", "b/.hidden.npy"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, np.asarray(photo(len(name))))
    cache = tmp_path / "cache" if cached else None

    def same_everywhere(left_out):
        places = [old(write_tar(tmp_path / "all.tar", folder)), old(write_zip(tmp_path / "all.zip", folder))]
        if memory.exists("/arrays"):
            memory.rm("/arrays", recursive=True)
        for file in files_of(folder):
            memory.pipe(f"/arrays/{file.relative_to(folder)}", file.read_bytes())
        (tmp_path / "set").mkdir(exist_ok=True)
        old(write_tar(tmp_path / "set" / "x.tar", tmp_path, files_of(folder)))
        expected, labels = contents(make_dataset(str(folder)), folder), open_labelled(folder_url(folder), "x").labels
        for place in (folder, *places, "memory://arrays", tmp_path / "set" / "x.tar" / "arrays"):
            for _ in range(2):
                caplog.clear()
                with caplog.at_level(logging.INFO):
                    assert contents(make_dataset(str(place), listing_cache=cache), place) == expected, place
                assert ("left out: 2 .npy" in caplog.text) == left_out, place
            assert torch.equal(open_labelled(folder_url(place), "x").labels, labels), place
        return [name for name, _ in expected]

    assert same_everywhere(left_out=False) == ["a/0.npy", "b/1.npy"]
    (folder / "b" / "2.png").write_bytes(encode(photo(2)))
    (folder / "a" / "3.png").write_bytes(encode(photo(3)))
    assert same_everywhere(left_out=True) == ["a/3.png", "b/2.png"]


def test_archives_are_found_through_links_once_and_compressed_ones_are_named(root, tmp_path, caplog):
    top, elsewhere = tmp_path / "top", tmp_path / "elsewhere"
    for folder in (top / "in", top / ".hidden", elsewhere):
        folder.mkdir(parents=True)
    for path in (top / "in" / "x.tar", top / ".hidden" / "x.tar", elsewhere / "y.tar"):
        write_tar(path, root)
    for name in ("more", "again"):
        (top / name).symlink_to(elsewhere)
    (top / "in" / "up").symlink_to(top)
    (top / "linked.tar").symlink_to(elsewhere / "y.tar")
    (top / "x.tar.gz").touch()
    dataset = make_dataset(str(top))
    found = [str(Path(file.place).relative_to(top)) for file in dataset.files]
    assert found == ["again/y.tar", "in/x.tar", "linked.tar"]
    assert "1 archives are not read: " in caplog.text and "x.tar.gz is compressed as a whole" in caplog.text
    only = tmp_path / "only"
    only.mkdir()
    (only / "more").symlink_to(elsewhere)
    assert len(make_dataset(str(only))) == 10
    (elsewhere / "y.tar").unlink()
    (elsewhere / "z.tgz").touch()
    assert "is compressed as a whole" in refusal(str(only))


def test_archives_beside_images_are_told(root, tmp_path, caplog):
    (tmp_path / "x.png").write_bytes(encode(photo(0)))
    write_tar(tmp_path / "x.tar", root)
    with caplog.at_level(logging.WARNING):
        assert len(make_dataset(str(tmp_path))) == 1
    assert "the 1 archives beside the images are not read" in caplog.text


def test_the_index_is_kept_until_the_archive_changes(root, tmp_path, monkeypatch):
    archive, cache, made = old(write_tar(tmp_path / "all.tar", root)), tmp_path / "cache", []
    index = archives.index
    monkeypatch.setattr(archives, "index", lambda file, names: made.append(file.place) or index(file, names))

    def names():
        return [name for name, _ in contents(make_dataset(str(archive), listing_cache=cache), archive)]

    first = names()
    assert names() == first
    assert len(made) == 1, "the index was not kept"
    (kept,) = cache.glob("*.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    assert names() == first, "a damaged index was used"
    old(write_tar(archive, root, files_of(root / "a")))
    assert [name for name in first if name.startswith("a/")] == names()
    before = len(list(cache.iterdir()))
    write_tar(archive, root, files_of(root / "b"))
    assert [name for name in first if name.startswith("b/")] == names()
    assert len(list(cache.iterdir())) == before, "an archive that may change within the clock's resolution was kept"


def test_an_archive_that_changes_while_it_is_read_stops_the_run(root, tmp_path):
    archive = write_tar(tmp_path / "all.tar", root)
    dataset = make_dataset(str(archive))
    write_tar(archive, root, files_of(root / "a"))
    with pytest.raises(UserError, match=rf"{archive} has changed since it was opened"):
        dataset[0].pixels()


@pytest.mark.parametrize("kind", ["tar", "zip", "shards"])
def test_a_fingerprint_is_that_of_the_content(root, kind, tmp_path):
    def make(name, top):
        (tmp_path / name).mkdir()
        if kind == "zip":
            write_zip(tmp_path / name / "x.zip", top)
        else:
            write_tar(tmp_path / name / "x.tar", top)
            if kind == "shards":
                write_tar(tmp_path / name / "y.tar", top / "a")
        return make_dataset(str(tmp_path / name)).fingerprint()

    changed = tmp_path / "changed"
    for file in files_of(root):
        target = changed / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes()
        target.write_bytes(content[:-20] + b"x" + content[-19:] if target.name == "4.png" else content)
        os.utime(target, (file.stat().st_atime, file.stat().st_mtime))
    assert make("one", root) == make("two", root)
    assert make("three", changed) != make("four", root), "sizes and names are the same, one byte is not"


# ----------------------------------------------------------------------------------------------------- labels


def test_class_folders_in_archives_are_labelled_as_those_of_a_folder(root, tmp_path):
    archive = write_zip(tmp_path / "all.zip", root)
    expected, got = open_labelled(folder_url(root), "test"), open_labelled(folder_url(archive), "test")
    assert torch.equal(got.labels, expected.labels)
    assert got.class_names == expected.class_names == ["a", "b"]
    (tmp_path / "classes").mkdir()
    for name in "ab":  # as ImageNet's training images come: an archive a class
        write_tar(tmp_path / "classes" / f"{name}.tar", root / name)
    by_archive = open_labelled(folder_url(tmp_path / "classes"), "test")
    assert torch.equal(by_archive.labels, expected.labels)
    assert by_archive.class_names == ["a", "b"]
    (tmp_path / "classes" / ".cache").mkdir()
    assert make_dataset(folder_url(tmp_path / "classes")).class_names == ["a", "b"]
    (tmp_path / "classes" / "more").mkdir()  # archives in several folders may have the same name
    assert "have archives and no images; unpack them" in refusal(folder_url(tmp_path / "classes"))
    url = finetune_classification.class_folders(str(archive))
    assert torch.equal(open_labelled(url, "test").labels, expected.labels)
    url = finetune_classification.class_folders("custom://Images?root='s3://b/x.tar'&cache='/scratch'")
    assert url == "torchvision://ImageFolder?root='s3://b/x.tar'&cache='/scratch'"
    fsspec.filesystem("memory").pipe("/flat/x.png", encode(photo(0)))
    with pytest.raises(UserError, match="no image is in a folder"):
        make_dataset(folder_url("memory://flat"))


@pytest.mark.parametrize("make", [write_tar, write_zip])
def test_classes_of_a_folder_in_an_archive_are_the_folders_below_it(root, make, tmp_path):
    expected = open_labelled(folder_url(root), "test")
    (tmp_path / "set" / "val" / "c").mkdir(parents=True)
    (tmp_path / "set" / "val" / "c" / "0.png").write_bytes(encode(photo(0)))
    shutil.copytree(root, tmp_path / "set" / "train")
    archive = make(tmp_path / "all.zip", tmp_path / "set")
    for url in (folder_url(f"{archive}/train"), finetune_classification.class_folders(f"{archive}/train")):
        got = open_labelled(url, "test")
        assert got.class_names == expected.class_names == ["a", "b"]
        assert torch.equal(got.labels, expected.labels)
    for name in "ab":  # an archive a class, all with a folder of the same name
        shutil.copytree(root / name, tmp_path / name / "train")
        make(tmp_path / f"{name}.zip", tmp_path / name)
    by_archive = open_labelled(folder_url(f"{tmp_path}/{{a,b}}.zip/train"), "test")
    assert by_archive.class_names == ["a", "b"] and torch.equal(by_archive.labels, expected.labels)


def test_what_is_here_is_seen_without_opening_it(root, tmp_path):
    write_tar(tmp_path / "s-0.tar", root)
    for url, here in (
        (f"{tmp_path}/s-0.tar", True),
        (f"{tmp_path}/s-{{0..0}}.tar", True),
        (f"{tmp_path}/s-{{0..1}}.tar", False),
        (f"{tmp_path}/s-0.tar/a", True),
        (folder_url(tmp_path / "s-0.tar"), True),
        ("s3://bucket/x.tar", False),
    ):
        assert (is_folder(url), is_on_disk(url, "key")) == (here, here), url
    for url in ("custom://Images?root=5", "hf://parquet?data_files=5", "hf://org/name?cache_dir=5"):
        with pytest.raises(UserError, match=r"^key="):
            is_on_disk(url, "key")


# --------------------------------------------------------------------------------------------- remote places


class _Handler(http.server.SimpleHTTPRequestHandler):
    ranges, refused, log = True, "", None

    def log_message(self, *_):
        pass

    def send_head(self):
        wanted = self.headers.get("Range")
        if self.log is not None:
            self.log.append((self.command, self.path, wanted))
        if self.refused and self.refused in self.path:
            self.send_error(403)
            return None
        path = Path(self.translate_path(self.path))
        if not wanted or not self.ranges or not path.is_file():
            return super().send_head()
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
        part = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{path.stat().st_size}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return io.BytesIO(part)


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Starts servers of a folder; indices of remote archives are kept in a folder of the test's own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    started = []

    def start(folder, **attributes):
        handler = functools.partial(type("Handler", (_Handler,), attributes), directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        started.append(server)
        threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def remote(root, serve, tmp_path):
    """Folder and archives of the same images, and a URL of each."""
    top = tmp_path / "served"
    (top / "shards").mkdir(parents=True)
    write_tar(top / "all.tar", root)
    write_zip(top / "all.zip", root, zipfile.ZIP_DEFLATED)
    for number in range(2):
        write_tar(top / "shards" / f"s-{number}.tar", root, files_of(root)[number::2])
    (top / "folder").symlink_to(root)
    return top, serve


@pytest.mark.parametrize("place", ["all.tar", "all.zip", "folder", "shards", "shards/s-{0..1}.tar", "all.tar/b"])
def test_a_server_gives_what_the_disk_gives(remote, place):
    top, serve = remote
    url = serve(top)
    here, there = make_dataset(f"{top}/{place}"), make_dataset(f"{url}/{place}")
    assert contents(there, url) == contents(here, top)
    assert len(there) in (5, 10)
    assert there.fingerprint() == make_dataset(f"{url}/{place}").fingerprint()


def test_a_bucket_gives_what_the_disk_gives(remote, root):
    memory = fsspec.filesystem("memory")
    for file in files_of(root):
        memory.pipe(f"/bucket/folder/{file.relative_to(root)}", file.read_bytes())
    memory.pipe("/bucket/tars/all.tar", (remote[0] / "all.tar").read_bytes())
    memory.pipe("/bucket/tars/more.tar.zst", b"")
    expected = contents(make_dataset(str(root)), root)
    assert contents(make_dataset("memory://bucket/folder"), "memory://bucket/folder") == expected
    assert contents(make_dataset("memory://bucket/tars"), "memory://bucket/tars/all.tar") == expected
    labelled = open_labelled(folder_url("memory://bucket/folder"), "test")
    assert torch.equal(labelled.labels, open_labelled(folder_url(root), "test").labels)


def test_a_remote_archive_is_indexed_once_and_its_images_are_read_alone(remote):
    top, serve = remote
    log = []
    url = serve(top, log=log)
    make_dataset(f"{url}/all.tar")
    indexed = len(log)
    dataset = make_dataset(f"{url}/all.tar")
    assert [method for method, *_ in log[indexed:]] == ["HEAD"], "it was indexed again"
    start, stored, *_ = dataset.members[4].tolist()
    dataset[4].pixels()
    assert log[-1] == ("GET", "/all.tar", f"bytes={start}-{start + stored - 1}")


def test_a_cache_holds_whole_copies_and_is_read_instead(remote, root, tmp_path, caplog):
    top, serve = remote
    log = []
    url = serve(top, ranges=False, log=log)
    archive = make_dataset(f"custom://Images?root='{url}/all.tar'&cache='{tmp_path}/copies'")
    assert contents(archive, f"{url}/all.tar") == contents(make_dataset(str(root)), root)
    folder = make_dataset(f"custom://Images?root='{url}/folder'&cache='{tmp_path}/copies'")
    first = contents(folder, f"{url}/folder")
    assert len(list((tmp_path / "copies").iterdir())) == 1 + 10, "copies and nothing else"
    log.clear()
    assert contents(folder, f"{url}/folder") == first
    assert contents(archive, f"{url}/all.tar") == first
    assert {method for method, *_ in log} <= {"HEAD"}


def test_a_copy_of_a_listed_image_is_read_without_asking_until_the_image_changes(tmp_path, monkeypatch):
    memory, url = fsspec.filesystem("memory"), f"custom://Images?root='memory://listed'&cache='{tmp_path}'"
    memory.pipe("/listed/x.png", first := encode(photo(0)))
    dataset = make_dataset(url)
    assert dataset[0].read() == first
    asked = []
    with monkeypatch.context() as patched:
        patched.setattr(archives, "file_system", asked.append)
        assert dataset[0].read() == first
    assert not asked
    memory.pipe("/listed/x.png", second := encode(photo(1)))
    assert make_dataset(url)[0].read() == second


def test_a_server_that_gives_no_parts_is_refused_with_a_remedy(remote, monkeypatch):
    top, serve = remote
    monkeypatch.setattr(archives, "REMOTE_BLOCK", 1024)
    message = refusal(f"{serve(top, ranges=False)}/all.tar")
    assert "the server does not give parts of files" in message
    assert "cache='/folder'" in message


def test_a_place_that_does_not_answer_is_asked_again_and_then_stops_the_run(remote, monkeypatch, caplog):
    top, serve = remote
    url = serve(top)
    dataset = make_dataset(f"{url}/all.tar")
    expected = dataset[0].pixels()
    failures = [ConnectionResetError("reset"), TimeoutError()]

    class Failing:
        def cat_file(self, *args, **kwargs):
            if failures:
                raise failures.pop()
            return fsspec.core.url_to_fs(url)[0].cat_file(*args, **kwargs)

    monkeypatch.setattr(archives, "file_system", lambda place: (Failing(), place))
    waited = []
    monkeypatch.setattr(archives.time, "sleep", waited.append)
    assert torch.equal(dataset[0].pixels(), expected)
    assert waited == list(archives.RETRY_S[:2])
    failures += [ConnectionResetError("reset")] * 5
    with pytest.raises(UserError, match=r"all\.tar: cannot be read \(ConnectionResetError: reset\); check the address"):
        dataset[0].pixels()


def test_a_remote_image_that_was_deleted_is_a_bad_image(remote):
    fsspec.filesystem("memory").pipe("/deleted/x.png", encode(photo(0)))
    dataset = make_dataset("memory://deleted")
    fsspec.filesystem("memory").rm("/deleted/x.png")
    with pytest.raises(BadImageError, match=r"memory://deleted/x\.png"):
        dataset[0].pixels()


def test_remote_places_that_cannot_be_read_say_what_is_missing(remote, monkeypatch):
    top, serve = remote
    url = serve(top, refused="all")
    assert "no access (" in (message := refusal(f"{url}/all.tar"))
    assert "credentials" in message
    assert "there is no such file" in refusal(f"{url}/none.tar")
    assert "there are no files below" in refusal(f"{url}/none")
    assert "there are no files below" in refusal("memory://nothing-here")

    def without_package(place):
        raise ImportError("Install s3fs to access S3")

    def without_credentials(place):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(fsspec.core, "url_to_fs", without_package)
    assert "needs the package s3fs: pip install -e '.[remote]'" in refusal("s3://bucket/x.tar")
    assert "needs the package gcsfs: pip install -e '.[remote]'" in refusal("gs://bucket/folder")

    class Refusing:
        info = find = lambda *_, **__: without_credentials("")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda place: (Refusing(), place))
    for place in ("s3://bucket/x.tar", "s3://bucket/folder"):
        assert "AWS_PROFILE" in refusal(place)
        assert "FSSPEC_S3_ANON=true" in refusal(place)
    assert "GOOGLE_APPLICATION_CREDENTIALS" in refusal("gs://bucket/x.tar")


# --------------------------------------------------------------------------------------------------- mixtures


def mixture(*sizes, weights=None, bad=()):
    parts = [MemoryDataset(size, bad if number == 0 else ()) for number, size in enumerate(sizes)]
    return Mixture([f"set {number}" for number in range(len(sizes))], parts, weights)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([3, 1], [7500, 2500]), ([1, 1, 1], [3334, 3333, 3333]), ([0.7, 0.2, 0.1], [7000, 2000, 1000]), ([1e9, 1], None)],
)
def test_shares_are_those_of_the_weights_to_a_ten_thousandth(weights, counts):
    got = share_out(10_000, weights)
    assert sum(got) == 10_000
    assert max(abs(n - 10_000 * w / sum(weights)) for n, w in zip(got, weights, strict=True)) < 1
    assert counts in (got, None)


def test_every_data_set_has_its_share_of_each_block_and_epochs_of_its_own():
    mixed = mixture(7, 3, 40, weights=[5, 1, 14])
    order = MixtureOrder(mixed, seed=5)
    shown = [order.image_at(position) for position in range(20_000)]
    for start in (0, 10_000):
        parts = np.bincount([mixed.part_of(index) for index in shown[start : start + 10_000]])
        assert parts.tolist() == [2500, 500, 7000]
    for part, size in enumerate((7, 3, 40)):
        own = [index - mixed.start_of(part) for index in shown if mixed.part_of(index) == part]
        whole = len(own) // size * size
        epochs = np.reshape(own[:whole], (-1, size))
        assert (np.sort(epochs, axis=1) == np.arange(size)).all(), "an image came twice before another came once"
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    # Spread out, not one data set after the other: about as a fair draw would.
    first = [mixed.part_of(index) == 0 for index in shown[:10_000]]
    assert all(150 < sum(first[start : start + 1000]) < 350 for start in range(0, 10_000, 1000))
    assert MixtureOrder(mixed, seed=5).image_at(12_345) == shown[12_345], "not a function of the position"
    assert [MixtureOrder(mixed, seed=6).image_at(i) for i in range(50)] != shown[:50]


@pytest.mark.parametrize("weights", [None, [2, 1]])
def test_a_mixture_is_the_same_on_any_number_of_ranks_and_resumed(weights):
    mixed = mixture(5, 6, weights=weights)
    straight = ids(make_loader(make_config(batch_size=8), dataset=mixed), 8)
    seed = make_config().train.seed
    order = EpochOrder(11, seed) if weights is None else MixtureOrder(mixed, seed)
    assert straight == [order.image_at(position) for position in range(64)]
    config = make_config(batch_size=4)
    loaders = [make_loader(config, dataset=mixed, rank=rank, world_size=2) for rank in range(2)]
    together = [index for _ in range(3) for loader in loaders for index in next(loader).sample_ids.tolist()]
    position = through_json(loaders[0].state_dict())
    assert together == straight[:24]
    assert ids(make_loader(make_config(batch_size=8), dataset=mixed, position=position), 5) == straight[24:]


def test_a_mixture_without_weights_shows_every_image_once_an_epoch():
    shown = ids(make_loader(make_config(batch_size=11), dataset=mixture(5, 6)), 3)
    assert all(sorted(shown[start : start + 11]) == list(range(11)) for start in (0, 11, 22))
    alone = EpochOrder(11, make_config().train.seed)
    assert shown == [alone.image_at(position) for position in range(33)]


def test_an_unreadable_image_is_replaced_by_one_of_the_same_data_set():
    config = make_config("data.max_bad_fraction=1")
    broken = mixture(6, 6, weights=[1, 1], bad={0, 1, 2})
    whole = mixture(6, 6, weights=[1, 1])
    parts = [
        [mixed.part_of(index) for index in ids(make_loader(config, dataset=mixed), 20)] for mixed in (broken, whole)
    ]
    assert parts[0] == parts[1]


def test_another_mixture_is_told_when_a_run_is_continued(caplog):
    position = through_json(make_loader(make_config(), dataset=mixture(5, 6, weights=[2, 1])).state_dict())
    for changed, told in (
        (mixture(5, 6, weights=[4, 2]), False),
        (mixture(5, 6, weights=[1, 2]), True),
        (mixture(5, 6), True),
        (mixture(6, 5, weights=[2, 1]), True),
        (MemoryDataset(11), True),
    ):
        caplog.clear()
        make_loader(make_config(), dataset=changed, position=position)
        assert ("the order of the images is another one from here on" in caplog.text) == told


def test_what_is_mixed_is_told_before_a_training_and_its_fingerprint_covers_all(root, tmp_path, capsys):
    archive = write_tar(tmp_path / "all.tar", root)
    (tmp_path / "mix.yaml").write_text(f"data: {{dataset: {{{archive}: 3, {root}/a: 1}}}}\n")
    own = [f"train.output_dir={tmp_path}", "train.device=cpu", "efficiency.dataloader_num_workers=0", "evals=null"]
    assert main([str(tmp_path / "mix.yaml"), *own, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 data sets with weights: 15 images" in said
    assert f"75.00% {archive}: 10 images, all of them every 13 images" in said
    assert f"25.00% {root}/a: 5 images, all of them every 20 images" in said

    def of(datasets):
        return make_mixture(datasets, key="data.dataset").fingerprint()

    one, two, other = str(archive), str(root / "a"), str(root / "b")
    prints = [of([one, two]), of({one: 1, two: 1}), of({one: 1, two: 2}), of([one, other]), of([two, one])]
    assert len(set(prints)) == len(prints)
    assert of([one]) == of({one: 5, other: None}) == make_dataset(one).fingerprint(), "one alone is itself"


def test_wrong_mixtures_are_refused(root, monkeypatch):
    def message(*overrides, **kwargs):
        with pytest.raises(UserError) as error:
            make_loader(make_config(*overrides, **kwargs))
        return str(error.value)

    assert "data.dataset=/no/such: the folder /no/such does not exist" in message(f"data.dataset=[{root},/no/such]")
    tiny = f"{root}/b has a share below 1 in 10,000"
    assert tiny in message(f"data.dataset={{{root}/a: 1, {root}/b: 0.00001}}")
    for wrong, what in (("{/a: 0}", "must be above 0"), ("{/a: null}", "must not be empty"),
                        ("[]", "must not be empty"), ("[/a,/a]", "must not have a value twice"),
                        ("{/a: x}", "must be a number")):  # fmt: skip
        assert what in message(f"data.dataset={wrong}")
    monkeypatch.setattr(
        "reading.sources.make_dataset", lambda url, **_: MemoryStream(3) if "hf" in url else MemoryDataset(3)
    )
    assert "hf://x is a stream, and a mixture needs random access" in message("data.dataset=[hf://x,/a]")
    mixed = make_config("data.dataset=[/a,/b]").data
    with pytest.raises(UserError, match="only pretraining mixes several data sets"):
        _ = mixed.only_dataset
