"""rows.py: reads data sets as people have them, and what their rows say.

JSONL, JSON, CSV and parquet; rows with messages, prompt and response, question and answer, or the
fields of Alpaca. Every error names file, row and field.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet

from chat import Message
from errors import InputError

PAIRS = [("prompt", "response"), ("prompt", "completion"), ("question", "answer")]
FIELDS = ["messages", "instruction", "input", "output", "choices"]
FIELDS += sorted({field for pair in PAIRS for field in pair})


@dataclass(frozen=True)
class Row:
    path: Path
    number: int  # 1-based: the line of a JSONL file, otherwise the row
    fields: dict

    def error(self, message: str) -> InputError:
        return InputError(f"{self.path}: row {self.number}: {message}")

    def text(self, field: str) -> str:
        value = self.fields.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"field '{field}': is {value!r}, must be a text that is not empty")
        return value


def parse_columns(text: str) -> dict[str, str]:
    """"prompt=question,response=reply" -> {field: column}."""
    columns = {}
    for part in filter(None, text.split(",")):
        field, _, column = part.partition("=")
        if field not in FIELDS or not column:
            raise InputError(f"--columns {part}: must be FIELD=COLUMN, FIELD one of {FIELDS}")
        columns[field] = column
    return columns


def read_rows(path: Path, columns: dict[str, str]) -> list[Row]:
    """All rows of a file, with the fields of `columns` filled from the columns they name."""
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv,
               ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(f"{path}: unknown kind of file, must end with one of {list(readers)}")
    rows = []
    for number, fields in readers[path.suffix](path):
        row = Row(path, number, fields)
        if not isinstance(fields, dict):
            raise row.error(f"is {type(fields).__name__}, must be an object with named fields")
        for field, column in columns.items():
            if column not in fields:
                raise row.error(f"there is no column '{column}', only {list(fields)}")
        rows.append(replace(row, fields=fields | {f: fields[c] for f, c in columns.items()}))
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def _read_jsonl(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}: row {number}: is not valid JSON: {error}") from error


def _read_json(path: Path) -> Iterator[tuple[int, object]]:
    try:
        rows = json.loads(_read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON: {error}; is it JSONL?") from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: holds a {type(rows).__name__}, must be a list of rows")
    yield from enumerate(rows, start=1)


def _read_csv(path: Path) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    number = 0
    try:
        for number, fields in enumerate(reader, start=1):
            if None in fields or None in fields.values():
                raise InputError(f"{path}: row {number}: has not {len(reader.fieldnames)} columns")
            yield number, fields
    except csv.Error as error:
        raise InputError(f"{path}: row {number + 1}: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: is not a parquet file: {error}") from error
    yield from enumerate(rows, start=1)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text: {error}") from error


def messages_of(row: Row) -> list[Message]:
    """The chat that a row stands for. Throws InputError naming file, row and field."""
    fields = row.fields
    if fields.get("messages") is not None:
        return _check_messages(row)
    for prompt, response in PAIRS:
        if prompt in fields and response in fields:
            return _exchange(row.text(prompt), row.text(response))
    if "instruction" in fields and "output" in fields:
        prompt = row.text("instruction")
        if fields.get("input"):
            prompt += "\n\n" + row.text("input")
        return _exchange(prompt, row.text("output"))
    if "choices" in fields:
        raise row.error("has choices, as a probe's rows: give --choices to make a probe of them")
    raise row.error(
        f"fields are {list(fields)}; must be messages, or "
        + ", or ".join(" and ".join(pair) for pair in PAIRS)
        + ", or instruction and output; other names can be mapped with --columns"
    )


def _exchange(prompt: str, response: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _check_messages(row: Row) -> list[Message]:
    messages = row.fields["messages"]
    if not isinstance(messages, list):
        raise row.error(f"field 'messages': is {type(messages).__name__}, must be a list")
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise row.error(
                    f"field 'messages[{index}].{key}': is {value!r}, must be a text that is not"
                    " empty"
                )
    if not any(message["role"] == "assistant" for message in messages):
        raise row.error("field 'messages': no message has the role assistant, one must")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """`messages` with a system message in front, unless they have one or `system` is None."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def candidates_of(row: Row) -> list[tuple[str, str]]:
    """(class, text) of each candidate of a row of a choice probe."""
    choices = row.fields.get("choices")
    if not isinstance(choices, list):
        raise row.error("field 'choices': must be a list of {class, text}")
    for index, candidate in enumerate(choices):
        for key in ("class", "text"):
            value = candidate.get(key) if isinstance(candidate, dict) else None
            if not isinstance(value, str) or not value.strip() or value != value.strip():
                raise row.error(
                    f"field 'choices[{index}].{key}': is {value!r}, must be a text that is not"
                    " empty, with no space around it"
                )
    candidates = [(candidate["class"], candidate["text"]) for candidate in choices]
    if len({name for name, _ in candidates}) < 2:
        raise row.error("field 'choices': holds one class, at least two are needed")
    return candidates
