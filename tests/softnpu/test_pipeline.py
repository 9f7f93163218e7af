"""HcclPPCommunicator over a real pipeline group of vLLM, without Ray. As a program, this file is one of two stages."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.softnpu.ranks import run_ranks, succeeded

VARIABLES = {"HCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
LATE_S, LONG_S = 1.0, 60.0


def test_tensors_between_stages(tmp_path: Path) -> None:
    """Right values of all kinds, whatever the producer's stream still has to do, and whatever it does afterwards."""
    succeeded(run_ranks("test_pipeline", "values", 2, tmp_path, VARIABLES))


def test_waits_end(tmp_path: Path) -> None:
    """A stage that is silent, and a communicator that is destroyed meanwhile."""
    succeeded(run_ranks("test_pipeline", "silent", 2, tmp_path, VARIABLES))


def test_a_stage_that_is_killed_is_told(tmp_path: Path) -> None:
    first, second = run_ranks("test_pipeline", "killed", 2, tmp_path, VARIABLES)
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
    assert communicator.settle(LONG_S)


def silent(own: int, communicator: Any, folder: Path) -> None:
    import torch

    if own == 1:
        while not (folder / "done").exists():
            time.sleep(0.05)
        return
    told: list[Exception] = []
    communicator.on_failure(told.append)
    communicator._limit_s = LATE_S
    assert "has waited 1 s for a tensor that stage 1 was to send" in raised(lambda: receive(communicator))
    assert [type(error) for error in told] == [TimeoutError]
    communicator._limit_s = LONG_S
    said: list[str] = []
    waiting = threading.Thread(target=lambda: said.append(raised(lambda: receive(communicator))))
    waiting.start()
    while not communicator.doing():
        time.sleep(0.01)
    assert communicator.doing() == "waiting for a tensor of stage 1"
    communicator.destroy()
    waiting.join(LONG_S)
    assert "was destroyed" in said[0]
    assert "was destroyed" in raised(lambda: communicator.send(torch.ones(1, device="npu:0"), 1))
    (folder / "done").touch()


def killed(own: int, communicator: Any, folder: Path) -> None:
    if own == 1:
        time.sleep(LATE_S)
        os.kill(os.getpid(), signal.SIGKILL)
    told: list[Exception] = []
    communicator.on_failure(told.append)
    assert "waiting for a tensor of stage 1 failed: " in raised(lambda: receive(communicator))
    assert "is gone: its process has ended" in str(told[0])


def receive(communicator: Any) -> None:
    import torch

    from vllm_ray_ascend.accelerators.choose import current

    current().bind_thread(0)
    communicator.recv((1,), torch.int64, 1)


def raised(call: Callable[[], object]) -> str:
    """What a call says that Ray's loop takes for a closed channel."""
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

    from vllm_ray_ascend.accelerators.choose import current
    from vllm_ray_ascend.executor.pairs import connect_pairs
    from vllm_ray_ascend.transport.pipeline import HcclPPCommunicator

    own, folder = int(os.environ["RANK"]), Path(os.environ["TEST_FOLDER"])
    current().bind_thread(own)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(2, own, f"file://{folder}/store", own, current().communicator)
        initialize_model_parallel(1, 2)
    connect_pairs(SimpleNamespace(device=current().device(own)))
    communicator = HcclPPCommunicator(2, None, None, [], limit_s=LONG_S)
    assert communicator.get_self_rank() is None
    members = communicator.join(f"actor of {own}")
    assert (members.own, members.actors) == (own, ["actor of 0", "actor of 1"])
    {"values": values, "silent": silent, "killed": killed}[scenario](own, communicator, folder)
    os._exit(0)  # torch would wait for its peer


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
