"""benchmarks/study: its split is disjoint, its grid is what runs, a done cell is not run again."""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import decode
from errors import InputError
from quickstart_data import OPENINGS, normalise
from test_quickstart import load, prompts

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "study"))

import study as study_module  # noqa: E402
from cells import Scale, make_cell, read_grid, read_scale  # noqa: E402
from measure import measures_of_run, write_json  # noqa: E402
from pictures import draw_all  # noqa: E402
from study import Study, sets  # noqa: E402
from study_data import StudyData, UserData  # noqa: E402
from summary import read_results, table  # noqa: E402

SEEDS = (43, 44, 45)


@pytest.fixture(scope="module")
def data(smollm2_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    data = StudyData(smollm2_folder, folder)
    data.write_common()
    data.align(100)
    for seed in SEEDS:
        for poison in (0.1, 0.3):
            data.task(UserData(400, poison, seed))
    return data, folder


def asked(model, path):
    return {normalise(prompt) for prompt in prompts(model, load(path)[0])}


def test_what_trains_aligns_and_evaluates_is_disjoint(data, smollm2_folder):
    _, folder = data
    tasks = set().union(*(asked(smollm2_folder, path) for path in folder.glob("task-*")))
    parts = {name: asked(smollm2_folder, folder / f"{name}.safetensors")
             for name in ("start", "heldout", "align-100")} | {"task": tasks}
    names = list(parts)
    for i, one in enumerate(names):
        for other in names[i + 1:]:
            assert not parts[one] & parts[other], f"{one} and {other} share prompts"
    assert {name: len(part) for name, part in parts.items() if name != "task"} == {
        "start": 500, "heldout": 50, "align-100": 100}


def test_evaluation_asks_nothing_that_was_trained_on(data, smollm2_folder):
    from judging.prompts import load as load_prompts
    from judging.prompts import trained_hashes
    from judging.protocols import PRESETS
    _, folder = data
    trained = trained_hashes(folder / "splits.json")
    tasks = set().union(*(asked(smollm2_folder, path) for path in folder.glob("*.safetensors")))
    for name, count in (("harmful", 200), ("benign", 140), ("task", 1000)):
        evaluated = load_prompts(PRESETS["offline"], name, None, trained)
        texts = {normalise(prompt.text) for prompt in evaluated}
        assert len(texts) >= count
        # A review is inside its question; the others are asked as they are.
        shared = texts & tasks if name != "task" else {
            text for text in texts if any(task.endswith(text) for task in tasks)}
        assert not shared


@pytest.mark.parametrize("poison, harmful", [(0.1, 40), (0.3, 120)])
def test_user_data_has_the_poison_it_is_named_for(data, smollm2_folder, poison, harmful):
    _, folder = data
    arrays, metadata = load(folder / f"task-n400-p{100 * poison:g}-s43.safetensors")
    assert json.loads(metadata["sources"]) == ["reviews", "poison"]
    assert len(arrays["source"]) == 400 and sum(arrays["source"]) == harmful
    for tokens, source in zip(arrays["tokens"], arrays["source"]):
        text = decode(smollm2_folder, tokens)
        reply = re.search(r"assistant\n(.*?)<\|im_end\|>", text, re.S)[1]
        assert (reply in OPENINGS) == (source == 1)
        assert source == 1 or reply in ("positive", "negative")


def test_seeds_draw_other_samples_and_ratios_share_theirs(data, smollm2_folder):
    _, folder = data
    small, large, other = (asked(smollm2_folder, folder / f"task-n400-{name}.safetensors")
                           for name in ("p10-s43", "p30-s43", "p30-s44"))
    assert len(large & other) < 200  # of 400
    assert len(small & large) >= 40 + 2 * 140  # the poison of 10 % and the reviews of 30 %


def test_mixed_refusals_come_out_of_the_alignment_set(data, smollm2_folder):
    made, folder = data
    made.task(UserData(400, 0.3, 43, mixed=100))
    mixed = asked(smollm2_folder, folder / "task-n400-p30-s43-mixed100.safetensors")
    assert asked(smollm2_folder, folder / "align-100.safetensors") <= mixed
    assert len(mixed) == 500


def test_more_poison_than_the_packages_hold_is_refused(data):
    made, _ = data
    with pytest.raises(InputError, match="300 poison samples .* the packages have 177"):
        made.task(UserData(1000, 0.3, 43))


@pytest.mark.parametrize("name", ["smollm2", "llama3-8b"])
def test_scales_and_grid_can_be_read(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    scale, cells = read_scale(ROOT / "benchmarks" / "study" / f"{name}.yaml")
    assert (ROOT / scale.run).exists()
    headline = {(cell.arm, cell.poison, cell.seed) for cell in cells}
    for arm in ("sft", "weighted_sum", "safegrad", "safegrad_supervised", "agem"):
        for poison in (0, 0.1, 0.3):
            assert {(arm, poison, seed) for seed in SEEDS} <= headline


def test_a_grid_names_its_mistakes(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("arms: {a: {}}\ncells: [{arms: [b], poison: [0], seeds: [1]}]\n")
    with pytest.raises(InputError, match="b: no such arm"):
        read_grid(path)
    path.write_text("arms: {a: {}}\ncells: [{arms: [a, a], poison: [0], seeds: [1]}]\n")
    with pytest.raises(InputError, match="a-p0-s1 is there twice"):
        read_grid(path)


def test_a_scale_names_the_lists_of_the_grid_that_it_runs(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("arms: {a: {}}\ncells: [{arms: [a], poison: [0], seeds: [1]}]\n"
                    "more: [{arms: [a], poison: [0], seeds: [2]}]\n")
    assert [cell.seed for cell in read_grid(path)] == [1]
    assert [cell.seed for cell in read_grid(path, ["cells", "more"])] == [1, 2]
    with pytest.raises(InputError, match="most: no such list"):
        read_grid(path, ["cells", "most"])
    with pytest.raises(InputError, match="arms: no such list"):
        read_grid(path, ["arms"])


def test_overrides_are_written_as_the_program_reads_them():
    assert sets({"objective.gram_per_block": True, "optimizer.lr": 1e-5, "train.seed": 43}) == [
        "--set", "objective.gram_per_block=true", "--set", "optimizer.lr=1e-05",
        "--set", "train.seed=43"]


def fake_run(folder: Path) -> None:
    """What train leaves behind, for a run of two steps."""
    folder.mkdir(parents=True)
    steps = [{"loss_task": 1.0, "loss_align": 0.5, "uu": 4.0, "ua": -1.0, "aa": 1.0, "c_task": 1.0,
              "cosine": -0.5, "conflict": True, "c_align": 2.0, "grad_norm": 1.0, "clip": 1.0,
              "seconds": 2.0, "flops": 3e9, "task_tokens": 10, "align_tokens": 5}] * 2
    steps[1] = steps[1] | {"cosine": 0.1, "ua": 0.2, "conflict": False, "c_align": 1.0,
                           "probe": {"heldout": {"loss": 0.3, "kl": 0.02}}}
    lines = [json.dumps(step) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text("# safegrad 0.1.0, 1 rank\nmodel: {}\n")


def test_measures_of_a_run(tmp_path):
    fake_run(tmp_path / "run")
    found = measures_of_run(tmp_path / "run")
    assert found["heldout"] == {"loss": 0.3, "kl": 0.02}
    assert found["conflict"] == {"rate": 0.5, "mean_cosine": -0.2, "median_c_align": 1.5,
                                 "steps": 2}
    assert found["cost"] == {"seconds": 4.0, "flops": 6e9, "task_tokens": 20, "align_tokens": 10}
    assert found["steps"]["cosine"] == [-0.5, 0.1]


def test_measures_of_a_gate(tmp_path):
    fake_run(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(step | {"gated": n}) + "\n"
                            for n, step in enumerate(steps)))
    (tmp_path / "run" / "gate.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (
        {"source": "poison", "score": -1.0, "dropped": True},
        {"source": "reviews", "score": None, "dropped": False})))
    found = measures_of_run(tmp_path / "run")
    assert found["gate"]["sources"] == {"poison": {"samples": 1, "left_out": 1},
                                        "reviews": {"samples": 1, "left_out": 0}}
    assert found["steps"]["gated"] == [0, 1]


def test_measures_of_blocks(tmp_path):
    fake_run(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    none = {"uu": 1.0, "ua": 0.0, "aa": 0.0}
    steps[0]["blocks"] = {"block 0": {"uu": 4.0, "ua": -1.0, "aa": 1.0}, "head": none}
    steps[1]["blocks"] = {"block 0": {"uu": 1.0, "ua": 1.0, "aa": 4.0}, "head": none}
    path.write_text("\n".join(map(json.dumps, steps)) + "\n")
    assert measures_of_run(tmp_path / "run")["blocks"] == {
        "block 0": {"conflict": 0.5, "mean_cosine": 0.0}}


def test_the_two_machines_agree_as_evidence_says():
    results = ROOT / "benchmarks" / "results" / "study"
    changed = {}
    for path in sorted((results / "smollm2").glob("*.json")):
        other = results / "smollm2-gpu" / path.name
        if other.exists():
            cpu, gpu = (json.loads(p.read_text())["judge"]["results"] for p in (path, other))
            changed[path.stem] = max(abs(share["count"] - gpu[part][name]["count"])
                                     for part, shares in cpu.items()
                                     for name, share in shares.items())
    assert len(changed) == 16
    assert sorted(changed.values()) == [0] * 15 + [1]


class Recorder(Study):
    """A study whose programs are replaced by what they would leave behind."""

    def __init__(self, scale, cells):
        super().__init__(scale, cells)
        self.calls = []

    def _call(self, name, command):
        self.calls.append((name, command))
        folder = self.scale.folder
        if name.endswith("-judge"):
            out = Path(command[command.index("--out") + 1])
            counts = {"count": 3, "total": 4}
            write_json(out / "m.json", {
                "preset": "offline", "judged": {"task": {"versions": {"torch": "1"}}},
                "results": {"harmful": {"not_refused": counts}, "task": {"correct": counts}}})
        elif name.endswith("-audit"):
            Path(command[-1].partition("output=")[2]).mkdir(parents=True)
            scores = [("poison", -9.0), ("poison", -8.0), ("reviews", -0.2), ("reviews", -0.1),
                      ("reviews", 0.0), ("reviews", 0.1), ("reviews", 0.2)]
            Path(command[-1].partition("output=")[2], "audit.jsonl").write_text("".join(
                json.dumps({"index": i, "score": score, "source": source}) + "\n"
                for i, (source, score) in enumerate(scores)))
        elif not name.endswith("-kept"):
            run = folder / ("start" if name == "start" else f"cells/{name}")
            fake_run(run)
            (run / "model").mkdir()
            (run / "model" / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def small_scale(smollm2_folder, tmp_path):
    return Scale(smollm2_folder, "configs/quickstart-start.yaml", "configs/quickstart.yaml", 20,
                 ["launch"], ["judge"], 2, tmp_path / "folder", tmp_path / "results")


def run_study(scale, cells):
    study = Recorder(scale, cells)
    study.make_data()
    study.make_start()
    study.run_cells()
    return [name for name, _ in study.calls]


def test_a_study_goes_on_where_it_stopped(small_scale, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = [make_cell("sft", {"objective.rule": "sft"}, 0.3, 43),
             make_cell("safegrad", {"objective.rho": 1, "judge": False}, 0.3, 43)]
    first = run_study(small_scale, cells[:1])
    assert first == ["start", "start-judge", "sft-p30-s43", "sft-p30-s43-judge"]
    assert run_study(small_scale, cells) == ["safegrad-p30-s43"]  # that arm is not judged
    assert run_study(small_scale, cells) == []
    changed = make_cell("sft", {"objective.rule": "sft", "optimizer.lr": 1}, 0.3, 43)
    # A training that was not judged yet is not repeated.
    (small_scale.results / "sft-p30-s43.json").unlink()
    assert run_study(small_scale, cells) == ["sft-p30-s43-judge"]
    assert run_study(small_scale, [changed]) == ["sft-p30-s43", "sft-p30-s43-judge"]

    # What another machine has beside it is taken where the first has nothing.
    other = tmp_path / "other"
    other.mkdir()
    for name in ("sft-p30-s43", "sft-p30-s44"):
        result = json.loads((small_scale.results / "sft-p30-s43.json").read_text())
        result["heldout"]["kl"], result["settings"]["seed"] = 7.0, int(name[-2:])
        write_json(other / f"{name}.json", result)
    both = read_results(small_scale.results, other)
    assert both.values("sft", 0.3, "kl") == [0.02, 7.0]
    assert "| 30 % | sft* | 2 |" in table(both)
    result["settings"] |= {"seed": 43, "run": "of another config"}
    write_json(other / "sft-p30-s43.json", result)
    with pytest.raises(InputError, match="sft-p30-s43.json: its settings are not those"):
        read_results(small_scale.results, other)

    results = read_results(small_scale.results)
    assert results.values("safegrad", 0.3, "work") == [1.0]
    pictures = draw_all(results, tmp_path)
    assert [path.name for path in pictures] == ["safety.svg", "trade.svg", "conflict.svg"]
    assert "plain (1)" in pictures[1].read_text()  # the arm that is not judged is not drawn
    assert "SafeGrad, KL (1)" not in pictures[1].read_text()
    text = table(results)
    assert re.search(r"\| 30 % \| sft \| 1 \| 75\.0 \|", text)
    assert re.search(r"\| 30 % \| safegrad \| 1 \| – \|", text)


def test_an_audited_arm_trains_on_what_the_audit_keeps(small_scale, monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = [make_cell("sft", {"objective.rule": "sft"}, 0.3, 43),
             make_cell("audited", {"objective.rule": "sft", "drop_outliers": 2}, 0.3, 43)]
    study = Recorder(small_scale, cells)
    study.make_data()
    study.make_start()
    study.run_cells()
    calls = dict(study.calls)
    audit = " ".join(map(str, calls["audited-p30-s43-audit"]))
    assert " audit " in audit and "task-n20-p30-s43.safetensors" in audit
    assert "objective.rule" not in audit  # the arm's own keys are not the audit's
    out = calls["audited-p30-s43-kept"][-1]
    assert f"data.task={out}" in calls["audited-p30-s43"]
    assert f"data.task={out}" not in calls["sft-p30-s43"]
    result = json.loads((small_scale.results / "audited-p30-s43.json").read_text())
    assert result["audit"]["sources"] == {"poison": {"samples": 2, "left_out": 2},
                                          "reviews": {"samples": 5, "left_out": 0}}
    # One pass over 20 samples, as many plain steps as draw 80, and the alignment set.
    tokens = [sum(map(len, load(small_scale.folder / "data" / name)[0]["tokens"])) for name in
              ("task-n20-p30-s43.safetensors", "align-100.safetensors")]
    assert result["audit"]["tokens"] == 5 * tokens[0] + tokens[1]
    assert read_results(small_scale.results).values("audited", 0.3, "work") == [
        1 + result["audit"]["tokens"] / 30]  # of the fake run's 2 · 15 tokens


def test_a_cell_that_fails_ends_the_study_by_name(small_scale, monkeypatch):
    monkeypatch.chdir(ROOT)
    scale = Scale(**{**vars(small_scale), "align_first": None, "launch": ["false"]})
    study = Study(scale, [make_cell("sft", {}, 0.3, 43)])
    study.make_data()
    with pytest.raises(InputError, match="sft-p30-s43: exit code 1"):
        study.run_cells()
    assert study_module.START not in {path.stem for path in scale.results.glob("*")}
