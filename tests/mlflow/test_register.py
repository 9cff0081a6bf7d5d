"""Registration against a real server: what a version holds, and that the same report never makes two."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from dpo_train import registry
from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig
from dpo_train.data.folder import weights_digest
from dpo_train.errors import ConfigError, NotLearnedError, StoreError, UserError
from dpo_train.model.load import load_policy
from dpo_train.registry.versions import default_uri
from dpo_train.stages.register import register
from dpo_train.tracking import Tracking, TrackingError
from tests.mlflow.made import json_files, made_policy, made_report, read_card
from tests.mlflow.test_promote import SPAWN, WAIT_SECONDS, received
from tests.s3.proxy import Proxy
from tests.tiny import CHAT_TEMPLATE, tiny_config

QUESTION = [{"role": "user", "content": "tell me about the cat"}]


def add_bos(model: Path) -> None:
    """Lets the tokenizer open every text with BOS, as Llama's does; the chat template writes it as well."""
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    file.write_text(json.dumps(content))


def renamed(config: RunConfig, name: str, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, register=dataclasses.replace(config.register, model_name=name, **changes))


@pytest.fixture(scope="module")
def config(server: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = tiny_config(tmp_path_factory.mktemp("registered"), tracking__uri=server, register__licence="apache-2.0")
    add_bos(Path(config.model.path))
    return config


@pytest.fixture(scope="module")
def policy(config: RunConfig) -> Artifact:
    return made_policy(config)


@pytest.fixture(scope="module")
def report(config: RunConfig, policy: Artifact) -> Artifact:
    return made_report(config, policy)


@pytest.fixture(scope="module")
def tracking(config: RunConfig) -> Tracking:
    return Tracking(config)


@pytest.fixture(scope="module")
def registered(config: RunConfig, policy: Artifact, report: Artifact, tracking: Tracking) -> Artifact:
    return register(config, policy, report, tracking)


@pytest.fixture(scope="module")
def folder(registered: Artifact, server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole version, downloaded."""
    place = registered.record.details["uri"]
    with default_uri(server):
        return Path(mlflow.artifacts.download_artifacts(place, dst_path=str(tmp_path_factory.mktemp("version"))))


def test_version_says_what_it_is(registered: Artifact, policy: Artifact, tracking: Tracking, folder: Path) -> None:
    """Alias, tags with bounds, the report's digest; the card has every number with interval and n, and the licence."""
    assert registered.record.details == {
        "registered": True, "model_name": "dpo-policy", "version": "1", "uri": "models:/dpo-policy/1",
    }  # fmt: skip
    version = registry.champion(tracking.client, "dpo-policy", "challenger")
    assert version is not None
    assert (version.version, version.policy, version.digest) == ("1", policy.record.digest, policy.record.digest)
    expected = {"dpo.passed": "true", "dpo.beta": "0.1", "dpo.accuracy": "0.9", "dpo.accuracy_low": "0.8"}
    assert expected.items() <= version.tags.items()
    card = read_card(folder / "model")
    for words in (
        "license: apache-2.0", "| beta | `0.1` |", "0.900 (0.800 to 0.950, n = 60)", policy.record.digest,
        "| accuracy | above 0.5 | passed |", "no answers were sampled",
    ):  # fmt: skip
        assert words in card


def test_folder_is_what_other_servers_load(folder: Path, config: RunConfig) -> None:
    """Tokenizer, template and generation config lie beside the safetensors, and no path of this machine is in it."""
    names = {file.name for file in (folder / "model").iterdir()}
    assert names == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md",
    }  # fmt: skip
    contents = json_files(folder)
    assert contents["model/config.json"]["architectures"] == ["LlamaForCausalLM"]
    assert contents["model/generation_config.json"]["eos_token_id"] == 2
    machine = str(Path(config.store).parent)
    texts = [file.read_text() for file in folder.rglob("*") if file.suffix not in {".safetensors"} and file.is_file()]
    assert [text for text in texts if machine in text] == []


def test_merged_weights_compute_what_base_and_adapter_do(folder: Path, policy: Artifact, config: RunConfig) -> None:
    """Logits of the folder loaded plainly equal those of the adapter on its base; the adapter is kept beside them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids_BT = torch.arange(40).view(2, 20)
    cpu = torch.device("cpu")
    adapted = load_policy(config.model, device=cpu, weights=policy.path)
    with torch.no_grad():
        wanted = adapted.model(ids_BT).logits
        with adapted.reference():
            base = adapted.model(ids_BT).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "model")(ids_BT).logits
    assert (merged - wanted).norm() <= 1e-5 * wanted.norm()
    assert (base - wanted).norm() > 0.01 * wanted.norm()
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template == CHAT_TEMPLATE
    assert weights_digest(folder / "adapter") == weights_digest(policy.path / "adapter")


def test_both_flavors_answer_with_the_template_opened_once(folder: Path) -> None:
    """The answer is that of plain greedy decoding of the template's own tokens, though the tokenizer adds BOS too.

    A pipeline samples unless it is told otherwise; over HTTP that can be said by top_k alone.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(folder / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    ids_BT = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert tokenizer(text).input_ids[:2] == [1, 1] != ids_BT[0, :2].tolist()
    made_T = model.generate(ids_BT, max_new_tokens=6, do_sample=False)[0, ids_BT.shape[1] :]
    wanted = tokenizer.decode(made_T, skip_special_tokens=True)

    (answer,) = mlflow.pyfunc.load_model(str(folder)).predict({"messages": QUESTION, "max_tokens": 6, "top_k": 1})
    said = mlflow.transformers.load_model(str(folder))(QUESTION, max_new_tokens=6, do_sample=False)[0][
        "generated_text"
    ][-1]

    assert answer["choices"][0]["message"]["content"] == wanted.lstrip()
    assert answer["usage"]["prompt_tokens"] == ids_BT.shape[1]
    assert said == {"role": "assistant", "content": wanted}


def test_input_example_fits_the_signature(folder: Path) -> None:
    """What the registry's page shows as an example is answered; without max_tokens it ends at the training's limit."""
    model = mlflow.models.Model.load(str(folder))
    example = model.load_input_example(str(folder))

    (answer,) = mlflow.pyfunc.load_model(str(folder)).predict(example)

    assert model.signature.inputs.input_names()[0] == "messages"
    assert answer["usage"]["completion_tokens"] <= 32


def test_same_report_is_the_same_version(
    config: RunConfig, policy: Artifact, report: Artifact, tracking: Tracking, registered: Artifact, tmp_path: Path
) -> None:
    """Again from its record; and from another machine, which has no record: it finds the version by its report."""
    assert register(config, policy, report, tracking).reused
    elsewhere = register(config, policy, report, tracking, output=tmp_path / "elsewhere")
    assert elsewhere.record.details == registered.record.details


def test_cut_short_registration_leaves_the_champion_and_is_completed(
    config: RunConfig, policy: Artifact, report: Artifact, proxy: Proxy
) -> None:
    """Ended after the upload there is no version; ended before the alias the next call sets it."""
    of = renamed(config, "cut-short")
    tracking = Tracking(dataclasses.replace(of, tracking=dataclasses.replace(of.tracking, uri=proxy.endpoint)))
    client = tracking.client
    proxy.fault("POST", r"registered-models/create$", "denied", times=1, skip=1)  # after that of the lock
    with pytest.raises(TrackingError, match="403"):
        register(of, policy, report, tracking)
    assert proxy.count("POST", r"registered-models/create$", "denied") == 1
    assert client.search_model_versions("name = 'cut-short'") == []
    assert client.search_registered_models("name LIKE 'cut-short%'") == []

    proxy.fault("POST", r"registered-models/alias$", "denied", times=1)
    with pytest.raises(TrackingError, match="403"):
        register(of, policy, report, tracking)
    assert [version.version for version in client.search_model_versions("name = 'cut-short'")] == ["1"]
    assert client.get_registered_model("cut-short").aliases == {}

    made = register(of, policy, report, tracking)
    assert made.record.details["version"] == "1"
    assert client.get_registered_model("cut-short").aliases == {"challenger": "1"}


def test_lost_version_is_registered_again(
    config: RunConfig, policy: Artifact, report: Artifact, tracking: Tracking
) -> None:
    """A record is believed only while the registry has its version."""
    of = renamed(config, "lost")
    register(of, policy, report, tracking)
    tracking.client.delete_registered_model("lost")

    made = register(of, policy, report, tracking)

    assert not made.reused
    assert tracking.client.get_registered_model("lost").aliases == {"challenger": "1"}


def test_refused_report_makes_an_output_and_no_version(config: RunConfig, policy: Artifact, tracking: Tracking) -> None:
    """The output is complete, says which rule was not passed, and is reused; the registry has nothing of the name."""
    of = renamed(config, "refused")
    report = made_report(config, policy, outcome="undecided")

    made = register(of, policy, report, tracking)

    assert made.record.details["registered"] is False
    assert "accuracy undecided" in made.record.details["reason"]
    assert register(of, policy, report, tracking).reused
    assert tracking.client.search_registered_models("name = 'refused'") == []


def test_what_must_not_register_is_told(
    config: RunConfig, policy: Artifact, tracking: Tracking, tmp_path: Path
) -> None:
    """Not learned, a report of another schema version, a report about another policy, the champion's own alias."""
    with pytest.raises(NotLearnedError, match="did not learn"):
        register(config, policy, made_report(config, policy, outcome="failed", learned=False), tracking)
    old = made_report(dataclasses.replace(config, store=str(tmp_path)), policy)
    (old.path / "report.json").write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(StoreError, match="schema version"):
        register(config, policy, old, tracking)
    with pytest.raises(StoreError, match="was not made from"):
        register(config, made_policy(config, lora=False), made_report(config, policy), tracking)
    with pytest.raises(ConfigError, match="dpo promote"):
        register(renamed(config, "x", alias="champion"), policy, made_report(config, policy), tracking)


def test_fully_trained_plain_text_policy_goes_on_with_a_text(server: str, tracking: Tracking, tmp_path: Path) -> None:
    """Its folder is registered as it was trained, and its signature is text to text."""
    config = tiny_config(tmp_path, tracking__uri=server, prepare__template="plain", register__model_name="plain")
    policy = made_policy(config, lora=False)

    made = register(config, policy, made_report(config, policy), tracking)

    found = registry.champion(tracking.client, "plain", made.record.details["version"])
    assert found is not None
    folder = registry.fetch(server, found, tmp_path / "cache")
    wanted = (policy.path / "model" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == wanted
    with default_uri(server):
        (text,) = mlflow.pyfunc.load_model("models:/plain/1").predict(["the cat"])
    assert not text.startswith("the cat")


def _killed() -> None:
    raise KeyboardInterrupt


def test_version_is_fetched_once_and_is_complete_or_absent(
    registered: Artifact, server: str, tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download cut short leaves nothing to be taken for a model; a second fetch asks for no file."""
    version = registry.champion(tracking.client, "dpo-policy", "1")
    assert version is not None
    download = mlflow.artifacts.download_artifacts
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", lambda *a, **k: (download(*a, **k), _killed()))
    with pytest.raises(KeyboardInterrupt):
        registry.fetch(server, version, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    monkeypatch.undo()
    folder = registry.fetch(server, version, tmp_path)
    assert (folder / "tokenizer.json").is_file()
    assert registry.fetch("http://127.0.0.1:1", version, tmp_path) == folder


def test_version_without_a_model_is_told(client: Any, server: str, tmp_path: Path) -> None:
    """Others may register what is no language model under the name."""
    run = client.create_run("0").info.run_id
    client.log_text(run, "hello", "files/a.txt")
    client.create_registered_model("foreign")
    client.create_model_version("foreign", f"{client.get_run(run).info.artifact_uri}/files", run)
    version = registry.champion(client, "foreign", "1")
    assert version is not None
    assert version.policy is None
    with pytest.raises(UserError, match="foreign version 1 holds no model"):
        registry.fetch(server, version, tmp_path)


def test_champion_is_found_by_alias_or_number(registered: Artifact, client: Any) -> None:
    """The default alias may be absent; whatever else is named must exist, and the error says what does."""
    assert registry.champion(client, "dpo-policy", "champion") is None
    assert registry.champion(client, "nothing-here", "champion") is None
    for which in ("2", "challenger2", "not an alias!"):
        with pytest.raises(UserError, match=r"versions: 1; aliases: challenger \(1\)"):
            registry.champion(client, "dpo-policy", which)
    with pytest.raises(UserError, match="no registered model 'nothing-here'"):
        registry.champion(client, "nothing-here", "1")


def _registrar(url: str, folder: str, barrier: Any, told: Any) -> None:
    """Registers the report from a store of its own, as another machine does."""
    config = tiny_config(Path(folder), tracking__uri=url, register__model_name="at-once")
    policy = made_policy(config)
    report = made_report(config, policy)
    barrier.wait(WAIT_SECONDS)
    told.send(register(config, policy, report, Tracking(config)).record.details["version"])


@pytest.mark.slow
def test_two_machines_that_register_one_report_at_once_make_one_version(
    server: str, client: Any, tmp_path: Path
) -> None:
    """Both upload; who comes second takes the first one's version."""
    Tracking(tiny_config(tmp_path, tracking__uri=server)).check()  # makes the experiment, if it is not there yet
    barrier, pipes = SPAWN.Barrier(2), [SPAWN.Pipe() for _ in range(2)]
    processes = [
        SPAWN.Process(target=_registrar, args=(server, str(tmp_path / str(index)), barrier, pipe[1]), daemon=True)
        for index, pipe in enumerate(pipes)
    ]
    for index, process in enumerate(processes):
        (tmp_path / str(index)).mkdir()
        process.start()
    assert [received(pipe[0]) for pipe in pipes] == ["1", "1"]
    for process in processes:
        process.join()
    assert [version.version for version in client.search_model_versions("name = 'at-once'")] == ["1"]
    assert client.search_registered_models("name LIKE 'at-once.%'") == []
