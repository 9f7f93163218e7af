# A runner with NVIDIA GPUs. BASE is an image with Python, torch's CUDA build and vLLM, such as one of vLLM's releases.
# From the repository's root:
#   docker build -f ci/containers/cuda.Dockerfile --build-arg BASE=IMAGE:TAG -t vllm-ray-ascend-cuda .
#   docker run --gpus all --shm-size 16g --entrypoint ci/run_suite.sh vllm-ray-ascend-cuda cuda
ARG BASE
FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git iproute2 make procps util-linux \
    && rm -rf /var/lib/apt/lists/*
ARG RAY=2.60.0
RUN python3 -c 'import ray' || python3 -m pip install --no-cache-dir "ray==${RAY}"
WORKDIR /src
COPY . .
RUN python3 -m pip install --no-cache-dir --no-deps -r requirements/test.txt \
    && python3 -m pip install --no-cache-dir --editable . --editable ./softnpu
ENV CI_PYTHON=python3
ENTRYPOINT []
CMD ["ci/run_suite.sh", "cuda"]
