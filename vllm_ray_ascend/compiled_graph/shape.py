"""Which rank stands where in the graph. Pure."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Ranks by stage; those of one place in each stage are a pipeline group, which hand their tensors on."""

    stages: tuple[tuple[int, ...], ...]

    def pipelines(self) -> list[tuple[int, ...]]:
        """The pipeline groups, each in the order of the stages."""
        return list(zip(*self.stages, strict=True))


def shape_of(world_size: int, pipeline_size: int) -> Shape:
    """vLLM's layout in 0.23 to 0.33: the ranks of a stage follow each other. ValueError where they cannot."""
    width, left = divmod(world_size, pipeline_size)
    if left:
        raise ValueError(f"{world_size} ranks cannot be dealt out to {pipeline_size} stages")
    return Shape(tuple(tuple(range(stage * width, (stage + 1) * width)) for stage in range(pipeline_size)))
