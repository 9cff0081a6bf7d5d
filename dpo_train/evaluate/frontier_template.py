"""The template, the style and the script of the frontier's page (frontier_page.py fills them)."""

from __future__ import annotations

from dpo_train.evaluate.report_template import STYLE as REPORT_STYLE

STYLE = (
    REPORT_STYLE
    + """
body { max-width: 76rem } .box { max-width: 60rem } tbody th { min-width: 11rem }
.charts { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)) }
.chart { display: block; width: 100%; max-width: 34rem; height: auto; overflow: visible }
.chart text { font-size: 13px; fill: var(--soft) } .chart .strong { fill: var(--ink); font-weight: 600 }
.chart line, .chart polyline { fill: none; stroke-width: 1.2 }
.chart .axis { stroke: var(--line) } .chart .frontier { stroke: var(--soft) }
.chart .budget { stroke: var(--ink); stroke-dasharray: 5 4 } .chart .bar { opacity: .55 }
.chart .band { stroke: none; opacity: .16 } .chart .grey { fill: var(--soft) }
.chart .over path { fill: var(--paper) } .chart .seed { opacity: .55 }
.chart .ring { fill: none; stroke: var(--ink); stroke-width: 1.6 } .chart .hit { fill: transparent; stroke: none }
.mark, .curve { cursor: pointer; outline: none } .mark.on .bar { opacity: 1; stroke-width: 3 }
.mark.on .shape { stroke: var(--ink); stroke-width: 2 }
.mark:focus-visible .shape { stroke: var(--mark); stroke-width: 4 } .hit { cursor: pointer }
.curve.on polyline { stroke-width: 3.5 } .cross { stroke-width: 1.6 }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .5rem 0; padding: 0; list-style: none;
 font-size: .875rem } .legend svg { width: .8rem; height: .8rem; margin-right: .35rem }
.legend .plain { fill: var(--ink) }
.detail { display: none } .detail.on { display: block } .detail b { font-size: 1rem } .detail ul { list-style: none;
 padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1.4rem }
tr.on { background: var(--card) } [data-off] { display: none !important }
.filters { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; margin: 1rem 0 } .filters[hidden] { display: none }
.filters label { min-width: 0; max-width: 100% }
select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .3rem;
 padding: .2rem .4rem; max-width: min(100%, 20rem) } .why { min-width: 14rem }
@media (max-width: 42rem) { .none { display: none } }
"""
)

SCRIPT = """
const all = [...document.querySelectorAll("[data-key]")], selects = [...document.querySelectorAll("select")];
const light = key => all.forEach(e => e.classList.toggle("on", e.dataset.key === key));
for (const e of all) for (const name of ["pointerenter", "focusin", "click"])
  e.addEventListener(name, () => light(e.dataset.key));
const filter = () => all.forEach(e => e.toggleAttribute("data-off",
  selects.some(s => s.value !== "" && e.getAttribute("data-" + s.name) !== s.value)));
selects.forEach(s => s.addEventListener("change", filter));
document.querySelector(".filters").hidden = false;
"""
"""Marks, curves, rows and details of one setting have the same data-key, and data-f0, data-f1 ... for the filters."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src '{{ style_digest }}';
 script-src '{{ script_digest }}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">
<title>Sweep: {{ headline }}</title>
<style>{{ style }}</style></head><body>
{% macro tags(s) -%}data-key="{{ s.key }}"{% for n in s.filters %} data-f{{ loop.index0 }}="{{ n }}"{% endfor %}
{%- endmacro %}
{% macro axes(c) -%}
{% for t in c.x_ticks %}<line class="axis" x1="{{ t.at }}" x2="{{ t.at }}" y1="{{ c.top }}" y2="{{ c.bottom }}"/>
<text x="{{ t.at }}" y="{{ c.bottom + 16 }}" text-anchor="middle">{{ t.text }}</text>{% endfor %}
{% for t in c.y_ticks %}<line class="axis" x1="{{ c.left }}" x2="{{ c.right }}" y1="{{ t.at }}" y2="{{ t.at }}"/>
<text x="{{ c.left - 6 }}" y="{{ t.at + 4 }}" text-anchor="end">{{ t.text }}</text>{% endfor %}
<text x="{{ (c.left + c.right) / 2 }}" y="{{ c.bottom + 36 }}" text-anchor="middle">{{ c.x_label }}</text>
{%- endmacro %}
<h1>{{ headline }}</h1>
<div class="box {{ 'passed' if chosen else 'failed' }}"><b>{{ verdict }}</b><p>{{ rule }}</p>
{% if notes %}<ul>{% for note in notes %}<li>{{ note | spaced }}</li>{% endfor %}</ul>{% endif %}</div>

<div class="filters" hidden>
{% for f in filters %}<label>{{ f.name }} <select name="f{{ loop.index0 }}" autocomplete="off">
<option value="">all</option>{% for value in f["values"] %}
<option value="{{ loop.index0 }}">{{ value | name }}</option>{% endfor %}</select></label>
{% endfor %}</div>

<div class="charts">
{% if chart.marks or chart.ways %}
<figure><figcaption>{{ chart.y_label | capitalize }}</figcaption>
<svg class="chart" viewBox="0 0 {{ chart.width }} {{ chart.height }}" role="group" aria-label="{{ chart.y_label }}
 against {{ chart.x_label }}">{{ axes(chart) }}
{% if chart.band %}<polygon class="band grey" points="{{ chart.band }}"/>{% endif %}
{% if chart.line %}<polyline class="frontier" points="{{ chart.line }}"/>{% endif %}
{% if chart.budget is not none %}<line class="budget" x1="{{ chart.budget }}" x2="{{ chart.budget }}"
 y1="{{ chart.top }}" y2="{{ chart.bottom }}"/><text class="strong" x="{{ chart.budget - 4 }}" y="{{ chart.top + 10 }}"
 text-anchor="end">budget</text>{% endif %}
{% for w in chart.ways %}
<g class="curve" {{ tags(w) }}><title>{{ w.words }}</title>
{% if w.band %}<polygon class="band" fill="{{ w.colour }}" points="{{ w.band }}"/>{% endif %}
<polyline stroke="{{ w.colour }}" points="{{ w.line }}"/>
{% for x, y in w.dots %}<circle class="way" cx="{{ x }}" cy="{{ y }}" r="2.2" fill="{{ w.colour }}"/>{% endfor %}
{% if w.is_stopped %}<path class="cross" transform="translate({{ w.dots[-1][0] }} {{ w.dots[-1][1] }})"
 d="M-4 -4L4 4M-4 4L4 -4" stroke="{{ w.colour }}"/>{% endif %}</g>
{% endfor %}
{% for m in chart.marks %}<circle class="hit" {{ tags(m) }} cx="{{ m.x }}" cy="{{ m.y }}" r="14"/>{% endfor %}
{% for m in chart.marks %}
<g class="mark{{ '' if m.is_within else ' over' }}{{ ' on' if m.is_chosen }}" {{ tags(m) }} tabindex="0" role="img"
 aria-label="{{ m.words }}"><title>{{ m.words }}</title>
<line class="bar" stroke="{{ m.colour }}" x1="{{ m.x_low }}" x2="{{ m.x_high }}" y1="{{ m.y }}" y2="{{ m.y }}"/>
<line class="bar" stroke="{{ m.colour }}" x1="{{ m.x }}" x2="{{ m.x }}" y1="{{ m.y_low }}" y2="{{ m.y_high }}"/>
{% for x, y in m.seeds %}<circle class="seed" cx="{{ x }}" cy="{{ y }}" r="2.2" fill="{{ m.colour }}"/>{% endfor %}
<g transform="translate({{ m.x }} {{ m.y }})">
{% if m.is_chosen %}<circle class="ring" r="10"/>{% endif %}
<path class="shape" d="{{ m.shape }}" fill="{{ m.colour }}" stroke="{{ m.colour }}"/></g></g>
{% endfor %}
</svg></figure>
{% endif %}
{% if steps.curves %}
<figure><figcaption>Accuracy on validation pairs</figcaption>
<svg class="chart" viewBox="0 0 {{ steps.width }} {{ steps.height }}" role="group" aria-label="accuracy by step">
{{ axes(steps) }}
{% for c in steps.curves %}
<g class="curve{{ ' on' if c.is_chosen }}" {{ tags(c) }}><title>{{ c.words }}</title>
{% if c.band %}<polygon class="band" fill="{{ c.colour }}" points="{{ c.band }}"/>{% endif %}
<polyline stroke="{{ c.colour }}" points="{{ c.line }}"/>
{% for x, y in c.dots %}<path transform="translate({{ x }} {{ y }}) scale(.6)" d="{{ c.shape }}"
 stroke="{{ c.colour }}" fill="{{ c.colour }}"/>{% endfor %}</g>
{% endfor %}
</svg></figure>
{% endif %}
</div>
<ul class="legend">
{% for words, colour, shape in legend %}<li><svg viewBox="-7 -7 14 14" aria-hidden="true"><path d="{{ shape }}"
 {%- if colour %} fill="{{ colour }}"{% else %} class="plain"{% endif %}/></svg>{{ words | name }}</li>
{% endfor %}
{% if any_over %}<li>hollow: over a budget</li>{% endif %}
{% if chart.ways %}<li>dots: on the way{{ ", a cross: stopped there" if any_stopped }}</li>{% endif %}
</ul>

{% for s in settings %}
<div class="box detail{{ ' on' if s.is_chosen }}" {{ tags(s) }}><b><bdi>{{ s.name | name }}</bdi></b>
 <span class="soft">{{ s.state }}</span>
<ul>{% for label, text in s.numbers %}<li><span class="soft">{{ label }}</span>
 {{ text | spaced }}</li>{% endfor %}</ul></div>
{% endfor %}

<h2>Trials</h2>
<table><thead><tr><th>trial</th>{% for c in columns %}<th>{{ c }}</th>{% endfor %}<th>steps</th><th>outcome</th></tr>
</thead><tbody>
{% for row in rows %}
<tr {{ tags(row) }}{% if row.is_lit %} class="on"{% endif %}><th scope="row"><bdi>{{ row.name | name }}</bdi></th>
{% for label, found in row.cells %}
{% if found is none %}<td class="n none">&ndash;</td>{% else %}<td data-label="{{ label }}">{{ found.value | number }}
<span class="soft n">({{ found.low | number }} to {{ found.high | number }})</span></td>{% endif %}
{% endfor %}
<td class="n" data-label="steps">{{ row.steps | number }}</td>
<td class="long why"><span class="badge {{ row.kind }}">{{ row.badge }}</span> {{ row.why | spaced }}</td></tr>
{% endfor %}
</tbody></table>
<p class="soft">Intervals are 95 %. Everything here is measured on validation pairs and prompts; the held-out pairs are
 left to the evaluation.</p>
<script>{{ script }}</script>
</body></html>
"""
