"""Held-out evaluation.

scores of policy and reference --preference.measure--> estimates with intervals
prompts --generate.answer--> answers of reference and policy
estimates and rules --gate.judge--> Verdict ;  trials --trials.select--> Choice, frontier
all of it --report.write_report--> report.json, report.html
"""
