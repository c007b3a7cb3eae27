"""A gang: the processes of one training, placed together, started together and ended together.

They are actors of Ray in one placement group. After a training that went well they wait for the next one of the same
shape, with all that is heavy imported. Which of their failures ended a gang is decided in failures.py.
"""

import contextlib
import functools
import gc
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lori_dist.cluster import schedule
from lori_dist.cluster.connection import runtime_env
from lori_dist.cluster.failures import (
    DIED,
    GRACE_SECONDS,
    MAX_STARTS,
    Broken,
    Failure,
    Outcome,
    cause_of,
    from_record,
    not_started,
    outcome_of,
)
from lori_dist.cluster.schedule import Resources, Shape
from lori_dist.config import Cluster, Run
from lori_dist.errors import JobError, Stopped
from lori_dist.jobs import Job

PLACE_SECONDS = 15.0
"""Seconds after which a gang that found no place asks again: nodes that Ray had counted on may be gone."""
POLL_SECONDS = 1.0
START_SECONDS = 300.0
"""Seconds within which a process must start. It may have to wait until its machine has fetched the package."""
END_SECONDS = 10.0
"""Seconds for which the end of a gang's processes is awaited."""

log = logging.getLogger(__name__)


class Unplaced(Exception):
    """Raised if there is no room for a gang."""


# --- in each process -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The node, port and GPUs that a process has."""

    node: str
    address: str
    """The node's address."""
    port: int
    """Port on which this process listens if it becomes rank 0."""
    gpus: tuple[str, ...]
    """The process's own GPUs, as CUDA_VISIBLE_DEVICES names them."""


class Process:
    """One process of a gang. An actor of Ray."""

    def __init__(self) -> None:
        self._listening: socket.socket | None = None
        self._store: Any = None
        self._outcome: Outcome | None = None

    def place(self) -> Place:
        """Opens a new port in every call. Returns where the process is."""
        import ray

        context = ray.get_runtime_context()
        address = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        if self._listening is not None:
            self._listening.close()
        self._listening = socket.create_server((address, 0), family=family, backlog=1024)
        return Place(
            node=context.get_node_id(),
            address=address,
            port=self._listening.getsockname()[1],
            gpus=tuple(map(str, context.get_accelerator_ids().get("GPU", ()))),
        )

    def run(self, variables: Mapping[str, str], function: Callable[..., Any], argument: Any) -> Outcome:
        """Calls function(argument) as the rank that the variables describe."""
        self._outcome = None
        os.environ.update(variables)
        rank = int(variables["RANK"])
        if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface(variables["NODE_ADDRESS"])):
            os.environ["GLOO_SOCKET_IFNAME"] = name
        self._outcome = outcome_of(rank, self._run, rank, function, argument)
        return self._outcome

    def outcome(self) -> Outcome | None:
        """The end of the last run. Ray loses the result of a cancelled call, so the driver asks for it here."""
        return self._outcome

    def _run(self, rank: int, function: Callable[..., Any], argument: Any) -> Any:
        assert self._listening is not None
        if rank == 0:
            self._serve(self._listening)
        self._listening.close()
        result = function(argument)
        _leave()
        return result

    def _serve(self, listening: socket.socket) -> None:
        """Opens the store at which all ranks meet, on a socket that nobody can have taken meanwhile, and on no other
        interface than the node's own."""
        import torch.distributed as dist

        host, port = listening.getsockname()[:2]
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )


def _leave() -> None:
    """Makes the process ready for another process group."""
    import torch.distributed as dist

    from lori_dist.training.device import free_cached

    if dist.is_initialized():
        dist.destroy_process_group()
    if "lori_dist.engines.deepspeed" in sys.modules:
        from lori_dist.engines.deepspeed import forget_groups

        forget_groups()
    gc.collect()  # models and engines refer to themselves
    free_cached()


def interface(address: str) -> str | None:
    """The network interface that has an IPv4 address. gloo would look up the machine's name, which may stand for
    another address that no other machine reaches."""
    if sys.platform != "linux" or ":" in address:
        return None
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR of ioctl_list(2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                answer = fcntl.ioctl(probe.fileno(), get_address, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


# --- in the driver ---------------------------------------------------------------------------------------------------


def ranked(places: Sequence[Place]) -> list[int]:
    """The processes in the order of their ranks: node by node in the given order, and by GPU on a node."""
    nodes = list(dict.fromkeys(place.node for place in places))

    def key(number: int) -> tuple[int, list[tuple[int, str]], int]:
        place = places[number]
        return nodes.index(place.node), [(len(gpu), gpu) for gpu in place.gpus], number

    return sorted(range(len(places)), key=key)


def variables(places: Sequence[Place]) -> list[dict[str, str]]:
    """The environment of each rank, with the variables that torchrun sets. places: in the order of the ranks."""
    nodes = list(dict.fromkeys(place.node for place in places))
    sizes = Counter(place.node for place in places)
    seen: Counter[str] = Counter()
    found = []
    for rank, place in enumerate(places):
        there = [other.gpus for other in places if other.node == place.node]
        # All GPUs of the gang on the node, each rank's first one at the index of its local rank: libraries look there.
        visible = [gpus[index] for index in range(len(there[0])) for gpus in there]
        found.append(
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(places)),
                "LOCAL_RANK": str(seen[place.node]),
                "LOCAL_WORLD_SIZE": str(sizes[place.node]),
                "GROUP_RANK": str(nodes.index(place.node)),
                "MASTER_ADDR": places[0].address,
                "MASTER_PORT": str(places[0].port),
                "NODE_ADDRESS": place.address,
                # The store is there already: nobody else is to open one.
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
                "CUDA_VISIBLE_DEVICES": ",".join(visible),  # none of those that Ray would let a rank see all the same
            }
        )
        seen[place.node] += 1
    return found


class Gang:
    """Processes of one shape that wait for work."""

    def __init__(
        self, shape: Shape, environment: Mapping[str, Any], is_ending: Callable[[], bool] = lambda: False
    ) -> None:
        """Starts the processes. Raises Unplaced if there is no room now or the run is to end, Broken if they did not
        start."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.shape = shape
        self._is_ending = is_ending
        self._processes: list[Any] = []
        self._group = placement_group([_bundle(shape.part)] * shape.count, strategy=shape.placement.upper())
        try:
            end = time.monotonic() + PLACE_SECONDS
            while not self._group.wait(POLL_SECONDS):
                if time.monotonic() > end or is_ending():
                    raise Unplaced("no node has room")
            amounts = {"num_cpus": shape.part.cpus, "num_gpus": shape.part.gpus}
            kind = ray.remote(**amounts, max_restarts=0, runtime_env=dict(environment))(Process)
            self._processes = [
                kind.options(
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        self._group, placement_group_bundle_index=index
                    )
                ).remote()
                for index in range(shape.count)
            ]
            self.meet()
        except BaseException:
            self.close()
            raise

    def meet(self) -> None:
        """Gives the processes their ranks. Raises Broken if one of them is gone."""
        import ray

        try:
            calls = [process.place.remote() for process in self._processes]
            places = _all_of(calls, time.monotonic() + START_SECONDS, self._is_ending)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise Broken(Failure(rank=None, time=time.time(), types=(), message=not_started(error))) from error
        order = ranked(places)
        self._processes = [self._processes[number] for number in order]
        self._variables = variables([places[number] for number in order])

    def run(
        self,
        function: Callable[[Any], Any],
        argument: Any,
        stopping: threading.Event,
        asked: threading.Event | None = None,
    ) -> Any:
        """Calls function(argument) as each rank of a world. Returns what it returns on rank 0.

        stopping: when set, the ranks are given up. asked: when set, they are asked to save and end, and waited for.
        Raises Broken with the failure that caused the others, as soon as one rank has failed.
        """
        self.meet()
        calls = {
            process.run.remote(self._variables[rank], function, argument): rank
            for rank, process in enumerate(self._processes)
        }
        outcomes: dict[int, Outcome | None] = {}
        for rank, outcome in _ended(calls, self._processes, stopping, asked or threading.Event()):
            outcomes[rank] = outcome
        failure = cause_of(outcomes)
        if failure is not None:
            raise Broken(failure)
        first = outcomes[0]
        assert first is not None
        return first.result

    def close(self) -> None:
        """Ends the processes and waits until they are gone."""
        import ray

        for process in self._processes:
            ray.kill(process)
        gone = [process.__ray_ready__.remote() for process in self._processes]
        ray.wait(gone, num_returns=len(gone), timeout=END_SECONDS) if gone else None
        ray.util.remove_placement_group(self._group)


def _all_of(calls: Sequence[Any], end: float, is_ending: Callable[[], bool]) -> list[Any]:
    """The results of calls. Raises the error of the first that fails, and Unplaced if the run is to end."""
    import ray

    waiting = list(calls)
    while waiting:
        if is_ending():
            raise Unplaced("the run ends")
        done, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
        ray.get(done)
        if waiting and time.monotonic() > end:
            raise ray.exceptions.GetTimeoutError(f"no answer for {START_SECONDS:g} s")
    return list(ray.get(list(calls)))


def _bundle(part: Resources) -> dict[str, float]:
    return {"CPU": part.cpus} | ({"GPU": part.gpus} if part.gpus else {})


def _ended(
    calls: dict[Any, int], processes: Sequence[Any], stopping: threading.Event, asked: threading.Event
) -> Iterator[tuple[int, Outcome | None]]:
    """Yields ranks and outcomes in the order of their ends, None for a process that died; after the first failure only
    for GRACE_SECONDS."""
    import ray

    end, were_asked = float("inf"), False
    while calls and time.monotonic() < end and not stopping.is_set():
        if asked.is_set() and not were_asked:
            were_asked = True
            for call in calls:
                ray.cancel(call)  # a method of an actor is not interrupted; it may ask for this
        done, _ = ray.wait(list(calls), num_returns=1, timeout=1.0)
        for call in done:
            rank = calls.pop(call)
            try:
                outcome = _outcome(call, processes[rank])
            except ray.exceptions.RayActorError as error:
                log.debug("rank %d", rank, exc_info=error)
                outcome = None
            if outcome is None or outcome.failure is not None:
                end = min(end, time.monotonic() + GRACE_SECONDS)
            yield rank, outcome
    if stopping.is_set():
        raise Broken(Failure(rank=None, time=time.time(), types=(), message="stopped"))


def _outcome(call: Any, process: Any) -> Outcome | None:
    import ray

    try:
        outcome: Outcome | None = ray.get(call)
    except ray.exceptions.TaskCancelledError:
        outcome = ray.get(process.outcome.remote())
    return outcome


@dataclass(kw_only=True, slots=True)
class Gangs:
    """The gangs of a run. A gang that has ended its work well waits here for more work of its shape."""

    environment: Mapping[str, Any]
    """Ray's runtime_env of all gangs."""
    nodes: Callable[[], Sequence[Resources]]
    """Returns the cluster's nodes as they are now."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """An event that is set when the run ends at once."""
    asked: threading.Event = field(default_factory=threading.Event)
    """An event that is set earlier: trainings are to save and end, and no job is started any more."""
    _idle: list[Gang] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_ending(self) -> bool:
        """Whether the run is to end, at once or after its trainings have saved."""
        return self.asked.is_set() or self.stopping.is_set()

    def take(self, job: Job, cluster: Cluster) -> Gang:
        """Returns a gang for a job as soon as there is room for one: one that waits, or a new one.

        Raises JobError if the cluster's nodes are too few for it for longer than cluster.patience, Stopped if the run
        is to end, and Broken if its processes died MAX_STARTS times while they started.
        """
        enough = time.monotonic()
        num_starts = 0
        while not self.is_ending:
            nodes = self.nodes()
            shape = schedule.possible(job, cluster, nodes)
            if shape is not None:
                enough = time.monotonic()
                try:
                    return self._waiting(shape) or Gang(shape, self.environment, lambda: self.is_ending)
                except Unplaced as error:
                    log.info("%s: waits for room (%s)", job.name, error)
                except Broken:  # a node may have been lost at that moment
                    num_starts += 1
                    if num_starts == MAX_STARTS:
                        raise
            elif time.monotonic() - enough > cluster.patience:
                raise JobError(f"{schedule.no_room(job, cluster, nodes)} (waited {cluster.patience:g} s for more)")
            self.stopping.wait(POLL_SECONDS)
        raise Stopped("the run ends")

    def give_back(self, gang: Gang) -> None:
        """Keeps a gang for the next job of its shape."""
        with self._lock:
            self._idle.append(gang)

    def keep(self, count: int) -> None:
        """Ends all waiting gangs but `count`, since others need their room."""
        with self._lock:
            extra, self._idle[:] = self._idle[count:], self._idle[:count]
        for gang in extra:
            gang.close()

    def _waiting(self, shape: Shape) -> Gang | None:
        with self._lock:
            found = next((gang for gang in self._idle if gang.shape == shape), None)
            if found is None:
                return None
            self._idle.remove(found)
        try:
            found.meet()
        except (Broken, Unplaced) as error:
            log.debug("a gang that waited has gone", exc_info=error)
            found.close()
            return None
        return found


# --- jobs of one process ---------------------------------------------------------------------------------------------


def remote(run: Run, job: Job, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as a Ray task with the room of one process of the job. Calls return references for `result`."""
    import ray

    part = schedule.wanted(job, run.cluster).part
    options = {"num_cpus": part.cpus, "num_gpus": part.gpus, "max_retries": 0, "runtime_env": runtime_env(run)}
    task = ray.remote(**options)(outcome_of)
    return functools.partial(task.remote, 0, function)


def first_done(references: Sequence[Any], stopping: threading.Event) -> Any:
    """The reference of the first task to end. Raises Broken once `stopping` is set."""
    import ray

    while True:
        done, _ = ray.wait(list(references), num_returns=1, timeout=POLL_SECONDS)
        if done:
            return done[0]
        if stopping.is_set():
            raise Broken(Failure(rank=None, time=time.time(), types=(), message="stopped"))


def result(reference: Any, stopping: threading.Event | None = None) -> Any:
    """Waits for a task and returns its result. Raises Broken with its failure, or once `stopping` is set."""
    import ray

    if stopping is not None:
        first_done([reference], stopping)
    try:
        outcome: Outcome = ray.get(reference)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.LocalRayletDiedError):
        raise Broken(Failure(rank=0, time=time.time(), types=(), message=DIED)) from None
    if outcome.failure is not None:
        raise Broken(from_record(outcome.failure))
    return outcome.result
