"""Replays a recorded machine as npu-smi or hccn_tool: Machine.install makes programs of this text."""

import fnmatch
import json
import pathlib
import re
import sys
from typing import Any

program = pathlib.Path(__file__)
recorded = json.loads((program.parent.parent / "answers.json").read_text())
line = " ".join([program.name, *sys.argv[1:]])
matching = (
    answer for session in recorded["sessions"] for answer in session if fnmatch.fnmatchcase(line, answer["command"])
)
unknown: dict[str, Any] = {"text": f"Error parameter of {sys.argv[-1]}\n", "code": 255}
answer = next(matching, unknown)
numbers = {**dict(re.findall(r"-([ic]) (\d+)", line)), "host": str(recorded["host"])}
sys.stdout.write(re.sub(r"\{(i|c|host)\}", lambda name: numbers[name[1]], answer["text"]))
sys.exit(answer["code"])
