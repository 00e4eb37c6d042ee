#pragma once
// A whole decoder layer as one call: the same functions in the same order as when they are called one by one, so the
// same bits. Knows their order; must not know what any of them computes.
#include "kernels.h"

namespace shoal {

// norm -> linear (q, k, v) -> place -> attention -> linear [-> norm] -> add, and norm -> gated -> linear [-> norm] -> add.
struct Layer {
  const Kernels *kernels;
  const float *before_attention, *after_attention, *before_feed, *after_feed;  // weights of norms, each may be null
  float eps;
  Weight qkv, out, gate_up, down;
  Kernels::Heads heads;
  float scale;  // of scores
  int64_t window;
  float softcap, factor;  // the latter of what is added to the stream

  bool wide() const { return qkv.kind == Kind::fp32; }
  int64_t number_bytes() const { return wide() ? 4 : 2; }
  // Bytes that `run` needs for so many tokens.
  int64_t memory(int64_t tokens) const { return tokens * (2 * qkv.k + qkv.n + out.k + down.k) * number_bytes(); }

  // x [tokens][width] becomes what comes after the layer. `states` is as for attention.
  void run(const Work &work, const Pages &pages, void *x, int64_t tokens, const int64_t *position, const int64_t *slot,
           char *memory, float *states) const {
    const int64_t width = qkv.k, size = number_bytes();
    char *normed = memory, *branch = normed + tokens * width * size, *rows = branch + tokens * width * size;
    char *mixed = rows + tokens * qkv.n * size, *inner = mixed + tokens * out.k * size;
    kernels->linear(qkv, norm(before_attention, x, normed, tokens), tokens, nullptr, 1.f, rows);
    kernels->place(rows, heads, pages, position, slot, tokens);
    kernels->attention(work, pages, rows, qkv.n, heads.query_heads, scale, window, softcap, states, mixed);
    add(out, mixed, after_attention, x, branch, tokens);
    kernels->linear(gate_up, norm(before_feed, x, normed, tokens), tokens, nullptr, 1.f, inner);
    add(down, inner, after_feed, x, branch, tokens);
  }

 private:
  // What goes into a branch: x, or its norm in `y`.
  const void *norm(const float *weight, const void *x, void *y, int64_t tokens) const {
    if (!weight) return x;
    kernels->rms_norm(x, weight, y, tokens, qkv.k, eps, wide());
    return y;
  }

  // Adds to x what a branch's last linear layer makes of its input, after a norm where there is one.
  void add(const Weight &last, const void *input, const float *weight, void *x, void *branch, int64_t tokens) const {
    if (!weight) return kernels->linear(last, input, tokens, x, factor, x);
    kernels->linear(last, input, tokens, nullptr, 1.f, branch);
    kernels->rms_norm(branch, weight, branch, tokens, qkv.k, eps, wide());
    kernels->add(x, branch, factor, x, tokens * qkv.k, wide());
  }
};

}  // namespace shoal
