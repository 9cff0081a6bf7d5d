"""Configuration: strict decoding, overrides, and the text that travels into pipeline steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_train.config import (
    LoraConfig,
    RunConfig,
    load_config,
    parse_config,
    to_dict,
    to_text,
)
from dpo_train.errors import ConfigError
from tests.tiny import tiny_config

MINIMAL = "model: {path: /m}\nprepare: {path: /p}\n"
TENSOR = ("compute.tensor_parallel=2", "compute.workers=2")


def _parse(text: str = "", *overrides: str) -> RunConfig:
    return parse_config(MINIMAL + text, overrides)


def test_two_paths_are_all_that_is_required() -> None:
    """Everything else has its default."""
    config = _parse()
    assert (config.model.path, config.prepare.path) == ("/m", "/p")
    assert (config.train.beta, config.train.learning_rate, config.train.lora) == (0.1, 5e-7, None)
    with pytest.raises(ConfigError, match=r"'model' is required; 'prepare' is required"):
        parse_config("seed: 1")


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("trian: {}", "trian", "train"),
        ("train: {learning_rat: 1}", "train.learning_rat", "train.learning_rate"),
        ("train: {lora: {rnak: 3}}", "train.lora.rnak", "train.lora.rank"),
        ("beta: 0.2", "beta", "train.beta"),
        ("train: {learning-rate: 1}", "train.learning-rate", "train.learning_rate"),
        ("train: {Beta: 1}", "train.Beta", "train.beta"),
    ],
)
def test_unknown_key_is_refused_and_names_the_nearest(text: str, unknown: str, nearest: str) -> None:
    """A typing error in a key must not leave its default in force without a word."""
    with pytest.raises(ConfigError) as caught:
        _parse(text)
    assert f"unknown key '{unknown}' (did you mean '{nearest}'?)" in str(caught.value)


def test_unknown_key_without_a_neighbour_is_named_alone() -> None:
    """A wrong guess would be worse than none."""
    with pytest.raises(ConfigError, match=r"unknown key 'zzzzzzzz'\.$"):
        _parse("zzzzzzzz: 1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {beta: '0.1'}", "'train.beta' should be a valid number, got '0.1'"),
        ("train: {beta: true}", "'train.beta' should be a valid number, got True"),
        ("train: {beta: 0}", "'train.beta' should be greater than 0, got 0"),
        ("train: {batch_pairs: 1.5}", "'train.batch_pairs' should be a valid integer, got 1.5"),
        ("train: {batch_pairs: 0}", "'train.batch_pairs' should be greater than or equal to 1, got 0"),
        ("train: {label_smoothing: 0.5}", "'train.label_smoothing' should be less than 0.5, got 0.5"),
        ("train: {loss: dpo}", "or 'unlikelihood', got 'dpo'"),
        ("train: {lora: 3}", "'train.lora' should be an object, got 3"),
        ("train: {lora: {rank: 0}}", "'train.lora.rank' should be greater than or equal to 1, got 0"),
        ("train: {loss: {dpo: 1.0}}", "'train.loss.dpo' should be 'sigmoid', "),
        ("train: {loss: {sft: 0}}", "'train.loss.sft' should be greater than 0, got 0"),
        ("train: 3", "'train' should be an object, got 3"),
        ("sweep: {betas: [0.1, x]}", "'sweep.betas.1' should be a valid number, got 'x'"),
        ("seed: one", "'seed' should be a valid integer, got 'one'"),
        ("seed: null", "'seed' should be a valid integer, got None"),
    ],
)
def test_wrong_type_or_value_names_the_key_and_what_was_got(text: str, message: str) -> None:
    """Nothing is converted silently: text is no number, a bool is no number, a half is no count."""
    with pytest.raises(ConfigError) as caught:
        _parse(text)
    assert message in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    """Two keys, two mistakes, one message."""
    with pytest.raises(ConfigError, match=r"has 2 mistakes: .*train\.beta.*; .*train\.epochs"):
        _parse("train: {beta: x, epochs: y}")


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("key", ["train.learning_rate", "train.beta", "evaluate.gate.min_margin"])
def test_numbers_are_finite(key: str, value: str) -> None:
    """An infinite rate trains nothing, a gate at NaN refuses nothing, and neither survives JSON."""
    with pytest.raises(ConfigError, match=key):
        _parse("", f"{key}={value}")


@pytest.mark.parametrize(
    ("text", "number"),
    [("5e-7", 5e-7), ("1E-6", 1e-6), ("2.5e-4", 2.5e-4), (".5e1", 5.0), ("1.e+0", 1.0), ("3", 3.0), ("0.01", 0.01)],
)
def test_number_is_read_as_people_write_it(text: str, number: float) -> None:
    """YAML 1.1 takes 5e-7 for text; both in the file and as an override it is a number here."""
    assert _parse(f"train: {{learning_rate: {text}}}").train.learning_rate == number
    assert _parse("", f"train.learning_rate={text}").train.learning_rate == number


def test_overrides_replace_in_order() -> None:
    """Deep keys, sections that were absent, lists, null and text with an equals sign."""
    config = _parse(
        "train: {beta: 0.3, lora: {rank: 2}}",
        "train.beta=0.4",
        "train.beta=0.5",
        "evaluate.gate.min_accuracy=0.6",
        "sweep.betas=[0.1, 0.2]",
        "train.lora=null",
        "tracking.uri=http://host/?a=b",
    )
    assert config.train.beta == 0.5
    assert config.evaluate.gate.min_accuracy == 0.6
    assert config.sweep.betas == (0.1, 0.2)
    assert config.train.lora is None
    assert config.tracking.uri == "http://host/?a=b"
    assert _parse("", "train.lora.rank=8").train.lora == LoraConfig(rank=8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.beta", "section.key=value"),
        ("=3", "section.key=value"),
        ("train.beta=[", "is not valid YAML"),
        ("seed.x=1", "'seed'"),
        ("train.bta=1", "did you mean 'train.beta'"),
    ],
)
def test_override_that_cannot_be_read_is_refused(override: str, message: str) -> None:
    """The message names the override or its key."""
    with pytest.raises(ConfigError) as caught:
        _parse("seed: 1", override)
    assert message in str(caught.value)


def test_file_is_read_and_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the current folder, because workers run elsewhere; hub names and addresses stay as they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "c.yaml").write_text("store: s\nmodel: {path: org/name}\nprepare: {path: ~/x.jsonl}\n")
    config = load_config("c.yaml", ["prepare.path=data/a.jsonl"])
    assert config.store == str(tmp_path / "s")
    assert config.model.path == "org/name"
    assert config.prepare.path == str(tmp_path / "data" / "a.jsonl")
    assert load_config("c.yaml").prepare.path == str(Path.home() / "x.jsonl")
    assert load_config("c.yaml", ["model.path=here"]).model.path == str(tmp_path / "here")
    assert load_config("c.yaml", ["model.path=./absent"]).model.path == str(tmp_path / "absent")
    assert load_config("c.yaml", ["store=s3://bucket/x/"]).store == "s3://bucket/x"
    assert load_config("c.yaml", ["prepare.path=hf://org/name"]).prepare.path == "hf://org/name"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("store=gs://bucket/x", "store has an address"),
        ("store=hf://org/name", "store has an address"),
        ("prepare.path=ftp://host/x", "prepare has an address"),
        ("prepare.sources=[{path: y.jsonl}]", "only one of them"),
        ("prepare.path=null", "only one of them"),
        ("prepare.weight=1.0", "no meaning without other sources"),
        ("prepare={sources: [{path: a, weight: 1.0}, {path: b}]}", "every source has a weight or none"),
        ("prepare={path: a, template: plain, chat_template: t}", "no meaning with prepare.template=plain"),
        ("prepare={sources: [{path: a, split: train}]}", "nothing to evaluate on"),
        ("prepare={sources: [{path: a}, {path: b, split: heldout, weight: 1.0}]}", "a share of the training pairs"),
        ("prepare={sources: [{pth: a}]}", "unknown key 'prepare.sources.0.pth'"),
        ("prepare={sources: [{path: a, format: nectar}]}", "prepare.sources.0.format"),
    ],
)
def test_data_that_cannot_be_meant_is_refused(override: str, message: str) -> None:
    """Addresses of other kinds, one source and several, weights of some, a template that is not used."""
    with pytest.raises(ConfigError, match=message):
        parse_config("model: {path: m}\nprepare: {path: x.jsonl}\n", [override])


def test_sources_have_absolute_paths_and_one_source_is_a_list_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heldout pairs of a source of their own need no fraction."""
    monkeypatch.chdir(tmp_path)
    one = parse_config("model: {path: m}\nprepare: {path: x.jsonl, format: hh, fields: {origin: o}}\n").prepare
    assert [(s.path, s.format, s.fields) for s in one.all_sources] == [
        (str(tmp_path / "x.jsonl"), "hh", {"origin": "o"})
    ]
    several = "prepare: {sources: [{path: a}, {path: s3://b/c, split: heldout}], heldout_fraction: 0.0}"
    config = parse_config(f"model: {{path: m}}\n{several}\n")
    assert [source.path for source in config.prepare.all_sources] == [str(tmp_path / "a"), "s3://b/c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "cannot be read"), (b"a: [", "is not valid YAML"), (b"- a", "is not a mapping"), (b"", "mapping")],
)
def test_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """Wrong encoding, broken YAML, a list, nothing; each names the file."""
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file)
    assert "c.yaml" in str(caught.value)
    with pytest.raises(ConfigError, match="dpo init"):
        load_config(tmp_path / "absent.yaml")


NAMES = st.text(min_size=1, max_size=30) | st.lists(
    st.sampled_from(["python3", "{{$", "{", "$", "\\", '"', "pytho", "n3", "\n", "é", "😀", "\x7f"]), min_size=1
).map("".join)


@given(name=NAMES, beta=st.floats(1e-300, 1e300), seed=st.integers(0, 2**63 - 1))
def test_text_form_reads_back_and_survives_kubeflow(name: str, beta: float, seed: int) -> None:
    """Any name and number comes back; what kfp.local would rewrite or expand is nowhere in the text."""
    config = _parse("train: {lora: {target_modules: [q, v]}}")
    config = dataclasses.replace(
        config,
        seed=seed,
        train=dataclasses.replace(config.train, beta=beta),
        tracking=dataclasses.replace(config.tracking, experiment=name),
    )
    text = to_text(config)
    assert parse_config(text) == config
    assert "python3" not in text
    assert "{{$" not in text
    assert "\n" not in text


def test_text_form_keeps_the_paths_that_kubeflow_would_damage() -> None:
    """The two literal cases by name."""
    config = _parse("", "store=/opt/python3/{{$}}/{{{$x")
    assert parse_config(to_text(config)).store == "/opt/python3/{{$}}/{{{$x"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.loss=ipo", "train.label_smoothing=0.1"], "no meaning with the ipo loss"),
        (["prepare.heldout_fraction=0"], "nothing to evaluate on"),
        (["prepare.heldout_fraction=0.5", "prepare.validation_fraction=0.5"], "nothing to train on"),
        (["prepare.max_heldout_pairs=5"], "below evaluate.min_heldout_pairs"),
        (["prepare.validation_fraction=0", "sweep.betas=[0.1]"], "needs validation pairs"),
        (["train.loss=simpo", "sweep.betas=[0.1]"], "at which no loss of train.loss looks"),
        (["train.loss=simpo", "train.ld_alpha=0.5"], "ld_alpha has no meaning with the simpo loss"),
        (["train.loss=aot", "train.wpo=true"], "wpo has no meaning with the aot loss"),
        (["train.simpo_margin=1.0"], "simpo_margin has no meaning without the simpo loss"),
        (["train.divergence_alpha=0.3"], "divergence_alpha has no meaning with the reverse_kl divergence"),
        (["train.keep=best", "prepare.validation_fraction=0"], "train.keep=best and train.patience need validation"),
        (["train.weight_decay=0.1", "train.optimizer=rmsprop"], "no meaning with rmsprop"),
        (["sft.enabled=true", "sft.weight_decay=0.1", "sft.optimizer=rmsprop"], "sft.weight_decay has no meaning"),
        (["sft.enabled=true", "sft.frozen=[lm_head]", "sft.lora={}"], "sft.lora trains none of them"),
        (["sft.enabled=true", "train.lora={}", "model.quantization=nf4"], "without sft.lora its weights would be"),
        ([*TENSOR, "compute.workers=3"], "compute.tensor_parallel=2 does not divide compute.workers=3"),
        ([*TENSOR, "compute.shard=off"], "compute.tensor_parallel shards weights, and compute.shard is off"),
        ([*TENSOR, "train.lora={}"], "with train.lora adapters are trained"),
        ([*TENSOR, "sft.enabled=true", "sft.lora={}"], "with sft.lora adapters are trained"),
        ([*TENSOR, "compute.executor=local"], "compute.executor=local is one"),
        (["register.model_name=org/model"], "'register.model_name'"),
        (["register.alias=latest"], "no alias that MLflow takes"),
        (["register.alias=v12"], "no alias that MLflow takes"),
        (['register.alias="12"'], "no alias that MLflow takes"),
        (["seed=-1"], "greater than or equal to 0"),
    ],
)
def test_contradiction_is_found_before_anything_runs(overrides: list[str], words: str) -> None:
    """What would fail after hours fails now."""
    with pytest.raises(ConfigError, match=words):
        _parse("", *overrides)


def test_keys_of_sft_do_not_contradict_each_other_while_it_is_off() -> None:
    """A section that is switched off for one run stays as it is."""
    overrides = ["sft.weight_decay=0.1", "sft.optimizer=rmsprop", "train.lora={}", "model.quantization=nf4"]
    assert _parse("", *overrides).sft.weight_decay == 0.1


def test_key_that_stands_twice_is_refused() -> None:
    """YAML readers keep the last one silently, and with it half of a person's settings."""
    with pytest.raises(ConfigError, match="the key 'train' stands twice"):
        _parse("train: {beta: 0.1}\ntrain: {epochs: 2}")


def test_dict_form_is_plain_json() -> None:
    """What goes into a record: lists for tuples, nothing that JSON cannot hold."""
    tree = to_dict(_parse("sweep: {betas: [0.1]}"))
    assert tree["sweep"]["betas"] == [0.1]
    assert json.loads(json.dumps(tree)) == tree


def test_tiny_config_takes_overrides_by_dot_or_underscores(tmp_path: Path) -> None:
    """The helper of other tests decodes like a user's config, and writes its model and data once."""
    config = tiny_config(tmp_path, train__beta=0.2, **{"evaluate.gate.min_accuracy": 0.7})
    assert (config.train.beta, config.evaluate.gate.min_accuracy) == (0.2, 0.7)
    assert config.compute.executor == "local"
    weights = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    tiny_config(tmp_path)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == weights


@pytest.mark.parametrize("text", ["on", "off", "auto"])
def test_on_and_off_are_words(tmp_path: Path, text: str) -> None:
    """In YAML 1.1 they would be booleans, and ``compute.shard=on`` an error."""
    assert tiny_config(tmp_path, compute__shard=text).compute.shard == text
    config = parse_config(json.dumps({"model": {"path": "m"}, "prepare": {"path": "p"}}), [f"compute.shard={text}"])
    assert config.compute.shard == text


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False)])
def test_booleans_are_true_and_false(text: str, value: bool) -> None:
    """As YAML 1.2 and JSON write them."""
    config = parse_config("{model: {path: m}, prepare: {path: p}}", [f"prepare.redact={text}"])
    assert config.prepare.redact is value
