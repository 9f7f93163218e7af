// Attention over tokens packed one sequence after another (layout TND), keys and values packed likewise or in pages.
#include "ops/attention.h"

#include "ops/tensors.h"

namespace softnpu::ops {
namespace {

struct Heads {
  int64_t query, key;
};

// Rows of one sequence as (heads, tokens, width), in float; key heads are repeated for their group of query heads.
at::Tensor by_head(const at::Tensor& rows, int64_t heads, int64_t repeat) {
  at::Tensor split = rows.reshape({rows.size(0), heads, -1}).to(at::kFloat).transpose(0, 1);
  return repeat > 1 ? split.repeat_interleave(repeat, 0) : split;
}

at::Tensor attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, Heads heads, double scale, bool causal) {
  int64_t repeat = heads.query / heads.key;
  at::Tensor q = by_head(query, heads.query, 1), k = by_head(key, heads.key, repeat), v = by_head(value, heads.key, repeat);
  at::Tensor scores = at::matmul(q, k.transpose(1, 2)) * scale;
  if (causal) {
    int64_t behind = k.size(1) - q.size(1);  // the first query's own position
    at::Tensor visible = at::ones({q.size(1), k.size(1)}, at::kBool).tril(behind);
    scores.masked_fill_(visible.logical_not(), -std::numeric_limits<float>::infinity());
  }
  return at::matmul(at::softmax(scores, -1), v).transpose(0, 1);
}

at::Tensor page_rows(const at::Tensor& cache, const at::Tensor& pages, int64_t length) {
  return cache.index_select(0, pages).flatten(0, 1).slice(0, 0, length);
}

}  // namespace

void attention(const at::Tensor& out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, std::vector<int64_t> query_ends,
               std::vector<int64_t> key_lengths, const std::optional<at::Tensor>& block_table, int64_t heads, int64_t key_heads, double scale, bool causal,
               int64_t block_size) {
  at::Tensor o = cpu_view(out), q = cpu_view(query), k = cpu_view(key), v = cpu_view(value);
  std::optional<at::Tensor> table;
  if (block_table) table = cpu_view(*block_table);
  Heads counts{heads, key_heads ? key_heads : heads};
  auto task = [=]() -> aclError {
    o.zero_();
    int64_t begin = 0, key_begin = 0;
    for (size_t i = 0; i < query_ends.size(); i++) {
      int64_t end = query_ends[i];
      // With pages the lengths are per sequence; packed keys are given by their ends, as the queries are.
      int64_t key_end = key_lengths.empty() ? end : key_lengths[i];
      int64_t length = table ? key_end : key_end - key_begin;
      if (end > begin && length > 0) {
        at::Tensor keys, values;
        if (table) {
          at::Tensor pages = (*table)[i].slice(0, 0, (length + block_size - 1) / block_size).to(at::kLong);
          keys = page_rows(k, pages, length), values = page_rows(v, pages, length);
        } else {
          keys = k.slice(0, key_begin, key_end), values = v.slice(0, key_begin, key_end);
        }
        at::Tensor rows = q.slice(0, begin, end);
        at::Tensor result = attend(rows, keys, values, counts, scale, causal);
        o.slice(0, begin, end).copy_(result.reshape(o.slice(0, begin, end).sizes()));
      }
      begin = std::max(begin, end);
      if (!table) key_begin = key_end;
    }
    return ACL_SUCCESS;
  };
  launch("npu_fused_infer_attention_score", query.device(), task);
}

void write_cache(const at::Tensor& rows, const at::Tensor& cache, const at::Tensor& slots) {
  at::Tensor r = cpu_view(rows), c = cpu_view(cache), s = cpu_view(slots);
  launch("npu_scatter_pa_kv_cache", cache.device(), [=]() -> aclError {
    at::Tensor real = s.ge(0).nonzero().flatten(), places = s.index_select(0, real).to(at::kLong);
    std::vector<int64_t> shape{real.size(0)};
    for (int64_t dim = 2; dim < c.dim(); dim++) shape.push_back(c.size(dim));
    at::Tensor values = r.index_select(0, real).reshape(shape).to(c.scalar_type());
    c.index_put_({places.div(c.size(1), "floor"), places.remainder(c.size(1))}, values);
    return ACL_SUCCESS;
  });
}

}  // namespace softnpu::ops
