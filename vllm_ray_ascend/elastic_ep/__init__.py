"""Elastic expert parallelism on NPUs: an MoE engine gains and loses data parallel ranks while it serves.

vLLM has the state machine (vllm/distributed/elastic_ep) and vllm-ascend the layers, and neither accepts the other's
half. This folder is what stands between. Opt-in: VLLM_RAY_ASCEND_ELASTIC_EP=1.
"""
