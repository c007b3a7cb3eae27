"""Runs a function in several processes that form a process group: gloo on the loopback, one thread a rank.

They are forked from a server that has imported what is heavy, so only the first test pays for the imports.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

PRELOADED = (
    "pytest",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which imports the whole of torch.compile
    "lori_dist.engines.ddp",
    "lori_dist.engines.deepspeed",
    "lori_dist.engines.fsdp",
    "lori_dist.training.train",
)
TIMEOUT = 300.0
"""Seconds: many times what a test takes, as machines are shared."""
GRACE = 10.0
"""Seconds in which a rank that hangs tells where."""
LOG_CHARACTERS = 6000
"""Of a rank's output that a failure shows."""


def run_distributed(
    function: Callable[..., Any], *args: Any, world_size: int, timeout: float = TIMEOUT, process_group: bool = True
) -> list[Any]:
    """Calls function(*args) in world_size processes. Returns what it returned in each, by rank.

    function: of a module's top level, as it is found by name. Arguments and results are pickled. process_group: if
    False, there are only the processes, without a group and without a launcher's variables. Environment and warning
    filters are those of the caller.

    The calling test fails with the traceback of the rank that failed first, with what ended a rank that died, or, after
    timeout seconds, with where the ranks hang. All processes have ended when this returns.
    """
    with tempfile.TemporaryDirectory() as folder:
        setting = _Setting(
            folder=Path(folder),
            world_size=world_size,
            timeout=timeout,
            process_group=process_group,
            environment=dict(os.environ),
            filters=_filters(),
            call=pickle.dumps((function, args)),
        )
        ranks: list[_Rank] = []
        start = time.monotonic()
        try:
            for rank in range(world_size):
                ranks.append(_start(rank, setting))
            return _collect(ranks, start, timeout)
        finally:
            for started in ranks:
                started.process.kill()
                started.process.join()
                started.messages.close()


@dataclass(frozen=True, kw_only=True)
class _Setting:
    folder: Path
    world_size: int
    timeout: float
    process_group: bool
    environment: dict[str, str]
    filters: list[tuple[Any, ...]]
    call: bytes


@dataclass(frozen=True, kw_only=True)
class _Message:
    """The last word of a rank."""

    when: float
    """On the monotonic clock, which all processes share."""
    result: bytes | None = None
    failure: str | None = None


# --- the parent ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Rank:
    """One process, as its parent sees it."""

    rank: int
    process: BaseProcess
    messages: Connection
    log: Path

    def output(self) -> str:
        text = self.log.read_text(errors="replace")[-LOG_CHARACTERS:].strip()
        return f"\nIts output ends with:\n{text}" if text else ""


def _start(rank: int, setting: _Setting) -> _Rank:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # for the server, which starts with the first process
    receiver, sender = context.Pipe(duplex=False)
    log = setting.folder / f"rank{rank}.log"
    log.touch()
    process = context.Process(target=_main, args=(rank, setting, log, sender), daemon=True)
    process.start()
    sender.close()  # the process's own end is then the last, and closes with it
    return _Rank(rank=rank, process=process, messages=receiver, log=log)


def _collect(ranks: Sequence[_Rank], start: float, timeout: float) -> list[Any]:
    results: dict[int, bytes] = {}
    while len(results) < len(ranks):
        waiting = [rank for rank in ranks if rank.rank not in results]
        ready = wait([rank.messages for rank in waiting], timeout=max(0.0, start + timeout - time.monotonic()))
        if not ready:
            _fail_hung(waiting, timeout)
        messages = {rank.rank: _receive(rank) for rank in waiting if rank.messages in ready}
        if any(message and message.failure for message in messages.values()):
            # One that was killed may be heard of after those that miss it.
            late = [rank for rank in waiting if rank.rank not in messages]
            ready = wait([rank.messages for rank in late], timeout=1.0)
            messages.update({rank.rank: _receive(rank) for rank in late if rank.messages in ready})
        _check(ranks, messages)
        results.update({rank: message.result for rank, message in messages.items() if message and message.result})
    return [pickle.loads(results[rank.rank]) for rank in ranks]


def _receive(rank: _Rank) -> _Message | None:
    """None if it ended without a word."""
    try:
        message: _Message = rank.messages.recv()
        return message
    except EOFError:
        return None


def _check(ranks: Sequence[_Rank], messages: dict[int, _Message | None]) -> None:
    dead = [rank for rank in messages if messages[rank] is None]
    failed = {rank: message for rank, message in messages.items() if message and message.failure}
    if dead:  # first, as what the others then complain of is a closed connection
        rank = ranks[dead[0]]
        rank.process.join()
        pytest.fail(f"rank {rank.rank} of {len(ranks)} {_ending(rank.process.exitcode)}{rank.output()}", pytrace=False)
    if failed:
        first = min(failed, key=lambda rank: failed[rank].when)
        text = f"rank {first} of {len(ranks)} failed:\n{failed[first].failure}{ranks[first].output()}"
        pytest.fail(text, pytrace=False)


def _ending(exit_code: int | None) -> str:
    assert exit_code is not None
    if exit_code < 0:
        return f"was killed by signal {-exit_code} ({signal.Signals(-exit_code).name})"
    return f"exited with code {exit_code} before it was done"


def _fail_hung(ranks: Sequence[_Rank], timeout: float) -> None:
    _await_stacks(ranks)
    where = "".join(f"\n\nrank {rank.rank}:{rank.output()}" for rank in ranks)
    numbers = ", ".join(str(rank.rank) for rank in ranks)
    pytest.fail(f"rank {numbers} did not finish within {timeout:g} seconds{where}", pytrace=False)


def _await_stacks(ranks: Sequence[_Rank]) -> None:
    """Until all ranks have written where they stand; a rank that is stopped never does."""
    end, seen = time.monotonic() + GRACE, [""]
    while time.monotonic() < end:
        outputs = [rank.output() for rank in ranks]
        if outputs == seen and all("Timeout (" in output for output in outputs):
            return
        seen = outputs
        time.sleep(0.1)


def _filters() -> list[tuple[Any, ...]]:
    """This process's warning filters, as arguments of `warnings.filterwarnings`, the strongest last."""

    def text(pattern: Any) -> str:
        return str(getattr(pattern, "pattern", pattern or ""))  # Python's default filters hold plain text

    def arguments() -> Iterator[tuple[Any, ...]]:
        for action, message, category, module, line in warnings.filters:
            yield action, text(message), category, text(module), line

    return list(arguments())[::-1]


# --- a rank ----------------------------------------------------------------------------------------------------------


def _main(rank: int, setting: _Setting, log: Path, messages: Connection) -> None:
    with log.open("ab", buffering=0) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        # It does not exit: the others would then fail for a closed connection before they have told where they stand.
        faulthandler.dump_traceback_later(setting.timeout, exit=False, file=stream)
        try:
            gc.freeze()  # a collection would go over all that was imported, which takes half a second
            _enter(rank, setting)
            function, args = pickle.loads(setting.call)
            result = pickle.dumps(function(*args))
            messages.send(_Message(when=time.monotonic(), result=result))
        except BaseException:
            messages.send(_Message(when=time.monotonic(), failure=traceback.format_exc()))


def _enter(rank: int, setting: _Setting) -> None:
    os.environ.clear()
    os.environ.update(setting.environment)
    warnings.resetwarnings()
    for arguments in setting.filters:
        warnings.filterwarnings(*arguments)
    import torch  # not above: pytest imports this file also where no test needs torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if setting.process_group:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(setting.world_size))
        dist.init_process_group(
            "gloo",
            init_method=f"file://{setting.folder / 'store'}",
            rank=rank,
            world_size=setting.world_size,
            timeout=timedelta(seconds=2 * setting.timeout),  # what hangs is shown by the harness
        )
