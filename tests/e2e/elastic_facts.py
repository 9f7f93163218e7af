"""A worker extension class for engines that are scaled: what each worker holds, through collective_rpc.

The server answers with the first rank's value alone, so that a check raises on whatever rank it fails.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.e2e.facts import WorkerFacts, point_to_point


class ElasticFacts(WorkerFacts):
    """Mixed into vllm-ascend's worker by `worker_extension_cls`."""

    def check_experts(self) -> dict[str, Any]:
        """Check that every expert slot of this rank has the weights of the expert that the tables say, byte by byte."""
        import torch
        from safetensors import safe_open
        from vllm.distributed import get_dp_group, get_ep_group

        runner = self.model_runner  # type: ignore[attr-defined]
        (state,) = runner.eplb_state.model_states.values()
        experts = state.physical_to_logical_map.cpu()
        rank, size = get_ep_group().rank_in_group, get_ep_group().world_size
        local = experts.shape[1] // size
        model = Path(self.model_config.model) / "model.safetensors"  # type: ignore[attr-defined]
        with safe_open(model, "pt") as weights:
            for number, layer in enumerate(runner.get_model().moe_layers):
                assert sorted(set(experts[number].tolist())) == list(range(state.model.num_logical_experts))
                for slot in range(local):
                    expert = int(experts[number, rank * local + slot])
                    prefix = f"model.layers.{number}.mlp.experts.{expert}"
                    gate, up, down = (
                        weights.get_tensor(f"{prefix}.{name}_proj.weight").to(self.model_config.dtype)  # type: ignore[attr-defined]
                        for name in ("gate", "up", "down")
                    )
                    held = layer.routed_experts
                    assert torch.equal(held.w13_weight[slot].cpu(), torch.cat([gate, up]).t()), (number, slot, expert)
                    assert torch.equal(held.w2_weight[slot].cpu(), down.t()), (number, slot, expert)
        return {
            "size": size,
            "dp_size": get_dp_group().world_size,
            "physical": experts.shape[1],
            "point_to_point": point_to_point(),
        }

    def graph_facts(self, folder: str) -> None:
        """Write which graphs this rank has to a file of the ``folder``: sizes of batches, captures and replays so far.

        Replays are counted from the first call on. It asks no other rank: these may still be stepping, with other
        operations on the same groups.
        """
        from vllm.compilation.counter import compilation_counter
        from vllm.distributed import get_dp_group
        from vllm_ascend.compilation import acl_graph

        if not hasattr(self, "replays"):
            self.count_replays()
        sizes = {
            entry.batch_descriptor.num_tokens
            for wrapper in acl_graph._acl_graph_wrappers
            for entry in wrapper.concrete_aclgraph_entries.values()
            if entry.aclgraph is not None
        }
        found = {
            "sizes": sorted(sizes),
            "captured": compilation_counter.num_cudagraph_captured,
            "replays": self.replays,
        }
        (Path(folder) / f"rank{get_dp_group().rank_in_group}").write_text(json.dumps(found))

    def resources(self) -> str:
        """Return what this worker holds that a scaling could leave behind, as JSON."""
        import torch
        from torch.distributed.distributed_c10d import _world

        return json.dumps(
            {
                "files": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
                "memory": torch.npu.memory_allocated(),
                "groups": len(_world.pg_group_ranks),
            }
        )
