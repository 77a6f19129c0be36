#!/usr/bin/env python3
"""make_seeds.py FOLDER: writes small valid inputs for each fuzz target into FOLDER/<target>/.

Only for a start without tests/fuzz/corpus/, which grew out of these. The forms of an input stand at
the end of each tests/fuzz/fuzz_*.cpp and in fuzz_input.h.
"""

import hashlib
import json
import struct
import sys
from pathlib import Path

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1}
REPOSITORY = Path(__file__).resolve().parents[2]


def header_of(tensors, metadata):
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, dtype, shape in tensors:
        count = 1
        for n in shape:
            count *= n
        begin, end = end, end + count * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return json.dumps(header).encode(), end


def both_forms(tensors, metadata, data=None):
    header, size = header_of(tensors, metadata)
    data = bytes(range(1, 256)) * (size // 255 + 1) if data is None else data
    yield header + b"\0" + data[:size]
    yield struct.pack("<Q", len(header)) + header + data[:size]


def safetensors():
    yield from both_forms([("w", "F32", [2, 3]), ("b", "BF16", [5]), ("h", "F16", [3])], {})
    yield from both_forms([("scalar", "I64", []), ("none", "U8", [0, 7])], {"format": "pt"})
    yield from both_forms([("d", "F64", [2, 1, 1]), ("i", "I32", [1])], {"a": "b", "c": "\u00e9"})


def token_file():
    metadata = {"format": "safegrad.tokens/1", "tokenizer_sha256": "a" * 64}
    columns = [
        ("tokens", "I32", [1, 2, 7, 1, 2, 8, 8, 3, 7, 3, 8, 3, 9]),
        ("loss_mask", "U8", [0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1]),
        ("offsets", "I64", [0, 3, 7, 9, 11, 13]),
    ]
    source = [("source", "I32", [0, 1, 0, 1, 1])]
    choices = [("group", "I32", [0, 0, 1, 1, 1]), ("choice", "I32", [0, 1, 2, 1, 2])]
    classes = {"classes": '["refuse", "comply", "other"]'}
    for more, names in [
        ([], {}),
        (source, {"sources": '["user", "poison"]'}),
        (choices, classes),
        (source + choices, {"sources": '["user", "poison"]'} | classes),
    ]:
        chosen = columns + more
        data = b"".join(
            struct.pack("<" + str(len(v)) + {"I32": "i", "U8": "B", "I64": "q"}[d], *v)
            for _, d, v in chosen
        )
        shapes = [(name, dtype, [len(values)]) for name, dtype, values in chosen]
        yield from both_forms(shapes, metadata | names, data)


def config():
    small = b"model: {config: c.json}\noutput: o\n"
    yield small
    yield small + b"\0batch.align_sequences=0\0objective.rule=sft\0model.lora={targets: [q_proj]}"
    yield small + b"\0train.epochs=null\0probe=[{name: a, file: b}]\0optimizer.betas=[0.5, 0.25]"
    yield small + b"\0model.path=m"
    yield b"model: &m {path: m}\ndata: *m\n"
    trainable = b"model:\n  path: m\n  trainable: ['.*norm.*', \"a|b\"]\n"
    yield trainable + b"data: {task: t, align: a}\noutput: o\n"
    for path in sorted((REPOSITORY / "configs").glob("*.yaml")):
        # Comments and blanks say nothing to a parser.
        lines = [line.split(" #")[0].rstrip() for line in path.read_text().splitlines()]
        yield "\n".join(line for line in lines if line and line[0] != "#").encode() + b"\n"


def manifest():
    facts = {
        "format": "safegrad.checkpoint/1",
        "step": 100,
        "updates": 99,
        "ranks": 2,
        "shards": 1,
        "inputs": {"model": "1f", "data.task": "2e"},
        "versions": {"safegrad": "0.1.0", "libtorch": "2.11.0"},
        "config": {"optimizer.lr": "1.0e-05", "output": "runs/x", "model.path": "m\u00e9"},
        "align": {"tokens": 345, "loss": 1.25, "aa": 0.5},
    }
    sums = "b" * 64 + "  shard-00000-of-00001.safetensors\n"
    # Of what fuzz_manifest.cpp puts into the shard.
    right = "{}  shard-00000-of-00001.safetensors\n".format(
        hashlib.sha256(b"the shard").hexdigest()
    )
    newest = "step-000100\n"
    for text, latest in [(sums, newest), (right, newest), (right, "../x"), ("", "")]:
        yield json.dumps(facts, indent=2).encode() + b"\0" + text.encode() + b"\0" + latest.encode()
    facts["shards"] = 2
    yield json.dumps(facts).encode() + b"\0" + right.encode() * 2 + b"\0step-000200\n"


def main():
    for inputs in (safetensors, token_file, config, manifest):
        folder = Path(sys.argv[1]) / inputs.__name__
        folder.mkdir(parents=True, exist_ok=True)
        for i, data in enumerate(inputs()):
            (folder / f"seed-{i}").write_bytes(data)


if __name__ == "__main__":
    main()
