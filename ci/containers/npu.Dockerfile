# A runner with Ascend NPUs (Atlas A2, A3). BASE is an image with CANN and its NNAL: one of vllm-ascend's releases, which has
# vLLM and vllm-ascend as well, or a bare one of CANN, where both are then installed. From the repository's root:
#   docker build -f ci/containers/npu.Dockerfile --build-arg BASE=IMAGE:TAG -t vllm-ray-ascend-npu .
#   docker run --network host --shm-size 16g \
#     --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc --device /dev/davinci0 \
#     -v /usr/local/dcmi:/usr/local/dcmi -v /usr/local/Ascend/driver:/usr/local/Ascend/driver \
#     -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi -v /etc/ascend_install.info:/etc/ascend_install.info \
#     -v /etc/hccn.conf:/etc/hccn.conf vllm-ray-ascend-npu ci/run_suite.sh npu
ARG BASE
FROM ${BASE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git iproute2 make procps util-linux wget \
    && rm -rf /var/lib/apt/lists/*
ARG VLLM=0.30.0
ARG VLLM_ASCEND=0.30.0rc2
ARG RAY=2.60.0
# Only what the image lacks: its torch, torch_npu, vLLM and vllm-ascend fit each other and its CANN.
RUN python3 -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(n) is None for n in ("vllm", "vllm_ascend")))' \
    || VLLM_TARGET_DEVICE=empty python3 -m pip install --no-cache-dir "vllm==${VLLM}" "vllm-ascend==${VLLM_ASCEND}"
# Always this Ray: vllm-ascend's images have 2.48, without what its dashboard, Serve LLM and Data LLM need.
RUN python3 -m pip install --no-cache-dir "ray[default,serve,data]==${RAY}" jsonref==1.1.0
WORKDIR /src
COPY . .
RUN python3 -m pip install --no-cache-dir --no-deps -r requirements/test.txt \
    && python3 -m pip install --no-cache-dir --editable . --editable ./softnpu
# CANN's variables, for whatever is run: hooks of a shell are not read by `docker run COMMAND`.
ENV CI_PYTHON=python3 BASH_ENV=/src/ci/containers/cann.sh
CMD ["ci/run_suite.sh", "npu"]
