"""The template and the style of the report's page (report_page.py fills them)."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #59636e; --line: #dde1e6; --card: #f5f6f8; --paper: #fff;
 --good: #1a7f37; --bad: #c62828; --warn: #8a5a00; --mark: #4477aa }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a2abb5; --line: #363c44; --card: #1d2126;
 --paper: #121518; --good: #57c785; --bad: #ff8a80; --warn: #e3b341; --mark: #7fb2e5 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
 color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin: 0 0 1rem } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem } p { margin: .5rem 0 } ul { margin: .5rem 0; padding-left: 1.2rem }
.soft { color: var(--soft); font-size: .875rem; font-weight: 400 } .soft p { margin: 0 }
.box { border: 1px solid var(--line); border-left: .4rem solid; border-radius: .3rem; background: var(--card);
 padding: .8rem 1rem; margin: 1rem 0 } .box b { font-size: 1.1rem }
.passed { color: var(--good) } .failed { color: var(--bad) } .undecided { color: var(--warn) }
.not_applied { color: var(--soft) } .box p, .box ul { color: var(--ink) }
table { border-collapse: collapse; width: 100%; margin: .75rem 0 } caption { text-align: left; padding-top: 1rem }
th, td { text-align: left; vertical-align: top; padding: .45rem .9rem .45rem 0; border-bottom: 1px solid var(--line) }
thead th { font-size: .8rem; font-weight: 600; color: var(--soft); border-bottom-width: 2px; vertical-align: bottom;
 overflow-wrap: normal }
tbody th { font-weight: 500; min-width: 10rem } th .soft { white-space: pre-line }
.n { white-space: nowrap; font-variant-numeric: tabular-nums } .badge { white-space: nowrap; font-weight: 600 }
.graph { width: 26%; min-width: 8rem } .graph svg { display: block; width: 100%; height: 1.1rem; margin-top: .2rem }
svg .axis { stroke: var(--line); stroke-width: 1 } svg .at { stroke: var(--soft); stroke-width: 1 }
svg .range { fill: var(--mark); opacity: .4 } svg .point { fill: var(--mark) }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)) }
figure { margin: .5rem 0; min-width: 0; break-inside: avoid } figcaption { color: var(--soft); font-size: .875rem }
img { display: block; width: 100%; max-width: 32rem; height: auto; background: #fff; border-radius: .3rem }
details { border-top: 1px solid var(--line); padding: .5rem 0 } summary { cursor: pointer; font-weight: 600 }
article { border: 1px solid var(--line); border-radius: .4rem; padding: .8rem; margin: 1rem 0 }
.answers { display: grid; gap: .8rem; margin-top: .8rem;
 grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)) } .answers > div { min-width: 0 }
.who, .who + .soft { margin: 0 } .who { font-weight: 600 } code { font-size: .85em }
pre { font: inherit; font-size: .925rem; white-space: pre-wrap; margin: .3rem 0 0; unicode-bidi: isolate;
 max-height: 18rem; overflow: auto; background: var(--card); border-radius: .3rem; padding: .5rem .7rem }
@media (max-width: 42rem) {
 thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
 table, tbody, caption { display: block } tr { display: flex; flex-wrap: wrap; column-gap: 1.2rem; padding: .6rem 0;
 border-bottom: 1px solid var(--line) } th, td { display: block; border: 0; padding: .1rem 0 }
 tbody th, .graph, .long { flex: 1 0 100%; width: auto } td[data-label]:not(.n) { flex: 0 1 auto }
 td[data-label]::before { content: attr(data-label) " "; color: var(--soft); font-size: .8rem }
}
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --card: #fff; --paper: #fff }
 body { max-width: none; padding: 0; font-size: 11pt } pre { max-height: none } tr, .box { break-inside: avoid }
 h2, h3 { break-after: avoid } details::details-content { content-visibility: visible; block-size: auto } }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src '{{ style_digest }}';
 base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">
<title>Evaluation: {{ headline.title }}</title>
<style>{{ style }}</style></head><body>

{% macro graph(e, scale) -%}
{% if e.value is none or scale is none %}{% else -%}
<svg role="img" viewBox="0 0 100 12" preserveAspectRatio="none" aria-label="{{ e.value | number }}
{%- if e.low is not none %}, 95 % interval {{ e.low | number }} to {{ e.high | number }}{% endif %}">
<line class="axis" x1="0" y1="6" x2="100" y2="6" vector-effect="non-scaling-stroke"/>
{% if scale.at is not none %}{% set x = scale.at | place(scale) %}
<line class="at" x1="{{ x }}" y1="0" x2="{{ x }}" y2="12" vector-effect="non-scaling-stroke"/>{% endif %}
{% if e.low is not none and e.high is not none %}<rect class="range" y="3" height="6" x="{{ e.low | place(scale) }}"
 width="{{ e | width(scale) }}"/>{% endif %}
<rect class="point" y="1" height="10" width="1" x="{{ e.value | place(scale) }}"/></svg>{% endif %}
{%- endmacro %}
{% macro value(e, label) -%}
{% if e is none %}<td></td>{% else -%}
<td data-label="{{ label }}">{{ e.value | number }}
<span class="soft"><span class="n">({{ e.low | number }} to {{ e.high | number }},</span>
<span class="n">n = {{ e.n | number }})</span></span></td>{% endif %}
{%- endmacro %}
{% macro interval(e) -%}
<td class="n" data-label="95 %">{% if e.low is none or e.high is none %}&ndash;{% else %}{{ e.low | number }} to
 {{ e.high | number }}{% endif %}</td><td class="n" data-label="n">{{ e.n | number }}</td>
{%- endmacro %}
{% macro name(row) -%}
<th scope="row"><bdi>{{ row.label | name }}</bdi>
{% if row.detail %}<div class="soft">{{ row.detail }}</div>{% endif %}</th>
{%- endmacro %}
{% macro table(rows, title="", explained="") -%}
<table>{% if title %}<caption><b>{{ title }}</b> <span class="soft">{{ explained }}</span></caption>{% endif %}
<thead><tr><th></th><th></th><th>value</th><th>95 % interval</th><th>n</th></tr></thead><tbody>
{% for row in rows %}
{% if row.estimate is none %}<tr>{{ name(row) }}<td class="long" colspan="4">{{ row.missing }}</td></tr>
{% else %}<tr>{{ name(row) }}<td class="graph">{{ graph(row.estimate, row.scale) }}</td>
<td class="n"><b>{{ row.estimate.value | number }}</b></td>{{ interval(row.estimate) }}</tr>{% endif %}
{% endfor %}
</tbody></table>
{%- endmacro %}
{% macro plot(key, alt, caption) -%}
{% if plots[key] %}<figure><img alt="{{ alt }}" src="data:image/png;base64,{{ plots[key] }}">
<figcaption>{{ caption }}</figcaption></figure>{% endif %}
{%- endmacro %}
{% macro slices(part) -%}
{% for title, rows in part.slices if rows %}
<h3>{{ title }}</h3>
<table><thead><tr><th></th><th>0 to 1, chance at the line</th><th>accuracy</th>
<th>95 % interval</th><th>n</th><th>mean margin</th></tr></thead><tbody>
{% for row in rows %}
<tr>{{ name(row) }}<td class="graph">{{ graph(row.accuracy, share) }}</td>
<td class="n" data-label="accuracy"><b>{{ row.accuracy.value | number }}</b></td>{{ interval(row.accuracy) }}
{{ value(row.margin, "margin") }}</tr>
{% endfor %}
</tbody></table>
{% endfor %}
{%- endmacro %}
{% macro text(shown) -%}
<pre dir="auto" tabindex="0">{{ shown.text }}</pre>
{% if shown.of %}<p class="soft">Cut here: {{ shown.text | length | number }} of {{ shown.of | number }} characters. The
 whole text is in report.json.</p>{% endif %}
{%- endmacro %}
{% macro sample(item, number) -%}
<article><p class="who">Prompt {{ number }}</p>{{ text(item.prompt) }}
<div class="answers">{% for answer in item.answers %}
<div><p class="who"><bdi>{{ answer.who | name }}</bdi></p>
{% if answer.note %}<p class="soft"><bdi>{{ answer.note }}</bdi></p>{% endif %}{{ text(answer) }}</div>
{% endfor %}</div></article>
{%- endmacro %}

<header><h1>Evaluation of the policy</h1>
<div class="box {{ headline.kind }}"><b>{{ headline.title }}</b>
<p>{{ headline.text }}</p></div></header>
<main>
<h2>The gate, rule by rule</h2>
{% if verdict.rules %}
<table><thead><tr><th>rule</th><th>outcome</th><th>found</th><th>95 % interval</th><th>n</th><th>limit</th></tr></thead>
<tbody>
{% for rule in verdict.rules %}
<tr><th scope="row"><bdi>{{ rule.rule | name }}</bdi>
{% if rule.reason %}<div class="soft">{{ rule.reason }}</div>
{% endif %}</th><td class="badge {{ rule.outcome }}">{{ outcomes[rule.outcome] }}</td>
{% if rule.found %}<td class="n" data-label="found"><b>{{ rule.found.value | number }}</b></td>
{{ interval(rule.found) }}{% else %}<td colspan="3" class="soft" data-label="found">nothing to judge by</td>{% endif %}
<td data-label="limit">{{ rule.limit or "none" }}</td></tr>
{% endfor %}
</tbody></table>
<p class="soft">Passed: the whole 95 % interval lies on the right side of the limit. Undecided: it reaches over the
limit, or there is no number to judge by. An undecided rule does not let a model through.</p>
{% else %}<p>The gate has no rules.</p>{% endif %}

<h2>What is compared</h2>
<ul><li><b>Policy</b>: the trained model that this report is about.</li>
<li><b>Reference</b>: the model that it was trained from. The reward of an answer is beta &times; log(policy /
reference) of its probability, with beta = {{ findings.beta }}.</li>
<li><b>Champion</b>: {% if champion %}<bdi>{{ champion.name | name }}</bdi>, version
<bdi>{{ champion.version | name }}</bdi> of the registry (digest <code>{{ champion.digest | name }}</code>).
{%- else %}there was none to compare with.{% endif %}</li></ul>
{% if findings.notes %}<div class="box undecided"><b>What could not be measured</b>
<ul>{% for note in findings.notes %}<li>{{ note }}</li>{% endfor %}</ul></div>{% endif %}

<h2>Held-out preferences</h2>
<p>On pairs that the training never saw: is the chosen answer the one that the policy rewards more?</p>
{{ table(heldout.rows) }}
<div class="plots">
{{ plot("margins",
 "Histogram of the reward margins of the held-out pairs, mean " ~ findings.heldout.margin.value | number,
 "Right of zero the policy agrees with the data. n = " ~ drawn ~ ", of all sets.") }}
{{ plot("reliability", "Reliability plot: accuracy against the probability that the policy gives its preference",
 "A point below the dashed line: the policy is surer than it is right. Bars: how many pairs it stands for.") }}
</div>
{% if heldout.bins %}<details><summary>The reliability plot as a table</summary>
<table><thead><tr><th>probability from, to</th><th>mean probability</th><th>accuracy</th><th>n</th></tr></thead><tbody>
{% for bin in heldout.bins %}<tr><th scope="row">{{ bin.low | number }} to {{ bin.high | number }}</th>
<td class="n" data-label="probability">{{ bin.confidence | number }}</td>
<td class="n" data-label="accuracy">{{ bin.accuracy | number }}</td>
<td class="n" data-label="n">{{ bin.n | number }}</td></tr>{% endfor %}</tbody></table></details>{% endif %}

<h2>Does it only prefer longer answers?</h2>
{{ table(heldout.length_rows) }}
<div class="plots">{{ plot("lengths", "Scatter plot of reward margin against difference in length",
 "A trend that rises from left to right: the policy rewards length. n = " ~ drawn ~ ", of all sets.") }}</div>
{{ slices(heldout) }}

<h2>Sets</h2>
{% if sets %}
<table><thead><tr><th>set</th><th>0 to 1, chance at the line</th><th>accuracy</th><th>95 % interval</th>
<th>n</th><th>drop</th>{% if champion %}<th>policy - champion</th>{% endif %}</tr></thead><tbody>
{% for part in sets %}
<tr>{{ name(part) }}<td class="graph">{{ graph(part.accuracy, share) }}</td>
<td class="n" data-label="accuracy"><b>{{ part.accuracy.value | number }}</b></td>{{ interval(part.accuracy) }}
{{ value(part.drop, "drop") }}{% if champion %}{{ value(part.gain, "policy - champion") }}{% endif %}</tr>
{% endfor %}</tbody></table>
<p class="soft">Drop: accuracy of a set outside the training distribution minus that of the held-out pairs of the sets
that were trained on. Below zero, the policy is worse on what it was not trained for.</p>
{% for part in sets %}<details><summary><bdi>{{ part.label | name }}</bdi>, all numbers</summary>
{{ table(part.rows) }}{{ table(part.length_rows, "Length") }}{{ slices(part) }}</details>{% endfor %}
{% else %}<p>There is one set only.</p>{% endif %}
{% if not outside %}<p>No held-out set lies outside the training distribution, so this report does not say how the
policy does on other data.</p>{% endif %}

<h2>Sampled answers</h2>
{% if divergence %}{{ table(divergence) }}
{% else %}<p>The divergence from the reference, KL(policy || reference), was not measured.</p>{% endif %}
{% for group in sampled %}{{ table(group.rows, group.title, group.explained) }}
{% else %}<p>No answers were sampled.</p>{% endfor %}

<h2>Win rates</h2>
{% if comparisons %}{{ table(comparisons) }}
<p class="soft">A rate of 0 to 1, ties counting half; the line is a draw. Intervals are Wilson's, over prompts.</p>
{% else %}<p>No judge compared the answers.</p>{% endif %}

<h2>Side by side</h2>
{% for item in samples[:open_samples] %}{{ sample(item, loop.index) }}
{% else %}<p>No samples were asked for.</p>{% endfor %}
{% if samples | length > open_samples %}<details><summary>{{ samples | length - open_samples }} more</summary>
{% for item in samples[open_samples:] %}{{ sample(item, loop.index + open_samples) }}{% endfor %}</details>{% endif %}

{% if plots.training %}<h2>Training</h2>
<div class="plots">{{ plot("training", "Loss, and rewards of the chosen and of the rejected answers, by step",
 "Both rewards and their margin: a margin may also grow while both answers become unlikely.") }}</div>{% endif %}

<h2>Identity</h2>
<table><thead><tr><th>what</th><th>digest</th></tr></thead><tbody>
{% for key, digest in identity.items() %}<tr><th scope="row"><bdi>{{ key | name }}</bdi></th>
<td class="long"><code>{{ digest }}</code></td></tr>
{% endfor %}</tbody></table>
<p class="soft">report.json beside this page holds the same numbers (schema version {{ schema_version }}).</p>
</main></body></html>
"""
