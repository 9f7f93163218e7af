"""`make test-upstream`: vLLM's own tests on software NPUs. Arguments: groups of tests.txt, and after ``--`` pytest's.

Each group is a process of its own, in which Ray is started by the tests themselves, on this machine alone.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from ci.upstream.processes import (
    Counts,
    Harness,
    import_tests_from,
    make_variables,
    print_counts,
)
from ci.upstream.sources import VLLM, installed_version, source_tree
from ci.upstream.table import TABLE, parse
from demo.signals import exit_on_sigterm
from demo.train.recitation import DENSE, MOE

MODELS = {
    "facebook/opt-125m": DENSE,
    "Qwen/Qwen3-0.6B": DENSE,
    "hmellor/tiny-random-LlamaForCausalLM": DENSE,
    "ibm-research/PowerMoE-3b": MOE,
}
"""What the tests name where any model does: here they are the demonstration's, found in Hugging Face's cache."""
_ASYNCIO = ("-o", "asyncio_default_fixture_loop_scope=function")


def main(arguments: list[str]) -> int:
    """Run the groups; 0 where every test that is not left out passes."""
    exit_on_sigterm()
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, options = arguments[:split], arguments[split + 1 :]
    groups = [group for group in parse(TABLE.read_text()).groups if not names or group.name in names]
    version = installed_version(VLLM.name)
    failed: list[str] = []
    counts: Counts = {}
    # A short path, since Ray's sockets are in it; what ends late may still write there while it is removed.
    with tempfile.TemporaryDirectory(prefix="upstream-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        sources = Path(temporary) / "vllm"
        shutil.copytree(source_tree(VLLM, version), sources)
        variables = import_tests_from(sources, make_variables(Path(temporary), MODELS))
        harness = Harness(TABLE, ("ci.upstream.plugin",), sources, variables, (*_ASYNCIO, *options))
        for group in groups:
            passed, found = harness.run(group)
            counts |= found
            failed += [] if passed else [group.name]
    print_counts(f"vLLM {version}'s tests", counts)
    if failed:
        print(f"failed: {', '.join(failed)}. One group again: make test-upstream GROUPS={failed[0]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
