"""What tools/audit.py reads and computes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import audit  # noqa: E402
from errors import InputError  # noqa: E402
from tokenfile import Sequence, write_token_file  # noqa: E402


def counted(bad, good) -> float:
    """By the definition: over all pairs."""
    return float(np.mean([(b < g) + (b == g) / 2 for b in bad for g in good]))


@pytest.mark.parametrize("seed", range(5))
def test_the_area_is_the_share_of_pairs_in_order(seed):
    generator = np.random.default_rng(seed)
    bad, good = generator.integers(6, size=7) - 1.0, generator.integers(6, size=12) + 0.0
    assert math.isclose(audit.area_under_curve(bad, good), counted(bad, good))


def test_the_ends_of_the_area():
    low, high = np.array([-2.0, -1.0]), np.array([0.0, 3.0, 4.0])
    assert audit.area_under_curve(low, high) == 1
    assert audit.area_under_curve(high, low) == 0


def test_precision_is_taken_at_the_true_count_and_nan_is_the_worst():
    scores = np.array([math.nan, -3.0, -2.0, 0.5, 1.0])
    is_bad = np.array([True, False, True, False, False])
    result = audit.judge(scores, is_bad)
    assert result["precision"] == 0.5  # the NaN and the −3 are taken for the two bad ones
    assert result["below_zero_bad"] == 1 and math.isclose(result["below_zero_good"], 1 / 3)


def write(folder: Path, lines: list[dict] | None = None) -> list[str]:
    sequences = [Sequence([1, 2, 3 + i] + [4] * i, [0, 0, 1] + [1] * i, source=i % 2)
                 for i in range(4)]
    write_token_file(folder / "task.safetensors", sequences, "", "", sources=["good", "bad"])
    lines = lines or [{"index": i, "score": s, "loss": 1.0, "tokens": 3 + i, "scored": 1 + i}
                      for i, s in ((1, -2.0), (3, -1.0), (0, 0.0), (2, None))]
    (folder / "audit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(folder / "audit.jsonl"), str(folder / "task.safetensors")]


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "tools/audit.py"), *arguments],
                          capture_output=True, text=True)


def test_the_command_judges_and_shows(tmp_path):
    paths = write(tmp_path)
    ended = command(*paths, "--bad", "bad")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["bad"] == 2
    ended = command(*paths, "--top", "2")
    assert [line.split()[0] for line in ended.stdout.splitlines()] == ["sample", "1", "3"]


def test_what_a_gate_has_never_scored_is_not_the_worst(tmp_path):
    lines = [{"index": i, "score": s, "dropped": i == 1, "tokens": 3 + i, "scored": 1 + i}
             for i, s in ((1, -2.0), (3, -1.0), (0, 0.5), (2, None))]
    audited, task = write(tmp_path, lines)
    result = json.loads(command(audited, task, "--bad", "bad").stdout)
    assert (result["auc"], result["precision"]) == (1, 1)


def test_an_audit_of_other_data_is_refused(tmp_path):
    paths = write(tmp_path, [{"index": 0, "score": 1.0, "loss": 1.0, "tokens": 9, "scored": 1}])
    with pytest.raises(InputError, match="1 samples that are not the 4"):
        audit.read_audit(Path(paths[0]), audit.read_tokens(Path(paths[1])))
    ended = command(*paths)
    assert ended.returncode == 1 and ended.stderr.count("error:") == 1


def test_an_unknown_source_is_refused(tmp_path):
    ended = command(*write(tmp_path), "--bad", "poison")
    assert ended.returncode == 1 and "['bad', 'good']" in ended.stderr


def test_the_rest_is_written_as_it_was(tmp_path):
    audited, task = write(tmp_path)
    out = tmp_path / "rest.safetensors"
    ended = command(audited, task, "--drop", "2", "--out", str(out))
    assert ended.returncode == 0 and "2 of 4 samples" in ended.stdout, ended.stderr
    before, rest = audit.read_tokens(Path(task)), audit.read_tokens(out)
    assert rest.sources == ["good", "good"] and rest.metadata == before.metadata
    for index, tokens, mask in zip((0, 2), rest.tokens, rest.masks, strict=True):
        assert tokens.tolist() == before.tokens[index].tolist()
        assert mask.tolist() == before.masks[index].tolist()


def test_outliers_are_left_out(tmp_path):
    lines = [{"index": i, "score": s, "loss": 1.0, "tokens": 3 + i, "scored": 1 + i}
             for i, s in ((1, None), (3, -9.0), (0, 0.0), (2, 0.1))]
    audited, task = write(tmp_path, lines)
    out = tmp_path / "rest.safetensors"
    ended = command(audited, task, "--drop-outliers", "2", "--out", str(out))
    assert ended.returncode == 0 and "2 of 4 samples" in ended.stdout, ended.stderr
    assert audit.read_tokens(out).sources == ["good", "good"]


def test_outliers_are_told_by_the_many():
    good = np.random.default_rng(1).normal(size=700)
    for share in (0, 0.05, 0.3):  # of bad ones, far below
        bad = np.full(round(700 * share / (1 - share)), -20.0)
        found = audit.outliers(np.concatenate([bad, good]), 3)
        assert found[: len(bad)].all() and found[len(bad):].mean() < 0.01


def test_what_was_never_scored_and_what_is_the_same_is_no_outlier():
    scores = np.array([math.inf, math.inf, -9.0, 0.1, 0.0, -0.1, 0.2])
    assert audit.outliers(scores, 2).tolist() == [False, False, True] + [False] * 4
    assert not audit.outliers(np.array([-9.0, 0.0, 0.0, 0.0]), 2).any()


@pytest.mark.parametrize("arguments, message", [
    (["--drop", "1"], "error: --drop or --drop-outliers, and --out, belong together"),
    (["--drop-outliers", "2"], "error: --drop or --drop-outliers, and --out, belong together"),
    (["--out", "x"], "error: --drop or --drop-outliers, and --out, belong together"),
    (["--drop-outliers", "0", "--out", "x"], "error: --drop-outliers 0: must be above 0"),
    (["--drop", "1", "--drop-outliers", "2", "--out", "x"], "not allowed with argument --drop"),
    (["--drop", "4", "--out", "x"], "error: --drop: 4 would be left out"),
])
def test_dropping_needs_a_number_and_a_file(tmp_path, arguments, message):
    ended = command(*write(tmp_path), *arguments)
    assert ended.returncode in (1, 2) and "error: " in ended.stderr
    assert message in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "x").exists()
