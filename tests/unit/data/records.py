"""Strategies for raw records: from well-formed to arbitrary."""

from __future__ import annotations

from hypothesis import strategies as st

# Few letters, so that equal and blank answers turn up; a lone surrogate, which JSON can write and UTF-8 cannot hold.
TEXT = st.text("ab \n\u00e9\U0001f600", max_size=4) | st.text("a\ud800", max_size=2) | st.text(max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "pirate"]), "content": TEXT})
FIELD = TEXT | st.lists(MESSAGE, max_size=3) | st.lists(MESSAGE | JSON, max_size=3) | JSON
_STRANGE = st.dictionaries(TEXT, JSON, max_size=2)
_PARTIAL = st.fixed_dictionaries({}, optional={"prompt": FIELD, "chosen": FIELD, "rejected": FIELD, "group": JSON})
_PLAUSIBLE = st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}, optional={"group": JSON})
# Plausible ones are there so that every rule is reached and some records are used.
RECORD = st.builds(lambda fields, strange: {**strange, **fields}, _PLAUSIBLE | _PARTIAL, _STRANGE)
