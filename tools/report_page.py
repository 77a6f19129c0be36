"""report_page.py: puts pictures, tables and sentences into one HTML file that needs no other."""

from __future__ import annotations

import html
import json
import math
import re

from report_charts import Picture, Section, count, probe_order, sections
from report_theme import DASHES, css_variables, run_color
from runs import LAST, Run, config_differences, summarize

ABSENT = "–"

CSS = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:84rem;padding:1rem;background:var(--page);color:var(--ink);
  font:16px/1.5 system-ui,"Segoe UI","Helvetica Neue",Arial,"DejaVu Sans",sans-serif}
h1{font-size:1.5rem;margin:.2rem 0 .6rem}
h2{font-size:1.2rem;margin:2rem 0 .6rem;scroll-margin-top:5rem}
h3{font-size:1rem;margin:0 0 .2rem;overflow-wrap:anywhere}
p{margin:.4rem 0;max-width:75ch;overflow-wrap:anywhere}
.muted,figcaption{color:var(--muted);font-size:.875rem}
.legend{position:sticky;top:0;z-index:1;background:var(--page);border-bottom:1px solid var(--rule);
  margin:0;padding:.5rem 0;list-style:none;
  max-height:30vh;overflow-y:auto;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem}
.legend li{display:flex;align-items:center;gap:.4rem;font-size:.875rem;overflow-wrap:anywhere}
.legend svg{flex:none}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,23rem),1fr))}
figure{margin:0;padding:.8rem;background:var(--card);border:1px solid var(--rule);
  border-radius:.4rem;min-width:0}
figure svg{display:block;width:100%;height:auto;margin:.3rem 0;stroke-linejoin:round}
figure svg text{font-family:inherit}
figure svg image{image-rendering:pixelated}
figcaption p{margin:.1rem 0}
.scroll{overflow-x:auto;margin:.6rem 0}
.words{columns:2 28rem;column-gap:2rem}
.words p{break-inside:avoid;margin:0 0 .5rem}
.scroll:focus-visible{outline:2px solid var(--run0)}
table{border-collapse:collapse;font-size:.875rem;background:var(--card);
  font-variant-numeric:tabular-nums}
th,td{border:1px solid var(--rule);padding:.3rem .6rem;text-align:right;vertical-align:top}
tbody th,thead td{text-align:left;font-weight:normal}
td{min-width:6rem}
tbody th,thead td{position:sticky;left:0;min-width:7rem;background:var(--card)}
.scale{display:flex;align-items:center;gap:.5rem;font-size:.875rem;flex-wrap:wrap}
.scale span{display:inline-block;width:10rem;height:.9rem;border:1px solid var(--rule);
  background:linear-gradient(90deg,var(--against),transparent,var(--along))}
@media print{.legend{position:static}figure{break-inside:avoid}}
"""


def page(runs: list[Run]) -> tuple[str, dict]:
    """The HTML, and the numbers that are drawn and written in it, which it also holds as JSON."""
    summaries = [summarize(run) for run in runs]
    differences = config_differences(runs)
    drawn = sections(runs)
    data = {
        "runs": [{"name": run.name, "versions": run.versions, "notes": run.notes,
                  "summary": summary} for run, summary in zip(runs, summaries)],
        "config_differences": differences,
        "pictures": {picture.id: picture.data for section in drawn for picture in section.pictures},
    }
    names = ", ".join(run.name for run in runs)
    title = f"safegrad: {names if len(runs) <= 3 else count(len(runs), 'run')}"
    body = [
        f"<h1>{escape(title)}</h1>",
        '<div class="words">',
        *(sentence(run, summary) for run, summary in zip(runs, summaries)),
        "</div>",
        legend(runs),
        "<main>",
        heading("Summary"),
        table("Losses and speed over all steps of each run", runs, summary_rows(runs, summaries)),
        *probe_table(runs, summaries),
        *differences_table(runs, differences),
        *(part for section in drawn for part in section_html(section)),
        "</main>",
        f'<script type="application/json" id="data">{json_for_html(data)}</script>',
    ]
    return document(title, body), data


def document(title: str, body: list[str]) -> str:
    head = ('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>\n{css_variables()}\n{CSS}</style>\n</head>\n")
    return head + "<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"


def escape(text: str) -> str:
    return html.escape(str(text))


def json_for_html(data: dict) -> str:
    """JSON that no HTML parser takes for an end of the script; NaN becomes null."""
    text = json.dumps(without_nan(data), ensure_ascii=False, allow_nan=False,
                      separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c")


def without_nan(value):
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None, digits: int = 4) -> str:
    if value is None or not math.isfinite(value):
        return ABSENT
    text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.{digits}g}"
    return text.replace("-", "−")


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ABSENT


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"
    return f"{minutes}:{rest:02d} min" if minutes else f"{number(seconds, 3)} s"


def gibibytes(size: float | None) -> str:
    return ABSENT if size is None else f"{size / 2**30:.2f} GiB"


def align_name(summary: dict) -> str:
    return "alignment KL" if summary["align_loss"] == "kl" else "alignment loss"


def sentence(run: Run, s: dict) -> str:
    steps = f"steps {s['first_step']} to {s['last_step']}"
    if s["planned_steps"]:
        steps += f" of {s['planned_steps']}"
        if s["last_step"] < s["planned_steps"]:
            steps += " (not finished)"
    parts = [f"rule {s['rule']}{how(s)}, learning rate {s['lr']}, {steps}.",
             f"Task loss {number(s['loss_task_first'])} → {number(s['loss_task_last'])}"]
    if s["loss_align_first"] is not None:
        parts[-1] += (f", {align_name(s)} {number(s['loss_align_first'])} →"
                      f" {number(s['loss_align_last'])}")
    parts[-1] += "."
    if s["compared_steps"]:
        parts.append(f"The two gradients were in conflict in {s['conflicts']} of"
                     f" {count(s['compared_steps'], 'step')}"
                     f" ({share(s['conflicts'], s['compared_steps'])}), mean cosine"
                     f" {number(s['cosine_mean'], 2)}.")
    else:
        parts.append("There was no alignment gradient to compare with.")
    if s["skipped"]:
        parts.append(f"{count(s['skipped'], 'step')} skipped, because a number was not finite.")
    parts.append(f"The steps took {duration(s['seconds'])}.")
    text = f"<p><strong>{escape(run.name)}</strong>: {escape(' '.join(parts))}</p>"
    return text + "".join(f'<p class="muted">{escape(run.name)}: {escape(note)}.</p>'
                          for note in run.notes)


def how(s: dict) -> str:
    """What the rule is applied to, where that is not one inner product of every step."""
    return (", layer-wise surgery" * (s["surgery"] == "block")
            + f", gate {s['gate']}" * (float(s["gate"]) > 0)
            + f", alignment gradient every {s['align_every']} steps" * (s["align_every"] != "1"))


def legend(runs: list[Run]) -> str:
    items = []
    for i, run in enumerate(runs):
        dashes = " ".join(str(2.5 * length) for length in DASHES[i])
        items.append('<li><svg width="34" height="10" aria-hidden="true"><line x1="1" x2="33"'
                     f' y1="5" y2="5" stroke="var(--{run_color(i)})" stroke-width="2.5"'
                     f' stroke-dasharray="{dashes}"/></svg>{escape(run.name)}</li>')
    return f'<ul class="legend" aria-label="Runs and their lines">{"".join(items)}</ul>'


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def table(caption: str, runs: list[Run], rows: dict[str, list[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    body = "".join(f'<tr><th scope="row">{breakable(label)}</th>'
                   + "".join(f"<td>{breakable(cell)}</td>" for cell in cells) + "</tr>"
                   for label, cells in rows.items())
    # A region that the keyboard reaches: it scrolls sideways where the screen is narrow.
    return (f'<p class="muted">{escape(caption)}</p>'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
            f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>")


def breakable(text: str) -> str:
    """Paths and dotted keys may go on in the next line."""
    return re.sub(r"([/._])(?=[A-Za-z])", r"\1<wbr>", escape(text))


def summary_rows(runs: list[Run], summaries: list[dict]) -> dict[str, list[str]]:
    def row(cell):
        return [cell(summary) for summary in summaries]

    rows = {
        "rule": row(lambda s: s["rule"] + how(s)),
        "learning rate": row(lambda s: s["lr"]),
        "steps": row(lambda s: str(s["steps"])),
        "skipped steps": row(lambda s: str(s["skipped"])),
        "task loss, first step": row(lambda s: number(s["loss_task_first"])),
        "task loss, last step": row(lambda s: number(s["loss_task_last"])),
        f"task loss, mean of the last {LAST}": row(lambda s: number(s["loss_task_last_mean"])),
        "alignment loss, last step": row(lambda s: number(s["loss_align_last"])),
        f"alignment loss, mean of the last {LAST}": row(
            lambda s: number(s["loss_align_last_mean"])),
        "steps in conflict": row(lambda s: share(s["conflicts"], s["compared_steps"])),
        "mean cosine": row(lambda s: number(s["cosine_mean"], 2)),
        "tokens/s": row(lambda s: number(s["tokens_per_s_mean"])),
        "time of the steps": row(lambda s: duration(s["seconds"])),
        "time stopped for checkpoints": row(
            lambda s: ABSENT if s["checkpoint_seconds"] is None
            else duration(s["checkpoint_seconds"])),
        "peak memory of a rank": row(lambda s: gibibytes(s["memory_bytes"])),
        "versions, ranks, device": [run.versions or ABSENT for run in runs],
    }
    return {label: cells for label, cells in rows.items() if any(c != ABSENT for c in cells)}


def probe_table(runs: list[Run], summaries: list[dict]) -> list[str]:
    names = {label: tuple(label.split(" · ", 1)) for s in summaries for label in s["probes"]}
    if not names:
        return []
    rows = {label: [probe_cell(summary["probes"].get(label), is_share(names[label][1]))
                    for summary in summaries]
            for label in sorted(names, key=lambda label: probe_order(names[label]))}
    caption = "First and last result of each probe that the run recorded."
    if any(is_share(measure) for _, measure in names.values()):
        caption += (" greedy_X is the share of prompts whose greedy reply begins like class X, X"
                    " the share for which X is the likeliest.")
    return [heading("Probes"), table(caption, runs, rows)]


def is_share(measure: str) -> bool:
    return measure not in ("kl", "loss")


def probe_cell(ends: dict | None, percent: bool) -> str:
    if ends is None:
        return ABSENT

    def at(which: str) -> str:
        value = ends[which]
        shown = number(value) if value is None or not percent else f"{100 * value:.1f} %"
        return f"{shown} (step\u00a0{ends[f'{which}_step']})"

    if ends["first_step"] == ends["last_step"]:
        return at("last")
    return f"{at('first')} → {at('last')}"


def differences_table(runs: list[Run], differences: dict) -> list[str]:
    if len(runs) == 1:
        return []
    if not differences:
        return [heading("Differences of the configs"), "<p>None but the output folder.</p>"]
    rows = {key: [ABSENT if value is None else value for value in values]
            for key, values in differences.items()}
    return [heading("Differences of the configs"),
            table("Keys of config.yaml that are not the same in all runs", runs, rows)]


def section_html(section: Section) -> list[str]:
    if not section.pictures and not section.text:
        return []
    parts = [heading(section.title)]
    if section.text:
        parts.append(f'<p class="muted">{escape(section.text)}</p>')
    if section.legend:
        parts.append(f'<p class="scale">cosine −{section.legend} or less (conflict) <span></span>'
                     f" {section.legend} or more (agreement)</p>")
    if section.pictures:
        pictures = "".join(figure_html(picture) for picture in section.pictures)
        parts.append(f'<div class="grid">{pictures}</div>')
    return parts


def figure_html(picture: Picture) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in [picture.meaning, *picture.notes] if line)
    return (f"<figure><h3>{escape(picture.title)}</h3>{picture.svg}"
            f"<figcaption>{lines}</figcaption></figure>\n")
