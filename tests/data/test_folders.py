"""A folder's training and test files are kept apart, as on the Hugging Face hub."""

import json

import pytest

from dpo_eqx import data


def fill(folder, names):
    """Files with one record each, whose prompt is the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"prompt": name, "chosen": "a", "rejected": "b"}))
    return folder


def read(folder, **settings):
    return [record["prompt"] for record in data.read(folder, **settings)]


TRAIN, TEST = "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"
FOLDERS = [
    ([TEST, TRAIN], [TRAIN], [TEST]),
    (["prefs-test.jsonl", "prefs_train.jsonl"], ["prefs_train.jsonl"], ["prefs-test.jsonl"]),
    (["test/a.jsonl", "train/a.jsonl"], ["train/a.jsonl"], ["test/a.jsonl"]),
    (["a.jsonl", "eval.jsonl"], ["a.jsonl"], ["eval.jsonl"]),
    (
        ["training_data/test.jsonl", "training_data/b.jsonl"],
        ["training_data/b.jsonl"],
        ["training_data/test.jsonl"],
    ),
    # Words within words say nothing.
    (["contest.jsonl", "latest.jsonl"], ["contest.jsonl", "latest.jsonl"], None),
    (["testing.jsonl"], ["testing.jsonl"], ["testing.jsonl"]),
]


@pytest.mark.parametrize(("names", "train", "test"), FOLDERS)
def test_names_say_the_split(names, train, test, tmp_path):
    folder = fill(tmp_path / "test set", names)
    assert read(folder) == train
    if test is None:
        with pytest.raises(ValueError, match=r"`split` must be one of \['train'\]"):
            data.read(folder, split="test")
    else:
        assert read(folder, split="test") == test


@pytest.mark.parametrize("name", ["split", "subset"])
def test_one_file_has_no_splits(name, tmp_path):
    fill(tmp_path, ["a.jsonl"])
    with pytest.raises(ValueError, match=f"`{name}` is for a folder .* got 'test' for the file"):
        data.read(tmp_path / "a.jsonl", **{name: "test"})


@pytest.mark.parametrize("name", ["split", "subset"])
def test_a_list_has_no_splits(name):
    with pytest.raises(ValueError, match=f"`{name}` is for a folder .* for an iterable"):
        data.read([{"prompt": "a", "chosen": "b", "rejected": "c"}], **{name: "test"})


def test_a_saved_split_is_read_under_its_name_only(tmp_path):
    import datasets

    for split in (None, "test"):
        rows = datasets.Dataset.from_list(
            [{"prompt": "p", "chosen": "a", "rejected": "b"}], split=split
        )
        rows.save_to_disk(tmp_path / str(split))
        assert read(tmp_path / str(split)) == ["p"]
        with pytest.raises(ValueError, match=f"one data set of {split or 'no split'}"):
            data.read(tmp_path / str(split), split="train")
    assert read(tmp_path / "test", split="test") == ["p"]


def test_it_says_which_files_are_read(tmp_path):
    text = str(data.read(fill(tmp_path, [TRAIN, TEST, "notes.csv"])))
    assert f"(train: {TRAIN}; not read: {TEST}, notes.csv): explicit prompt" in text


def test_without_train_the_split_must_be_named(tmp_path):
    fill(tmp_path, [f"data/{name}-00000-of-00001.jsonl" for name in ("train_prefs", "test_prefs")])
    with pytest.raises(ValueError, match=r"`split` must be one of \['test_prefs', 'train_prefs'\]"):
        data.read(tmp_path)
    assert read(tmp_path, split="train_prefs") == ["data/train_prefs-00000-of-00001.jsonl"]


def test_hidden_files_and_metadata_are_never_read(tmp_path):
    hidden = ["._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", ".git/x.json"]
    fill(tmp_path, ["a.jsonl", "dataset_infos.json", "dataset_info.json", *hidden])
    assert read(tmp_path) == ["a.jsonl"]
    assert "not read" not in str(data.read(tmp_path))
    only_hidden = fill(tmp_path / "hidden", hidden)
    with pytest.raises(FileNotFoundError, match="is neither"):
        data.read(only_hidden)


README = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: one/*
  - split: held
    path: [two/b.jsonl, "two/c*"]
- config_name: other
  data_files: two/b.jsonl
---
# Text
"""


def test_the_list_in_the_readme_decides(tmp_path):
    fill(tmp_path, ["one/a.jsonl", "one/test.jsonl", "two/b.jsonl", "two/c.jsonl", "d.jsonl"])
    (tmp_path / "README.md").write_text(README)
    assert read(tmp_path) == ["one/a.jsonl", "one/test.jsonl"]
    assert read(tmp_path, split="held") == ["two/b.jsonl", "two/c.jsonl"]
    assert read(tmp_path, subset="other") == ["two/b.jsonl"]
    with pytest.raises(ValueError, match=r"`subset` must be one of \['main', 'other'\]"):
        data.read(tmp_path, subset="third")
    (tmp_path / "README.md").write_text(README.replace("one/*", "three/*"))
    with pytest.raises(ValueError, match=r"README.md lists the files \['three/\*'\]"):
        data.read(tmp_path)


def test_the_cache_follows_the_files_that_are_read(tmp_path):
    folder, cache = fill(tmp_path / "set", [TRAIN, TEST]), tmp_path / "cache"
    for split, name in [("train", TRAIN), ("test", TEST), (None, TRAIN)]:
        rows, _ = data.tokenize(data.read(folder, split=split), data.ByteTokenizer(), cache=cache)
        assert data.ByteTokenizer().decode(rows[0]["prompt_ids"]) == name
