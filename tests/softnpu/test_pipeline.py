"""HcclPPCommunicator over a real pipeline group of vLLM, without Ray. As a program, this file is one of two stages."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.softnpu.ranks import Rank, run_ranks, succeeded

VARIABLES = {"HCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
LATE_S, LONG_S = 1.0, 60.0


def test_tensors_between_stages(tmp_path: Path) -> None:
    """Values of all shapes and types arrive, with work queued before and after the send on the producer's stream."""
    succeeded(run_ranks("test_pipeline", "values", 2, tmp_path, VARIABLES))


def test_waits_for_a_silent_stage_end(tmp_path: Path) -> None:
    """Waits for a stage that sends nothing end after their limit, and when the communicator is destroyed."""
    succeeded(run_ranks("test_pipeline", "silent", 2, tmp_path, VARIABLES))


def test_a_killed_stage_of_another_node_is_an_error_of_the_device(tmp_path: Path) -> None:
    """One of the same node is seen by nobody but the executor, which ends all workers."""
    ranks = [Rank(rank, {"SOFTNPU_NODE": f"node{rank}"}) for rank in range(2)]
    first, second = run_ranks("test_pipeline", "killed", ranks, tmp_path, VARIABLES)
    assert first.code == 0, first.output[-4000:]
    assert second.code == -signal.SIGKILL, second.output[-4000:]


def values(own: int, communicator: Any, folder: Path) -> None:
    import torch

    peer, count = 1 - own, 50
    shapes = [(0,), (1,), (7, 3), (64, 1024), (513, 257)]
    types = [torch.float32, torch.bfloat16, torch.float16, torch.int64]
    for number in range(count):
        shape, dtype = shapes[number % len(shapes)], types[number % len(types)]
        if number % 2 == own:
            tensor = torch.zeros(shape, dtype=dtype, device=f"npu:{own}")
            for _ in range(20):
                tensor += 1  # queued: a send that does not wait for the stream would send less
            communicator.send(tensor + number, peer)
            communicator.send(tensor, peer)
            tensor.fill_(-1)  # queued after the send, which has to be done with the memory
        else:
            found = [communicator.recv(shape, dtype, peer) for _ in range(2)]
            for tensor, value in zip(found, (20 + number, 20), strict=True):
                assert tensor.shape == shape and tensor.dtype == dtype
                assert bool((tensor == value).all()), (number, tensor)
    strided = torch.arange(12, device=f"npu:{own}").reshape(3, 4).t()
    if own == 0:
        communicator.send(strided, peer)
    else:
        assert communicator.recv((4, 3), torch.int64, peer).tolist() == strided.tolist()
    communicator.destroy()
    assert communicator.drain(LONG_S)


def silent(own: int, communicator: Any, folder: Path) -> None:
    import torch

    if own == 1:
        while not (folder / "done").exists():
            time.sleep(0.05)
        return
    failures: list[Exception] = []
    communicator.set_failure_callback(failures.append)
    communicator._limit_s = LATE_S
    assert "has waited 1 s for a tensor that stage 1 was to send" in channel_error(lambda: receive(communicator))
    assert [type(error) for error in failures] == [TimeoutError]
    communicator._limit_s = LONG_S
    errors: list[str] = []
    waiting = threading.Thread(target=lambda: errors.append(channel_error(lambda: receive(communicator))))
    waiting.start()
    while not communicator.describe_transfer():
        time.sleep(0.01)
    assert communicator.describe_transfer() == "waiting for a tensor of stage 1"
    communicator.destroy()
    waiting.join(LONG_S)
    assert "was destroyed" in errors[0]
    assert "was destroyed" in channel_error(lambda: communicator.send(torch.ones(1, device="npu:0"), 1))
    (folder / "done").touch()


def killed(own: int, communicator: Any, folder: Path) -> None:
    from vllm_ray_ascend.accelerators.choose import current_accelerator

    if own == 1:
        time.sleep(LATE_S)
        os.kill(os.getpid(), signal.SIGKILL)
    failures: list[Exception] = []
    communicator.set_failure_callback(failures.append)
    # Not a tensor of undefined values, from which this stage would compute, and the next one answer.
    assert "VRA-373: the tensor of stage 1 did not arrive" in channel_error(lambda: receive(communicator))
    assert len(failures) == 1
    with pytest.raises(RuntimeError, match="is gone: its process has ended"):
        current_accelerator().synchronize()


def receive(communicator: Any) -> None:
    import torch

    from vllm_ray_ascend.accelerators.choose import current_accelerator

    current_accelerator().bind_thread(0)
    communicator.recv((1,), torch.int64, 1)


def channel_error(call: Callable[[], object]) -> str:
    """Return the text of the RayChannelError that a call raises, which Ray's loop treats as a closed channel."""
    from ray.exceptions import RayChannelError

    try:
        call()
    except RayChannelError as error:
        return str(error)
    raise AssertionError("nothing was raised")


def main(scenario: str) -> None:
    from types import SimpleNamespace

    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    from vllm_ray_ascend.accelerators.choose import current_accelerator
    from vllm_ray_ascend.compiled_graph.pp_communicator import HcclPPCommunicator
    from vllm_ray_ascend.executor.pipeline_warmup import connect_pipeline_pairs

    own, folder = int(os.environ["RANK"]), Path(os.environ["TEST_FOLDER"])
    current_accelerator().bind_thread(own)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(2, own, f"file://{folder}/store", own, current_accelerator().dist_backend)
        initialize_model_parallel(1, 2)
    connect_pipeline_pairs(SimpleNamespace(device=current_accelerator().torch_device(own)))
    communicator = HcclPPCommunicator(2, None, None, [], limit_s=LONG_S)
    assert communicator.get_self_rank() is None
    member = communicator.join_group(f"actor of {own}")
    assert (member.stage, member.actor_ids) == (own, ["actor of 0", "actor of 1"])
    {"values": values, "silent": silent, "killed": killed}[scenario](own, communicator, folder)
    os._exit(0)  # torch waits for its peer at exit


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
