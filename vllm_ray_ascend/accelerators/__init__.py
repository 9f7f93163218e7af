"""NPU and CUDA behind one base class; the only place that names `torch.npu` and `torch.cuda`."""
