"""The driver's side of data parallelism over Ray: where each engine core is placed, and which variables it receives."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from vllm.v1.engine.utils import CoreEngineActorManager, get_env_vars_to_copy
from vllm.v1.executor.ray_utils import WORKER_SPECIFIC_ENV_VARS

from vllm_ray_ascend import patches
from vllm_ray_ascend.accelerators.choose import current_accelerator
from vllm_ray_ascend.cluster.connect import connect, npu_wait_s
from vllm_ray_ascend.cluster.dp_placement import (
    PlacedRank,
    RankPlacement,
    RankPlacementDemand,
    growth_demand,
    placed_ranks,
    plan_placement,
    plan_scale_up,
)
from vllm_ray_ascend.cluster.growth import place_with_growth
from vllm_ray_ascend.cluster.placement_groups import (
    create_placement_groups,
    free_npus_per_node,
    nodes_of_bundles,
    remove_placement_groups,
)
from vllm_ray_ascend.cluster.registry import ignored_list_warning, running_engines
from vllm_ray_ascend.compat.ray_state import draining_nodes
from vllm_ray_ascend.control.protocol import STOP, EventReported
from vllm_ray_ascend.control.server import ControlServer, PeerLost
from vllm_ray_ascend.control.timeouts import stop_grace_s
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.devices.owners import reject_device_ids
from vllm_ray_ascend.doctor.before_start import check_nodes
from vllm_ray_ascend.elastic_ep.admission import check_ranks_up, is_elastic
from vllm_ray_ascend.engine.data_parallel import allowed_addresses, check_master_address, placement_request
from vllm_ray_ascend.engine.process import (
    EngineLaunchContext,
    driver_settings_value,
    node_address,
    node_id,
    node_local_variables,
)
from vllm_ray_ascend.engine.rank_actors import GRANT_LIMIT_S, WATCH_S, ReplaceableActors, wanted_groups
from vllm_ray_ascend.engine.rank_recovery import (
    RankRecovery,
    drain_limit_s,
    drain_message,
    failure_domains,
    may_restart_ranks,
)
from vllm_ray_ascend.engine.rank_status import SIZE_CHANGED, SizeStatus, StatusPublisher
from vllm_ray_ascend.environment.table import DRIVER_VARIABLE, NICENESS, is_secret, names_to_copy
from vllm_ray_ascend.errors import ElasticEPError
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.observability.events import ENGINE_FAILED, EVENTS, RANKS_ADDED, RANKS_REMOVED, WORKERS_CHANGED
from vllm_ray_ascend.observability.ray_events import list_in_ray
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

_ACTOR_EXIT_EXTRA_S = 3.0
"""Seconds that an engine core in an actor may take in addition to the grace period of its workers."""
_EXIT_POLL_S = 0.05
_UNDO_LIMIT_S, _UNDO_POLL_S = 30.0, 0.2
"""For how long to wait for the end of a start that is undone, and between two looks."""


class RankLoss(NamedTuple):
    """An engine core that has exited, or has failed and is about to."""

    rank: int
    text: str


class RayAscendEngineActorManager(ReplaceableActors):
    """vLLM's manager of engine core actors, with our placement and our selection of variables."""

    _ranks_before_scaling: int | None = None
    """While a scaling is prepared: how many ranks serve."""
    _is_rolled_back = False
    """Whether the scale-up that was begun last was undone."""

    def __init__(self, vllm_config: Any, addresses: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(super().__init__).bind(vllm_config, addresses, *args, **kwargs).arguments
        self._given_groups = given.get("placement_groups") or ()
        self._given_local_ranks = given.get("local_dp_ranks") or ()
        self.placements: list[RankPlacement] = []
        self._kind = current_accelerator().kind
        names = _variables_to_copy()
        secrets = {name: os.environ[name] for name in names if is_secret(name) and name in os.environ}
        start = patches.with_globals(
            "vllm.v1.engine.utils.CoreEngineActorManager.__init__",
            CoreEngineActorManager.__init__,
            get_env_vars_to_copy=lambda **options: names - secrets.keys(),
            CoreEngineActorManager=SimpleNamespace(create_dp_placement_groups=self.create_dp_placement_groups),
        )
        connect(vllm_config.parallel_config)
        EVENTS.listen(list_in_ray)
        self._check_before_start(node for group in self._given_groups for node in nodes_of_bundles(group).values())
        self._world_size: int = vllm_config.parallel_config.world_size
        self._losses: list[RankLoss] = []
        """Since a scaling began."""
        self._ended: set[tuple[int, int]] = set()
        """Rank and process id of engine cores that this process has ended: their losses are none."""
        self._starting = threading.Lock()
        """Held while the engine cores of a scale-up are started."""
        self._leaving: dict[int, threading.Thread] = {}
        self._ranks_lock, self._placing = threading.RLock(), threading.Lock()
        self._config = copy.deepcopy(vllm_config)
        self._publisher = StatusPublisher(addresses)
        self._restarts: RankRecovery | None = None
        restarts_ranks = may_restart_ranks(vllm_config) and not (self._given_groups and is_elastic(vllm_config))
        self._server = ControlServer(
            node_address(),
            load().silence_s,
            self._record_loss,
            processes=max_dp_size(vllm_config.parallel_config),
            on_error=self._handle_server_error,
        )
        try:
            addresses.launch_context = EngineLaunchContext(self._server.address_json(), secrets, restarts_ranks)
            niceness = os.environ.get(NICENESS, "0")
            with _environment({DRIVER_VARIABLE: driver_settings_value(), NICENESS: niceness}):
                start(self, vllm_config, addresses, *args, **kwargs)
        except BaseException:  # Ctrl-C too: no actor may stay
            self._undo_startup()
            raise
        if restarts_ranks:
            self._restarts = RankRecovery(failure_domains(vllm_config), self.restart_ranks, self._publisher)
        self._server.on_event = self._record_event
        self._warn_of_unused_list(vllm_config)

    def monitor_engine_liveness(self) -> None:
        """Return, and end all engine cores, when one has ended as upstream; where they are restarted, when none can be.

        Called in a thread of its own.
        """
        if self._restarts is None:
            super().monitor_engine_liveness()
            return
        drained: set[int] = set()
        while not self.manager_stopped.is_set() and not self._restarts.ended.is_set():
            self._watch_ranks(self._restarts)
            drained = self._drain_ranks(self._restarts, drained)
        if self._restarts.ended.is_set():
            self.failed_proc_name = self._restarts.cause
        self.shutdown()

    def shutdown(self, timeout: float | None = None) -> None:
        """Stop the engine cores gracefully, then kill what is left, as upstream does immediately."""
        self.manager_stopped.set()
        if self._restarts is not None:
            self._restarts.stop()
        self._server.broadcast(STOP)
        grace_s = stop_grace_s(load().stop_grace_s, self._world_size)
        late = self._server.wait_for_exit(grace_s + _ACTOR_EXIT_EXTRA_S)
        if late:
            logger.warning(
                "VRA-305: engine cores of data parallel ranks %s did not exit in time and are killed; raise "
                "VLLM_RAY_ASCEND_STOP_GRACE_S (now %g s)",
                late,
                load().stop_grace_s,
            )
        self._server.close()
        self._publisher.close()
        super().shutdown(timeout)

    def given_ranks(self) -> int:
        """Return how many of the first ranks have placement groups that the caller made."""
        return len(self._given_groups)

    def begin_scaling(self) -> None:
        """Note that a scaling begins: `lost_in_scaling` and `roll_back_scale_up` are about what happens from now on.

        Raises ElasticEPError while a rank is being restarted.
        """
        down = self._restarts.down() if self._restarts is not None else set()
        check_ranks_up(f"data parallel ranks {sorted(down)} are down" if down else "")
        self._losses.clear()
        self._ranks_before_scaling = len(self.placement_group_is_local)

    def begin_commit(self) -> None:
        """Note that ranks which have joined are like all others from now on: the end of one ends all."""
        self._ranks_before_scaling = None
        if self._restarts is not None:
            self._restarts.set_domains(())

    def end_commit(self, vllm_config: Any) -> None:
        """Note that the ranks of ``vllm_config`` serve: one that is lost from now on is restarted, where ranks are."""
        config = vllm_config.parallel_config
        size = config.data_parallel_size
        local = sum(self.placement_group_is_local[:size])
        self._set_size(size, local, config.eplb_config.num_redundant_experts)
        if self._restarts is not None:
            self._restarts.set_domains(failure_domains(self._config))
            for loss in self._losses:  # since the last look of the commit
                self._restarts.lose(loss.rank, loss.text)

    def lost_in_scaling(self) -> list[RankLoss]:
        """Return the engine cores that have failed or exited since `begin_scaling`."""
        return list(self._losses)

    def get_run_refs(self) -> list[Any]:
        """Return what upstream watches to end all engine cores with the first: not those that are about to join."""
        return list(self.run_refs[: self._ranks_before_scaling])

    def scale_up_elastic_ep(self, *args: Any, **kwargs: Any) -> None:
        """Start engine cores for the ranks that join, as upstream. Where that fails, none of them stays.

        NPUs of ranks that have left come free first. Upstream waits for ever where all new ranks are on this node and
        others are not: it takes the last 0 of these for all.
        """
        if self._ranks_before_scaling is None:
            self.begin_scaling()
        for thread in list(self._leaving.values()):
            thread.join()
        with self._starting:
            self._is_rolled_back = False
            before = len(self.placement_group_is_local)
            self.local_engine_actors = AppendedSlices(self.local_engine_actors)
            self.remote_engine_actors = AppendedSlices(self.remote_engine_actors)
            try:
                super().scale_up_elastic_ep(*args, **kwargs)
            except BaseException:  # Ctrl-C too: no actor may stay
                self._end_ranks_from(before)
                raise

    def roll_back_scale_up(self) -> None:
        """Kill the engine cores started since `begin_scaling`, and release their NPUs. May be called again.

        A start that is in progress ends with them, or with the next free NPUs that it waits for.
        """
        if self._ranks_before_scaling is None:
            return
        self._is_rolled_back = True
        deadline = time.monotonic() + _UNDO_LIMIT_S
        has_ended = False
        while not has_ended and time.monotonic() < deadline:
            has_ended = self._starting.acquire(timeout=_UNDO_POLL_S)
            self._end_ranks_from(self._ranks_before_scaling)
        if has_ended:
            self._starting.release()

    def _end_ranks_from(self, first: int) -> None:
        with self._ranks_lock:
            while len(self.placement_group_is_local) > first:
                rank = len(self.placement_group_is_local) - 1
                self._end(rank, *self._take_last())

    def scale_down_elastic_ep(self, cur_data_parallel_size: int, new_data_parallel_size: int) -> None:
        """Forget the ranks that leave, and release their NPUs once they have ended. Does not wait.

        Upstream removes their placement groups immediately, which kills them in the middle of their shutdown.
        """
        for rank in reversed(range(new_data_parallel_size, cur_data_parallel_size)):
            with self._ranks_lock:
                actor, group = self._take_last()
            thread = threading.Thread(target=self._end_in_order, args=(rank, actor, group), daemon=True)
            self._leaving[rank] = thread
            thread.start()

    def restart_ranks(self, ranks: Sequence[int]) -> list[int]:
        """Start new engine cores, and notify API servers where there are fewer ranks than before."""
        started = super().restart_ranks(ranks)
        if len(started) < len(ranks):
            config = self._config.parallel_config
            size = config.data_parallel_size, config.data_parallel_size_local
            self._publisher.publish(SIZE_CHANGED, SizeStatus(*size, config.eplb_config.num_redundant_experts))
            EVENTS.emit(RANKS_REMOVED, data_parallel_size=len(started))
        return started

    def _restartable_ranks(self, restarts: RankRecovery) -> list[int]:
        """Return the ranks that serve, or are being restarted: not those that are about to join or to leave."""
        return [rank for rank in range(len(self.placement_group_is_local)) if restarts.domain(rank)]

    def _watch_ranks(self, restarts: RankRecovery) -> None:
        """Note the ranks whose engine cores have ended, as Ray says; wait a moment for the next."""
        import ray

        with self._ranks_lock:
            up = [rank for rank in self._restartable_ranks(restarts) if rank not in restarts.down()]
            ranks = {reference: rank for rank in up if (reference := self.run_ref(rank)) is not None}
        if not ranks:
            self.manager_stopped.wait(WATCH_S)
            return
        ended, _ = ray.wait(list(ranks), timeout=WATCH_S)
        for reference in ended:
            if not self.manager_stopped.is_set() and reference in self.run_refs:  # not of one that was left out
                restarts.lose(ranks[reference], f"the engine core of data parallel rank {ranks[reference]} exited")

    def _drain_ranks(self, restarts: RankRecovery, drained: Collection[int]) -> set[int]:
        """Let the ranks on nodes that are about to be stopped finish and exit; they are then started on other nodes.

        ``drained`` are those that were before. Return all that are.
        """
        try:
            draining = draining_nodes()
        except Exception:  # Ray's head does not answer now: the next look may succeed
            logger.debug("it is not known which nodes drain", exc_info=True)
            return set(drained)
        down = restarts.down()
        with self._ranks_lock:
            ranks = self._restartable_ranks(restarts)
            affected = {
                rank: deadlines
                for rank in ranks
                if (deadlines := [draining[node] for node in self.nodes(rank) if node in draining])
            }
        ending = {each for rank in affected for each in restarts.domain(rank)}
        if not set(ranks) - ending - down or restarts.changed_by:
            return set(drained)  # no other rank serves, or none could be started: rather until the nodes are gone
        for rank in affected.keys() - drained - down:
            seconds = drain_limit_s(min(filter(None, affected[rank]), default=0), time.time())
            logger.warning(
                "VRA-155: the node of data parallel rank %d is about to be stopped: the rank finishes its requests "
                "within %d s",
                rank,
                seconds,
            )
            ending_together = restarts.drain(rank, "its node is about to be stopped")
            self.manager_stopped.wait(WATCH_S)  # until API servers know: an engine core that ends refuses requests
            for each in ending_together:
                self._server.send(each, drain_message(seconds))
        return set(affected) - down

    def _is_current(self, loss: PeerLost) -> bool:
        """Return whether the lost process is the rank's last one: a silent node's may be replaced before it is lost."""
        return any(
            (peer.rank, peer.pid, peer.location()) == (loss.rank, loss.pid, loss.location)
            for peer in self._server.latest_peers()
        )

    def _record_event(self, rank: int, event: EventReported) -> None:
        """Note that an engine core has failed, or that a call has changed the workers: one started again lacks that."""
        if event.name == ENGINE_FAILED.name:
            self._losses.append(RankLoss(rank, f"data parallel rank {rank} failed: {event.fields['cause']}"))
        elif event.name == WORKERS_CHANGED.name and self._restarts is not None:
            self._restarts.changed_by = str(event.fields["call"])

    def _take_last(self) -> tuple[Any, Any]:
        """Remove the last rank from upstream's lists; return its actor and its placement group."""
        group, is_local = self.created_placement_groups.pop(), self.placement_group_is_local.pop()
        actor = (self.local_engine_actors if is_local else self.remote_engine_actors).pop()
        if (ref := self.actor_run_ref_dict.pop(actor, None)) in self.run_refs:
            self.run_refs.remove(ref)
        return actor, group

    def _end_in_order(self, rank: int, actor: Any, group: Any) -> None:
        """Wait until a rank has ended by itself, then release its NPUs."""
        deadline = time.monotonic() + stop_grace_s(load().stop_grace_s, self._world_size) + _ACTOR_EXIT_EXTRA_S
        while rank in self._server.connected_ranks() and time.monotonic() < deadline:
            time.sleep(_EXIT_POLL_S)
        self._end(rank, actor, group)
        del self._leaving[rank]

    def _end(self, rank: int, actor: Any, group: Any) -> None:
        """Kill an engine core, whose workers die with it, if it still lives, and remove its placement group."""
        import ray

        self._ended.update((peer.rank, peer.pid) for peer in self._server.latest_peers() if peer.rank == rank)
        ray.kill(actor)
        remove_placement_groups([group])

    def add_dp_placement_groups(self, old_vllm_config: Any, new_data_parallel_size: int) -> tuple[list[Any], list[int]]:
        """Return groups and local ranks for the ranks that elastic scale-up adds.

        Ranks that run keep their groups, whoever made these. Each new group is pinned to the node for which its local
        rank was computed. Raises PlacementError where they do not fit; then none is made.
        """
        config = old_vllm_config.parallel_config
        created = self.placements[: len(self.created_placement_groups)]
        current = [
            *placed_ranks([nodes_of_bundles(group) for group in self._given_groups], self._given_local_ranks),
            *(PlacedRank(each.dp_rank, each.local_dp_rank, each.bundle_nodes[0]) for each in created),
        ]
        allowed = allowed_addresses()
        missing = [] if allowed else [RankPlacementDemand(config.world_size, 1, "STRICT_PACK")]
        added = place_with_growth(
            lambda demand: plan_scale_up(
                current,
                new_data_parallel_size,
                config.world_size,
                node_id(),
                free_npus_per_node(self._kind, demand),
                allowed,
                self._kind,
            ),
            lambda: self._demand(old_vllm_config, missing * (new_data_parallel_size - len(current))),
            lambda: npu_wait_s(new_data_parallel_size * config.world_size, self._kind),
        )
        self._check_before_start(node for placement in added for node in placement.bundle_nodes)
        if self._is_rolled_back:
            raise ElasticEPError("VRA-349", "the scaling was undone while it waited for NPUs: no rank is started")
        groups = create_placement_groups(wanted_groups(old_vllm_config, added, self._kind), GRANT_LIMIT_S)
        EVENTS.emit(RANKS_ADDED, data_parallel_size=new_data_parallel_size)
        self.placements[len(created) :] = added
        return groups, [placement.local_dp_rank for placement in added]

    def create_dp_placement_groups(self, vllm_config: Any) -> tuple[list[Any], list[int]]:
        """Return groups and local ranks of all ranks, as vLLM's static method of this name does.

        A method that replaces this one is used. Raises PlacementError where the ranks do not fit; then none is made.
        """
        config = vllm_config.parallel_config
        reject_device_ids(getattr(config, "assigned_physical_gpu_ids", None), self._kind)
        check_master_address(config.data_parallel_master_ip)
        request = placement_request(config, self._kind, vllm_config.model_config.is_moe)
        self.placements = place_with_growth(
            lambda demand: plan_placement(request, free_npus_per_node(self._kind, demand)),
            lambda: self._demand(vllm_config, growth_demand(request, free_npus_per_node(self._kind))),
            lambda: npu_wait_s(request.dp_size * request.world_size, self._kind),
        )
        self._check_before_start(node for placement in self.placements for node in placement.bundle_nodes)
        groups = create_placement_groups(wanted_groups(vllm_config, self.placements, self._kind), GRANT_LIMIT_S)
        return groups, [placement.local_dp_rank for placement in self.placements]

    def _check_before_start(self, node_ids: Iterable[str]) -> None:
        if self._kind is NPU and (used := set(node_ids)):
            check_nodes(used)

    def _handle_server_error(self, error: Exception) -> None:
        """End the engine cores, which nobody could stop any more: each loses its connection. vLLM learns of that."""
        logger.error(
            "VRA-338: the control server of the engine cores failed, which ends them: %s: %s",
            type(error).__name__,
            error,
            exc_info=error,
        )
        self._server.close()

    def _record_loss(self, loss: PeerLost) -> None:
        """Note and log which engine core has exited. vLLM, which learns of it from Ray, ends the others."""
        if loss.rank not in self._leaving and (loss.rank, loss.pid) not in self._ended:
            self._losses.append(RankLoss(loss.rank, f"{_describe(loss)} exited"))
        logger.info("%s exited", _describe(loss))
        if self._restarts is not None and self._is_current(loss):
            self._restarts.lose(loss.rank, f"{_describe(loss)} exited")

    def _warn_of_unused_list(self, vllm_config: Any) -> None:
        """Log a warning where this process's visible list is not what its engines on this node use."""
        if not self.placements:  # the caller made the groups
            return
        ours = {f"{vllm_config.instance_id}{suffix}" for suffix in ("", *(f"_dp{p.dp_rank}" for p in self.placements))}
        records = [record for record in running_engines() if record.engine in ours]
        note = ignored_list_warning(os.environ.get(self._kind.variable), node_address(), records, self._kind, node_id())
        if note:
            logger.warning("%s", note)

    def _undo_startup(self) -> None:
        """Kill the engine cores that were started, whose workers die with them, and release their NPUs."""
        import ray

        self._server.close()
        for actor in [*getattr(self, "local_engine_actors", ()), *getattr(self, "remote_engine_actors", ())]:
            ray.kill(actor)
        remove_placement_groups(getattr(self, "created_placement_groups", ()))


def _variables_to_copy() -> set[str]:
    """Return the variables for engine core actors: vLLM's without the node's own, plus those of the NPU stack."""
    stay = WORKER_SPECIFIC_ENV_VARS | node_local_variables()
    names: set[str] = get_env_vars_to_copy(exclude_vars=stay, destination="engine cores")
    return names | names_to_copy(os.environ) | {DRIVER_VARIABLE, NICENESS}


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set ``values`` in the environment, from which upstream copies, while the context lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def max_dp_size(config: Any) -> int:
    """Return how many data parallel ranks the engine of a ParallelConfig may ever have."""
    return int(max(config.data_parallel_size, getattr(config, "elastic_ep_max_dp_size", None) or 0))


def _describe(loss: PeerLost) -> str:
    return f"the engine core of data parallel rank {loss.rank} (process {loss.pid}, {loss.location})"


class AppendedSlices(list[Any]):
    """A list each slice of which is what was appended to it."""

    def __init__(self, items: Collection[Any]) -> None:
        super().__init__(items)
        self._given = len(items)

    def __getitem__(self, index: Any) -> Any:
        """Return the item at ``index``; for a slice, all items that were appended."""
        return [*self][self._given :] if isinstance(index, slice) else super().__getitem__(index)
