"""What patches/ray-ascend mends, asked of the ray-ascend on the path, on software NPUs; one check a patch."""

from __future__ import annotations

import threading

import pytest
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


def device_of_the_group() -> None:
    """What a thread of Ray's does that receives: nothing, here, but on which device?"""
    found: list[int] = []

    def receive() -> None:
        HCCLTensorTransport().recv_multiple_tensors(
            "object",
            CollectiveTransportMetadata(tensor_meta=[], tensor_device="npu"),
            CollectiveCommunicatorMetadata(communicator_name=NAME, src_rank=0, dst_rank=0),
        )
        found.append(torch.npu.current_device())

    thread = threading.Thread(target=receive)
    thread.start()
    thread.join()
    assert found == [DEVICE], found


def error_of_hccl() -> None:
    with pytest.raises(RuntimeError, match="HcclBroadcast failed with HCCL error"):
        group.broadcast(torch.ones(4, device=f"npu:{DEVICE}"), BroadcastOptions(root_rank=5))


if __name__ == "__main__":
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    torch.npu.set_device(DEVICE)
    group = HCCLGroup(1, 0, NAME)
    collective._group_mgr._name_group_map[NAME] = group
    run({"ray-ascend-0001": device_of_the_group, "ray-ascend-0002": error_of_hccl})
    ray.shutdown()
