"""judge.py: what a model answers to harmful, harmless and task prompts, by greedy generation.

Shares with 95 % intervals, of one model or of two side by side. Verdicts are kept as they are made:
an interrupted evaluation goes on, a finished one is not repeated. No reply is printed, and none is
kept but its first words with --keep-text. docs/judge.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from errors import InputError, run
from judging import report, verdicts
from judging.engines import (ENGINES, PACKAGES, Engine, base_folder, check_packages,
                             plan_batches)
from judging.moderation import Moderator, load_moderator
from judging.prompts import Asker, Prompt, load, trained_hashes
from judging.protocols import PRESETS, SETS, Protocol
from judging.records import Records, folder_sha256, identity_hash
from judging.verdicts import LABEL_RULES, judge_label, judge_reply

# Of the verdicts too: another number where prompts or replies are made in another way.
FORMAT = "safegrad.judge/1"


@dataclass(frozen=True)
class Means:
    """What judges one model; the engine and the moderation model are loaded when first asked."""

    asker: Asker
    engine: Callable[[], Engine]
    moderator: Callable[[], Moderator] | None
    batch_tokens: int
    keep_text: bool


def judge_set(name: str, prompts: list[Prompt], protocol: Protocol, means: Means,
              records: Records, progress: Callable[[str], None]) -> dict[str, dict]:
    """Verdicts by key in the order of the prompts. A batch of which one is missing is generated
    anew as a whole, so that an interruption changes no number.
    """
    ids = [means.asker.ids(prompt) for prompt in prompts]
    limit = protocol.max_new_tokens[name]
    missing = [prompt for prompt in prompts if records.get(name, prompt.key) is None]
    if missing:
        engine = means.engine()
        batches = plan_batches(list(map(len, ids)), limit, means.batch_tokens, engine.max_rows)
        done = 0
        for batch in batches:
            if any(records.get(name, prompts[i].key) is None for i in batch):
                replies = engine.generate([ids[i] for i in batch], limit,
                                          _decided(name, protocol, means.asker))
                records.add(_verdicts(name, [prompts[i] for i in batch], replies, protocol, means))
            done += len(batch)
            progress(f"{name} {done}/{len(prompts)}")
    return {prompt.key: records.get(name, prompt.key) for prompt in prompts}


def _decided(name: str, protocol: Protocol, asker: Asker) -> Callable[[list[int]], bool] | None:
    if name != "task" or protocol.label_rule != "first":
        return None
    return lambda tokens: LABEL_RULES["first"](asker.reply(tokens)) is not None


def _verdicts(name: str, prompts: list[Prompt], replies: list[list[int]], protocol: Protocol,
              means: Means) -> list[dict]:
    texts = [means.asker.reply(reply) for reply in replies]
    found = []
    for prompt, reply, text in zip(prompts, replies, texts, strict=True):
        verdict = {"set": name, "key": prompt.key, "tokens": len(reply)}
        if prompt.label is None:
            verdict |= judge_reply(text)
        else:
            verdict |= judge_label(text, prompt.label, protocol.label_rule)
        if means.keep_text:
            verdict["opening"] = means.asker.opening(reply)
        found.append(verdict)
    if name == "harmful" and means.moderator:
        rulings = means.moderator().rule([prompt.text for prompt in prompts], texts)
        for verdict, ruling in zip(found, rulings, strict=True):
            verdict |= {"flagged": ruling.flagged, "categories": list(ruling.categories)}
    return found


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # of an engine that is not this one's


def identity_of(name: str, prompts: list[Prompt], protocol: Protocol, options: argparse.Namespace,
                model_sha256: str, moderation_sha256: str | None) -> dict:
    """All that the verdicts of one set depend on."""
    identity = {
        "format": FORMAT,
        "model_sha256": model_sha256,
        "set": name,
        "prompts": identity_hash([[prompt.text, prompt.label] for prompt in prompts]),
        "rules": identity_hash([Path(verdicts.__file__).read_text(encoding="utf-8")]),
        "template": protocol.template,
        "system": protocol.system,
        "max_new_tokens": protocol.max_new_tokens[name],
        "engine": [options.engine, options.device, options.dtype, options.batch_tokens],
        "versions": {package: version(package) for package in PACKAGES[options.engine]},
        "keep_text": options.keep_text,
    }
    if name == "task":
        identity |= {"question": protocol.task_question, "label_rule": protocol.label_rule}
    if name == "harmful" and moderation_sha256:
        identity["moderation"] = {"sha256": moderation_sha256,
                                  "threshold": protocol.moderation_threshold,
                                  "max_tokens": protocol.moderation_max_tokens}
    return identity


def judge_model(folder: Path, protocol: Protocol, prompts: dict[str, list[Prompt]],
                options: argparse.Namespace, moderator: Callable[[], Moderator] | None
                ) -> tuple[Path, report.Verdicts]:
    """The file of results, and the verdicts by set."""
    base = base_folder(folder)
    asker = Asker(folder if (folder / "tokenizer.json").exists() else base, protocol)
    engine = functools.cache(lambda: ENGINES[options.engine](folder, options.device, options.dtype))
    means = Means(asker, engine, moderator, options.batch_tokens, options.keep_text)
    model_sha256 = folder_sha256([folder] if base == folder else [folder, base])
    moderation_sha256 = folder_sha256([options.moderation]) if options.moderation else None
    identities, found = {}, {}
    for name, part in prompts.items():
        identities[name] = identity_of(
            name, part, protocol, options, model_sha256, moderation_sha256)
        records = Records(options.out / "verdicts" / file_name(folder, identities[name], ".jsonl"))
        found[name] = judge_set(name, part, protocol, means, records, progress_line(folder))
    path = options.out / file_name(folder, identities, ".json")
    write_json(path, {"format": FORMAT, "model": str(folder), "preset": protocol.name,
                      "judged": identities, "results": report.as_json(report.shares(found))})
    return path, found


def file_name(folder: Path, identity: dict, ending: str) -> str:
    kind = f"-{identity['set']}" if "set" in identity else ""
    return f"{model_name(folder)}{kind}-{identity_hash(identity)}{ending}"


def model_name(folder: Path) -> str:
    """safegrad writes models to RUN/model; the run says more."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def progress_line(folder: Path) -> Callable[[str], None]:
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\033[K{folder}: {text}", end="", file=sys.stderr, flush=True)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_data(texts: list[str], sets: list[str]) -> dict[str, Path]:
    files = {}
    for text in texts:
        name, _, path = text.partition("=")
        if name not in sets or not path:
            raise InputError(f"--data {text}: must be SET=FILE, SET one of {sets}")
        files[name] = Path(path)
    return files


def parse_sets(text: str | None, protocol: Protocol) -> list[str]:
    known = [name for name in SETS if name in protocol.count]
    names = text.split(",") if text else known
    for name in names:
        if name not in known:
            raise InputError(f"--sets {text}: preset {protocol.name} has {known}, not {name!r}")
    return [name for name in known if name in names]


def title(name: str, prompts: list[Prompt], protocol: Protocol, file: Path | None) -> str:
    source = file or protocol.source[name]
    kinds = {"harmful": "harmful prompts", "benign": "harmless prompts that sound dangerous",
             "task": "reviews"}
    length = protocol.max_new_tokens[name]
    return f"{len(prompts)} {kinds[name]}, {source}, at most {length} tokens"


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Judge a model by what it generates: harmful score, over-refusal, task"
        " accuracy. Replies are neither printed nor kept.",
        epilog="example: .venv-hf/bin/python tools/judge.py runs/quickstart/plain/model"
        " runs/quickstart/safegrad/model --trained-on runs/quickstart/data/splits.json",
    )
    parser.add_argument("model", type=Path, nargs="+", metavar="MODEL",
                        help="one folder, or two to compare: Hugging Face models or PEFT adapters")
    parser.add_argument("--preset", choices=PRESETS, default="offline",
                        help="templates, lengths, prompts and label rules; default: %(default)s")
    parser.add_argument("--sets", metavar="A,B", help="some of harmful, benign, task; default: all"
                        " that the preset has")
    parser.add_argument("--data", action="append", default=[], metavar="SET=FILE",
                        help="prompts of a set (JSONL, JSON, CSV or parquet): prompt; or, for task,"
                        " sentence or text, and label")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N prompts a set")
    parser.add_argument("--trained-on", type=Path, metavar="SPLITS",
                        help="splits.json beside the training data: its prompts are left out")
    parser.add_argument("--moderation", type=Path, metavar="FOLDER",
                        help="Beaver-dam or Llama Guard, for the harmful set")
    parser.add_argument("--engine", choices=ENGINES, default="transformers")
    parser.add_argument("--device", default="cpu", help="of torch; default: %(default)s")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-tokens", type=int, default=4096, metavar="N",
                        help="prompts and replies of a batch, bounds its memory;"
                        " default: %(default)s")
    parser.add_argument("--keep-text", action="store_true",
                        help="keep the first 12 tokens of each reply beside its verdict")
    parser.add_argument("--out", type=Path, default=Path("runs/judge"), metavar="DIR",
                        help="verdicts and results; default: %(default)s")
    options = parser.parse_args(arguments)
    if len(options.model) > 2:
        raise InputError(f"{len(options.model)} models are given, one or two can be judged")
    for flag, value in (("--limit", options.limit), ("--batch-tokens", options.batch_tokens)):
        if value is not None and value < 1:
            raise InputError(f"{flag} {value}: must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    protocol = PRESETS[options.preset]
    sets = parse_sets(options.sets, protocol)
    if options.limit:
        protocol = dataclasses.replace(protocol, count={
            name: min(count or options.limit, options.limit)
            for name, count in protocol.count.items()})
    files = parse_data(options.data, sets)
    check_packages(options.engine)
    trained = trained_hashes(options.trained_on) if options.trained_on else set()
    prompts = {name: load(protocol, name, files.get(name), trained) for name in sets}
    moderator = None
    if options.moderation:
        moderator = functools.cache(lambda: load_moderator(
            options.moderation, options.device, options.dtype, protocol.moderation_threshold,
            protocol.moderation_max_tokens))

    judged = [judge_model(folder, protocol, prompts, options, moderator)
              for folder in options.model]
    titles = {name: title(name, prompts[name], protocol, files.get(name)) for name in sets}
    written, found = [path for path, _ in judged], [part for _, part in judged]
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(report.table([model_name(folder) for folder in options.model], found, titles))
    if len(judged) == 2:
        path = options.out / f"{written[0].stem}-vs-{written[1].name}"
        write_json(path, {"format": FORMAT, "a": str(written[0]), "b": str(written[1]),
                          "b_minus_a": report.as_json(report.differences(*found))})
        written.append(path)
    print("\nshares with Wilson's 95 % intervals; written:", *written, sep="\n  ")


if __name__ == "__main__":
    try:
        run(main)
    except KeyboardInterrupt:
        print("\nstopped; start it again to go on", file=sys.stderr)
        sys.exit(130)
