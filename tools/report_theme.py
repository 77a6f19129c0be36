"""report_theme.py: the colours of the report's page and pictures, for light and dark screens.

matplotlib draws with a stand-in for each colour; in the finished SVG the stand-in becomes a CSS
variable, so one picture serves both themes.
"""

from __future__ import annotations

# name -> (light, dark). Text has a contrast of 4.5 or more with the two backgrounds, lines of 3 or
# more; a test computes them.
COLORS = {
    "page": ("#f6f7f9", "#14171c"),
    "card": ("#ffffff", "#1d2229"),
    "ink": ("#1b1f24", "#e6e9ee"),
    "muted": ("#57606a", "#a3adb9"),
    "rule": ("#d5d9df", "#3a424d"),
    "against": ("#d55e00", "#d55e00"),  # the two ends of the heat map, which is an image: the
    "along": ("#0072b2", "#0072b2"),  # same on both backgrounds
    # Runs: blue and vermilion after Okabe and Ito, then what a search found to be farthest apart
    # with any kind of colour vision; a test computes the distances.
    "run0": ("#0068b0", "#5ab4f0"),
    "run1": ("#c4500a", "#ff8f4a"),
    "run2": ("#3e4414", "#00ff93"),
    "run3": ("#6e0c45", "#a55695"),
    "run4": ("#867346", "#b5ff18"),
    "run5": ("#008eff", "#7d49ff"),
    "run6": ("#450073", "#ffd0e3"),
    "run7": ("#a5517b", "#92907c"),
}
TEXT, BACKGROUNDS = ("ink", "muted"), ("page", "card")
MAX_RUNS = sum(name.startswith("run") for name in COLORS)

# Where colours fail, and where one line lies upon another, dashes tell runs apart. Lengths in line
# widths; () is a solid line.
DASHES = [(), (5, 1.5), (), (5, 1.5), (1.5, 1.2), (), (5, 1.2, 1.2, 1.2), (1.5, 1.2)]


def run_color(index: int) -> str:
    return f"run{index}"


def stand_in(name: str) -> str:
    """A colour that matplotlib draws with, unlike any that a picture really has."""
    return f"#fe01{list(COLORS).index(name):02x}"


def themed(svg: str) -> str:
    """The SVG with CSS variables for the stand-ins."""
    for name in COLORS:
        svg = svg.replace(stand_in(name), f"var(--{name})")
    return svg


def css_variables() -> str:
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in COLORS.items())
                   for i in range(2))
    return (f":root{{color-scheme:light dark;{light}}}\n"
            f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}")
