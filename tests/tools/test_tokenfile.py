"""Token files hold what was given, and nothing that the trainer would refuse is written."""

import json

import numpy as np
import pytest
from errors import InputError
from safetensors import safe_open
from tokenfile import Sequence, write_token_file


def write(path, sequences, **options):
    write_token_file(path, sequences, "a" * 64, "b" * 64, **options)


def read(path):
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def test_layout_is_the_documented_one(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    write(path, [Sequence([5, 6, 7], [0, 1, 1], source=1), Sequence([8, 9], [0, 1], source=0)],
          sources=["clean", "poison"])

    arrays, metadata = read(path)
    assert {name: array.dtype for name, array in arrays.items()} == {
        "tokens": np.int32, "loss_mask": np.uint8, "offsets": np.int64, "source": np.int32}
    assert arrays["tokens"].tolist() == [5, 6, 7, 8, 9]
    assert arrays["loss_mask"].tolist() == [0, 1, 1, 0, 1]
    assert arrays["offsets"].tolist() == [0, 3, 5]
    assert arrays["source"].tolist() == [1, 0]
    assert metadata == {"format": "safegrad.tokens/1", "tokenizer_sha256": "a" * 64,
                        "template_sha256": "b" * 64, "sources": json.dumps(["clean", "poison"])}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.safetensors"]


def test_choice_groups_are_written(tmp_path):
    path = tmp_path / "x.safetensors"
    group = [Sequence([1, 2], [0, 1], group=0, choice=0),
             Sequence([1, 3], [0, 1], group=0, choice=1)]
    write(path, group, classes=["yes", "no"])

    arrays, metadata = read(path)
    assert arrays["group"].tolist() == [0, 0]
    assert arrays["choice"].tolist() == [0, 1]
    assert json.loads(metadata["classes"]) == ["yes", "no"]
    assert "source" not in arrays and "sources" not in metadata


@pytest.mark.parametrize("sequence, problem", [
    (Sequence([1, 2], [0]), "2 tokens but a mask of 1"),
    (Sequence([1, 2], [1, 1]), "first token is scored"),
    (Sequence([1, 2], [0, 0]), "no token is scored"),
    (Sequence([1, 2], [0, 2]), r"mask holds \[2\]"),
    (Sequence([1, -2], [0, 1]), "token id -2"),
    (Sequence([1, 2], [0, 1], source=0), "source is 0, but 0 sources"),
    (Sequence([1, 2], [0, 1], group=0, choice=0), "choice is 0, but 0 classes"),
])
def test_bad_sequence_is_refused_by_number(tmp_path, sequence, problem):
    path = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match=f"x.safetensors: sequence 1: .*{problem}"):
        write(path, [Sequence([1, 2], [0, 1]), sequence])
    assert not path.exists()


@pytest.mark.parametrize("second, problem", [
    (Sequence([1, 3], [0, 1], group=0, choice=0), "group 0 holds one class"),
    (Sequence([2, 3], [0, 1], group=0, choice=1), "group 0: its prompts differ"),
    (Sequence([1, 3], [0, 1], group=2, choice=1), "group 0 holds one class"),
    (Sequence([1, 3], [0, 1], group=0, choice=2), "choice is 2, but 2 classes"),
])
def test_bad_group_is_refused(tmp_path, second, problem):
    first = Sequence([1, 2], [0, 1], group=0, choice=0)
    with pytest.raises(InputError, match=problem):
        write(tmp_path / "x.safetensors", [first, second], classes=["yes", "no"])


def test_groups_count_up_from_zero(tmp_path):
    group = [Sequence([1, 2], [0, 1], group=1, choice=0),
             Sequence([1, 3], [0, 1], group=1, choice=1)]
    with pytest.raises(InputError, match="group 1 comes where group 0 should"):
        write(tmp_path / "x.safetensors", group, classes=["yes", "no"])


def test_nothing_to_write_is_refused(tmp_path):
    with pytest.raises(InputError, match="no sequences"):
        write(tmp_path / "x.safetensors", [])
