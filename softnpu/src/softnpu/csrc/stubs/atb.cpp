// libatb.so: what libop_plugin_atb.so of torch_npu links against. Creating anything fails, so that an ATB operator which
// the operator library does not replace raises.
extern "C" {
#define FAILS(id, symbol)            \
  int id() __asm__(symbol);          \
  int id() { return 1; }

FAILS(create_context, "_ZN3atb13CreateContextEPPNS_7ContextE")
FAILS(destroy_context, "_ZN3atb14DestroyContextEPNS_7ContextE")
FAILS(create_linear, "_ZN3atb15CreateOperationINS_5infer11LinearParamEEEiRKT_PPNS_9OperationE")
FAILS(create_elementwise, "_ZN3atb15CreateOperationINS_5infer12ElewiseParamEEEiRKT_PPNS_9OperationE")
FAILS(create_rms_norm, "_ZN3atb15CreateOperationINS_5infer12RmsNormParamEEEiRKT_PPNS_9OperationE")
FAILS(create_group_top_k, "_ZN3atb15CreateOperationINS_5infer14GroupTopkParamEEEiRKT_PPNS_9OperationE")
FAILS(create_self_attention, "_ZN3atb15CreateOperationINS_5infer18SelfAttentionParamEEEiRKT_PPNS_9OperationE")
FAILS(create_paged_attention, "_ZN3atb15CreateOperationINS_5infer19PagedAttentionParamEEEiRKT_PPNS_9OperationE")
FAILS(create_reshape_and_cache, "_ZN3atb15CreateOperationINS_5infer20ReshapeAndCacheParamEEEiRKT_PPNS_9OperationE")
FAILS(create_rope, "_ZN3atb15CreateOperationINS_5infer9RopeParamEEEiRKT_PPNS_9OperationE")
FAILS(destroy_operation, "_ZN3atb16DestroyOperationEPNS_9OperationE")
FAILS(tensor_size, "_ZN3atb5Utils13GetTensorSizeERKNS_6TensorE")
FAILS(hash_buffer, "_ZTHN3atb10g_hash_bufE")
FAILS(hash_offset, "_ZTHN3atb13g_hash_offsetE")
}
