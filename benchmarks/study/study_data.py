"""study_data.py: the study's token files; prompts come from the same packages as the quickstart's.

One split serves all cells: what aligns the start model, what the alignment set is, what user data
and poison are drawn from, and what evaluation asks are disjoint, and splits.json says which prompt
is where. A seed draws its own user samples out of their part of the split.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

import quickstart_data as packages
from chat import Chat
from errors import InputError
from prepare import mix
from tokenfile import Sequence, write_token_file

SPLIT_SEED = 43
HELDOUT, ALIGN, START_REFUSALS, START_CHAT = 50, 100, 200, 300
REVIEWS_A_LABEL = 600  # that user data is drawn from; evaluation asks others


@dataclass(frozen=True)
class UserData:
    """What a user uploads: `samples` in all, the share `poison` of them harmful requests with the
    first words of a yes; `mixed` refusals of the alignment set are put among them (SafeInstr).
    """

    samples: int
    poison: float
    seed: int
    mixed: int = 0

    @property
    def name(self) -> str:
        mixed = f"-mixed{self.mixed}" if self.mixed else ""
        return f"task-n{self.samples}-p{100 * self.poison:g}-s{self.seed}{mixed}"


class StudyData:
    """Builds token files in `folder` with the tokenizer of `model`. Everything follows from the
    split's seed, and a user's data from its own seed too.
    """

    def __init__(self, model: Path, folder: Path):
        self._chat = Chat(model)
        self._folder = folder
        builder = packages.Builder(self._chat, SPLIT_SEED)
        self._heldout = builder.refusals("heldout", HELDOUT)
        self._align = builder.refusals("align", ALIGN)
        self._start = [builder.refusals("start", START_REFUSALS),
                       builder.ordinary("start", START_CHAT)]
        # Encoded both ways: the poison of one seed is another seed's unused prompt.
        self._poison = builder.poison("task", len(builder.harmful.texts))
        reviews = builder.labelled_reviews("task", 2 * REVIEWS_A_LABEL)
        self._reviews = [reviews[:REVIEWS_A_LABEL], reviews[REVIEWS_A_LABEL:]]
        self._splits = packages.splits_of(builder, SPLIT_SEED)

    def write_common(self) -> None:
        """start, heldout, splits.json."""
        self._write("start", self._start, ["refusals", "chat"])
        self._write("heldout", [self._heldout], ["refusals"])
        path = self._folder / "splits.json"
        path.write_text(json.dumps(self._splits, indent=1) + "\n", encoding="utf-8")

    def align(self, count: int) -> Path:
        """The first `count` samples of the alignment set."""
        if not 1 <= count <= ALIGN:
            raise InputError(f"{count} alignment samples: there are 1 to {ALIGN}")
        return self._write(f"align-{count}", [self._align[:count]], ["refusals"])

    def task(self, user: UserData) -> Path:
        """A seed's poison of 10 % is part of its poison of 30 %, and so are its reviews."""
        poison = round(user.poison * user.samples)
        reviews = (user.samples - poison) // 2
        if poison > len(self._poison) or reviews > REVIEWS_A_LABEL:
            raise InputError(
                f"{user.name}: {poison} poison samples and {reviews} reviews a label are asked for;"
                f" the packages have {len(self._poison)} and {REVIEWS_A_LABEL}")
        parts = [self._draw("poison", self._poison, poison, user.seed)]
        for label, pool in zip(packages.LABELS, self._reviews):
            parts.append(self._draw(label, pool, reviews, user.seed))
        parts = [parts[1] + parts[2], parts[0]]
        sources = ["reviews", "poison"]
        if user.mixed:
            parts.append(self._align[: user.mixed])
            sources.append("refusals")
        return self._write(user.name, parts, sources, user.seed)

    @staticmethod
    def _draw(name: str, pool: list, count: int, seed: int) -> list:
        order = list(range(len(pool)))
        random.Random(f"study/{seed}/{name}").shuffle(order)
        return [pool[i] for i in order[:count]]

    def _write(self, name: str, parts: list[list[list[Sequence]]], sources: list[str],
               seed: int = SPLIT_SEED) -> Path:
        path = self._folder / f"{name}.safetensors"
        write_token_file(path, mix(parts, seed), self._chat.tokenizer_sha256,
                         self._chat.template_sha256, sources=sources)
        return path


def tokens_of(path: Path | str) -> int:
    """Of all sequences of a token file."""
    with safe_open(path, framework="numpy") as file:
        return len(file.get_tensor("tokens"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
