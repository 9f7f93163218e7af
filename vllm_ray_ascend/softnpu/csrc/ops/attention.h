#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

namespace softnpu::ops {

// Queues softmax(query key^T scale) value for each sequence, into `out` (tokens, heads, width).
// query_ends: cumulated token counts. key_lengths: per sequence with a block table, cumulated without; empty: as the
// queries. Pages: key and value are (pages, block_size, ...), block_table (sequences, pages).
void attention(const at::Tensor& out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, std::vector<int64_t> query_ends,
               std::vector<int64_t> key_lengths, const std::optional<at::Tensor>& block_table, int64_t heads, int64_t key_heads, double scale, bool causal,
               int64_t block_size);

}  // namespace softnpu::ops
