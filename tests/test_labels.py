"""labels.py: reading labels, matching classes, splits, and balanced draws."""

from collections import Counter

import pytest
import torch
from samples import Listed, folder_url, save_colour_folders

from labels import choose_images, choose_rows, open_labelled, open_splits, split_off
from reading.sources import Fields, HubDataset
from utils import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    save_colour_folders(root, train=20, test=5)
    return root


def splits_of(train, test, val=None, val_proportion=0.3, **more):
    return open_splits(train, val, test, val_proportion=val_proportion, num_classes=None, all_classes=True, **more)


# ---------------------------------------------------------------------------------------------------- labels


def test_labels_of_hub_datasets_are_read_at_once(listed):
    import datasets

    features = datasets.Features({"jpg": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])})
    table = datasets.Dataset.from_dict({"jpg": ["missing"] * 3, "label": [1, -1, 0]}, features=features)
    listed["url"] = HubDataset(table, Fields("hf://pets", "jpg", "label"))
    data = open_labelled("url", "train_dataset_name")
    assert data.labels.tolist() == [[1], [-1], [0]]
    assert data.class_names == ["cat", "dog"]
    assert data.labelled.tolist() == [0, 2]


def test_the_column_of_labels_is_asked_for_where_none_is_known(listed):
    import datasets

    table = datasets.Dataset.from_dict({"jpg": ["missing"], "species": [1]})
    listed["url"] = HubDataset(table, Fields("hf://pets", "jpg", None))
    with pytest.raises(UserError, match=r"train_dataset_name=url: needs tgt_field=.* there are: 'jpg', 'species'"):
        open_labelled("url", "train_dataset_name")


@pytest.mark.parametrize("targets", [[[0, 1, 0], [1, 0, 0], [0, 0, 1]], [[1, 0], [0, 1]]])
def test_one_label_for_each_class_is_no_list_of_classes(listed, targets):
    """Else every image would be of classes 0 and 1, and every prediction right."""
    listed["url"] = Listed(targets)
    with pytest.raises(UserError, match=r"url: each image has . labels, all 0 or 1.*\[1, 4\] instead of \["):
        open_labelled("url", "train_dataset_name")
    listed["url"] = Listed([*targets, [2]])
    assert open_labelled("url", "train_dataset_name").labels.max() == 2


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("cat", "a label is 'cat'"),
        (1.5, "a label is '1.5'"),
        (-2, "label -2 is out of range"),
        (True, "a label is 'True'"),
    ],
)
def test_labels_that_are_no_classes_are_named(listed, target, message):
    listed["url"] = Listed([target])
    with pytest.raises(UserError, match="train_dataset_name=url: ") as raised:
        open_labelled("url", "train_dataset_name")
    assert message in str(raised.value)


# -------------------------------------------------------------------------------------------- class matching


def test_class_folders_are_matched_by_name(images, tmp_path):
    for name in ("red", "blue"):  # in a folder of their own, blue is 0 and red is 1
        (tmp_path / "some").mkdir(exist_ok=True)
        (tmp_path / "some" / name).symlink_to(images / "test" / name)
    train, some = folder_url(images / "train"), folder_url(tmp_path / "some")
    test = splits_of(train, some).tests[""]
    assert test.mapping is None, "an image may be taken for one of the third class"
    assert test.data.labels.tolist() == [[0]] * 5 + [[2]] * 5
    restricted = splits_of(train, some, only_test_classes=True).tests[""]
    assert restricted.mapping is not None and restricted.mapping.tolist() == [0, 2]
    assert restricted.data.labels.tolist() == [[0]] * 5 + [[1]] * 5
    splits = splits_of(train, folder_url(images / "test"), val=folder_url(images / "test"))
    assert splits.val_indices.tolist() == list(range(15))
    assert len(splits.fit) == 60


# ---------------------------------------------------------------------------------------------------- splits


def test_a_split_is_a_permutation_and_a_function_of_its_seed():
    kept, held_out = split_off(50, 0.1, seed=3)
    assert len(held_out) == 5
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(50))
    assert torch.equal(split_off(50, 0.1, seed=3)[1], held_out)
    assert not torch.equal(split_off(50, 0.1, seed=4)[1], held_out)
    with pytest.raises(UserError, match="leave none"):
        split_off(1, 0.1, seed=0)


def test_split_is_a_fixed_permutation(images):
    first = splits_of(folder_url(images / "train"), folder_url(images / "test"))
    torch.manual_seed(1)
    again = splits_of(folder_url(images / "train"), folder_url(images / "test"))
    assert torch.equal(first.val_indices, again.val_indices)
    assert sorted([*first.fit.tolist(), *first.val_indices.tolist()]) == list(range(60))
    assert len(first.val_indices) == 18


@pytest.mark.parametrize(("proportion", "num_val"), [(0.02, 1), (0.1, 2), (0.98, 19)])
def test_the_split_is_by_class_where_a_random_one_would_miss_a_class(listed, proportion, num_val, caplog):
    caplog.set_level("INFO")
    listed["train"] = listed["test"] = Listed([0] * 20 + [1] * 20 + [2] * 20 + ([] if proportion == 0.02 else [3] * 2))
    splits = splits_of("train", "test", val_proportion=proportion)
    labels = splits.train.labels.squeeze(1)
    counted = Counter(labels[splits.val_indices].tolist())
    assert all(counted[label] == num_val for label in range(3)), counted
    assert {*labels[splits.fit].tolist()} == {*labels[splits.val_indices].tolist()} == {*labels.tolist()}
    assert sorted([*splits.fit.tolist(), *splits.val_indices.tolist()]) == list(range(len(labels)))
    assert torch.equal(splits_of("train", "test", val_proportion=proportion).val_indices, splits.val_indices)
    assert "drawn by class" in caplog.text


def test_the_only_image_of_a_class_is_trained_on(listed, caplog):
    listed["train"] = listed["test"] = Listed([0] * 9 + [1] * 9 + [2])
    splits = splits_of("train", "test")
    assert 18 in splits.fit.tolist()
    assert "1 classes have one image, which is trained on and not validated: 2" in caplog.text


def test_images_of_several_classes_are_split_so_that_each_class_is_on_both_sides(listed):
    listed["train"] = listed["test"] = Listed([[0, 1]] * 20 + [[1, 2]] * 2 + [[0, 2]] + [1] * 10)
    splits = splits_of("train", "test", val_proportion=0.1)
    for part in (splits.fit, splits.val_indices):
        assert {*splits.train.labels[part].flatten().tolist()} >= {0, 1, 2}


# -------------------------------------------------------------------------------------------- balanced draws


def test_few_labels_are_so_many_of_each_class_and_differ_by_seed(images):
    data = open_labelled(folder_url(images / "train"), "train_dataset_name")
    for per_class, expected in ((3, 3), (0.1, 2), (0.001, 1), (1.0, 20)):
        rows = choose_rows(data.labels, per_class, 0, data)
        assert Counter(data.labels[rows].flatten().tolist()) == dict.fromkeys(range(3), expected)
    assert not torch.equal(choose_rows(data.labels, 3, 0, data), choose_rows(data.labels, 3, 1, data))
    assert torch.equal(choose_rows(data.labels, 3, 5, data), choose_rows(data.labels, 3, 5, data))


def test_chosen_images_have_all_classes_equally_often():
    one_each = torch.zeros(30, 4, dtype=torch.bool)
    one_each[:, 0] = True  # a background
    one_each[torch.arange(30), 1 + torch.tensor([0] * 26 + [1, 1, 2, 2])] = True
    for seed in range(5):
        chosen = choose_images(one_each, 3, seed)
        assert one_each[chosen].sum(0).tolist() == [3, 1, 1, 1], "one image of each, however rare a class is"
        assert one_each[choose_images(one_each, 6, seed)].sum(0).tolist() == [6, 2, 2, 2]
        assert choose_images(one_each, 3, seed) == chosen
    assert len({tuple(choose_images(one_each, 3, seed)) for seed in range(9)}) > 3, "seeds choose alike"
    scenes = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    assert {*choose_images(scenes, 2, 0)} == {0, 1}, "two scenes have all four classes"
    assert sorted(choose_images(torch.zeros(4, 2, dtype=torch.bool), 4, 0)) == [0, 1, 2, 3]
