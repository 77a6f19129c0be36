"""The quickstart's table shows what the files say, and refuses files of unfinished runs."""

import json

import pytest
from errors import InputError
from quickstart_table import table

PROBE = {"refusal": {"refusal": 0.5, "compliance": 0.5, "greedy_refusal": 0.25},
         "harmless": {"refusal": 0.4, "greedy_refusal": 0.1}, "accuracy": {"correct": 0.855},
         "heldout": {"kl": 1.2345, "loss": 2.0}}


def write_runs(folder, safegrad_steps):
    start = {"refusal": {"refusal": 1.0, "greedy_refusal": 0.96},
             "harmless": {"greedy_refusal": 0.07}, "accuracy": {"correct": 0.5},
             "heldout": {"loss": 0.4}}
    plain = [{"seconds": 2.0, "conflict": False}, {"seconds": 3.0, "conflict": False,
                                                   "probe": PROBE}]
    for name, text in {"start/evaluation.json": json.dumps(start),
                       "plain/metrics.jsonl": "\n".join(map(json.dumps, plain)) + "\n",
                       "safegrad/metrics.jsonl": "\n".join(map(json.dumps, safegrad_steps)) + "\n",
                       }.items():
        path = folder / name
        path.parent.mkdir()
        path.write_text(text)


def cells_of(text):
    rows = [[cell for cell in line.split("  ") if cell] for line in text.split("\n")]
    return [[cell.strip() for cell in row] for row in rows]


def test_cells_come_from_the_last_probe_and_from_all_steps(tmp_path):
    write_runs(tmp_path, [
        {"seconds": 4.0, "conflict": True, "ua": -1.5, "cosine": -0.3},
        {"seconds": 4.0, "conflict": False, "ua": 0.5, "cosine": 0.1, "probe": PROBE}])

    cells = cells_of(table(tmp_path))

    assert [cell for cell in cells[0] if cell] == ["start", "plain", "SafeGrad"]
    assert cells[1:] == [
        ["harmful prompts refused", "96 %", "25 %", "25 %"],
        ["harmless prompts refused", "7 %", "10 %", "10 %"],
        ["task accuracy", "50.0 %", "85.5 %", "85.5 %"],
        ["held-out KL", "0.000", "1.234", "1.234"],
        ["steps with conflict", "–", "–", "50 %"],
        ["mean cosine of u and a", "–", "–", "-0.10"],
        ["seconds of training", "–", "5", "8"],
    ]


def test_a_skipped_step_is_in_neither_mean(tmp_path):
    """What is skipped has gradients that are not finite: nulls in JSON, and `conflict` false."""
    write_runs(tmp_path, [
        {"seconds": 4.0, "conflict": True, "ua": -1.5, "cosine": -0.3},
        {"seconds": 4.0, "conflict": False, "ua": None, "cosine": None, "skipped": True},
        # Without an alignment gradient, as the first step of a run.
        {"seconds": 4.0, "conflict": False, "ua": 0.0, "cosine": None},
        {"seconds": 4.0, "conflict": True, "ua": -0.5, "cosine": -0.1, "probe": PROBE}])

    cells = cells_of(table(tmp_path))
    assert cells[5:7] == [["steps with conflict", "–", "–", "67 %"],  # 2 of 3
                          ["mean cosine of u and a", "–", "–", "-0.20"]]


def test_a_stopped_run_is_refused(tmp_path):
    write_runs(tmp_path, [{"seconds": 4.0, "conflict": True, "ua": -1.5, "cosine": -0.3}])

    with pytest.raises(InputError, match="safegrad/metrics.jsonl: the last of its 1 steps"):
        table(tmp_path)
