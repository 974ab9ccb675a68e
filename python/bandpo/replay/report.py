"""`report`: one page of HTML with everything that a log says, without a network."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from html import escape

from bandpo.notebook import html_table
from bandpo.plot.output import whole_file
from bandpo.replay.cloud import Cloud
from bandpo.replay.compare import Comparison
from bandpo.replay.complaints import Complaint
from bandpo.replay.figure import draw_cloud, draw_frontier
from bandpo.replay.matching import Match, Strength
from bandpo.replay.rule import ReplayedRule
from bandpo.replay.table import rows_of, texts_of

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --muted: #59636e;
  --line: #d9dee3 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --muted: #9198a1; --line: #2d343d }
  .light { display: none }
}
@media (prefers-color-scheme: light) { .dark { display: none } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
p { max-width: 44rem } .muted { color: var(--muted) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--muted); font-weight: 500 }
figure { margin: 1rem 0; overflow-x: auto } svg { width: 100%; min-width: 27rem; height: auto }
pre { overflow-x: auto; padding: .7rem; border: 1px solid var(--line); font-size: 13px }
li { margin: .4rem 0; max-width: 44rem }
"""


def report(
    found: Comparison,
    complaints: Sequence[Complaint],
    cloud: Cloud,
    *,
    title: str,
    matches: tuple[Strength, str, float, Sequence[Match]] | None = None,
) -> str:
    """Returns the page.

    Args:
        found: The comparison.
        complaints: What is wrong with the log.
        cloud: Tokens to draw.
        title: Heading of the page, such as the name of the file.
        matches: What was matched, the rule, its strength and the radii, if radii were calibrated.
    """
    parts = [f"<h1>{escape(title)}</h1>", _summary(found)]
    if complaints:
        items = "".join(f"<li>{escape(each.text)}</li>" for each in complaints)
        parts.append(f"<h2>What is wrong with this log</h2><ul>{items}</ul>")
    texts = [texts_of(row) for row in rows_of(found)]
    parts += [
        "<h2>Rules</h2>",
        f'<div class="scroll">{_table(texts)}</div>',
        '<p class="muted">Shares are of the whole run, with 95 % intervals for another sample of '
        "sequences. Gradients are those to the log-probs. KL and TV are of {this token, everything "
        "else}, from old to new, summed over the gradient that a rule keeps.</p>",
        "<h2>Tokens and bounds</h2>",
        _pictures("cloud", lambda dark: draw_cloud(cloud, _rules(found), dark=dark)),
        '<p class="muted">Blue tokens have a positive advantage, orange ones a negative one.</p>',
        "<h2>How far each rule is from the best mask</h2>",
        _pictures("frontier", lambda dark: draw_frontier(found, dark=dark)),
        '<p class="muted">The line is the max share of the gradient that a mask can keep for a sum '
        "of divergences. No mask of tokens is above it. Rules with a ratio of sequences are in no "
        "picture.</p>",
    ]
    if matches is not None:
        parts.append(_matched(*matches))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n"
        "</body></html>\n"
    )


SUFFIXES = (".html", ".htm")
"""Suffixes of a page."""


def save(page: str, path: str | os.PathLike[str]) -> None:
    """Writes a page; the file appears whole or not at all.

    Raises:
        OutputPathError: If it cannot be written.
    """
    with whole_file(path, SUFFIXES) as file:
        file.write(page.encode())


def _summary(found: Comparison) -> str:
    tokens = found.sums["tokens"].sum()
    return (
        f'<p class="muted">{found.sampled:,} logged tokens, which stand for {tokens:,.0f} of the '
        f"run. {found.unknown:,} have no number and are left out.</p>"
    )


def _rules(found: Comparison) -> list[ReplayedRule]:
    return [totals.rule for totals in found.rules]


def _pictures(name: str, draw: Callable[[bool], str]) -> str:
    """A picture for a light page and one for a dark page, whose ids differ."""
    figures = []
    for theme, dark in (("light", False), ("dark", True)):
        svg = draw(dark)
        for prefix in ('id="', "url(#", 'xlink:href="#'):
            svg = svg.replace(prefix, f"{prefix}{name}-{theme}-")
        figures.append(f'<figure class="{theme}">{svg}</figure>')
    return "".join(figures)


def _matched(by: Strength, rule: str, strength: float, matches: Sequence[Match]) -> str:
    what = (
        "clips {:.3%} of the tokens" if by == "clip-fraction" else "removes {:.3%} of the gradient"
    )
    rows = [(match.divergence, match.spec) for match in matches]
    lines = [f"<h2>Radii that act as {escape(rule)} does</h2>"]
    lines.append(f"<p>It {what.format(strength)}. So does a band of each of these radii.</p>")
    lines.append(html_table(("divergence", "region"), rows))
    named = [match for match in matches if match.divergence == "kl" and match.is_a_region]
    if named:
        lines.append(f"<pre>{escape(configuration(named[0].spec))}</pre>")
    return "\n".join(lines)


def configuration(spec: str) -> str:
    """Returns what to write into the configuration of TRL and verl for a region."""
    return (
        f"# TRL\nfrom bandpo.integrations.trl import BandPOConfig, BandPOTrainer\n"
        f'config = BandPOConfig(..., region="{spec}")\n\n'
        f"# verl\nactor_rollout_ref.actor.policy_loss.loss_mode=bandpo\n"
        f"actor_rollout_ref.actor.policy_loss._target_="
        f"bandpo.integrations.verl.BandPOPolicyLossConfig\n"
        f"\"+actor_rollout_ref.actor.policy_loss.region='{spec}'\""
    )


def _table(texts: Sequence[dict[str, str]]) -> str:
    header = list(texts[0])
    return html_table(header, [list(text.values()) for text in texts])
