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
from tokenfile import Sequence, write_token_file


@dataclass(frozen=True)
class Tokens:
    """A token file's sequences and, where it has them, the source of each."""

    tokens: list[np.ndarray]
    masks: list[np.ndarray]
    sources: list[str] | None
    metadata: dict[str, str]


def read_tokens(path: Path) -> Tokens:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            offsets = file.get_tensor("offsets")
            tokens, masks = file.get_tensor("tokens"), file.get_tensor("loss_mask")
            named = json.loads(metadata.get("sources", "[]"))
            sources = [named[i] for i in file.get_tensor("source")] if named else None
    except Exception as problem:  # safetensors has kinds of its own
        raise InputError(f"{path}: not a token file: {problem}") from problem
    bounds = list(zip(offsets[:-1], offsets[1:]))
    return Tokens([tokens[a:b] for a, b in bounds], [masks[a:b] for a, b in bounds], sources,
                  metadata)


def read_audit(path: Path, tokens: Tokens) -> list[dict]:
    """The lines in their order, the worst first; they must be of this token file."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lengths = {line["index"]: line["tokens"] for line in lines}
        for line in lines:
            # An audit's null is a loss that broke, a gate's a sample that was never scored.
            null = math.inf if "dropped" in line else math.nan
            line["score"] = null if line["score"] is None else float(line["score"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise InputError(f"{path}: not an audit.jsonl or gate.jsonl of safegrad: {problem}"
                         ) from problem
    expected = {i: len(sequence) for i, sequence in enumerate(tokens.tokens)}
    if lengths != expected or len(lines) != len(expected):
        raise InputError(f"{path}: {len(lines)} samples that are not the {len(expected)} of the"
                         " token file; give the file that was audited")
    return lines


def area_under_curve(bad: np.ndarray, good: np.ndarray) -> float:
    """The chance that a bad sample's score is below a good one's; a tie counts half."""
    _, place, ties = np.unique(np.concatenate([bad, good]), return_inverse=True, return_counts=True)
    ranks = (ties.cumsum() - (ties - 1) / 2)[place]
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


def outliers(scores: np.ndarray, deviations: float) -> np.ndarray:
    """[N] bool: more than `deviations` robust standard deviations (1.4826 times the median absolute
    deviation) below the median; and what is no number. As long as most samples are good, median and
    deviation are theirs, whatever the share of bad ones.
    """
    known = scores[np.isfinite(scores)]
    if not known.size:
        return np.isnan(scores)
    median = np.median(known)
    deviation = 1.4826 * np.median(np.abs(known - median))
    if deviation == 0:  # most are the same: none stands out
        return np.isnan(scores)
    return np.isnan(scores) | (scores < median - deviations * deviation)


def write_without(out: Path, dropped: set[int], tokens: Tokens) -> None:
    """The sequences but those of these indices, in their order, as a token file."""
    names = list(json.loads(tokens.metadata.get("sources", "[]")))
    kept = [
        Sequence(t.tolist(), m.tolist(), names.index(tokens.sources[i]) if names else None)
        for i, (t, m) in enumerate(zip(tokens.tokens, tokens.masks)) if i not in dropped
    ]
    write_token_file(out, kept, tokens.metadata.get("tokenizer_sha256", ""),
                     tokens.metadata.get("template_sha256", ""), sources=names)


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
    parser.add_argument("audit", type=Path, help="audit.jsonl, or gate.jsonl of a run with a gate")
    parser.add_argument("tokens", type=Path, help="the token file that was audited")
    parser.add_argument("--model", type=Path, metavar="FOLDER",
                        help="decode the worst samples with this model's tokenizer")
    parser.add_argument("--top", type=int, default=20, metavar="N",
                        help="samples to show (default: %(default)s)")
    parser.add_argument("--bad", action="append", metavar="SOURCE",
                        help="a source whose samples ought to be found (repeatable): prints AUC and"
                        " precision as JSON")
    leave_out = parser.add_mutually_exclusive_group()
    leave_out.add_argument("--drop", type=int, metavar="N",
                           help="with --out: leave out the N worst")
    leave_out.add_argument("--drop-outliers", type=float, metavar="K",
                           help="with --out: leave out scores more than K robust deviations below"
                           " the median")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="write the rest of the token file here")
    arguments = parser.parse_args()
    drops = arguments.drop is not None or arguments.drop_outliers is not None
    if drops != (arguments.out is not None):
        raise InputError("--drop or --drop-outliers, and --out, belong together: what to leave out,"
                         " and the file of the rest")
    if arguments.drop_outliers is not None and not arguments.drop_outliers > 0:
        raise InputError(f"--drop-outliers {arguments.drop_outliers:g}: must be above 0")
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
    if arguments.out:
        if arguments.drop is None:
            scores = np.array([line["score"] for line in lines])
            count = int(outliers(scores, arguments.drop_outliers).sum())  # the first of the lines
        else:
            count = arguments.drop
        if not 0 <= count < len(lines):
            option = "--drop" if arguments.drop is not None else "--drop-outliers"
            raise InputError(f"{option}: {count} would be left out: there are {len(lines)} samples,"
                             " and at least one must be left")
        worst = {line["index"] for line in lines[:count]}
        write_without(arguments.out, worst, tokens)
        print(f"{arguments.out}: {len(lines) - len(worst)} of {len(lines)} samples")
    elif arguments.model or not arguments.bad:
        show(lines[: arguments.top], tokens, arguments.model and decoder(arguments.model))


def show(lines: list[dict], tokens: Tokens, decode) -> None:
    headings = ["source"] * (tokens.sources is not None) + ["text"] * bool(decode)
    print("  ".join([f"{'sample':>8}", f"{'score':>11}", *headings]))
    for line in lines:
        source = tokens.sources[line["index"]] if tokens.sources else ""
        text = f"  {decode(tokens.tokens[line['index']])!r}" if decode else ""
        sys.stdout.write(f"{line['index']:>8}  {line['score']:>11.4g}  {source}{text}\n")


if __name__ == "__main__":
    run(main)
