"""Ranks by pipeline stage. Pure."""

from __future__ import annotations

from typing import NamedTuple


class PipelineLayout(NamedTuple):
    """Ranks by stage. Those at the same position in each stage are a pipeline group, and pass tensors along it."""

    stages: tuple[tuple[int, ...], ...]

    def pipelines(self) -> list[tuple[int, ...]]:
        """Return the pipeline groups, each in the order of the stages."""
        return list(zip(*self.stages, strict=True))


def create_layout(world_size: int, pipeline_size: int) -> PipelineLayout:
    """Return vLLM's layout in 0.23 to 0.33: the ranks of a stage are consecutive. ValueError for unequal stages."""
    width, left = divmod(world_size, pipeline_size)
    if left:
        raise ValueError(f"VRA-455: {world_size} ranks cannot be split into {pipeline_size} equal pipeline stages")
    return PipelineLayout(tuple(tuple(range(stage * width, (stage + 1) * width)) for stage in range(pipeline_size)))
