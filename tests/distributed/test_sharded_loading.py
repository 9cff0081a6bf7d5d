"""Sharded loading and saving against doing the same with whole models, on real gloo processes.

Every process does everything once and leaves what it found in a file; the tests read it.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dpo_train.config import LoraConfig, ModelConfig, TrainConfig
from dpo_train.core.logprobs import LogitTransform
from dpo_train.data.tokens import load_tokenizer
from dpo_train.errors import ModelError
from dpo_train.model import weight_files
from dpo_train.model.load import Policy, load_policy, save_policy
from dpo_train.model.score import check_layout
from dpo_train.model.shard import local, shard
from dpo_train.model.sharded import load_sharded, save_sharded
from dpo_train.train.ranks import Ranks
from dpo_train.train.step import train_step
from tests.distributed.processes import spawn
from tests.tiny import random_pairs, tiny_model, tiny_policy, with_reference
from tests.unit.model.families import FAMILIES, VOCABULARY, write

CPU = torch.device("cpu")
USED = ("llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "mixtral")
"""Plain; tied; sliding and capped; transposed weights; a renamed weight; stacked experts."""
LORAS = {"all weights": None, "adapters": LoraConfig(rank=2)}
FILES = {"one file": 10**9, "several files": 20_000}
CASES = [(family, lora, files) for family in USED for lora in LORAS for files in FILES]
CONFIG = TrainConfig(beta=0.5, row_tokens=40)


def _options(lora: str) -> dict[str, Any]:
    return {"device": CPU, "lora": LORAS[lora], "seed": 3}


def _whole_then_shard(folder: Path, lora: str) -> Policy:
    policy = load_policy(ModelConfig(path=str(folder)), **_options(lora), trainable=True)
    shard(policy)
    return policy


def _tensors(policy: Policy) -> dict[str, Tensor]:
    return policy.model.state_dict(keep_vars=True) | dict(policy.model.named_buffers())


def _differing(got: Policy, wanted: Policy) -> list[str]:
    """Names of what differs in this rank's share, bit for bit, in kind, dtype, or in whether it is trained."""
    tensors, others = _tensors(got), _tensors(wanted)
    assert list(tensors) == list(others)
    assert len(list(got.model.parameters())) == len(list(wanted.model.parameters()))  # tied weights are one
    return [
        name
        for name, tensor in tensors.items()
        if not torch.equal(local(tensor), local(others[name]))
        or (type(tensor), tensor.dtype, tensor.requires_grad, tensor.shape)
        != (type(others[name]), others[name].dtype, others[name].requires_grad, others[name].shape)
    ]


def _step(policy: Policy, pairs: Any, ranks: Ranks) -> None:
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
    train_step(policy, optimizer, pairs, CONFIG, ranks, step=0, learning_rate=1.0)


def _load(root: Path, case: tuple[str, str, str], ranks: Ranks) -> dict[str, Any]:
    """One case, and a training step after it."""
    family, lora, files = case
    told: list[str] = []
    folder = root / files / family
    got = load_sharded(ModelConfig(path=str(folder)), **_options(lora), tell=told.append)
    wanted = _whole_then_shard(root / "one file" / family, lora)
    tensors = _tensors(got)
    found: dict[str, Any] = {"told": told, "loaded": _differing(got, wanted)}
    weights = [tensor for tensor in tensors.values() if isinstance(tensor, torch.nn.Parameter)]
    found["held"] = sum(local(tensor).numel() for tensor in weights)
    found["share"] = sum(-(-len(tensor) // ranks.world_size) * math.prod(tensor.shape[1:]) for tensor in weights)
    found["whole"] = sum(tensor.numel() for tensor in weights)
    pairs = with_reference(
        tiny_policy(root / "one file" / family, lora=False, trainable=False), random_pairs(5, vocabulary=VOCABULARY)
    )
    before = {name: local(tensor).clone() for name, tensor in got.trainable().items()}
    for policy in (got, wanted):
        _step(policy, pairs, ranks)
    found["trained"] = _differing(got, wanted)
    found["moved"] = sum(float((local(tensor) - before[name]).abs().sum()) for name, tensor in got.trainable().items())
    return found


def _save(root: Path, output: Path, ranks: Ranks) -> None:
    """Each model saved as shares, and by the first rank as a whole."""
    for family in USED:
        for files, most in FILES.items():
            weight_files.MAX_FILE_BYTES = most
            for lora in LORAS if most > 10**6 else ["all weights"]:
                config, target = ModelConfig(path=str(root / "one file" / family)), output / family / files / lora
                tokenizer = load_tokenizer(root / "tiny")
                save_sharded(load_sharded(config, **_options(lora)), target / "sharded", tokenizer, keep=ranks.is_first)
                if ranks.is_first:
                    save_policy(load_policy(config, **_options(lora), trainable=True), target / "whole", tokenizer)
    weight_files.MAX_FILE_BYTES = 5_000_000_000


def _raised(action: Callable[[], Any]) -> str:
    try:
        action()
    except ModelError as error:
        return str(error)
    return "nothing was raised"


def _bent_layout(root: Path) -> str:
    """What is said of a sharded policy whose logits are not those that its layout promises."""
    policy = load_sharded(ModelConfig(path=str(root / "one file" / "llama")), **_options("all weights"))
    check_layout(policy)
    policy.packed._layout = replace(policy.layout, transform=LogitTransform(scale=2.0))
    return _raised(lambda: check_layout(policy))


def _untied(root: Path) -> tuple[list[str], list[str]]:
    """A tied model whose file has two different matrices: what is told, and what differs from loading it whole."""
    told: list[str] = []
    folder = root / "untied"
    got = load_sharded(ModelConfig(path=str(folder)), **_options("all weights"), tell=told.append)
    return told, _differing(got, _whole_then_shard(folder, "all weights"))


def _everything(root: Path, output: Path, ranks: Ranks) -> dict[str, Any]:
    found: dict[str, Any] = {str(case): _load(root, case, ranks) for case in CASES}
    _save(root, output, ranks)
    found["bent"] = _bent_layout(root)
    found["untied"] = _untied(root)
    broken = ModelConfig(path=str(root / "an expert missing"))
    found["missing"] = _raised(lambda: load_sharded(broken, **_options("all weights")))
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each family in one file and in several, and two models that are not as they should be."""
    folder = tmp_path_factory.mktemp("loading")
    tiny_model(folder / "tiny")
    for family in USED:
        write(folder / "one file" / family, FAMILIES[family])
        model = AutoModelForCausalLM.from_pretrained(folder / "one file" / family)
        model.save_pretrained(folder / "several files" / family, max_shard_size=FILES["several files"])
        assert len(list((folder / "several files" / family).glob("*.safetensors"))) > 2
    _changed(folder, "qwen2", "untied", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1})
    lost = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    _changed(folder, "mixtral", "an expert missing", lambda t: {name: v for name, v in t.items() if name != lost})
    return folder


def _changed(root: Path, family: str, name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    write(root / name, FAMILIES[family])
    file = root / name / "model.safetensors"
    save_file(change({key: tensor.clone() for key, tensor in load_file(file).items()}), file)


@dataclass(frozen=True)
class World:
    """A number of ranks, and what each found."""

    output: Path
    ranks: list[dict[str, Any]]


# Three ranks on two cores are part of `make test-all`.
@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def world(root: Path, request: pytest.FixtureRequest) -> World:
    """What each rank of a world found."""
    output = root / f"{request.param} ranks"
    return World(output, spawn(request.param, output, _everything, root, output))


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_sharded_loading_is_whole_loading_cut_afterwards(world: World, case: tuple[str, str, str]) -> None:
    """On every rank, bit for bit, buffers included; none holds more than its rows of each weight; nobody is told."""
    for found in (rank[str(case)] for rank in world.ranks):
        assert found["loaded"] == []
        assert found["told"] == []
        assert found["held"] <= found["share"] < 0.6 * found["whole"]


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_training_goes_on_from_either(world: World, case: tuple[str, str, str]) -> None:
    """A step of SGD at rate 1 moves both to the same weights, bit for bit."""
    for found in (rank[str(case)] for rank in world.ranks):
        assert found["moved"] > 0.01
        assert found["trained"] == []


def test_layout_is_checked_on_shares(world: World) -> None:
    """Every rank finds, together with the others, that packed rows do not give the model's own log-probs."""
    for rank in world.ranks:
        assert re.search(r"LlamaForCausalLM\) cannot be trained in packed rows\. Got: log-prob", rank["bent"])


def test_whole_model_is_loaded_where_it_must_be_seen_and_that_is_told(world: World) -> None:
    """Weights that the config ties and the file does not."""
    for told, differing in (rank["untied"] for rank in world.ranks):
        (note,) = told
        assert note.startswith("note: every rank loads the whole model before it keeps its share, because")
        assert "lm_head.weight are tied by its config and differ in its files" in note
        assert differing == []


def test_expert_that_is_missing_is_noticed_by_every_rank(world: World) -> None:
    """Also by those whose own experts are there: a rank that waits for another would wait for ever."""
    for rank in world.ranks:
        assert "down_proj is made of 3 tensors. Expected: 4 of each kind" in rank["missing"]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("family", USED)
def test_sharded_policy_is_saved_as_a_whole_one_is(world: World, family: str, files: str) -> None:
    """The same files, byte for byte, which ``from_pretrained`` loads: tied weights once, experts one by one."""
    target = world.output / family / files / "all weights"
    sharded, whole = _contents(target / "sharded"), _contents(target / "whole")
    assert sharded == whole
    is_split = "model/model.safetensors.index.json" in sharded
    assert is_split == (files == "several files")
    loaded = AutoModelForCausalLM.from_pretrained(target / "sharded" / "model").state_dict()
    wanted = tiny_policy(target.parents[3] / "one file" / family, lora=False).model.state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("family", USED)
def test_adapters_of_a_sharded_policy_are_saved_as_those_of_a_whole_one(world: World, family: str) -> None:
    """The adapters alone, byte for byte."""
    target = world.output / family / "one file" / "adapters"
    assert _contents(target / "sharded") == _contents(target / "whole")
    assert "adapter/adapter_model.safetensors" in _contents(target / "sharded")


LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 8}
"""104 million weights; a layer is 3 % of them."""


def _anonymous_bytes() -> int:
    """Memory of this process with no file behind it: a mapped checkpoint does not count, copies of its weights do."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) * 1024


@contextmanager
def _growth(found: dict[str, float], name: str) -> Iterator[None]:
    """Notes by how much anonymous memory grew at most, looking every two milliseconds."""
    before, over = _anonymous_bytes(), threading.Event()
    peaks = [before]

    def watch() -> None:
        while not over.wait(0.002):
            peaks.append(_anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        found[name] = max(peaks) - before


def _measure(root: Path, output: Path, ranks: Ranks) -> dict[str, float]:
    """Peaks of loading and saving as shares, and then of loading as a whole, which leaves memory behind."""
    found: dict[str, float] = {}
    shard(load_policy(ModelConfig(path=str(root / "tiny")), **_options("all weights"), trainable=True))  # imports
    config = ModelConfig(path=str(root / "large"))
    with _growth(found, "loading"):
        policy = load_sharded(config, **_options("all weights"))
    found["whole"] = 4.0 * sum(parameter.numel() for parameter in policy.model.parameters())
    weight_files.MAX_FILE_BYTES = 40_000_000
    with _growth(found, "saving"):
        save_sharded(policy, output, load_tokenizer(root / "tiny"), keep=ranks.is_first)
    del policy
    with _growth(found, "loading whole"):
        _whole_then_shard(root / "large", "all weights")
    return found


# Four processes, half a minute.
@pytest.mark.slow
def test_no_rank_ever_holds_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """417 MB of fp32 weights on four ranks, from a bf16 file; by how much a process grows at most, on the worst rank:

    Loading 0.39 of the whole: a quarter is its share, and the check afterwards gathers a few layers at a time. Loading
    whole and then cutting 1.02. Saving in files of 40 MB takes the first rank 0.11, the others 0.03.
    """
    # Freed memory goes back to the system at once, as it does of weights of more than 32 MB.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "100000")
    tiny_model(tmp_path / "tiny")
    config = LlamaConfig(vocab_size=2048, num_key_value_heads=8, max_position_embeddings=64, **LARGE)
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "large")
    found = spawn(4, tmp_path / "ranks", _measure, tmp_path, tmp_path / "saved")
    parts = {name: [rank[name] / rank["whole"] for rank in found] for name in ("loading", "saving", "loading whole")}
    assert found[0]["whole"] > 400e6
    assert max(parts["loading"]) < 0.45, parts
    assert min(parts["loading whole"]) > 1.0, parts
    assert parts["saving"][0] < 0.15, parts
    assert max(parts["saving"][1:]) < 0.06, parts
