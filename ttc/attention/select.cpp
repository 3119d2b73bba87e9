// Page choice for one decode step: score every page of every (sequence, KV head), keep the best k, write them in ascending order.
// The first page (sink) and the last (recent, perhaps part-filled) are always kept where k >= 2; k == 1 keeps the last alone.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

static inline float wide(float x) { return x; }
static inline float wide(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// rule 1: mean key . sum of the group's queries; rule 2: the largest over the group of sum_d max(q_d lo_d, q_d hi_d)
template <typename T>
static float score(const T* s, const float* q, const float* qsum, int rule, int G, int D) {
  float acc = 0;
  if (rule == 1) {
#pragma omp simd reduction(+ : acc)
    for (int d = 0; d < D; d++) acc += qsum[d] * wide(s[d]);
    return acc;
  }
  float best = -INFINITY;
  for (int g = 0; g < G; g++) {
    const float* one = q + (int64_t)g * D;
    acc = 0;
#pragma omp simd reduction(+ : acc)
    for (int d = 0; d < D; d++) {
      float a = one[d] * wide(s[d]), b = one[d] * wide(s[D + d]);
      acc += a > b ? a : b;
    }
    best = std::max(best, acc);
  }
  return best;
}

template <typename T>
static void choose(const float* q, const T* mean, const T* bounds, const int32_t* pages, int n, int k, int rule, int h, int H,
                   int G, int D, int32_t* out) {
  if (k >= n) {
    for (int j = 0; j < n; j++) out[j] = pages[j] * H + h;
    return;
  }
  int written = 0, need = k - 2, C = n - 2;
  if (k > 1) out[written++] = pages[0] * H + h;
  if (need > 0) {
    static thread_local std::vector<float> scores, sorted, qsum;
    scores.resize(C);
    const T* base = rule == 1 ? mean : bounds;
    int64_t row = (int64_t)H * D * rule, own = (int64_t)h * D * rule;
    if (rule == 1) {
      qsum.assign(D, 0.f);
      for (int g = 0; g < G; g++)
        for (int d = 0; d < D; d++) qsum[d] += q[(int64_t)g * D + d];
    }
    for (int c = 0; c < C; c++) {
      if (c + 8 < C) {
        const char* next = (const char*)(base + (int64_t)pages[c + 9] * row + own);
        for (size_t o = 0; o < sizeof(T) * D * rule; o += 64) __builtin_prefetch(next + o);
      }
      scores[c] = score(base + (int64_t)pages[c + 1] * row + own, q, qsum.data(), rule, G, D);
    }
    sorted = scores;
    std::nth_element(sorted.begin(), sorted.begin() + (need - 1), sorted.end(), std::greater<float>());
    float bar = sorted[need - 1];
    int ties = need;
    for (int c = 0; c < C; c++) ties -= scores[c] > bar;
    for (int c = 0; c < C; c++)
      if (scores[c] > bar || (scores[c] == bar && ties-- > 0)) out[written++] = pages[c + 1] * H + h;
  }
  out[written] = pages[n - 1] * H + h;
}

// q [rows, H*G, D] float32; mean [pages, H, D] and bounds [pages, H, 2, D], bf16 or (is_float) float32; tables [rows, stride];
// counts [rows]; keep [rows, H]; rules [rows]: 0 leaves a row's table as it is; out [rows*H, width].
extern "C" void ttc_select(const float* q, const void* mean, const void* bounds, int is_float, const int32_t* tables,
                           int64_t stride, const int32_t* counts, const int32_t* keep, const int32_t* rules, int rows, int H,
                           int G, int D, int32_t* out, int width, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int i = 0; i < rows * H; i++) {
    int b = i / H, h = i % H;
    if (!rules[b]) continue;
    const float* own = q + (int64_t)i * G * D;
    const int32_t* pages = tables + b * stride;
    int32_t* to = out + (int64_t)i * width;
    if (is_float)
      choose(own, (const float*)mean, (const float*)bounds, pages, counts[b], keep[i], rules[b], h, H, G, D, to);
    else
      choose(own, (const uint16_t*)mean, (const uint16_t*)bounds, pages, counts[b], keep[i], rules[b], h, H, G, D, to);
  }
}
