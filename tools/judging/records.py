"""records.py: the verdicts of one evaluation, a line each, so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from errors import InputError


def identity_hash(identity: dict | list) -> str:
    """Names an evaluation: other models, prompts, protocols or versions have other names."""
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def folder_sha256(folders: list[Path]) -> str:
    """Of the weights, configurations and tokenizers in the folders, under whatever path."""
    digest = hashlib.sha256()
    for folder in folders:
        names = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model")
        for path in sorted({p for name in names for p in folder.glob(name)}):
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


class Records:
    """The JSONL file of one evaluation: {"set", "key", verdict…} a line."""

    def __init__(self, path: Path):
        self._path = path
        self._found: dict[tuple[str, str], dict] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self._path.read_bytes()
        # A line without its end was being written when the program was stopped.
        whole = content[: content.rfind(b"\n") + 1]
        # Not splitlines(): it also cuts at U+0085, U+2028 and U+2029, which JSON leaves in a text.
        lines = whole.decode(errors="replace").split("\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                self._found[record["set"], record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{self._path}: line {number}: is not a verdict of judge.py;"
                                 " delete the file to judge from the start") from error
        if len(whole) != len(content):
            self._path.write_bytes(whole)

    def get(self, name: str, key: str) -> dict | None:
        return self._found.get((name, key))

    def add(self, records: list[dict]) -> None:
        """Appends the records of a batch; they are on their way to the disk when it returns."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        self._found |= {(r["set"], r["key"]): r for r in records}
