"""audit.py: what an audit found: the worst samples as text, and how well it found known ones."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer

from errors import InputError, run


@dataclass(frozen=True)
class Tokens:
    """A token file's sequences and, where it has them, the source of each."""

    tokens: list[np.ndarray]
    sources: list[str] | None


def read_tokens(path: Path) -> Tokens:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            offsets = file.get_tensor("offsets")
            tokens = file.get_tensor("tokens")
            named = json.loads(metadata.get("sources", "[]"))
            sources = [named[i] for i in file.get_tensor("source")] if named else None
    except Exception as problem:  # safetensors has kinds of its own
        raise InputError(f"{path}: not a token file: {problem}") from problem
    pieces = [tokens[a:b] for a, b in zip(offsets[:-1], offsets[1:])]
    return Tokens(pieces, sources)


def read_audit(path: Path, tokens: Tokens) -> list[dict]:
    """The audit's lines in its order, the worst first; they must be of this token file."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lengths = {line["index"]: line["tokens"] for line in lines}
        for line in lines:
            line["score"] = math.nan if line["score"] is None else float(line["score"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise InputError(f"{path}: not an audit.jsonl of safegrad audit: {problem}") from problem
    expected = {i: len(sequence) for i, sequence in enumerate(tokens.tokens)}
    if lengths != expected or len(lines) != len(expected):
        raise InputError(f"{path}: {len(lines)} samples that are not the {len(expected)} of the"
                         " token file; give the file that was audited")
    return lines


def area_under_curve(bad: np.ndarray, good: np.ndarray) -> float:
    """The chance that a bad sample's score is below a good one's; a tie counts half."""
    order = np.concatenate([bad, good]).argsort(kind="stable")
    values = np.concatenate([bad, good])[order]
    ranks = np.empty(len(values))
    ranks[order] = np.arange(1, len(values) + 1)
    for value in np.unique(values):
        same = order[values == value]
        ranks[same] = ranks[same].mean()
    worse = ranks[: len(bad)].sum() - len(bad) * (len(bad) + 1) / 2
    return float(1 - worse / (len(bad) * len(good)))


def judge(scores: np.ndarray, is_bad: np.ndarray) -> dict[str, float]:
    """How well low scores find the bad samples; a score that is no number is the lowest."""
    scores = np.where(np.isnan(scores), -math.inf, scores)
    count = int(is_bad.sum())
    if count in (0, len(scores)):
        raise InputError(f"{count} of {len(scores)} samples are bad: nothing can be told apart")
    worst = scores.argsort(kind="stable")[:count]
    negative = scores < 0
    return {
        "samples": len(scores),
        "bad": count,
        "auc": area_under_curve(scores[is_bad], scores[~is_bad]),
        "precision": float(is_bad[worst].mean()),  # at the true count, so recall as well
        "below_zero_bad": float(negative[is_bad].mean()),
        "below_zero_good": float(negative[~is_bad].mean()),
    }


def decoder(model: Path):
    """tokens -> text, special tokens included."""
    path = model / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as problem:  # the package raises plain Exception
        raise InputError(f"{path}: not a tokenizer: {problem}") from problem
    return lambda tokens: tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Read an audit.jsonl of `safegrad audit`: show the worst samples and, where"
        " the token file names the sources of its samples, how well the scores find some of them.",
        epilog="example: python tools/audit.py runs/quickstart/safegrad/audit.jsonl"
        " runs/quickstart/data/task.safetensors --bad poison",
    )
    parser.add_argument("audit", type=Path, help="audit.jsonl")
    parser.add_argument("tokens", type=Path, help="the token file that was audited")
    parser.add_argument("--model", type=Path, metavar="FOLDER",
                        help="decode the worst samples with this model's tokenizer")
    parser.add_argument("--top", type=int, default=20, metavar="N",
                        help="samples to show (default: %(default)s)")
    parser.add_argument("--bad", action="append", metavar="SOURCE",
                        help="a source whose samples ought to be found (repeatable): prints AUC and"
                        " precision as JSON")
    arguments = parser.parse_args()
    tokens = read_tokens(arguments.tokens)
    lines = read_audit(arguments.audit, tokens)
    if arguments.bad:
        if tokens.sources is None or not set(arguments.bad) <= set(tokens.sources):
            known = sorted(set(tokens.sources or []))
            raise InputError(f"--bad {' '.join(arguments.bad)}: the sources of {arguments.tokens}"
                             f" are {known}")
        scores = np.array([line["score"] for line in lines])
        is_bad = np.array([tokens.sources[line["index"]] in arguments.bad for line in lines])
        print(json.dumps(judge(scores, is_bad)))
    if arguments.model or not arguments.bad:
        show(lines[: arguments.top], tokens, arguments.model and decoder(arguments.model))


def show(lines: list[dict], tokens: Tokens, decode) -> None:
    for line in lines:
        source = tokens.sources[line["index"]] if tokens.sources else ""
        text = f"  {decode(tokens.tokens[line['index']])!r}" if decode else ""
        sys.stdout.write(f"{line['index']:>8}  {line['score']:>11.4g}  {source}{text}\n")


if __name__ == "__main__":
    run(main)
