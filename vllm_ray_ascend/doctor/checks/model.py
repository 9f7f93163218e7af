"""The files of a model, for `doctor --model PATH`: on every node, and the same there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from vllm_ray_ascend.cluster.findings import Finding, join
from vllm_ray_ascend.doctor.records import ModelFiles
from vllm_ray_ascend.doctor.views import Check, NodeView, odd_ones, on_every_node

MODEL = "model"
"""The check that is made where a path is given."""
_NAMED = 3


def check_model(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield an error for each node that lacks the model or some of its files, and where they are not those of most.

    On a node without NPUs it is missing for an engine that is started there alone: a note. The others are compared.
    """
    found = {node: node.record.model for node in nodes}
    complete = {node: files for node, files in found.items() if node.has_npus and files and _is_complete(files)}
    for node, files in found.items():
        if files is None:
            yield node.unknown(
                "the file system did not answer in time, or vllm-ray-ascend there is older",
                "`ls` and `df` of the path there; where it only takes long, --timeout 120.",
            )
        elif files.error:
            yield node.finding(
                "error" if node.has_npus else "info",
                "VRA-693",
                f"the model {files.path} cannot be read there ({files.error}).",
                _copy(files, complete),
                path=files.path,
            )
        elif not _is_complete(files):
            yield node.finding(
                "error" if node.has_npus else "info",
                "VRA-694",
                f"the model {files.path} lacks {_lacks(files)}.",
                _copy(files, complete),
                missing=files.missing,
            )
    yield from _different(complete)


def _is_complete(files: ModelFiles) -> bool:
    return not files.error and not files.missing and files.weights_bytes > 0


def _lacks(files: ModelFiles) -> str:
    """Return which files are missing, as far as they are known by name."""
    unnamed = len(files.missing) - _NAMED
    listed = f"{join(files.missing[:_NAMED])}{f' and {unnamed} more' if unnamed > 0 else ''}"
    return join(text for text in (listed, "" if files.weights_bytes else "all of its weights") if text)


def _different(complete: dict[NodeView, ModelFiles]) -> Iterator[Finding]:
    """Yield a finding for each node whose model is whole, and another one than that of most nodes."""
    sizes = {node: (files.weights_bytes, files.index_bytes) for node, files in complete.items()}
    for node, here, example, there in odd_ones(sizes):
        (bytes_here, index_here), (bytes_there, index_there) = here, there
        yield node.finding(
            "error",
            "VRA-695",
            f"the weights of {complete[node].path} have {bytes_here} bytes there ({_indexed(index_here)}), "
            f"{bytes_there} on node {example.address} ({_indexed(index_there)}).",
            _copy(complete[node], {example: complete[example]}),
            here=bytes_here,
            there=bytes_there,
        )
    for node, _, example, _ in odd_ones({node: files.config for node, files in complete.items()}):
        if sizes[node] == sizes[example]:
            yield node.finding(
                "warning",
                "VRA-696",
                f"config.json of {complete[node].path} is not that of node {example.address}.",
                _copy(complete[node], {example: complete[example]}),
            )


def _indexed(size: int | None) -> str:
    return "no index" if size is None else f"by its index {size}"


def _copy(files: ModelFiles, sources: dict[NodeView, ModelFiles]) -> str:
    """Return the remedy: a copy from a node that has the model, where one has it."""
    mount = "In a container, mount it at this path."
    if not sources:
        return f"Give --model the path that all nodes have, or copy the model to {files.path} on each. {mount}"
    source, folder = next(iter(sources)).address, str(PurePosixPath(files.path).parent).rstrip("/")
    host = f"[{source}]" if ":" in source else source
    return f"`rsync -aL {host}:{files.path} {folder}/` there, or a file system that nodes share. {mount}"


CHECKS = (
    Check(
        MODEL,
        "the model is on every node, and the same (with `--model`)",
        "its index, config.json, sizes of files",
        check_model,
        of_cluster=True,
        applies=on_every_node,
    ),
)
