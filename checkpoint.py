"""What outlives a process: training checkpoints, and exports of weights alone.

A run that is killed at any instant, or whose disk fills up, loses the steps since its last save and nothing else. A
checkpoint that cannot be read stops the run with the name of one that can; training never starts anew by itself.
"""

import contextlib
import dataclasses
import errno
import gc
import json
import logging
import os
import pickle
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from config import changed_keys, merge
from distributed import (
    all_reduce_sum_,
    gather_objects,
    is_distributed,
    on_all_ranks,
    on_rank_0,
    rank,
    world_size,
    zeros_by_rows,
)
from utils import (
    UserError,
    fsync,
    git_revision,
    hash_file,
    reason,
    remove,
    replacing,
)
from weights import not_finite, published_key

logger = logging.getLogger(__name__)

Modules = Mapping[str, nn.Module]
Optimizers = Mapping[str, tuple[nn.Module, Optimizer]]


@dataclass(frozen=True)
class SavedState:
    """Everything in a checkpoint besides tensors."""

    path: Path
    step: int
    """Finished updates."""
    extra: dict[str, Any]
    """What `save` was given, the same on all ranks."""
    rank_extra: list[dict[str, Any]]
    """What each rank gave to `save`; as long as `world_size`, which may differ from today's."""
    world_size: int
    """Ranks of the run that saved it."""
    config: dict[str, Any]
    """Resolved configuration of the run that saved it."""


class Checkpoints:
    """The training checkpoints of one run, saved and loaded by all ranks together.

        output_dir/checkpoints/
            step_000003750/              3750 finished updates
                __0_0.distcp, ...        tensors, one file per rank; readable on any number of ranks
                .metadata                which tensor lies where
                state.json               step, extra, rank_extra, world size, versions, time
                config.yaml              resolved configuration
                manifest.json            size and sha256 of every file above
            step_000007500/
            step_000011250.set-aside-1/  not part of this run's history any more; never read, never deleted
            .tmp-step_000015000/         being written; becomes step_000015000 by one rename
            .trash-step_.../             being deleted
            .replaced-step_.../          its step is being saved a second time

    Folders are ordered by the number in their name; modification times and symbolic links mean nothing. What a killed
    run left behind (`.tmp-`, `.trash-`) is deleted by the next `restore*` or `save`, so a run must hold
    `launch.claim_output_dir` when it calls them; `all`, `newest` and `load` change nothing on disk, and neither
    do `restore*` with `only_reads`.

    **Histories.** A run may start from a checkpoint that is not the newest one (`restore`), or from none at all in a
    folder that has some. Checkpoints beyond its starting step then belong to another history, and would be picked by
    the next automatic resume. They stay as they are until the first checkpoint of the new history is complete on disk,
    so that a start that comes to nothing changes nothing. Then they are renamed to `<name>.set-aside-<n>`, lowest step
    first: until the last rename the newest checkpoint is still the old one, afterwards it is the one the user chose or
    the new one. Nothing but the user deletes them, and `train.resume_from` can name one of them.

    **Safety.** The hashes detect damage, not malice, but nothing in a checkpoint is executed: `.metadata`, a pickle, is
    read by an unpickler that knows the classes of an index and no others (`CheckpointReader`), tensors by `torch.load`
    with `weights_only`, the rest is JSON and YAML.

    **In the background.** With `async_save`, `save` copies the tensors to host memory, which has to hold that much
    more, and returns; one thread does the rest with a process group of its own, so that training may go on in between.
    At most one save is under way: the next `save`, `load` or `restore*` first waits for it, as `wait` and `close` do.
    A save that fails is logged at once. `wait`, `close`, `load` and `restore*` then raise what it would have raised;
    `save` saves again what there is now, this time waits for it, and raises if that fails, too. `all` and `newest` see
    finished checkpoints only.

    Args:
        output_dir: folder of the run, on a file system that all ranks share.
        keep: how many of the newest checkpoints stay on disk; so does the one that the user chose to go on from.
        model_keys: keys and sections of the configuration that say which weights there are; see `check_compatible`.
        later_keys: keys that the configurations of earlier checkpoints may lack, as nested dicts, with their values
            there.
        check: raises UserError for a checkpoint that this run cannot continue, before its tensors are read.
        only_reads: nothing is saved: what looks left behind may be what another process, unseen by locks, is writing.
        async_save: save in the background. All ranks must then construct the object together, and `close` it, or use
            it as a context.
    """

    finished: Path | None
    """The checkpoint that this object loaded or finished saving last."""

    def __init__(
        self,
        output_dir: str | Path,
        *,
        keep: int,
        model_keys: Sequence[str] = ("model",),
        later_keys: Mapping[str, Any] | None = None,
        check: Callable[[SavedState], None] = lambda _: None,
        only_reads: bool = False,
        async_save: bool = False,
    ) -> None:
        assert keep >= 1
        self.output_dir = Path(output_dir)
        self.directory = self.output_dir / "checkpoints"
        self._home = self.output_dir.stat() if self.output_dir.is_dir() else None
        self.keep = keep
        self.model_keys, self.later_keys, self._check = model_keys, dict(later_keys or {}), check
        self.only_reads, self.finished = only_reads, None
        self._thread = _one_thread() if async_save else None
        self._group = _group_of_the_thread() if async_save and is_distributed() else None
        self._saving: Future[UserError | None] | None = None
        self._start_step = 0  # the history of this process begins here
        self._others_are_aside = False  # checkpoints of other histories beyond it were set aside
        self._resumed_from: str | None = None  # the checkpoint last chosen by hand in this history
        self._resumed_by: list[str] = []  # names of the launch in which it was chosen

    def all(self) -> list[Path]:
        """Finished checkpoints, lowest step first."""
        try:
            found = [path for path in self.directory.iterdir() if _is_checkpoint(path)]
        except FileNotFoundError:
            return []
        return sorted(found, key=_step_of)

    def newest(self) -> Path | None:
        """The checkpoint with the highest step, or None."""
        return next(reversed(self.all()), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            if isinstance(error, UserError):
                raise UserError(f"{error}. Besides: {failure}") from failure
            error.add_note(str(failure))  # the traceback shows it

    def close(self) -> None:
        """Wait for the save under way and end the thread; nothing can be saved in the background any more.

        Raises: UserError if that save failed.
        """
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def wait(self) -> None:
        """Wait until the save under way, if there is one, is on disk.

        Raises: UserError if it failed, once: saving can be tried again.
        """
        if failure := self._outcome():
            raise failure

    def _outcome(self) -> UserError | None:
        """Wait until the save under way, if there is one, has ended; why it failed, if it did, once."""
        if self._saving is None:
            return None
        self._saving.exception()  # waits; if a signal ends the waiting, the outcome is still to be told
        saving, self._saving = self._saving, None
        return saving.result()

    def last(self) -> Path | None:
        """`finished`, once the save under way has ended, well or not: so that no later save deletes what this names."""
        if self._saving is not None:
            self._saving.exception()  # waits
        return self.finished

    def save(
        self,
        step: int,
        *,
        modules: Modules,
        optimizers: Optimizers,
        extra: dict[str, Any],
        rank_extra: dict[str, Any],
        config_yaml: str,
    ) -> Path:
        """Save the state after `step` finished updates; every rank calls it. A checkpoint of that step is replaced.

        Optimizer hyper-parameters (learning rate, betas, ...) are not saved: they come from the configuration and its
        schedules at every step.

        Args:
            step: finished updates.
            modules: name -> module; a tensor's key is `<name>.<its state-dict key>`.
            optimizers: name -> (module that owns the parameters, optimizer).
            extra: JSON-able state that is the same on all ranks.
            rank_extra: JSON-able state of this rank.
            config_yaml: the resolved configuration.

        Returns: the checkpoint's folder. With `async_save` everything given may be changed from here on, but the
            folder is not there before `wait` has returned.
        Raises: UserError if it cannot be written (disk full, quota, permissions). Older checkpoints stay as they were.
            With `async_save` only if the save before could not be written either; else see `wait`.
        """
        assert not self.only_reads
        has_failed = self._outcome() is not None
        final = self.directory / f"step_{step:09d}"
        tensors = _model_tensors(modules) | _optimizer_tensors(optimizers)
        state = {
            "step": step,
            "extra": _json_copy(extra),
            "rank_extra": _json_copy(rank_extra),
            "world_size": world_size(),
            "modules": sorted(modules),
            "optimizers": sorted(optimizers),
            "resumed_from": self._resumed_from,
            "resumed_by": self._resumed_by,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        if self._thread is None:
            self._write(final, tensors, state, config_yaml)
        else:
            self._saving = self._thread.submit(self._try_to_write, final, _copy_to_host(tensors), state, config_yaml)
            if has_failed:
                self.wait()
        return final

    def _try_to_write(self, *args: Any) -> UserError | None:
        """`_write` in the background: why it failed, if it did, on all ranks."""
        try:
            self._write(*args)
        except (UserError, OSError) as error:
            failure = UserError(str(error))
        else:
            return None
        logger.warning("%s. The run ends if the next save fails, too", failure)
        gc.collect()  # tracebacks hold the copies of all tensors, and training collects by itself only now and then
        return failure

    def _write(self, final: Path, tensors: dict[str, Tensor], state: dict[str, Any], config_yaml: str) -> None:
        group, temporary = self._group, self.directory / f".tmp-{final.name}"
        try:
            on_rank_0(lambda: self._make_room_for(temporary), group)
            _write_tensors(tensors, temporary, group)
            manifests = on_all_ranks(lambda: _describe_own_tensor_files(temporary), group)
            state["rank_extra"] = gather_objects(state["rank_extra"], group)
            state["versions"]["code"] = on_rank_0(git_revision, group)
            on_rank_0(lambda: _write_texts(temporary, state, config_yaml, manifests), group)
            on_rank_0(lambda: self._publish(temporary, final), group)
        except OSError as error:
            on_rank_0(self._sweep, group)
            raise UserError(
                f"The checkpoint of step {state['step']} could not be saved in {str(self.directory)!r}: "
                f"{reason(error)}. {self._after_failure()}"
            ) from error
        self._others_are_aside = True
        self.finished = final
        logger.info("saved %s", final)
        on_rank_0(self._delete_oldest, group)

    def load(
        self, path: Path, *, modules: Modules, optimizers: Optimizers, config: dict[str, Any] | None = None
    ) -> SavedState:
        """Verify a checkpoint, then load its tensors in place, bit for bit; every rank calls it.

        Args:
            path: checkpoint folder.
            modules: as given to `save`; none may be left out. Gradients are not touched.
            optimizers: as given to `save`. Their hyper-parameters stay as they are.
            config: resolved configuration of this run as nested dicts, to check with `check_compatible` before any
                tensor is read; None skips the check.

        Raises: UserError if the checkpoint is damaged, or does not fit `config`, `modules` or `optimizers`.
        """
        self.wait()
        problem = _problem_with(path)
        if problem:
            raise UserError(f"The checkpoint {str(path)!r} is unreadable: {problem}")
        return self._load_verified(path, modules, optimizers, config)

    def restore_latest(
        self, *, modules: Modules, optimizers: Optimizers, config: dict[str, Any] | None = None
    ) -> SavedState | None:
        """Load the newest checkpoint, or return None if there is none.

        Raises: UserError if the newest one is damaged; it says which older one is good and how to choose it.
        """
        self.wait()
        self._sweep_before_restoring()
        path = on_rank_0(self.newest)
        if path is None:
            return None
        problem = _problem_with(path)
        if problem:
            raise UserError(f"The newest checkpoint {str(path)!r} is unreadable: {problem}. " + self.remedy(path))
        return self._load_verified(path, modules, optimizers, config)

    def restore(
        self,
        resume_from: str | Path,
        *,
        modules: Modules,
        optimizers: Optimizers,
        config: dict[str, Any] | None = None,
        launches: Sequence[str] = (),
        repeated: str | None = None,
    ) -> SavedState:
        """Load the checkpoint that the user chose; newer ones are set aside at the next save.

        Args:
            resume_from: a checkpoint folder, of this run or of another one.
            modules, optimizers, config: as for `load`.
            launches: names of what started this process, by which it knows a repetition of itself.
            repeated: the one of them that repeats the command of a user; None if none does. If there are checkpoints
                that descend from `resume_from` as chosen in that launch, the choice was carried out before, and the
                newest of them is loaded instead.

        Raises: UserError if there is no such folder (it lists those there are) or it is damaged.
        """
        self.wait()
        chosen = Path(resume_from)
        self._sweep_before_restoring()
        if repeated and on_rank_0(lambda: any(_was_chosen(path, chosen, repeated) for path in self.all())):
            logger.info("restarted: continuing after %s with the newest checkpoint that descends from it", chosen)
            state = self.restore_latest(modules=modules, optimizers=optimizers, config=config)
            assert state is not None
            return state
        if not on_rank_0(chosen.is_dir):
            there = on_rank_0(lambda: ", ".join(map(str, self.all())) or "none")
            raise UserError(
                f"train.resume_from={str(resume_from)!r}: there is no such folder"
                f"{' (a file of weights belongs into train.init_from)' if chosen.is_file() else ''}; "
                f"checkpoints in {str(self.directory)!r}: {there}"
            )
        problem = _problem_with(chosen)
        if problem:
            raise UserError(
                f"train.resume_from={str(resume_from)!r}: the checkpoint is unreadable: {problem}. "
                + self.remedy(chosen)
            )
        state = self._load_verified(chosen, modules, optimizers, config)
        self._resumed_from, self._resumed_by = str(chosen.resolve()), list(launches)
        return state

    def _load_verified(
        self, path: Path, modules: Modules, optimizers: Optimizers, config: dict[str, Any] | None
    ) -> SavedState:
        try:
            saved = json.loads((path / "state.json").read_text())
            state = SavedState(
                path=path,
                step=saved["step"],
                extra=saved["extra"],
                rank_extra=saved["rank_extra"],
                world_size=saved["world_size"],
                config=merge(self.later_keys, yaml.safe_load((path / "config.yaml").read_text())),
            )
        except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise UserError(
                f"{str(path)!r} is not a checkpoint of this program: state.json or config.yaml is not as written "
                f"({type(error).__name__}: {error})"
            ) from error
        if config is not None:
            for key, (old, new) in check_compatible(state.config, config, self.model_keys).items():
                logger.info("changed since the checkpoint: %s: %r -> %r", key, old, new)
        self._check(state)
        for kind, given in (("modules", modules), ("optimizers", optimizers)):
            if saved[kind] != sorted(given):
                raise UserError(f"The checkpoint {str(path)!r} holds the {kind} {saved[kind]}, not {sorted(given)}")
        _read_tensors(path, modules, optimizers)
        self._start_step = state.step
        self._others_are_aside = False
        self._resumed_from, self._resumed_by = saved["resumed_from"], saved.get("resumed_by", [])
        self.finished = path
        logger.info("loaded %s", path)
        return state

    def _make_room_for(self, temporary: Path) -> None:
        if self._home is not None and not (
            self.output_dir.is_dir() and os.path.samestat(self._home, self.output_dir.stat())
        ):
            # A new folder in its place would look like that of a fresh run.
            raise FileNotFoundError(
                errno.ENOENT,
                "the folder was moved or deleted while the run used it; bring it back",
                str(self.output_dir),
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self._sweep()
        temporary.mkdir()

    def _publish(self, temporary: Path, final: Path) -> None:
        """Make the finished checkpoint visible under its name, after other histories are out of its way."""
        if not self._others_are_aside:
            for other in self.all():
                if _step_of(other) > self._start_step:
                    aside = _free_name(f"{other}.set-aside-")
                    other.rename(aside)
                    logger.info("%s is not part of this run's history; set aside as %s", other, aside.name)
        replaced = self.directory / f".replaced-{final.name}"
        if os.path.lexists(final):
            final.rename(replaced)
        temporary.rename(final)
        fsync(self.directory)
        if os.path.lexists(replaced):
            self._delete(replaced)

    def _delete_oldest(self) -> None:
        for path in self.all()[: -self.keep]:
            if str(path.resolve()) != self._resumed_from:  # or the same command would not find it again
                self._delete(path)

    def _delete(self, path: Path) -> None:
        """Delete a folder so that a kill halfway never leaves a part of it under a name that is read."""
        trash = (
            path if path.name.startswith(".trash-") else _free_name(f"{path.parent}/.trash-{path.name.lstrip('.')}-")
        )
        try:
            if trash != path:
                path.rename(trash)
            remove(trash)
        except OSError as error:
            # The checkpoints that count are complete; this one takes space until the next save tries again.
            logger.warning("%s could not be deleted: %s", path, reason(error))

    def _sweep(self) -> None:
        """Delete what a killed or failed save left; bring back a checkpoint whose replacement never came."""
        for path in sorted(self.directory.glob(".*-step_*")):
            kind, name = path.name.split("-", 1)
            if kind not in {".tmp", ".trash", ".replaced"}:
                continue
            if kind == ".replaced" and _is_folder(path) and not os.path.lexists(self.directory / name):
                path.rename(self.directory / name)
            else:
                self._delete(path)

    def _sweep_before_restoring(self) -> None:
        if not self.only_reads:
            on_rank_0(self._sweep)

    def _after_failure(self) -> str:
        newest = on_rank_0(self.newest, self._group)
        if newest is None:
            return "There is no earlier checkpoint"
        return f"Earlier checkpoints are untouched; the newest is {str(newest)!r}"

    def remedy(self, damaged: Path) -> str:
        """What to do about a checkpoint that is damaged, or whose numbers are not finite; every rank calls it.

        Verifies the others, newest first, until one is good.
        """
        others = [path for path in reversed(on_rank_0(self.all)) if path.resolve() != damaged.resolve()]
        good = next((path for path in others if _problem_with(path) is None and _holds_finite_numbers(path)), None)
        if good is None:
            return f"No other one in {str(self.directory)!r} is good. To start anew, choose another train.output_dir"
        return (
            f"{str(good)!r} is good: continue from it with train.resume_from={good} "
            "(checkpoints after it are then set aside, not deleted)"
        )


def check_compatible(
    saved_config: dict[str, Any], config: dict[str, Any], model_keys: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Check that a checkpoint's model is the configured one.

    Args:
        saved_config: resolved configuration in the checkpoint, as nested dicts.
        config: resolved configuration of this run.
        model_keys: keys and sections that define the model.

    Returns: the other keys that differ, as `a.b` -> (saved, now).
    Raises: UserError listing every model-defining key that differs, with both values.
    """
    changed = changed_keys(saved_config, config)
    breaking = [key for key in changed if any(f"{key}.".startswith(f"{part}.") for part in model_keys)]
    if breaking:
        listing = "; ".join(f"{key} is {changed[key][0]!r} there and {changed[key][1]!r} now" for key in breaking)
        raise UserError(
            f"The checkpoint holds another model: {listing}. Set these keys back, or choose another train.output_dir"
        )
    return changed


def export_weights(path: Path, modules: Modules, config_yaml: str) -> None:
    """Write weights alone for others to load; every rank calls it, rank 0 writes.

    The file is a flat dict `<module name>.<state-dict key>` -> CPU tensor, for `torch.load(..., weights_only=True)`.

    Args:
        path: file to write or replace; `config_yaml` goes beside it as `<stem>.yaml`.
        modules: by name, such as `{"backbone": ..., "head": ...}`.
        config_yaml: the resolved configuration.

    Raises: UserError if a weight is not finite, or it cannot be written; a file that was there before stays.
    """
    weights: dict[str, Tensor] = {}
    for key, tensor in _model_tensors(modules).items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # a collective, so on every rank
        if rank() == 0:
            weights[key] = full.to("cpu", copy=True, memory_format=torch.contiguous_format)
    if problem := on_rank_0(lambda: not_finite(weights.items())):
        raise UserError(
            f"The weights are not exported to {str(path)!r}: they are not all finite: {problem}. Export an earlier "
            "checkpoint: python export.py <its folder> <file>"
        )

    def write() -> None:
        path.parent.mkdir(exist_ok=True)
        with replacing_export(path, config_yaml) as temporary:
            _save(temporary, weights)

    try:
        on_rank_0(write)
    except OSError as error:
        raise UserError(f"The weights could not be exported to {str(path)!r}: {reason(error)}") from error


@contextlib.contextmanager
def replacing_export(path: Path, config_yaml: str) -> Iterator[Path]:
    """A name to write weights to, which become `path` when the block ends; `config_yaml` goes beside it.

    Of an earlier export nothing is replaced before both are written: weights never lie beside another configuration.
    """
    with replacing(path) as weights, replacing(path.with_suffix(".yaml")) as config:
        config.write_text(config_yaml)
        yield weights
        fsync(weights)


def read_weights(path: Path, module: str) -> dict[str, Tensor]:
    """The weights of one module of a training checkpoint, by state-dict key, whole and on the CPU; for one process.

    Args:
        path: checkpoint folder.
        module: its name in the checkpoint, such as `student_ema`.

    Raises: UserError if the checkpoint is damaged or has no such module.
    """
    problem = _problem_with(path)
    if problem:
        raise UserError(f"The checkpoint {str(path)!r} is unreadable: {problem}")
    prefix = f"{module}."
    weights = read_tensors(path, lambda sizes: [key for key in sizes if key.startswith(prefix)])
    if not weights:
        raise UserError(f"The checkpoint {str(path)!r} has no module {module!r}")
    return {key.removeprefix(prefix): tensor for key, tensor in weights.items()}


def read_tensors(path: Path, choose: Callable[[Mapping[str, torch.Size]], Iterable[str]]) -> dict[str, Tensor]:
    """Some tensors of a training checkpoint, whole and on the CPU, without verifying its files; each rank by itself.

    Args:
        path: checkpoint folder.
        choose: from the shapes of all tensors by their keys in the checkpoint to the keys that are wanted.

    Raises: UserError if it is no checkpoint or damaged, OSError if its index cannot be opened.
    """
    reader = CheckpointReader(path)
    saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(saved[key].size, dtype=saved[key].properties.dtype)
        for key in choose({key: described.size for key, described in saved.items()})
    }
    _fill(tensors, reader, alone=True)
    return tensors


def save_atomically(path: Path, value: Any) -> None:
    """As `write_text_atomically`, for tensors in containers, which `torch.load(path, weights_only=True)` reads."""
    with replacing(path) as temporary:
        _save(temporary, value)


def _save(path: Path, value: Any) -> None:
    with path.open("wb") as file, _os_errors_shown():
        torch.save(value, file)


def _free_name(prefix: str) -> Path:
    number = 1
    while os.path.lexists(f"{prefix}{number}"):
        number += 1
    return Path(f"{prefix}{number}")


# Tensors: their keys, and the files that hold them.


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers themselves, by state-dict keys free of the prefixes that wrappers add."""
    named: dict[str, Tensor] = {}
    for key, value in module.state_dict(keep_vars=True).items():
        plain = ".".join(part for part in key.split(".") if part not in {"_orig_mod", "_checkpoint_wrapped_module"})
        assert isinstance(value, Tensor), f"{key} is not a tensor; state of other kinds belongs into `extra`"
        assert plain not in named, f"two tensors are called {plain}"
        named[plain] = value
    return named


def _model_tensors(modules: Modules) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        for key, tensor in _named_tensors(module).items():
            full_key = f"{name}.{key}"
            assert full_key not in tensors, f"two tensors are called {full_key}"
            tensors[full_key] = tensor.detach()
    return tensors


def _parameter_keys(name: str, module: nn.Module, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """Key prefix of each parameter's state, in the order in which the optimizer numbers its parameters."""
    key_of = {tensor: key for key, tensor in reversed(_named_tensors(module).items())}  # a tied one: its first key
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [(f"optimizers.{name}.{key_of[parameter]}", parameter) for parameter in parameters]


def _optimizer_tensors(optimizers: Optimizers) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, (module, optimizer) in optimizers.items():
        for prefix, parameter in _parameter_keys(name, module, optimizer):
            for key, value in optimizer.state.get(parameter, {}).items():
                assert isinstance(value, Tensor), f"{prefix}.{key} is not a tensor"
                tensors[f"{prefix}.{key}"] = value
    return tensors


@torch.no_grad()
def largest_magnitude(modules: Modules, optimizers: Optimizers) -> Tensor:
    """The largest magnitudes of all numbers that ranks hold, summed over ranks: finite if and only if all of these are.

    Every rank calls it. It does not wait for the device.
    """
    tensors = _model_tensors(modules) | _optimizer_tensors(optimizers)
    local = [each.to_local() if isinstance(each, DTensor) else each for each in tensors.values()]
    numbers = [each for each in local if each.is_floating_point() and each.numel() > 0]  # a small one has no part here
    return all_reduce_sum_(nn.utils.get_total_norm(numbers, torch.inf).to(local[0].device))


@torch.no_grad()
def _copy_to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the tensors hold now, in memory of the CPU; of sharded ones this rank's part, under the same description."""
    copies: dict[str, Tensor] = {}
    on_gpu = False
    for key, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        on_gpu |= local.is_cuda
        host = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
        host.copy_(local, non_blocking=local.is_cuda)
        # DTensor.from_local would move the copy back to the device of the mesh.
        copies[key] = DTensor(host, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else host
    if on_gpu:
        torch.cuda.synchronize()
    return copies


class _Writer(FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        with _os_errors_shown():
            return super().write_data(plan, planner)


@contextlib.contextmanager
def _os_errors_shown() -> Iterator[None]:
    """On a full disk torch's zip writer replaces the OSError by a RuntimeError about file positions: undo that."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _single_process_is_fine() -> None:
    # Not in a `catch_warnings`: the filters belong to all threads, and its end would undo what another has changed.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


class CheckpointReader(FileSystemReader):
    """torch's reader of a checkpoint's tensors, with an index that nothing hostile comes in by.

    Tensors of the time when final norms had another name are known by today's, for models and optimizers alike.
    """

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The index: which tensors there are, and in which file each lies.

        Raises: UserError if it is something else than an index of tensors; what it may ask for is not executed.
        """
        path = Path(self.path, ".metadata")
        try:
            with path.open("rb") as file:
                index = _IndexUnpickler(file).load()
            tensors = {published_key(key): described for key, described in index.state_dict_metadata.items()}
            places = {
                dataclasses.replace(at, fqn=published_key(at.fqn)): place for at, place in index.storage_data.items()
            }
            sound = (
                isinstance(index, Metadata)
                and all(isinstance(described, TensorStorageMetadata) for described in tensors.values())
                and all(isinstance(described.size, torch.Size) for described in tensors.values())
                and all(isinstance(described.properties.dtype, torch.dtype) for described in tensors.values())
                and all(re.fullmatch(r"__\d+_\d+\.distcp", place.relative_path) for place in places.values())
            )
        except (
            ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, TypeError, ValueError,
            pickle.UnpicklingError,
        ) as error:  # fmt: skip  # what an unpickler raises for bytes that are no pickle, or for parts that do not fit
            raise UserError(
                f"{str(path)!r} is not the index of a checkpoint: {error}; nothing in it was executed"
            ) from error
        if not sound:
            raise UserError(f"{str(path)!r} is not the index of a checkpoint that holds tensors alone")
        meta = StorageMeta(load_id=self.load_id)
        return dataclasses.replace(index, state_dict_metadata=tensors, storage_data=places, storage_meta=meta)


class _IndexUnpickler(pickle.Unpickler):
    """Knows what the indexes of tensors consist of: plain descriptions, types of numbers, sizes and paths."""

    ALLOWED: ClassVar = {
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},  # from a name to a constant
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},
    }  # fmt: skip

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if (module_name, global_name) == ("builtins", "getattr"):
            # Early Python 3.11 pickles members of enumerations so; there is no other attribute to be had.
            return lambda _, name: _MEM_FORMAT_ENCODING[name]
        if global_name not in self.ALLOWED.get(module_name, ()):
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def _write_tensors(tensors: dict[str, Tensor], directory: Path, group: dist.ProcessGroup | None) -> None:
    try:
        _single_process_is_fine()
        save_tensors(dict(tensors), storage_writer=_Writer(directory), process_group=group)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if all(isinstance(cause, OSError) for cause in causes):
            raise causes[0] from error
        raise


def _read_tensors(path: Path, modules: Modules, optimizers: Optimizers) -> None:
    reader = CheckpointReader(path)
    saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = _model_tensors(modules)
    states: list[tuple[Optimizer, dict[int, dict[str, Tensor]]]] = []
    for name, (module, optimizer) in optimizers.items():
        parameters = {
            prefix: (index, parameter)
            for index, (prefix, parameter) in enumerate(_parameter_keys(name, module, optimizer))
        }
        state: dict[int, dict[str, Tensor]] = {}
        for key, described in saved.items():
            prefix, _, state_name = key.rpartition(".")
            if prefix in parameters:
                index, parameter = parameters[prefix]
                tensors[key] = _room_for(state_name, described, parameter)
                state.setdefault(index, {})[state_name] = tensors[key]
        states.append((optimizer, state))
    _check_fit(path, saved, tensors)
    _fill(tensors, reader)
    for optimizer, state in states:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _fill(tensors: dict[str, Tensor], reader: CheckpointReader, *, alone: bool = False) -> None:
    """Read tensors in place, together with all ranks or `alone`."""
    try:
        _single_process_is_fine()
        load_tensors(tensors, storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if not all(isinstance(cause, OSError | EOFError | RuntimeError | pickle.UnpicklingError) for cause in causes):
            raise
        asked = re.search(r"GLOBAL (\S+)", str(causes[0]))  # torch goes on to advise how to let it run
        why = (
            f"a tensor of it is none, and asks for {asked[1]}"
            if asked
            else str(causes[0]).partition("\n")[0] or "a file ends early"
        )
        raise UserError(f"The checkpoint {str(reader.path)!r} cannot be read: {why}") from error


def _holds_finite_numbers(path: Path) -> bool:
    """Whether no tensor of a good checkpoint is NaN or infinite; every rank calls it and reads its share of them."""
    reader = CheckpointReader(path)
    described: dict[str, Any] = reader.read_metadata().state_dict_metadata
    finite = True
    for key in sorted(described)[rank() :: world_size()]:
        tensor = torch.empty(described[key].size, dtype=described[key].properties.dtype)
        _fill({key: tensor}, reader, alone=True)
        finite = finite and bool(tensor.isfinite().all())
    return all(gather_objects(finite))


def _room_for(state_name: str, described: Any, parameter: Tensor) -> Tensor:
    """An empty tensor for saved optimizer state: sharded as its parameter if it has values for each of its rows."""
    dtype, shape = described.properties.dtype, described.size
    if state_name != "step" and shape == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    if state_name != "step" and shape and parameter.ndim and shape[0] == parameter.shape[0]:
        return zeros_by_rows(parameter, shape, dtype)
    return torch.zeros(shape, dtype=dtype)


def _check_fit(path: Path, saved: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    problems = [f"{key} is missing" for key in sorted(tensors.keys() - saved.keys())]
    problems += [f"{key} is unexpected" for key in sorted(saved.keys() - tensors.keys())]
    for key in sorted(tensors.keys() & saved.keys()):
        there, here = saved[key], tensors[key]
        assert isinstance(there, TensorStorageMetadata), f"{key} is not a tensor"
        if there.size != here.shape or there.properties.dtype != here.dtype:
            problems.append(
                f"{key} is {there.properties.dtype} {list(there.size)} there, {here.dtype} {list(here.shape)} here"
            )
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"The checkpoint {str(path)!r} does not fit the model: {shown}")


# Folders: names, and the manifest that tells a good one from a damaged one.


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"step_\d{9,}", path.name) is not None and _is_folder(path)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _was_chosen(path: Path, chosen: Path, launch: str) -> bool:
    """Whether a checkpoint descends from another one as chosen by hand in this launch; not if it cannot be read."""
    try:
        state = json.loads((path / "state.json").read_text())
        return state["resumed_from"] == str(chosen.resolve()) and launch in state["resumed_by"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _json_copy(value: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value))


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def _describe_own_tensor_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Manifest entries of the files this rank wrote, so that hashing takes as long as one rank's share."""
    own = sorted(directory.glob(f"__{rank()}_*")) + ([directory / ".metadata"] if rank() == 0 else [])
    for path in own:
        fsync(path)  # torch 2.11 syncs `.metadata` while its content is still in a buffer of Python
    return {path.name: _describe(path) for path in own}


def _write_texts(
    directory: Path, state: dict[str, Any], config_yaml: str, manifests: list[dict[str, dict[str, Any]]]
) -> None:
    def write(name: str, text: str) -> None:
        (directory / name).write_text(text)
        fsync(directory / name)

    write("state.json", json.dumps(state, indent=1))
    write("config.yaml", config_yaml)
    manifest = {name: entry for part in manifests for name, entry in part.items()}
    unseen = [name for name in manifest if not (directory / name).exists()]
    if unseen:
        raise OSError(f"rank 0 does not see {unseen[0]}; all nodes must share the file system of train.output_dir")
    manifest |= {name: _describe(directory / name) for name in ("state.json", "config.yaml")}
    write("manifest.json", json.dumps(manifest, indent=1))
    fsync(directory)


def _problem_with(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None; every rank calls it and verifies its share of the files."""
    return next((problem for problem in gather_objects(_problem_with_share(path)) if problem), None)


def _problem_with_share(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        absent = {".metadata", "state.json", "config.yaml"} - manifest.keys()
        if absent:
            return f"manifest.json does not list {', '.join(sorted(absent))}"
        for name in sorted(manifest)[rank() :: world_size()]:
            expected, actual = manifest[name]["bytes"], (path / name).stat().st_size
            if actual != expected:
                return f"{name} has {actual} bytes instead of {expected}"
            if _describe(path / name) != manifest[name]:
                return f"the content of {name} has changed (its sha256 differs from manifest.json)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {reason(error)}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is damaged: {error}"
    return None


# The thread in the background.


def _one_thread() -> ThreadPoolExecutor:
    if not torch.cuda.is_initialized():
        return ThreadPoolExecutor(1, "checkpoint")
    # A new thread is on GPU 0, where torch would then open a context of every rank.
    return ThreadPoolExecutor(1, "checkpoint", torch.cuda.set_device, (torch.cuda.current_device(),))


def _group_of_the_thread() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group
