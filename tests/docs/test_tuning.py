"""The planned numbers of docs/tuning.md are those that `plan` prints, its links lead somewhere."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from doc_commands import PAGES
from tiny_job import PROGRAM, ROOT

PAGE = (ROOT / "docs/tuning.md").read_text(encoding="utf-8")
FULL, LORA, GIB = "llama3-8b-full-8gpu", "llama3-8b-lora", 2**30


def plan(config: str, ranks: int, *settings: str) -> dict:
    command = [PROGRAM, "plan", f"configs/{config}.yaml", "--ranks", str(ranks), "--device", "h100",
               "--tokens-per-sequence", "1024", "--json"]
    for setting in ("model.path=null", "model.config=benchmarks/llama3-8b.json", *settings):
        command += [setting] if setting.startswith("--") else ["--set", setting]
    found = json.loads(subprocess.check_output(command, cwd=ROOT, text=True))
    return found | {"sent": sum(kind["bytes"] for kind in found["traffic"].values()) / GIB,
                    "peak": found["peak_bytes"] / GIB}


@pytest.mark.parametrize("row, config, settings", [
    ("full, 64 + 16", FULL, []), ("LoRA r8, 10 + 10", LORA, []),
    ("the same with `parallel.frozen", LORA, ["parallel.frozen=sharded"])])
def test_lora_and_full(row, config, settings):
    found = plan(config, 8, *settings)

    trained = f"{found['trained'] / 1e6:.{0 if config == FULL else 1}f} M"
    assert re.search(re.escape(f"| {row}") + r"[^|]*" + re.escape(
        f"| {trained} | {found['peak']:.1f} | {found['sent']:.1f} |"), PAGE), found


@pytest.mark.parametrize("row, setting", [
    ("`batch.max_tokens_per_rank=4096`", "batch.max_tokens_per_rank=4096"),
    ("as it is: 8192", "batch.max_tokens_per_rank=8192"),
    ("`batch.max_tokens_per_rank=10240`", "batch.max_tokens_per_rank=10240"),
    ("`parallel.recompute=none`", "parallel.recompute=none")])
def test_tokens_per_rank(row, setting):
    found = plan(FULL, 8, setting)

    assert (f"| {row} | {found['micro_batches']} | {found['peak']:.1f} |"
            f" {found['largest_micro_batch']:,} | {found['sent']:.1f} | {found['step_s']:.2f} |"
            ) in PAGE, found


@pytest.mark.parametrize("row, shards", [
    ("`shards: all`", "all"), ("`shards: 8`, one copy a machine", "8"), ("`shards: 1`", "1")])
def test_shards_and_replicas(row, shards):
    layout, several = f"parallel.shards={shards}", "batch.max_tokens_per_rank=1024"
    found = plan(FULL, 32, layout)

    steps = "does not fit | | |" if not found["fits"] else " | ".join([
        f"{found['step_s']:.2f}", f"{plan(FULL, 32, layout, several)['step_s']:.2f}",
        f"{plan(FULL, 32, layout, several, '--network=ib-200')['step_s']:.2f} |"])
    assert f"| {row} | {found['peak']:.1f} | {found['sent']:.1f} | {steps}" in PAGE, found
    assert plan(FULL, 32, layout, several)["micro_batches"] == 3


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
