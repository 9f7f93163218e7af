// Attention, and the cache of keys and values that it reads.
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

// Queues: row i of `rows` goes to place slots[i] of `cache` (pages, block_size, ...). A slot below zero is padding.
void write_cache(const at::Tensor& rows, const at::Tensor& cache, const at::Tensor& slots);

}  // namespace softnpu::ops
