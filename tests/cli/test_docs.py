"""docs/config.md describes every key that the program knows, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def keys_of_the_program() -> set[str]:
    """The dotted keys that src/core/config_keys.h declares."""
    text = (ROOT / "src/core/config_keys.h").read_text()
    bodies = re.findall(r"void describe\(Visitor& v, (\w+)& \w+\) \{(.*?)\n\}", text, re.S)
    sections = {name: re.findall(r'v\.(key|section|list)\("(\w+)"', body) for name, body in bodies}
    types = {"lora": "LoraConfig", "probe": "ProbeConfig"}

    def expand(name, prefix):
        for kind, key in sections[name]:
            if kind != "key":
                yield from expand(types.get(key, key.capitalize() + "Section"), f"{prefix}{key}.")
            yield prefix + key

    return set(expand("RunConfig", ""))


def keys_of_the_page() -> set[str]:
    """The first column of every table of docs/config.md."""
    return set(re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs/config.md").read_text(), re.M))


def test_the_page_names_every_key_and_no_other():
    program = keys_of_the_program()
    assert "model.lora.rank" in program and "output" in program  # the header was understood

    # Sections have a heading rather than a row; the optional one, model.lora, has both.
    headings = {"model", "data", "objective", "batch", "optimizer", "schedule", "train", "parallel",
                "probe", "checkpoint"}
    assert keys_of_the_page() == program - headings


def test_every_shipped_config_uses_keys_of_the_page():
    page = keys_of_the_page()
    for path in (ROOT / "configs").glob("*.yaml"):
        section = ""
        for line in path.read_text().splitlines():
            if match := re.match(r"(  )?(\w+):", line):
                section = section if match[1] else match[2]
                key = f"{section}.{match[2]}" if match[1] else match[2]
                assert key in page or match[1] is None, f"{path.name}: {key}"
