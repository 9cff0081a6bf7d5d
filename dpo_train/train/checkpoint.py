"""What a resume needs: parameters, optimiser state, random state and position, each rank its share.

    checkpoints/step-00000050/shard-0-of-2.safetensors   parameters and optimiser state; its header says which parts
                             /shard-1-of-2.safetensors
                             /training.json              written last: whose checkpoint, and where the training stands
                             /metrics.jsonl              at s3:// only: the history up to here

Any number of ranks can read what any other number has written. safetensors holds numbers alone: loading runs no code.
Shards are written, and sent to s3:// where the output belongs there, by a thread while training goes on; a folder
without ``training.json`` does not count.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_train import storage
from dpo_train.artifacts import local_copy, mirror
from dpo_train.errors import LostPeerError, ModelError, StoreError
from dpo_train.identity import differences
from dpo_train.metrics_file import METRICS_FILE
from dpo_train.model.load import Policy
from dpo_train.model.shard import TENSOR, box, is_cut, like, local
from dpo_train.train.job import CHECKPOINT_FOLDER
from dpo_train.train.ranks import Ranks
from dpo_train.train.state import TrainingState

STATE_FILE = "training.json"
PARTIAL = ".partial"
RANDOM = "random"
WRITER = "dpo-checkpoint"

Bounds = list[tuple[int, int]]
"""Of each dimension where a part of a tensor begins, and where it ends."""


class Checkpoints:
    """The checkpoints of one training. All ranks call each method at the same step."""

    def __init__(
        self,
        home: str,
        origin: Mapping[str, Any],
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
    ) -> None:
        """``home`` is the training's output; ``origin`` what makes it this one: config, data, reference, model."""
        self._mirror = mirror(home)
        self._folder = local_copy(home) / CHECKPOINT_FOLDER
        self._origin, self._policy, self._optimizer, self._ranks = dict(origin), policy, optimizer, ranks
        self._pending: tuple[TrainingState, _Writer] | None = None
        # Whole weights are the same on every rank: the first one writes them.
        self._writes = policy.sharded or ranks.is_first

    def resume(self) -> TrainingState:
        """Loads the newest complete checkpoint, if any, and says where the training stands.

        Raises:
            StoreError: it belongs to another training; the message says what differs.
        """
        step = int(self._ranks.max(self._newest() if self._ranks.is_first else -1))
        if step < 0:
            return TrainingState()
        folder = self._target(step)
        content = self._fetch(folder)
        if different := list(differences(content["origin"], self._origin)):
            raise StoreError(
                f"{folder} was made by another training",
                got="; ".join(different[:5]),
                expected="the same data, reference, model and config",
                fix=f"remove {self._folder.parent}",
            )
        if self._ranks.is_first:
            self._fetch_history(folder)
        with _Shards(folder) as shards:
            self._load_parameters(shards)
            self._load_optimizer(shards)
            torch.set_rng_state(shards.read(RANDOM))
        return TrainingState(**content["state"])

    def _newest(self) -> int:
        """Step of the newest complete checkpoint, or -1; half-written ones are cleared away. The first rank decides for
        all: two that look for themselves might not see the same."""
        for leftover in self._folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)
        found = [file.parent.name for file in self._folder.glob(f"step-*/{STATE_FILE}")]
        if self._mirror.is_remote:
            entries = storage.list_files(storage.join(self._mirror.home, CHECKPOINT_FOLDER) + "/")
            found += [entry.path.split("/")[-2] for entry in entries if entry.path.endswith(f"/{STATE_FILE}")]
        return max((int(name.split("-")[1]) for name in found), default=-1)

    def _fetch(self, folder: Path) -> dict[str, Any]:
        """Makes sure that all files of a complete checkpoint are here; returns what it says of itself."""
        state = self._mirror.fetch(f"{CHECKPOINT_FOLDER}/{folder.name}/{STATE_FILE}")
        content: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))
        for name in _shard_names(content) if self._mirror.is_remote else ():
            self._mirror.fetch(f"{CHECKPOINT_FOLDER}/{folder.name}/{name}")
        return content

    def _fetch_history(self, folder: Path) -> None:
        """The history that belongs to a checkpoint at s3://; here may lie a shorter one."""
        if self._mirror.is_remote:
            copy = self._mirror.fetch(f"{CHECKPOINT_FOLDER}/{folder.name}/{METRICS_FILE}")
            shutil.copyfile(copy, self._mirror.path / METRICS_FILE)

    def save(self, state: TrainingState, *, wait: bool) -> None:
        """Saves the training as it stands. Without ``wait`` it is complete some steps later (``poll``).

        Raises:
            OSError: a full disk, say, of this save or of the one before it.
        """
        self.finish()
        target = self._target(state.step)
        if self._ranks.is_first:
            shutil.rmtree(self._partial(target), ignore_errors=True)
        self._ranks.barrier()
        self._partial(target).mkdir(parents=True, exist_ok=True)  # each rank: it may have a disk of its own
        shard = self._partial(target) / f"shard-{self._shard}.safetensors"
        tensors, boxes = self._snapshot() if self._writes else ({}, {})
        upload_to = self._away(target, shard.name) if self._mirror.is_remote else None
        self._pending = state, _Writer(shard if self._writes else None, tensors, boxes, upload_to)
        if wait:
            self.finish()

    def poll(self) -> None:
        """Completes a save whose shards are all written; costs nothing when none is under way."""
        if self._pending is not None and not self._ranks.any(not self._pending[1].is_done):
            self._complete()

    def finish(self) -> None:
        """Waits for the save that is under way, if any."""
        if self._pending is not None:
            self._pending[1].join()
            self._complete()

    def load_parameters(self, step: int) -> None:
        """The weights of a checkpoint that is kept."""
        self._fetch(self._target(step))
        with _Shards(self._target(step)) as shards:
            self._load_parameters(shards)

    @property
    def _shard(self) -> str:
        return f"{self._ranks.rank}-of-{self._ranks.world_size}" if self._policy.sharded else "0-of-1"

    def _target(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def _partial(self, target: Path) -> Path:
        return target.with_name(target.name + PARTIAL)

    def _away(self, target: Path, name: str) -> str:
        return storage.join(self._mirror.home, CHECKPOINT_FOLDER, target.name, name)

    def _complete(self) -> None:
        assert self._pending is not None
        state, writer = self._pending
        self._pending = None
        failed = self._ranks.any(writer.error is not None)
        if writer.error is not None:
            raise writer.error
        if failed:
            raise LostPeerError("Another rank could not write its share of the checkpoint", fix="see its own error")
        target = self._target(state.step)
        if self._ranks.is_first:
            num_shards = self._ranks.world_size if self._policy.sharded else 1
            content = {"origin": self._origin, "state": dataclasses.asdict(state), "num_shards": num_shards}
            _write_durably(self._partial(target) / STATE_FILE, json.dumps(content, indent=2, sort_keys=True) + "\n")
            if self._mirror.is_remote:
                self._publish(target)
            shutil.rmtree(target, ignore_errors=True)
            self._partial(target).rename(target)
            kept = {target.name} | ({self._target(state.best_step).name} if state.best_step is not None else set())
            for older in self._folder.glob("step-*"):
                if older.name not in kept:
                    self._remove(older)
        self._ranks.barrier()
        shutil.rmtree(self._partial(target), ignore_errors=True)  # a rank's on another machine than the first

    def _publish(self, target: Path) -> None:
        """The checkpoint is complete at s3:// before it is here: no later one refers to what only this machine has.

        The history is a copy of its own. Under its final name it would change an output that another machine has made
        complete meanwhile.
        """
        if (history := self._mirror.path / METRICS_FILE).is_file():
            shutil.copyfile(history, self._partial(target) / METRICS_FILE)
            storage.upload(self._partial(target) / METRICS_FILE, self._away(target, METRICS_FILE))
        storage.upload(self._partial(target) / STATE_FILE, self._away(target, STATE_FILE))

    def _remove(self, folder: Path) -> None:
        """A checkpoint that has served. What makes it complete goes first."""
        state = folder / STATE_FILE
        if self._mirror.is_remote and state.is_file():
            storage.delete([self._away(folder, STATE_FILE)])
            names = [METRICS_FILE, *_shard_names(json.loads(state.read_text(encoding="utf-8")))]
            storage.delete([self._away(folder, name) for name in names])
        state.unlink(missing_ok=True)
        shutil.rmtree(folder)

    def _snapshot(self) -> tuple[dict[str, Tensor], dict[str, Bounds | None]]:
        """Copies of this rank's share on the CPU, and which part of the whole each one is; None: all of it."""
        tensors: dict[str, Tensor] = {RANDOM: torch.get_rng_state()}
        boxes: dict[str, Bounds | None] = {RANDOM: None}
        for name, tensor in self._everything():
            share = local(tensor)
            whole = share is tensor
            # What several ranks hold, one of them writes.
            if not (self._ranks.is_first if whole else self._ranks.is_first_of_share or is_cut(tensor, TENSOR)):
                continue
            # A copy, on CPUs too: training goes on while it is written.
            tensors[name] = share.detach().to("cpu", copy=True).contiguous()
            boxes[name] = None if whole else [(part.start, part.stop) for part in box(tensor)]
        return tensors, boxes

    def _everything(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._policy.trainable().items():
            yield f"parameter/{name}", parameter
            for key, value in self._optimizer.state[parameter].items():
                yield f"optimizer/{name}/{key}", value

    def _load_parameters(self, shards: _Shards) -> None:
        parameters = self._policy.trainable()
        saved = {name.removeprefix("parameter/") for name in shards.names if name.startswith("parameter/")}
        if saved != set(parameters):
            raise ModelError("The checkpoint holds other parameters than the policy trains")
        with torch.no_grad():
            for name, parameter in parameters.items():
                local(parameter).copy_(shards.read_like(f"parameter/{name}", parameter))

    def _load_optimizer(self, shards: _Shards) -> None:
        for name, parameter in self._policy.trainable().items():
            prefix = f"optimizer/{name}/"
            for saved in shards.names:
                if not saved.startswith(prefix):
                    continue
                if shards.is_scalar(saved):
                    value = shards.read(saved)
                else:
                    value = like(parameter, shards.read_like(saved, parameter).to(local(parameter).device))
                self._optimizer.state[parameter][saved.removeprefix(prefix)] = value


class _Writer:
    """Writes one shard in a thread of its own."""

    def __init__(
        self,
        path: Path | None,
        tensors: dict[str, Tensor],
        boxes: Mapping[str, Bounds | None],
        upload_to: str | None = None,
    ) -> None:
        self.error: BaseException | None = None
        self._upload_to = upload_to
        self._thread = threading.Thread(target=self._write, args=(path, tensors, boxes), name=WRITER)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()

    def _write(self, path: Path | None, tensors: dict[str, Tensor], boxes: Mapping[str, Bounds | None]) -> None:
        if path is None:
            return
        try:
            save_file(tensors, path, metadata={"boxes": json.dumps(boxes)})
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            if self._upload_to is not None:
                storage.upload(path, self._upload_to)
        except BaseException as error:  # told by the training's own thread
            self.error = error


class _Shards(ExitStack):
    """All shards of a checkpoint as one."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        paths = sorted(folder.glob("shard-*.safetensors"))
        self._files = [self.enter_context(safe_open(path, "pt")) for path in paths]
        self._boxes: list[dict[str, Bounds | None]] = [json.loads(file.metadata()["boxes"]) for file in self._files]
        self.names = {name for boxes in self._boxes for name in boxes}

    def is_scalar(self, name: str) -> bool:
        file = next(file for file, boxes in zip(self._files, self._boxes, strict=True) if name in boxes)
        return not file.get_slice(name).get_shape()

    def read(self, name: str) -> Tensor:
        """A tensor that is whole in some shard."""
        file = next(file for file, boxes in zip(self._files, self._boxes, strict=True) if name in boxes)
        tensor: Tensor = file.get_tensor(name)
        return tensor

    def read_like(self, name: str, tensor: Tensor) -> Tensor:
        """The part that this rank's share of ``tensor`` is, on the CPU."""
        wanted = box(tensor)
        found = torch.empty([part.stop - part.start for part in wanted], dtype=tensor.dtype)
        missing = found.numel()
        for file, boxes in zip(self._files, self._boxes, strict=True):
            if name not in boxes:
                continue
            has = [slice(*bounds) for bounds in boxes[name] or [(0, size) for size in tensor.shape]]
            both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(wanted, has, strict=True)]
            if all(part.start < part.stop for part in both):
                part = file.get_slice(name)[_within(both, has) or ...]
                found[_within(both, wanted)] = part
                missing -= part.numel()
        if missing:
            raise StoreError(f"{self._folder} lacks {missing} numbers of {name}", fix=f"remove {self._folder}")
        return found


def _within(parts: Sequence[slice], whole: Sequence[slice]) -> tuple[slice, ...]:
    """Where a part is, counted from the beginning of another that holds it."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(parts, whole, strict=True))


def _shard_names(content: Mapping[str, Any]) -> list[str]:
    count = content["num_shards"]
    return [f"shard-{index}-of-{count}.safetensors" for index in range(count)]


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
