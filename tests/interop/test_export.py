"""transformers and peft load what safegrad wrote, and find the same probabilities.

The probability of one token is its logit and the logarithm of the sum over all others: the token
files with one scored token compare logits, at several places of several sequences.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import smollm2
from ranks import run
from tiny_job import ROOT, choices, sequences, write_job, write_tokens
from tokenfile import Sequence

GOLD = ROOT / "tests" / "gold" / "data"
SCORE = Path(__file__).with_name("score.py")
KINDS = {  # what is trained and how it is written
    "full": ["optimizer.lr=1e-3"],
    "adapter": ["optimizer.lr=1e-2", "model.lora.rank=4"],
    "merged": ["optimizer.lr=1e-2", "model.lora.rank=4", "model.lora.merge=true"],
}
# llama3: its scaling of rotary embeddings, untied; llama_tied: tied, bfloat16 weights; qwen2: the
# biases of q, k, v; qwen3: norms of q and k, an index of shards.
EXPORTS = [("llama3", "full"), ("llama3", "adapter"), ("llama_tied", "full"),
           ("llama_tied", "adapter"), ("llama_tied", "merged"), ("qwen2", "adapter"),
           ("qwen3", "merged"), ("smollm2", "full"), ("smollm2", "adapter")]
PLACES = 6  # token files with one scored token
TOLERANCE = 1e-5  # relative; float32 on both sides, sums in another order: 1e-6 was seen


def write_smollm2_job(folder: Path) -> None:
    """The tiny job, with SmolLM2 instead of the tiny model."""
    smollm2.build()
    write_job(folder)  # its data has the small numbers of its vocabulary, which are tokens here too
    shutil.rmtree(folder / "model")
    (folder / "model").symlink_to(smollm2.DEFAULT_OUT)
    for name, content in {"task": sequences(12, 1, 49152), "align": sequences(8, 2, 49152),
                          "choice": choices(2)}.items():
        write_tokens(folder, name, content, ["first", "second"] if name == "choice" else ())


def write_places(folder: Path) -> list[str]:
    """Token files with one scored token each; their names."""
    vocabulary = json.loads((folder / "model/config.json").read_text())["vocab_size"]
    names = []
    for i, sequence in enumerate(sequences(PLACES, 3, vocabulary)):
        scored = 1 + i * (len(sequence.tokens) - 2) // (PLACES - 1)  # from the first to the last
        mask = [int(t == scored) for t in range(len(sequence.tokens))]
        names.append(f"place{i}")
        write_tokens(folder, names[-1], [Sequence(sequence.tokens, mask)])
    return names


@dataclass
class Scored:
    """The losses of one export; how far training moved it from the start model."""

    ours: list[float]
    theirs: list[float]
    kl: float
    is_adapter: bool


def train_and_evaluate(folder: Path, kind: str) -> tuple[list[str], list[float]]:
    """The names of the token files, and the losses that safegrad finds for the export."""
    settings = [f"--set={s}" for s in ["train.steps=2", *KINDS[kind]]]
    run(folder, "train", "config.yaml", "--quiet", *settings)
    names = ["align", *write_places(folder)]
    probes = "".join(f"  - {{name: {name}, file: {name}.safetensors}}\n" for name in names)
    (folder / "evaluate.yaml").write_text(
        f"model: {{path: out/model}}\nprobe:\n{probes}output: none\n")
    found = json.loads(run(folder, "evaluate", "evaluate.yaml", "--quiet"))
    return names, [found[name]["loss"] for name in names]


@pytest.fixture(scope="module")
def scored(outside, tmp_path_factory) -> dict[tuple[str, str], Scored]:
    """All exports, scored by one process: importing transformers takes longer than the rest."""
    jobs, wanted = {}, []
    for model, kind in EXPORTS:
        folder = tmp_path_factory.mktemp(f"{model}-{kind}")
        if model == "smollm2":
            write_smollm2_job(folder)
        else:
            write_job(folder, GOLD / model)
        names, ours = train_and_evaluate(folder, kind)
        jobs[model, kind] = (folder, ours)
        wanted += [[str(folder), "out/model", f"{name}.safetensors"] for name in names]

    losses = iter(json.loads(outside.run(SCORE, text=json.dumps(wanted))))

    results = {}
    for job, (folder, ours) in jobs.items():
        theirs = [next(losses) for _ in ours]
        last_step = (folder / "out/metrics.jsonl").read_text().splitlines()[-1]
        results[job] = Scored(ours, theirs, json.loads(last_step)["probe"]["heldout"]["kl"],
                              (folder / "out/model/adapter_config.json").exists())
        shutil.rmtree(folder / "out")  # up to half a gigabyte
    return results


@pytest.mark.parametrize("export", EXPORTS, ids="-".join)
def test_transformers_finds_the_same_probabilities(scored, export):
    result = scored[export]

    assert result.ours == pytest.approx(result.theirs, rel=TOLERANCE)

    assert len(set(result.ours)) == PLACES + 1  # they are different places
    # A forgotten adapter would be seen: at this KL, log p is off by some √(2 KL) > 0.01.
    assert result.kl > 1e-4
    assert result.is_adapter == (export[1] == "adapter")
