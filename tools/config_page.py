"""Writes docs/config.md from what `safegrad schema` prints.

    build/safegrad schema | .venv/bin/python tools/config_page.py > docs/config.md
"""

from __future__ import annotations

import json
import sys

HEAD = """\
# The config

<!-- Made by `build/safegrad schema | .venv/bin/python tools/config_page.py`;
     edit src/core/config_meanings.cpp. -->

A run is one YAML file. `safegrad check CONFIG` says whether it is right; every mistake is reported
with its line, its key and what is allowed. Unknown and duplicate keys are mistakes.
`--set a.b=value` overrides a key (`null` takes it out; `probe` only as a whole). Paths are relative
to the working directory. The run folder keeps the resolved config as `config.yaml`, which runs
again as it is.

An editor that knows JSON schemas completes and checks a config:
`safegrad schema > safegrad.schema.json`, and as the config's first line
`# yaml-language-server: $schema=safegrad.schema.json` (VS Code's YAML extension and others).

Model architectures: `LlamaForCausalLM` (Llama, SmolLM2), `Qwen2ForCausalLM`, `Qwen3ForCausalLM`.
"""
COLUMNS = "| key | default | allowed | meaning |\n|---|---|---|---|"


def shown(value) -> str:
    """A value as it is spelled in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(shown(item) for item in value)}]"
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    return str(value)


def allowed(schema: dict) -> str:
    """What a key may hold, in a few words."""
    if "anyOf" in schema:
        return " or ".join(allowed(choice) for choice in schema["anyOf"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{name}`" for name in schema["enum"])
    kind = schema["type"]
    if kind == "boolean":
        return "`true`, `false`"
    if kind == "string":
        return "a text"
    if kind == "object":
        return "a section"
    if kind == "array":
        several = "two, each " if "maxItems" in schema else "a list of "
        return several + allowed(schema["items"])
    return interval(schema)


def interval(schema: dict) -> str:
    low, high = (next((schema[key] for key in keys if key in schema), None)
                 for keys in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")))
    if high is None:
        return f"{'>' if 'exclusiveMinimum' in schema else '>='} {shown(low)}"
    left, right = "([" ["minimum" in schema], ")]" ["maximum" in schema]
    return f"{left}{shown(low)}, {shown(high)}{right}"


def row(key: str, schema: dict, required: bool) -> str:
    default = f"`{shown(schema['default'])}`" if "default" in schema else ""
    default = "required" if required else default
    return f"| `{key}` | {default} | {allowed(schema)} | {schema['description']} |"


def rows(prefix: str, section: dict) -> list[str]:
    """A row for every key of a section, and for those of the sections in it."""
    result = []
    for name, schema in section["properties"].items():
        key = prefix + name
        result.append(row(key, schema, name in section.get("required", [])))
        if schema.get("type") == "object":
            result += rows(key + ".", schema)
    return result


def page(schema: dict) -> str:
    parts = [HEAD]
    for name, section in schema["properties"].items():
        parts.append(f"## {name}\n")
        if "properties" not in section and "items" not in section:
            parts.append(f"{COLUMNS}\n{row(name, section, name in schema.get('required', []))}\n")
            continue
        parts.append(section["description"] + "\n")
        table = rows(name + ".", section.get("items", section))
        parts.append("\n".join([COLUMNS, *table]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page(json.load(sys.stdin)))
