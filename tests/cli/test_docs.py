"""The config's schema, the page made of it, and the configs of this repository."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from tiny_job import CONFIG, PROGRAM, ROOT

sys.path.insert(0, str(ROOT / "tools"))
import config_page  # noqa: E402


@pytest.fixture(scope="module")
def schema() -> dict:
    return json.loads(subprocess.check_output([PROGRAM, "schema"], text=True))


def test_the_page_is_what_the_schema_says(schema):
    assert (ROOT / "docs/config.md").read_text() == config_page.page(schema), (
        "make it again: build/safegrad schema | .venv/bin/python tools/config_page.py"
        " > docs/config.md")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_pass_the_schema(schema, path):
    jsonschema.validate(yaml.safe_load(path.read_text()), schema)


@pytest.mark.parametrize("section, key, value", [
    ("objective", "rule", "safegard"), ("objective", "rhoo", 1), ("optimizer", "lr", 0),
    ("optimizer", "betas", [0.9]), ("optimizer", "betas", [0.9, 1]), ("parallel", "shards", 0),
    ("parallel", "shards", "some"), ("train", "seed", -1), ("train", "steps", 1.5),
    ("model", "path", ""), ("model", "lora", {"targets": ["q_proj", "q_proj"]}),
    ("model", "lora", {"dropout": 1})])
def test_the_schema_refuses_what_the_program_refuses(schema, tmp_path, section, key, value):
    config = yaml.safe_load(CONFIG)
    jsonschema.validate(config, schema)
    wrong = copy.deepcopy(config)
    wrong.setdefault(section, {})[key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    ended = subprocess.run([PROGRAM, "check", "wrong.yaml"], cwd=tmp_path, capture_output=True,
                           text=True)
    assert ended.returncode == 1 and f"{section}.{key}" in ended.stderr


@pytest.mark.parametrize("section, key, value", [
    ("parallel", "shards", "all"), ("parallel", "shards", 2), ("optimizer", "clip_norm", 0),
    ("train", "seed", 2**64 - 1), ("model", "lora", {"rank": 1, "dropout": 0})])
def test_the_schema_takes_the_ends_of_the_ranges(schema, section, key, value):
    config = yaml.safe_load(CONFIG)
    config.setdefault(section, {})[key] = value
    jsonschema.validate(config, schema)
