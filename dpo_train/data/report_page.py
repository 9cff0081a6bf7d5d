"""The page of the data report: plots and HTML. Text from the data is shown as text, whatever it holds."""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Mapping
from typing import Any

import jinja2

_BLUE, _RED, _DARK = "#4477aa", "#cc6677", "#222222"

# Control characters, invisible ones that reverse the text around them or make an answer look empty, and lone surrogates
# (of file names), which UTF-8 cannot hold.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]")


def to_html(content: Mapping[str, Any]) -> str:
    """One self-contained page from the report's JSON content."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": _number, "percent": _percent, "visible": visible}
    examples = itertools.groupby(content["examples"], key=lambda item: item["reason"])
    return environment.from_string(_PAGE).render(
        **content,
        examples_by_reason=[(reason, list(items)) for reason, items in examples],
        plots=_plots(content),
    )


def visible(text: str) -> str:
    """The text with characters that cannot be seen named: U+202E becomes ``[U+202E]``."""
    return _UNSEEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}".rstrip("0").rstrip(".")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _plots(content: Mapping[str, Any]) -> dict[str, str]:
    """PNGs in base64 by name; a name is missing where there is nothing to show."""
    lengths, plots = content["lengths"], {}
    if lengths["pair"]["histogram"]:
        answers = {side: lengths[side]["histogram"] for side in ("chosen", "rejected")}
        plots["prompt"] = _histogram({"": lengths["prompt"]["histogram"]}, "tokens of a prompt")
        plots["answers"] = _histogram(answers, "tokens of an answer")
        plots["pair"] = _histogram({"": lengths["pair"]["histogram"]}, "tokens of a pair: prompt + both answers")
        plots["difference"] = _histogram(
            {"": content["difference"]["histogram"]}, "tokens by which the chosen answer is longer", zero=True
        )
    for name in ("strength", "agreement"):
        if content[name]["histogram"]:
            plots[name] = _histogram({"": content[name]["histogram"]}, name)
    return plots


def _histogram(series: Mapping[str, Mapping[str, Any]], label: str, *, zero: bool = False) -> str:
    # The object interface: pyplot would keep figures alive and look for a display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    # Small, so that the lettering can still be read on a phone's width.
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.subplots()
    for (name, bins), color in zip(series.items(), (_BLUE, _RED), strict=False):
        axes.stairs(bins["counts"], bins["edges"], fill=True, color=color, alpha=0.25 if name else 1.0)
        if name:
            axes.stairs(bins["counts"], bins["edges"], color=color, linewidth=1.5, label=name)
    if zero:
        axes.axvline(0, color=_DARK, linewidth=1)
    if len(series) > 1:
        axes.legend(frameon=False)
    axes.set_xlabel(label)
    axes.set_ylabel("pairs")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if max(abs(edge) for bins in series.values() for edge in bins["edges"]) >= 1000:
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title | visible }}</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #222;
 background: #fff; overflow-wrap: anywhere }
 .scroll { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse }
 th, td { text-align: left; padding: .4rem .8rem .4rem 0; vertical-align: top; border-bottom: 1px solid #ddd;
 overflow-wrap: normal }
 .n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums;
 padding-left: .4rem } th.n { white-space: normal }
 td bdi { display: block; min-width: 13rem; max-width: 22rem; max-height: 8rem; overflow: auto;
 overflow-wrap: anywhere } .wide { min-width: 14rem; overflow-wrap: anywhere }
 .box { padding: .8rem 1rem; border-left: .4rem solid; margin: 1rem 0 }
 .box ul { margin: .3rem 0 0; padding-left: 1.2rem }
 .yes { border-color: #228833; background: #eef7ee } .no { border-color: #cc3311; background: #fbeeee }
 .plots, .texts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)) }
 img { width: 100%; max-width: 30rem; height: auto } .note { color: #555; font-size: .9em }
 details { border-bottom: 1px solid #ddd; padding: .5rem 0 } summary { cursor: pointer; font-weight: 600 }
 .example { margin: 1rem 0; padding: .6rem .8rem; background: #f4f4f4 } .example p { margin: 0 0 .3rem;
 max-height: 8rem; overflow: auto }
 .texts { gap: .6rem; margin-top: .6rem } .texts div { min-width: 0 } code { font-size: .9em }
 pre { white-space: pre-wrap; margin: 0; font: inherit; unicode-bidi: isolate; max-height: 14rem; overflow: auto;
 background: #fff; padding: .3rem .5rem }
</style></head><body>
{% macro n(value) %}<td class="n">{{ value | number }}</td>{% endmacro %}
{% macro share(value) %}<td class="n">{{ value | percent }}</td>{% endmacro %}
{% macro heads(first, names) %}
<tr><th>{{ first }}</th>{% for name in names %}<th class="n">{{ name }}</th>{% endfor %}</tr>
{% endmacro %}
{% macro plot(name, what) %}
{% if name in plots %}<img alt="Histogram of {{ what }}" src="data:image/png;base64,{{ plots[name] }}">{% endif %}
{% endmacro %}
<h1>{{ title | visible }}</h1>
<p><b>{{ records.used | number }}</b> of <b>{{ records.total | number }}</b> records are used. They give
<b>{{ pairs.kept | number }}</b> pairs of a preferred and a less preferred answer: {{ splits.train | number }} to
train on, {{ splits.validation | number }} to choose settings by (validation), and {{ splits.heldout | number }} held
out to judge the trained model.</p>
{% if warnings %}
<div class="box no"><b>Worth a look</b>
<ul>{% for text in warnings %}<li>{{ text | visible }}</li>{% endfor %}</ul></div>
{% else %}
<p class="box yes">Nothing stands out.</p>
{% endif %}
{% if redacted %}
<p class="note">The texts of the records are withheld, as the config asks: only lengths and reasons are shown.</p>
{% endif %}

<h2>What came in</h2>
<div class="scroll"><table>{{ heads("", ("in all", "used", "rejected")) }}
<tr><td>records</td>{{ n(records.total) }}{{ n(records.used) }}{{ n(records.rejected) }}</tr>
<tr><td>candidate pairs</td>{{ n(pairs.candidates) }}{{ n(pairs.kept) }}{{ n(pairs.rejected) }}</tr></table></div>
<p class="note">A record is one entry of the raw data. It gives one candidate pair, or several where it ranks several
answers; a record that gives none counts as one candidate, rejected. A record is used if at least one of its pairs
is.</p>

<h2>Why pairs were rejected</h2>
{% if reasons %}
<div class="scroll"><table>
<tr><th>reason</th><th class="n">pairs</th><th class="n">of all</th><th>what it means</th>
{%- if sources | length > 1 %}{% for source in sources %}<th class="n"><bdi>{{ source.label | visible }}</bdi></th>
{%- endfor %}{% endif %}</tr>
{% for row in reasons %}
<tr><td><code>{{ row.reason | visible }}</code></td>{{ n(row.pairs) }}{{ share(row.share) }}
<td class="wide">{{ row.meaning | visible }}</td>
{%- if sources | length > 1 %}{% for source in sources %}{{ n(source.reasons.get(row.reason, 0)) }}
{%- endfor %}{% endif %}</tr>
{% endfor %}
</table></div>
<p class="note">Each of them stands in <code>rejections.jsonl</code> beside this page, with its file and line.</p>
{% else %}
<p>None was.</p>
{% endif %}

<h2>Where the pairs come from</h2>
<div class="scroll"><table>
{{ heads("source", ("records", "records used", "pairs rejected", "pairs kept", "train", "validation", "held out")) }}
{% for row in sources %}
<tr><td><bdi>{{ row.label | visible }}</bdi></td>{{ n(row.records) }}{{ n(row.used) }}{{ n(row.rejected) }}
{{ n(row.kept) }}{{ n(row.splits.train) }}{{ n(row.splits.validation) }}{{ n(row.splits.heldout) }}</tr>
{% endfor %}
</table></div>
{% if origins.named %}
<p>The records themselves name {{ "" if origins.complete else "more than " }}{{ origins.named | number }}
origin{{ "" if origins.named == 1 else "s" }}:</p>
<div class="scroll"><table>{{ heads("origin", ("pairs rejected", "pairs kept")) }}
{% for row in origins.top %}
<tr><td><bdi>{{ row.origin | visible or "(not stated, or not read)" }}</bdi></td>
{{ n(row.rejected) }}{{ n(row.kept) }}</tr>
{% endfor %}
{% if origins.other.kept or origins.other.rejected %}
<tr><td>all others</td>{{ n(origins.other.rejected) }}{{ n(origins.other.kept) }}</tr>
{% endif %}
</table></div>
{% if not origins.complete %}
<p class="note">There are so many that only some were counted by name; the commonest may be among the others.</p>
{% endif %}
{% endif %}

{% if pairs.kept %}
<h2>How long they are</h2>
<p>Lengths in tokens (pieces of words, as the model reads them) of the {{ pairs.kept | number }} pairs kept, as they are
used. In {{ truncated.any.pairs | number }} of them ({{ truncated.any.share | percent }}) something was cut to fit.</p>
<div class="scroll"><table>
{{ heads("", ("average", "half have at most", "90 % at most", "99 % at most", "longest", "cut")) }}
{% for name, title in (("prompt", "prompt"), ("chosen", "chosen answer"), ("rejected", "rejected answer"),
 ("pair", "whole pair")) %}
{% set row = lengths[name] %}
<tr><td>{{ title }}</td><td class="n">{{ "{:,.1f}".format(row.mean) }}</td>{{ n(row.median) }}{{ n(row.p90) }}
{{ n(row.p99) }}{{ n(row.max) }}{{ n(truncated["any" if name == "pair" else name].pairs) }}</tr>
{% endfor %}
</table></div>
<div class="plots">{{ plot("prompt", "prompt lengths") }}{{ plot("answers", "answer lengths") }}
{{ plot("pair", "pair lengths") }}</div>
<p class="note">There are {{ prompts.different | number }} different prompts; the one with the most pairs has
{{ prompts.most_pairs_of_one | number }}.</p>

<h2>Is the chosen answer simply the longer one?</h2>
{% set longer = difference.share_chosen_longer %}
<p>{% if longer %}In <b>{{ longer.value | percent }}</b> of the pairs whose answers differ in length, the chosen answer
is the longer one (95 % interval {{ longer.low | percent }} to {{ longer.high | percent }};
{{ longer.n | number }} pairs). 50 % would mean that length says nothing about preference.{% endif %}
On average the chosen answer is {{ "{:,.1f}".format(difference.mean | abs) }} tokens
{{ "longer" if difference.mean >= 0 else "shorter" }} than the rejected one.</p>
<div class="scroll"><table>{{ heads("longer answer", ("pairs",)) }}
<tr><td>chosen</td>{{ n(difference.chosen_longer) }}</tr>
<tr><td>rejected</td>{{ n(difference.rejected_longer) }}</tr>
<tr><td>equally long</td>{{ n(difference.equal) }}</tr></table></div>
<div class="plots">{{ plot("difference", "length differences") }}</div>

<h2>How sure the preferences are</h2>
{% if strength.known or agreement.known %}
<div class="scroll"><table>
{{ heads("", ("pairs with it", "average", "least", "half have at most", "90 % at most", "most")) }}
{% for name, row in (("strength", strength), ("agreement", agreement)) if row.known %}
<tr><td>{{ name }}</td>{{ n(row.known) }}{{ n(row.mean) }}{{ n(row.min) }}{{ n(row.median) }}{{ n(row.p90) }}
{{ n(row.max) }}</tr>
{% endfor %}
</table></div>
<div class="plots">{{ plot("strength", "strength") }}{{ plot("agreement", "agreement") }}</div>
<p class="note">Strength: how much better the chosen answer is, in the data's own unit, rounded to three digits.
Agreement: the share of annotators who agree with the preference.</p>
{% else %}
<p>The data do not say: neither strength nor agreement is known for any pair.</p>
{% endif %}
{% endif %}

{% if training.pairs %}
<h2>What an epoch of training reads</h2>
<p>The {{ training.pairs | number }} training pairs are <b>{{ training.tokens_prompt_once | number }}</b> tokens,
because both answers of a pair share one copy of the prompt. As two sequences per pair, each with a prompt of its own,
they would be {{ training.tokens_prompt_twice | number }} even without padding: {{ training.saving | percent }} are
saved.</p>
<p>Pairs are laid one after another into rows; what no further pair fits into stays empty. With batches of
{{ rows.batch_pairs }} pairs:</p>
<div class="scroll"><table>
{{ heads("tokens of a row", ("rows per batch", "filled", "pairs longer than a row")) }}
{% for row in rows.by_row_tokens %}
<tr><td>{{ row.row_tokens | number }}</td><td class="n">{{ "{:,.1f}".format(row.rows_per_batch) }}</td>
{{ share(row.fill) }}{{ share(row.share_too_long) }}</tr>
{% endfor %}
</table></div>
<p class="note">Estimated from {{ rows.sampled_pairs | number }} of the training pairs. A pair that is longer than a row
gets a longer one of its own.</p>
{% endif %}

<h2>Examples</h2>
{% for reason, items in examples_by_reason %}
<details{{ " open" if loop.first }}>
<summary>{% if reason %}rejected: <code>{{ reason | visible }}</code>{% else %}kept{% endif %}</summary>
{% for item in items %}
<div class="example"><p><bdi>{{ item.source | visible }}</bdi>, line {{ item.line }}
{%- if item.candidate %}, pair {{ item.candidate + 1 }} of the record{% endif %}
{% if item.tokens %}&middot; {{ item.tokens.prompt | number }} + {{ item.tokens.chosen | number }} +
{{ item.tokens.rejected | number }} tokens{% endif %}
{% if sources | length > 1 %}&middot; <bdi>{{ item.label | visible }}</bdi>{% endif %}</p>
{% if item.detail %}<p><bdi>{{ item.detail | visible }}</bdi></p>{% endif %}
{% if item.prompt %}<p class="note">prompt</p><pre dir="auto">{{ item.prompt | visible }}</pre>{% endif %}
{% if item.chosen or item.rejected %}
<div class="texts"><div><p class="note">chosen</p><pre dir="auto">{{ item.chosen | visible }}</pre></div>
<div><p class="note">rejected</p><pre dir="auto">{{ item.rejected | visible }}</pre></div></div>
{% endif %}
</div>
{% endfor %}
</details>
{% else %}
<p>There are none to show.</p>
{% endfor %}
</body></html>
"""
