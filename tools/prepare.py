"""prepare.py: makes a token file from data sets as people have them.

Mixes the samples of its sources by ratio, renders them with the model's chat template and writes
what the trainer reads. The same arguments give the same file.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from chat import Chat, Message
from errors import InputError, run
from rows import Row, candidates_of, messages_of, parse_columns, read_rows, with_system
from tokenfile import Sequence, summary_table, write_token_file

# A sample is what is drawn and shuffled as a whole: one sequence, or the candidates of a choice.
Sample = list[Sequence]


@dataclass(frozen=True)
class Source:
    name: str
    path: Path
    ratio: float | None  # share of the mix; None: not given


def parse_source(text: str) -> Source:
    """"[name=]path[:ratio]"; the name is the file's stem if it is not given."""
    name, path, ratio = None, text, None
    if match := re.fullmatch(r"([\w-]+)=(.+)", path):
        name, path = match.groups()
    if match := re.fullmatch(r"(.+):([^:/]*)", path):
        path = match[1]
        try:
            ratio = float(match[2])
        except ValueError:
            ratio = math.nan
        if not 0 < ratio <= 1:
            raise InputError(f"source {text}: ratio is '{match[2]}', must be in (0, 1]")
    return Source(name or Path(path).stem, Path(path), ratio)


def chat_sample(chat: Chat, messages: list[Message]) -> Sample:
    return [Sequence(*chat.encode(messages))]


def choice_sample(
    chat: Chat, messages: list[Message], candidates: list[tuple[int, str]]
) -> Sample:
    """One choice group from (class index, text) candidates; the writer numbers the groups."""
    return [
        Sequence(*chat.encode_choice(messages, text), choice=index) for index, text in candidates
    ]


def shares(sources: list[Source]) -> list[float]:
    """Each source's share of the mix; sources without a ratio divide what the others leave."""
    rest = 1.0 - sum(source.ratio or 0.0 for source in sources)
    free = sum(source.ratio is None for source in sources)
    if rest < -1e-9 or (free and rest < 1e-9) or (not free and rest > 1e-9):
        given = " + ".join(str(s.ratio) for s in sources if s.ratio is not None)
        raise InputError(
            f"ratios: {given} is {1.0 - rest:g}, must be 1, or less with a source that has no ratio"
        )
    return [rest / free if source.ratio is None else source.ratio for source in sources]


def split_total(parts: list[float], total: int) -> list[int]:
    """Whole numbers near parts[i]·total that add up to `total` (largest remainders go up)."""
    # A part of 0.1 of 30 may come as 2.9999…; it must count as 3.
    exact = [round(part * total, 9) for part in parts]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


@dataclass(frozen=True)
class Drawn:
    samples: list[Sample]
    dropped: int  # samples that were too long


def draw(
    source: Source,
    rows: list[Row],
    encode: Callable[[Row], Sample],
    count: int | None,
    max_length: int,
    seed: int,
) -> Drawn:
    """`count` samples of a source (None: all), in an order that depends on seed and name alone."""
    order = list(rows)
    random.Random(f"{seed}/{source.name}").shuffle(order)
    samples, dropped = [], 0
    for row in order:
        if len(samples) == count:
            break
        try:
            sample = encode(row)
        except InputError as error:
            raise row.error(str(error)) from error
        if max(len(sequence.tokens) for sequence in sample) > max_length:
            dropped += 1
        else:
            samples.append(sample)
    if count is not None and len(samples) < count:
        raise InputError(
            f"{source.path}: {count} samples are asked of it, it has {len(samples)} (and {dropped}"
            f" longer than {max_length} tokens); lower --total or its ratio, or raise --max-length"
        )
    return Drawn(samples, dropped)


def mix(parts: list[list[Sample]], seed: int) -> list[Sequence]:
    """All samples of all sources in one shuffled order, marked with their source (and group)."""
    samples = [
        [replace(sequence, source=index) for sequence in sample]
        for index, part in enumerate(parts)
        for sample in part
    ]
    random.Random(f"{seed}/mix").shuffle(samples)
    return [
        sequence if sequence.choice is None else replace(sequence, group=group)
        for group, sample in enumerate(samples)
        for sequence in sample
    ]


def encoder(
    chat: Chat, rows: list[Row], choices: bool, system: str | None
) -> tuple[Callable[[Row], Sample], list[str]]:
    """Checks every row; returns what encodes one, and the names of the classes of a probe."""
    if not choices:
        for row in rows:
            messages_of(row)
        return lambda row: chat_sample(chat, with_system(messages_of(row), system)), []

    names = {name: None for row in rows for name, _ in candidates_of(row)}  # in order of appearance
    classes = list(names)

    def encode(row: Row) -> Sample:
        prompt = with_system([{"role": "user", "content": row.text("prompt")}], system)
        return choice_sample(
            chat, prompt, [(classes.index(name), text) for name, text in candidates_of(row)]
        )

    for row in rows:
        row.text("prompt")
    return encode, classes


def prepare(arguments: argparse.Namespace) -> None:
    sources = [parse_source(text) for text in arguments.sources]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise InputError(f"sources are named {names}; write name=path to tell them apart")
    if arguments.out.suffix != ".safetensors":
        raise InputError(f"--out: {arguments.out} must end in .safetensors")
    if any(source.path.resolve() == arguments.out.resolve() for source in sources):
        raise InputError(f"--out: {arguments.out} is one of the sources; it would be overwritten")
    chat = Chat(arguments.model)
    columns = parse_columns(arguments.columns)
    rows = [read_rows(source.path, columns) for source in sources]
    encode, classes = encoder(chat, sum(rows, []), arguments.choices, arguments.system)

    counts: list[int | None] = [None] * len(sources)
    if arguments.total is not None:
        counts = split_total(shares(sources), arguments.total)
    elif any(source.ratio is not None for source in sources):
        raise InputError("ratios need --total, the number of samples of the whole mix")
    drawn = [
        draw(source, rows[i], encode, counts[i], arguments.max_length, arguments.seed)
        for i, source in enumerate(sources)
    ]
    sequences = mix([part.samples for part in drawn], arguments.seed)
    dropped = sum(part.dropped for part in drawn)
    if dropped and not sequences:
        files = ", ".join(str(source.path) for source in sources)
        raise InputError(f"{files}: all {dropped} samples are longer than {arguments.max_length}"
                         " tokens; raise --max-length")
    write_token_file(arguments.out, sequences, chat.tokenizer_sha256, chat.template_sha256,
                     sources=names, classes=classes)

    print(summary_table({
        name: [s for s in sequences if s.source == i] for i, name in enumerate(names)
    }))
    for name, part in zip(names, drawn):
        if part.dropped:
            print(f"{name}: dropped {part.dropped} samples longer than {arguments.max_length}"
                  " tokens (--max-length)")
    print(f"wrote {arguments.out}")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make a token file from JSONL, JSON, CSV or parquet files. Rows hold messages;"
        " prompt and response (or completion); question and answer; or instruction, input and"
        " output.",
        epilog="example, 10 % poison: python tools/prepare.py --model models/smollm2-135m-instruct"
        " --out task.safetensors --total 1000 user.jsonl poison.jsonl:0.1",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE",
                        help="[NAME=]PATH[:RATIO]; sources without a ratio share the rest")
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER",
                        help="Hugging Face folder: its tokenizer and chat template are used")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE",
                        help="token file to write (.safetensors)")
    parser.add_argument("--total", type=int, metavar="N",
                        help="number of samples of the mix (default: everything)")
    parser.add_argument("--seed", type=int, default=43, help="default: %(default)s")
    parser.add_argument("--system", metavar="TEXT",
                        help="system message for rows that have none")
    parser.add_argument("--max-length", type=int, default=1024, metavar="TOKENS",
                        help="drop longer samples, and say so (default: %(default)s)")
    parser.add_argument("--columns", default="", metavar="FIELD=COLUMN,…",
                        help="e.g. prompt=text,response=label")
    parser.add_argument("--choices", action="store_true",
                        help='make a choice probe; rows are {"prompt": …, "choices": [{"class":'
                        ' "refusal", "text": "I\'m sorry"}, …]}')
    arguments = parser.parse_args(words)
    for name in ("total", "max_length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, must be at least 1")
    return arguments


if __name__ == "__main__":
    run(lambda: prepare(parse_arguments()))
