# A runner without NPU or GPU: everything on software NPUs, the linters, the documentation. From the repository's root:
#   docker build -f ci/containers/plain.Dockerfile -t vllm-ray-ascend-ci .
#   docker run --privileged --shm-size 4g vllm-ray-ascend-ci ci/run_suite.sh all
# Privileged, because the nodes of the tests are network namespaces; without it tests that need those are skipped.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git iproute2 make procps util-linux \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python demo/install.py test lint docs
CMD ["ci/run_suite.sh", "all"]
