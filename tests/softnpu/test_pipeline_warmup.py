"""Pipeline stages connect before the first step, or say why not. As a program, this file is one of the stages."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.softnpu.ranks import run_ranks, succeeded

VARIABLES = {"HCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "SOFTNPU_CONNECT_TIMEOUT": "2"}


def test_a_pair_that_cannot_connect_is_explained(tmp_path: Path) -> None:
    succeeded(run_ranks("test_pipeline_warmup", "explain", 2, tmp_path, VARIABLES, limit=300))
    first, second = (json.loads((tmp_path / f"errors{rank}").read_text()) for rank in range(2))
    for message, code in zip(
        [*first, *second],
        ["HCCL_E_PARA (1)", "HCCL_E_UNAVAIL (7)", "HCCL_E_TIMEOUT (9)", "HCCL_E_TCP_CONNECT (11)"],
        strict=True,
    ):
        assert message.startswith("VRA-313: Pipeline stages 0 and 1 (ranks 0 and 1) cannot be connected by hccl: ")
        assert message.splitlines()[-1].startswith(f"{code}: "), message


def test_four_stages_need_no_connection_in_their_first_step(tmp_path: Path) -> None:
    variables = VARIABLES | {"SOFTNPU_CONNECT_TIMEOUT": "60"}
    succeeded(run_ranks("test_pipeline_warmup", "step", 4, tmp_path, variables, limit=300))
    assert [json.loads((tmp_path / f"errors{stage}").read_text()) for stage in range(4)] == [[]] * 4


def test_a_stage_that_never_comes_is_named_and_the_others_are_connected(tmp_path: Path) -> None:
    succeeded(run_ranks("test_pipeline_warmup", "absent", 3, tmp_path, VARIABLES, limit=300))
    first, second = (json.loads((tmp_path / f"errors{stage}").read_text()) for stage in range(2))
    assert first == []
    assert len(second) == 1
    assert second[0].startswith("VRA-313: Pipeline stages 1 and 2 (ranks 1 and 2) cannot be connected by hccl: ")
    assert second[0].splitlines()[-1].startswith("HCCL_E_TIMEOUT (9): ")


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.1)


def explain(stage: int, device: Any, folder: Path) -> list[str]:
    """Stage 0 fails in three ways: at its ports, then because stage 1 does not come, which does only afterwards."""
    taken = socket.create_server(("127.0.0.1", 0))
    if stage == 1:
        wait_for(folder / "errors0")
        return connect(device)
    errors = []
    for ports in ("from here to there", str(taken.getsockname()[1]), "auto"):
        os.environ["HCCL_HOST_SOCKET_PORT_RANGE"] = ports
        errors += connect(device)
    return errors


def step(stage: int, device: Any, folder: Path) -> list[str]:
    """Connect, the last stage first; then pass a tensor through all stages, where no communicator can be made."""
    import torch
    from torch import distributed
    from vllm.distributed.parallel_state import get_pp_group

    group = get_pp_group().device_group
    (folder / f"begins{stage}").touch()
    if stage < 3:
        wait_for(folder / f"begins{stage + 1}")
    errors = connect(device)
    os.environ["HCCL_HOST_SOCKET_PORT_RANGE"] = "from here to there"
    tensor = torch.zeros(5, device=device)
    if stage > 0:
        distributed.recv(tensor, stage - 1, group=group)
    if stage < 3:
        distributed.send(tensor + 1, stage + 1, group=group)
    torch.accelerator.synchronize()
    assert tensor.tolist() == [stage] * 5
    return errors


def absent(stage: int, device: Any, folder: Path) -> list[str]:
    """The last stage of three does not connect."""
    return connect(device) if stage < 2 else []


def connect(device: Any) -> list[str]:
    """Connect the pairs of this stage; return the error, if there is one."""
    from vllm_ray_ascend.errors import PipelinePairError
    from vllm_ray_ascend.executor.pipeline_warmup import connect_pipeline_pairs

    try:
        connect_pipeline_pairs(SimpleNamespace(device=device))
    except PipelinePairError as error:
        return [str(error)]
    return []


def main(scenario: str) -> None:
    """Run a scenario in a pipeline group of vLLM, and write its errors to a file."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    from vllm_ray_ascend.accelerators.choose import get_accelerator

    stage, stages, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(os.environ["TEST_FOLDER"])
    npu = get_accelerator("npu")
    npu.bind_thread(stage)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(stages, stage, f"file://{folder}/store", stage, npu.dist_backend)
        initialize_model_parallel(1, stages)
    errors = {"explain": explain, "step": step, "absent": absent}[scenario](stage, npu.torch_device(stage), folder)
    (folder / f"partial{stage}").write_text(json.dumps(errors))
    (folder / f"partial{stage}").rename(folder / f"errors{stage}")
    for other in range(stages):
        wait_for(folder / f"errors{other}")
    os._exit(0)  # torch would wait for a communicator that never was


if __name__ == "__main__":
    main(sys.argv[1])
