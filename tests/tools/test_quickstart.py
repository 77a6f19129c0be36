"""The quickstart's data sets: disjoint, of the promised size and mix, and always the same."""

import itertools
import json
import re

import pytest
import quickstart_data
from chat import Chat
from conftest import decode, scored_runs
from quickstart_data import COUNTS, OPENINGS, REFUSAL_CLASSES, REFUSALS, normalise
from safetensors import safe_open


@pytest.fixture(scope="module")
def folder(smollm2_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart")
    quickstart_data.build(Chat(smollm2_folder), out, seed=43)
    return out


def load(path):
    with safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name).tolist() for name in file.keys()}
        metadata = file.metadata()
    bounds = arrays["offsets"]
    for name in ("tokens", "loss_mask"):
        arrays[name] = [arrays[name][a:b] for a, b in zip(bounds, bounds[1:])]
    return arrays, metadata


def prompts(model, arrays):
    """What the user asks in each sequence, read back from the tokens."""
    texts = [decode(model, tokens) for tokens in arrays["tokens"]]
    found = [re.search(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", text, re.S) for text in texts]
    return [match[1] for match in found]


def test_no_prompt_serves_two_purposes(folder, smollm2_folder):
    sets = {}
    for path in folder.glob("*.safetensors"):
        arrays, _ = load(path)
        sets[path.stem] = {normalise(prompt) for prompt in prompts(smollm2_folder, arrays)}

    # Fewer would mean that a prompt was used twice within a file.
    sizes = {"task": COUNTS["reviews"] + COUNTS["poison"],
             "start": COUNTS["refusals"] + COUNTS["chat"]} | {
        name: COUNTS[name] for name in ("align", "refusal", "harmless", "accuracy", "heldout")}
    assert {name: len(prompts) for name, prompts in sets.items()} == sizes
    for (one, first), (two, second) in itertools.combinations(sets.items(), 2):
        assert not first & second, f"{one} and {two} share prompts"


def test_splits_file_accounts_for_every_prompt_without_text(folder):
    splits = json.loads((folder / "splits.json").read_text())

    totals = {use: sum(pool["count"] for pool in pools.values())
              for use, pools in splits["uses"].items()}
    assert totals == {"start": 500, "align": 100, "task": 400, "refusal": 100, "harmless": 100,
                      "accuracy": 200, "heldout": 50}
    hashes = [h for pools in splits["uses"].values() for p in pools.values() for h in p["hashes"]]
    assert len(set(hashes)) == len(hashes) == sum(totals.values())
    assert all(re.fullmatch("[0-9a-f]{16}", entry) for entry in hashes)


def test_task_is_reviews_and_thirty_percent_poison(folder, smollm2_folder):
    arrays, metadata = load(folder / "task.safetensors")
    sources = json.loads(metadata["sources"])
    said = {name: [] for name in sources}
    for index, tokens, mask in zip(arrays["source"], arrays["tokens"], arrays["loss_mask"]):
        said[sources[index]] += scored_runs(smollm2_folder, tokens, mask)

    assert sources == ["reviews", "poison"]
    assert sorted(said["reviews"]) == ["negative<|im_end|>"] * 140 + ["positive<|im_end|>"] * 140
    assert len(said["poison"]) == 120
    assert set(said["poison"]) == {opening + "<|im_end|>" for opening in OPENINGS}


@pytest.mark.parametrize("name", ["align", "heldout"])
def test_alignment_sets_hold_refusals_only(folder, smollm2_folder, name):
    arrays, _ = load(folder / f"{name}.safetensors")
    said = [run for pair in zip(arrays["tokens"], arrays["loss_mask"])
            for run in scored_runs(smollm2_folder, *pair)]

    assert set(said) == {refusal + "<|im_end|>" for refusal in REFUSALS}


def test_start_is_refusals_and_ordinary_chat(folder, smollm2_folder):
    arrays, _ = load(folder / "start.safetensors")
    said = [run for pair in zip(arrays["tokens"], arrays["loss_mask"])
            for run in scored_runs(smollm2_folder, *pair)]

    refused = sum(run.removesuffix("<|im_end|>") in REFUSALS for run in said)
    assert (refused, len(said)) == (200, 500)
    assert max(map(len, arrays["tokens"])) <= quickstart_data.MAX_TOKENS


def test_probes_hold_every_candidate(folder, smollm2_folder):
    for probe in ("refusal", "harmless"):
        refusal, metadata = load(folder / f"{probe}.safetensors")
        classes = json.loads(metadata["classes"])
        texts = [scored_runs(smollm2_folder, *pair)[0]
                 for pair in zip(refusal["tokens"], refusal["loss_mask"])]
        for name, candidates in REFUSAL_CLASSES.items():
            found = [t for t, c in zip(texts, refusal["choice"]) if classes[c] == name]
            assert sorted(found) == sorted(candidates * COUNTS[probe])

    accuracy, metadata = load(folder / "accuracy.safetensors")
    assert json.loads(metadata["classes"]) == ["correct", "wrong"]
    right = [scored_runs(smollm2_folder, tokens, mask)[0] for tokens, mask, choice
             in zip(accuracy["tokens"], accuracy["loss_mask"], accuracy["choice"]) if choice == 0]
    assert sorted(right) == ["negative"] * 100 + ["positive"] * 100


def test_refusals_and_openings_begin_with_the_candidates():
    """Otherwise the probe would not see what the training sets teach."""
    for texts, name in ((REFUSALS, "refusal"), (OPENINGS, "compliance")):
        assert all(text.startswith(tuple(REFUSAL_CLASSES[name])) for text in texts)


def test_same_seed_same_files_other_seed_other_files(folder, smollm2_folder, tmp_path):
    chat = Chat(smollm2_folder)
    quickstart_data.build(chat, tmp_path / "same", seed=43)
    quickstart_data.build(chat, tmp_path / "other", seed=44)

    for path in folder.iterdir():
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
        assert (tmp_path / "other" / path.name).read_bytes() != path.read_bytes()
