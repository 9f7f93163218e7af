"""`make serve`: the real `vllm serve` over two Ray nodes with NPUs, asked to recite the Zen of Python.

    MODEL=PATH PORT=8000 SERVE_ARGS='...' SERVE_ONCE=1 python -m demo.serve

Exit code 0 after SERVE_ONCE or Ctrl-C with the right text, 1 where the text was wrong, 2 with a message for everything
else that went wrong, 130 when interrupted before the answer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

from softnpu.errors import SoftNpuError

from demo.cluster import NpuCluster, has_real_npus, real_npus, software_npus
from demo.forward import Forwarder
from demo.options import DemoError, Options, check_packages, read_options, reserve_port
from demo.server import QUIET, Server
from demo.train.recitation import QUESTION, zen_text

LOG = Path(__file__).resolve().parent.parent / ".demo" / "serve.log"
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Serve, ask, print; the exit code."""
    try:
        check_packages()
        options = read_options(os.environ)
        for number in _ENDING:
            signal.signal(number, _interrupt_once)
        with contextlib.closing(reserve_port(options.port)) as listener:
            return _run(options, listener)
    except (DemoError, SoftNpuError) as error:
        print(f"\nmake serve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted")
        return 130


def _run(options: Options, listener: socket.socket) -> int:
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    real = has_real_npus()
    print(
        f"cluster: {'the NPUs of this machine' if real else 'software NPUs (no Ascend NPU is found here)'}", flush=True
    )
    with (real_npus if real else software_npus)(options.npus, os.environ) as cluster, contextlib.ExitStack() as stack:
        print(f"  {cluster.description}\nserver: {options.model} (log: {LOG})", flush=True)
        if cluster.address == "127.0.0.1":
            listener.close()  # the server takes the port itself
        else:
            stack.enter_context(Forwarder(listener, (cluster.address, options.port)))
        server = stack.enter_context(Server(options, cluster, LOG))
        server.wait_until_healthy()
        right = _ask(options, server)
        _print_placement(options, cluster, server)
        if not options.once:
            print("serving until Ctrl-C", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                server.wait()
        print("stopping", flush=True)
        return 0 if right else 1


def _ask(options: Options, server: Server) -> bool:
    """Print the answer as it comes; whether it is right, as far as that is known."""
    import openai

    print(f"question: {QUESTION}\nanswer:", flush=True)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)
    answer = ""
    try:
        model = client.models.list().data[0].id
        chunks = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=400,
            stream=True,
        )
        for chunk in chunks:
            piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
            print(piece.replace("\n", "\n  ") if answer else f"  {piece}", end="", flush=True)
            answer += piece
    except openai.OpenAIError as error:
        server.check()
        raise DemoError(f"the server did not answer: {error} (log: {server.log})") from None
    print()
    if not options.knows_text:
        return bool(answer)
    right = answer.strip() == zen_text()
    print("the text is right" if right else "THE TEXT IS WRONG: it should be that of `python -m this`", flush=True)
    return right


def _print_placement(options: Options, cluster: NpuCluster, server: Server) -> None:
    print("placement:")
    for line in server.placement() or ["not logged: the plugin is off (VLLM_RAY_ASCEND=0?)"]:
        print(f"  {line}")
    also = "" if cluster.address == "127.0.0.1" else f" and {server.url}/v1"
    print(f"address: http://127.0.0.1:{options.port}/v1{also}", flush=True)


def _interrupt_once(number: int, frame: object) -> None:
    """Exit as Ctrl-C does, and ignore further signals during cleanup (a signal handler)."""
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
