"""Serve a model with Ray Serve LLM, as Ray's own documentation does: `python app.py MODEL` on a node of the cluster."""

import sys

from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

llm_config = LLMConfig(
    model_loading_config={"model_id": "my-model", "model_source": sys.argv[1]},
    engine_kwargs={"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "max_model_len": 512},
)

if __name__ == "__main__":
    serve.run(build_openai_app({"llm_configs": [llm_config]}), blocking=True)
