"""vLLM's manager of engine core actors, by data parallel rank: which actor a rank has, and how it gets a new one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.utils.network_utils import get_open_ports_list
from vllm.v1.engine import core
from vllm.v1.engine.utils import CoreEngineActorManager, _apply_dp_identity_suffix

from vllm_ray_ascend.cluster.dp_placement import (
    NodeNpus,
    PlacedRank,
    RankPlacement,
    RankPlacementDemand,
    plan_replacement,
)
from vllm_ray_ascend.cluster.growth import place_with_growth
from vllm_ray_ascend.cluster.placement_groups import (
    PlacementGroupSpec,
    create_placement_groups,
    current_nodes,
    free_npus_per_node,
    nodes_of_bundles,
    pin_to_nodes,
    remove_placement_groups,
)
from vllm_ray_ascend.devices.kind import Kind
from vllm_ray_ascend.elastic_ep.admission import MIN_RANKS, is_elastic
from vllm_ray_ascend.engine.data_parallel import allowed_addresses
from vllm_ray_ascend.engine.process import node_id
from vllm_ray_ascend.errors import PlacementError, ShortageError
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

GRANT_LIMIT_S = 60.0
WATCH_S = 1.0
"""Between two looks at what only Ray knows: actors that have ended, nodes that drain. Deaths are detected before."""


class ReplaceableActors(CoreEngineActorManager):
    """vLLM's manager of engine core actors, which can start new ones for ranks whose old ones are gone."""

    created_placement_groups: list[Any]
    placement_group_is_local: list[bool]
    local_engine_actors: list[Any]
    remote_engine_actors: list[Any]
    placements: list[RankPlacement]
    """Of each rank; none where the caller made the placement groups."""
    _config: Any
    """The vLLM config as it was before the start."""
    _kind: Kind
    _world_size: int
    _given_groups: Sequence[Any] = ()
    """Placement groups that the caller made, of the first ranks: it removes them itself."""
    _given_local_ranks: Sequence[int] = ()
    _placing: threading.Lock
    _ranks_lock: threading.RLock
    """Held while ranks are added to the lists, or removed."""
    _starts = 0
    """How often lost ranks were started again."""
    _shortages = 0
    """How often in a row ranks had no NPUs."""

    def restart_ranks(self, ranks: Sequence[int]) -> list[int]:
        """Start new engine cores for ``ranks``, in the places of their old ones as far as these are there.

        Return those that serve now: with elastic expert parallelism fewer, where NPUs are missing. Raises what prevents
        it; then none of the new ones stays.
        """
        import ray

        ranks = [rank for rank in ranks if rank < len(self.placement_group_is_local)]  # others were left out before
        for rank in ranks:
            ray.kill(self.actor(rank))
        ranks = self._ensure_groups(ranks)
        config = copy.deepcopy(self._config)
        self._starts += 1
        config.instance_id += f"_start{self._starts}"
        if len(ranks) > 1:
            self._renew_rendezvous(config.parallel_config)
        try:
            for rank in ranks:
                self._set_actor(rank, self._launch(rank, config))
            self._wait_until_ready(ranks)
        except BaseException:  # Ctrl-C too: no actor may stay
            for rank in ranks:
                ray.kill(self.actor(rank))
            raise
        for rank in ranks:
            actor = self.actor(rank)
            self.actor_run_ref_dict[actor] = actor.run.remote()
            self.run_refs.append(self.actor_run_ref_dict[actor])
        return ranks

    def _ensure_groups(self, ranks: list[int]) -> list[int]:
        """Give each rank a placement group on nodes that are there; return the ranks that are to be started.

        Raises PlacementError where they have no room.
        """
        missing: dict[int, ShortageError] = {}
        for rank in ranks:
            try:
                self._ensure_group(rank)
            except ShortageError as error:
                missing[rank] = error
        if not missing:
            self._shortages = 0
            return ranks
        self._shortages += 1
        if self._shortages == 1:  # Ray may not know yet of NPUs that have come free just now
            raise next(iter(missing.values()))
        self._leave_out(missing)
        return list(range(len(self.placement_group_is_local)))

    def _leave_out(self, missing: Mapping[int, ShortageError]) -> None:
        """Continue without the ranks that are ``missing``, for these reasons. Raises one where that is not possible."""
        config, cause = self._config.parallel_config, next(iter(missing.values()))
        if not is_elastic(self._config) or self._given_groups:
            raise cause
        present = config.data_parallel_size
        kept = [rank for rank in range(present) if rank not in missing]
        experts, redundant = self._config.model_config.get_num_experts(), config.eplb_config.num_redundant_experts
        redundant = redundant_experts(experts, redundant, present, len(kept))
        if 0 in missing or len(kept) < MIN_RANKS or redundant < 0:  # all ranks meet at the node of rank 0
            raise cause
        logger.error(
            "VRA-166: the NPUs of data parallel ranks %s are lost: the engine continues with %d ranks instead of %d. "
            "Scale it up once NPUs are back: POST /scale_elastic_ep. %s",
            ", ".join(map(str, missing)),
            len(kept),
            present,
            cause,
        )
        with self._ranks_lock:
            self._keep_ranks(kept)
        self._set_size(len(kept), len(self.local_engine_actors), redundant)

    def _keep_ranks(self, kept: Sequence[int]) -> None:
        """Give the ``kept`` ranks the numbers from 0, and forget all others."""
        for rank in set(range(len(self.placement_group_is_local))) - set(kept):
            if (reference := self.actor_run_ref_dict.pop(self.actor(rank), None)) in self.run_refs:
                self.run_refs.remove(reference)
        actors = [(self.actor(rank), self.placement_group_is_local[rank]) for rank in kept]
        self.local_engine_actors = [actor for actor, is_local in actors if is_local]
        self.remote_engine_actors = [actor for actor, is_local in actors if not is_local]
        self.placement_group_is_local = [is_local for _, is_local in actors]
        self.created_placement_groups = [self.created_placement_groups[rank] for rank in kept]
        placements = [self.placements[rank] for rank in kept]
        self.placements[:] = [  # vLLM refuses a local rank above the rank
            replace(each, dp_rank=rank, local_dp_rank=min(rank, each.local_dp_rank))
            for rank, each in enumerate(placements)
        ]

    def _renew_rendezvous(self, config: Any) -> None:
        """Let ranks that have a group meet elsewhere than their old ones, whose port may be taken, and store used."""
        config._data_parallel_master_port_list = get_open_ports_list(5)
        config.data_parallel_master_port = config._data_parallel_master_port_list.pop()
        if getattr(config, "enable_elastic_ep", False):
            from vllm.distributed.utils import create_tcp_store

            self._coord_store = create_tcp_store(
                config.data_parallel_master_ip, 0, is_master=True, world_size=-1, wait_for_workers=False
            )
            config._coord_store_port = self._coord_store.port

    def _set_size(self, ranks: int, local_ranks: int, redundant: int) -> None:
        """Start as many ``ranks`` from now on, and so many of them here, with so many redundant experts."""
        config = self._config.parallel_config
        config.data_parallel_size, config.data_parallel_size_local = ranks, local_ranks
        config.eplb_config.num_redundant_experts = redundant

    def _wait_until_ready(self, ranks: Sequence[int]) -> None:
        """Wait until new engine cores are initialized. Raises Ray's error where one dies, or PlacementError."""
        import ray

        pending = {self.actor(rank).wait_for_init.remote(): rank for rank in ranks}
        while pending:
            ready, _ = ray.wait(list(pending), timeout=WATCH_S)
            for reference in ready:
                ray.get(reference)
                del pending[reference]
            if self.manager_stopped.is_set():
                raise RuntimeError("the server is stopping")
            for rank in pending.values():
                self._check_nodes(rank)

    def _launch(self, rank: int, config: Any) -> Any:
        """Return a new engine core's actor for ``rank``."""
        import ray
        from ray.runtime_env import RuntimeEnv
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        config = copy.deepcopy(config)
        _apply_dp_identity_suffix(config, rank)
        config.parallel_config.placement_group = self._group(rank)
        strategy = PlacementGroupSchedulingStrategy(self._group(rank), placement_group_bundle_index=self._world_size)
        actor_class = core.DPMoEEngineCoreActor if config.model_config.is_moe else core.EngineCoreActor
        return (
            ray.remote(actor_class)
            .options(scheduling_strategy=strategy, runtime_env=RuntimeEnv(env_vars=self.env_vars_dict))
            .remote(
                vllm_config=config,
                executor_class=self.executor_class,
                log_stats=self.log_stats,
                local_client=self.placement_group_is_local[rank],
                addresses=self.addresses,
                dp_rank=rank,
                local_dp_rank=self._local_rank(rank),
            )
        )

    def _check_nodes(self, rank: int) -> None:
        """Raise PlacementError where a node of ``rank`` is gone or drains."""
        if missing := self._missing_nodes(rank):
            raise PlacementError("VRA-156", f"node {', '.join(missing)} of data parallel rank {rank} is gone or drains")

    def _missing_nodes(self, rank: int) -> list[str]:
        usable = {node.node_id for node in current_nodes(self._kind) if not node.draining}
        return [node for node in self.nodes(rank) if node not in usable]

    def nodes(self, rank: int) -> list[str]:
        """Return the ids of the nodes of a rank's placement group; nothing for a group that the caller made."""
        return sorted(set(self.placements[rank].bundle_nodes)) if self.placements else []

    def _group(self, rank: int) -> Any:
        return (self._given_groups or self.created_placement_groups)[rank]

    def _local_rank(self, rank: int) -> int:
        return self.placements[rank].local_dp_rank if self.placements else self._given_local_ranks[rank]

    def _place(self, rank: int) -> tuple[list[Any], int]:
        """Return upstream's list with the actor of ``rank``, and its index there."""
        is_local = self.placement_group_is_local[rank]
        actors = self.local_engine_actors if is_local else self.remote_engine_actors
        return actors, self.placement_group_is_local[:rank].count(is_local)

    def actor(self, rank: int) -> Any:
        """Return the actor of a rank's engine core."""
        actors, index = self._place(rank)
        return actors[index]

    def _set_actor(self, rank: int, actor: Any) -> None:
        actors, index = self._place(rank)
        if (reference := self.actor_run_ref_dict.pop(actors[index], None)) in self.run_refs:
            self.run_refs.remove(reference)
        actors[index] = actor

    def run_ref(self, rank: int) -> Any:
        """Return the reference that is ready when a rank's engine core has ended; None while it starts."""
        return self.actor_run_ref_dict.get(self.actor(rank))

    def _ensure_group(self, rank: int) -> None:
        """Give ``rank`` a placement group on other nodes where it has none, or a node of its own is gone or drains.

        Raises PlacementError where they have no room.
        """
        if rank < len(self._given_groups):
            return
        if not self._missing_nodes(rank) and nodes_of_bundles(self.created_placement_groups[rank]):
            return
        with self._placing:  # two ranks must not choose the same NPUs
            self._replace_group(rank)

    def _replace_group(self, rank: int) -> None:
        config = self._config.parallel_config
        remove_placement_groups([self.created_placement_groups[rank]])
        others = [
            PlacedRank(each.dp_rank, each.local_dp_rank, each.bundle_nodes[0])
            for each in self.placements
            if each.dp_rank != rank
        ]
        missing = [] if is_elastic(self._config) else [RankPlacementDemand(config.world_size, 1, "PACK")]
        placement = place_with_growth(
            lambda demand: plan_replacement(
                rank,
                others,
                config.world_size,
                node_id(),
                self._reachable_nodes(demand),
                allowed_addresses(),
                self._kind,
                config.tensor_parallel_size,
            ),
            lambda: self._demand(self._config, missing),
            lambda: 0.0,  # whoever restarts ranks tries it again
        )
        (group,) = create_placement_groups(wanted_groups(self._config, [placement], self._kind), GRANT_LIMIT_S)
        self.created_placement_groups[rank], self.placements[rank] = group, placement
        if self.manager_stopped.is_set():  # it has removed the groups that were there
            remove_placement_groups([group])

    def _reachable_nodes(self, demand: Sequence[Any]) -> list[NodeNpus]:
        """Return the nodes with their free NPUs where a new engine core reaches the API servers."""
        nodes = free_npus_per_node(self._kind, demand)
        is_local = any(address.startswith("ipc://") for address in self.addresses.outputs)
        return [node for node in nodes if node.key == node_id()] if is_local else nodes

    def _demand(self, vllm_config: Any, demand: Collection[RankPlacementDemand]) -> list[PlacementGroupSpec]:
        """Return the placement groups that ask an autoscaler for nodes."""
        name = f"{vllm_config.instance_id}_demand"
        return [
            PlacementGroupSpec(f"{name}{number}", each.bundles(self._kind.key), each.strategy)
            for number, each in enumerate(demand)
        ]


def redundant_experts(experts: int, redundant: int, ranks: int, new_ranks: int) -> int:
    """Return how many redundant experts another number of ranks has, each with as many experts as before.

    Below 0 where the ``experts`` of the model do not fit.
    """
    return (experts + redundant) * new_ranks // ranks - experts


def wanted_groups(vllm_config: Any, placements: Collection[RankPlacement], kind: Kind) -> list[PlacementGroupSpec]:
    """Return the placement groups of data parallel ranks, pinned to the nodes of their placements."""
    nodes = current_nodes(kind)

    def pinned(placement: RankPlacement) -> PlacementGroupSpec:
        name = f"{vllm_config.instance_id}_dp{placement.dp_rank}"
        spec = PlacementGroupSpec(name, placement.bundles(kind.key), placement.strategy)
        return pin_to_nodes(spec, placement.pins, nodes)

    return [pinned(placement) for placement in placements]
