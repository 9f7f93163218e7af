"""What patches/ray-ascend mends, asked of the ray-ascend on the path, on software NPUs; one check a patch."""

from __future__ import annotations

import threading
from typing import Any

import ray
import torch
import torch_npu  # noqa: F401
from ray.experimental.rdt.collective_tensor_transport import (
    CollectiveCommunicatorMetadata,
    CollectiveTransportMetadata,
)
from ray.util.collective import collective
from ray.util.collective.types import BroadcastOptions
from ray_ascend.collective.hccl_collective_group import HCCLGroup
from ray_ascend.direct_transport.hccl_tensor_transport import HCCLTensorTransport

from tests.patches.report import run

NAME, DEVICE = "alone", 1


@ray.remote(num_cpus=0)
class Actor:
    """A group of one, on the second NPU."""

    def __init__(self) -> None:
        torch.npu.set_device(DEVICE)
        self.group = HCCLGroup(1, 0, NAME)
        collective._group_mgr._name_group_map[NAME] = self.group

    def receive(self) -> list[int]:
        """What a thread of Ray's does that receives: nothing, here, but on which device?"""
        found: list[int] = []

        def run() -> None:
            HCCLTensorTransport().recv_multiple_tensors(
                "object",
                CollectiveTransportMetadata(tensor_meta=[], tensor_device="npu"),
                CollectiveCommunicatorMetadata(communicator_name=NAME, src_rank=0, dst_rank=0),
            )
            found.append(torch.npu.current_device())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found

    def broadcast(self) -> str:
        """Broadcast from a rank that there is not: what is said of it."""
        options = BroadcastOptions()
        options.root_rank = 5
        try:
            self.group.broadcast(torch.ones(4, device=f"npu:{DEVICE}"), options)
        except RuntimeError as error:
            return str(error)
        return "nothing"


def device_of_the_group() -> None:
    found = ray.get(actor.receive.remote())
    assert found == [DEVICE], found


def error_of_hccl() -> None:
    said = ray.get(actor.broadcast.remote())
    assert "HcclBroadcast failed with HCCL error" in said, said


if __name__ == "__main__":
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    kind: Any = Actor
    actor = kind.remote()
    run({"ray-ascend-0001": device_of_the_group, "ray-ascend-0002": error_of_hccl})
    ray.shutdown()
