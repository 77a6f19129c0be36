"""tokenfile.py: writes token files, the form in which the trainer reads every data set.

A token file is a safetensors file (the reader and its checks are in src/core/token_file.h):

    tokens i32[T]  loss_mask u8[T]  offsets i64[M+1]     M sequences end to end
    source i32[M]                   optional, index into metadata "sources"
    group i32[M], choice i32[M]     optional, choice groups; choice indexes metadata "classes"

A mask of 1 marks a token that the model has to predict.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Sequence as List
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import InputError

FORMAT = "safegrad.tokens/1"


@dataclass(frozen=True)
class Sequence:
    """Tokens of one sample and their mask; `group` and `choice` only in a choice probe."""

    tokens: List[int]
    mask: List[int]
    source: int | None = None
    group: int | None = None
    choice: int | None = None


def write_token_file(
    path: Path,
    sequences: List[Sequence],
    tokenizer_sha256: str,
    template_sha256: str,
    sources: List[str] = (),
    classes: List[str] = (),
) -> None:
    """Checks the sequences as the trainer will, then writes `path`; it is whole or untouched."""
    _check(path, sequences, sources, classes)
    lengths = [len(sequence.tokens) for sequence in sequences]
    arrays = {
        "tokens": np.concatenate([np.asarray(s.tokens, np.int32) for s in sequences]),
        "loss_mask": np.concatenate([np.asarray(s.mask, np.uint8) for s in sequences]),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    }
    metadata = {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer_sha256,
        "template_sha256": template_sha256,
    }
    if sources:
        arrays["source"] = np.asarray([s.source for s in sequences], np.int32)
        metadata["sources"] = json.dumps(list(sources))
    if classes:
        arrays["group"] = np.asarray([s.group for s in sequences], np.int32)
        arrays["choice"] = np.asarray([s.choice for s in sequences], np.int32)
        metadata["classes"] = json.dumps(list(classes))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(_safetensors(arrays, metadata))
    os.replace(temporary, path)


def _safetensors(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """The file's bytes. The safetensors package orders metadata at random (0.8.0); here the same
    content always gives the same bytes.
    """
    names = {"int64": "I64", "int32": "I32", "uint8": "U8"}
    header: dict = {"__metadata__": metadata}
    data = b""
    # Wide types first, so that every array starts at a multiple of its element size.
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])):
        content = array.astype(array.dtype.newbyteorder("<")).tobytes()
        header[name] = {"dtype": names[array.dtype.name], "shape": list(array.shape),
                        "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _check(
    path: Path, sequences: List[Sequence], sources: List[str], classes: List[str]
) -> None:
    if not sequences:
        raise InputError(f"{path}: there are no sequences to write")
    for number, sequence in enumerate(sequences):
        problem = _problem(sequence, len(sources), len(classes))
        if problem:
            raise InputError(f"{path}: sequence {number}: {problem}")
    if classes:
        _check_groups(path, sequences)


def _problem(sequence: Sequence, sources: int, classes: int) -> str | None:
    tokens, mask = sequence.tokens, sequence.mask
    if len(tokens) != len(mask):
        return f"{len(tokens)} tokens but a mask of {len(mask)}"
    if not set(mask) <= {0, 1}:
        return f"mask holds {sorted(set(mask) - {0, 1})}, allowed are 0 and 1"
    if not any(mask):
        return "no token is scored, at least one must be"
    if mask[0]:
        return "its first token is scored, but nothing comes before it to predict it from"
    if min(tokens) < 0:
        return f"token id {min(tokens)} is negative"
    if not _index_fits(sequence.source, sources):
        return f"source is {sequence.source}, but {sources} sources are named"
    if not _index_fits(sequence.choice, classes):
        return f"choice is {sequence.choice}, but {classes} classes are named"
    if (sequence.group is None) != (classes == 0):
        return f"group is {sequence.group}, but {classes} classes are named"
    return None


def _index_fits(index: int | None, size: int) -> bool:
    return index is None if size == 0 else index is not None and 0 <= index < size


def _check_groups(path: Path, sequences: List[Sequence]) -> None:
    for expected, (group, members) in enumerate(
        itertools.groupby(sequences, key=lambda s: s.group)
    ):
        members = list(members)
        if group != expected:
            raise InputError(
                f"{path}: group {group} comes where group {expected} should; groups are adjacent"
                " and count up from 0"
            )
        if len({member.choice for member in members}) < 2:
            raise InputError(f"{path}: group {group} holds one class, at least two are needed")
        if len({tuple(member.tokens[: list(member.mask).index(1)]) for member in members}) > 1:
            raise InputError(f"{path}: group {group}: its prompts differ, they must be the same")


def summary_table(parts: dict[str, List[Sequence]]) -> str:
    """A line for each part: sequences, tokens, scored tokens, median and greatest length."""
    rows = [("", "sequences", "tokens", "scored", "median", "longest")]
    for name, sequences in parts.items():
        lengths = [len(sequence.tokens) for sequence in sequences]
        scored = sum(sum(sequence.mask) for sequence in sequences)
        median = statistics.median(lengths) if lengths else 0
        cells = (len(lengths), sum(lengths), scored, int(median), max(lengths, default=0))
        rows.append((name, *(f"{cell:,}" for cell in cells)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join(cells))
    return "\n".join(lines)
