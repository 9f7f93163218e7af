"""Pipeline stages that cannot connect say why. As a program, this file is one of two stages."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

from tests.softnpu.ranks import run_ranks, succeeded


def test_a_pair_that_cannot_connect_is_explained(tmp_path: Path) -> None:
    variables = {"HCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "HCCL_CONNECT_TIMEOUT": "2"}
    succeeded(run_ranks("test_pairs", "main", 2, tmp_path, variables, limit=300))
    first, second = (json.loads((tmp_path / f"said{rank}").read_text()) for rank in range(2))
    for said, code in zip(
        [*first, *second],
        ["HCCL_E_PARA (1)", "HCCL_E_UNAVAIL (7)", "HCCL_E_TIMEOUT (9)", "HCCL_E_TCP_CONNECT (11)"],
        strict=True,
    ):
        assert said.startswith("Pipeline stages 0 and 1 (ranks 0 and 1) cannot be connected by hccl: ")
        assert said.splitlines()[-1].startswith(f"{code}: "), said


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.1)


def main() -> None:
    """Rank 0 fails in three ways: at its ports, then because rank 1 does not come, which does only afterwards."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    from vllm_ray_ascend.accelerators.choose import accelerator
    from vllm_ray_ascend.errors import PipelinePairError
    from vllm_ray_ascend.executor.pairs import connect_pairs

    rank, folder = int(os.environ["RANK"]), Path(os.environ["TEST_FOLDER"])
    npu = accelerator("npu")
    npu.bind_thread(rank)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(2, rank, f"file://{folder}/store", rank, npu.communicator)
        initialize_model_parallel(1, 2)
    taken = socket.create_server(("127.0.0.1", 0))
    said = []
    if rank == 1:
        wait_for(folder / "said0")
    for ports in ("from here to there", str(taken.getsockname()[1]), "auto") if rank == 0 else ("auto",):
        os.environ["HCCL_HOST_SOCKET_PORT_RANGE"] = ports
        try:
            connect_pairs(SimpleNamespace(device=npu.device(rank)))
        except PipelinePairError as error:
            said.append(str(error))
    (folder / f"saying{rank}").write_text(json.dumps(said))
    (folder / f"saying{rank}").rename(folder / f"said{rank}")
    wait_for(folder / f"said{1 - rank}")
    os._exit(0)  # torch would wait for a communicator that never was


if __name__ == "__main__":
    main()
