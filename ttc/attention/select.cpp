// Page choice for one decode step: score every page of every (sequence, KV head), keep the best k, write them in ascending order.
// The first page (sink) and the last (recent, perhaps part-filled) are always kept where k >= 2; k == 1 keeps the last alone.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

static const int AHEAD = 2;  // pages that are fetched before they are scored

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

// The k best of one head's pages: 0 and n - 1, and of the others those with the highest scores [n], the earlier one where two tie.
static void pick(const float* scores, const int32_t* pages, int n, int k, int h, int H, int32_t* out) {
  int written = 0, need = k - 2;
  if (k > 1) out[written++] = pages[0] * H + h;
  if (need > 0) {
    static thread_local std::vector<float> sorted;
    sorted.assign(scores + 1, scores + n - 1);
    std::nth_element(sorted.begin(), sorted.begin() + (need - 1), sorted.end(), std::greater<float>());
    float bar = sorted[need - 1];
    int ties = need;
    for (int c = 1; c < n - 1; c++) ties -= scores[c] > bar;
    for (int c = 1; c < n - 1; c++)
      if (scores[c] > bar || (scores[c] == bar && ties-- > 0)) out[written++] = pages[c] * H + h;
  }
  out[written] = pages[n - 1] * H + h;
}

// Heads [first, last) of one sequence of n pages. Page by page, all heads of each: they lie side by side, so memory is read in order.
template <typename T>
static void choose(const float* q, const T* summaries, const int32_t* pages, int n, const int32_t* keep, int rule, int first,
                   int last, int H, int G, int D, int32_t* out, int width) {
  static thread_local std::vector<float> scores, sums;
  int heads = last - first, most = 0;
  for (int h = first; h < last; h++)
    if (keep[h] < n) most = std::max(most, keep[h]);
  if (most > 2) {
    scores.resize((size_t)heads * n);
    sums.assign((size_t)heads * D, 0.f);
    if (rule == 1)
      for (int h = first; h < last; h++)
        for (int g = 0; g < G; g++)
          for (int d = 0; d < D; d++) sums[(h - first) * D + d] += q[((int64_t)h * G + g) * D + d];
    int64_t one = (int64_t)D * rule, page = H * one;
    for (int c = 1; c < n - 1; c++) {
      if (c + AHEAD < n - 1) {
        const char* next = (const char*)(summaries + pages[c + AHEAD] * page + first * one);
        for (size_t o = 0; o < sizeof(T) * heads * one; o += 64) __builtin_prefetch(next + o);
      }
      const T* here = summaries + pages[c] * page;
      for (int h = first; h < last; h++)
        scores[(size_t)(h - first) * n + c] =
            score(here + h * one, q + (int64_t)h * G * D, sums.data() + (h - first) * D, rule, G, D);
    }
  }
  for (int h = first; h < last; h++) {
    int32_t* own = out + (int64_t)h * width;
    if (keep[h] < n)
      pick(scores.data() + (size_t)(h - first) * n, pages, n, keep[h], h, H, own);
    else
      for (int j = 0; j < n; j++) own[j] = pages[j] * H + h;
  }
}

// q [rows, H*G, D] float32; mean [pages, H, D] and bounds [pages, H, 2, D], bf16 or (is_float) float32; tables [rows, stride];
// counts [rows]; keep [rows, H]; rules [rows]: 0 leaves a row's table as it is; out [rows*H, width].
extern "C" void ttc_select(const float* q, const void* mean, const void* bounds, int is_float, const int32_t* tables,
                           int64_t stride, const int32_t* counts, const int32_t* keep, const int32_t* rules, int rows, int H,
                           int G, int D, int32_t* out, int width, int threads) {
  int parts = std::min(H, std::max(1, (threads + rows - 1) / rows));  // of a sequence's heads: work for every thread
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int i = 0; i < rows * parts; i++) {
    int b = i / parts, part = i % parts, first = H * part / parts, last = H * (part + 1) / parts, rule = rules[b];
    if (!rule) continue;
    const float* own = q + (int64_t)b * H * G * D;
    const int32_t *pages = tables + b * stride, *most = keep + (int64_t)b * H;
    int32_t* to = out + (int64_t)b * H * width;
    const void* summaries = rule == 1 ? mean : bounds;
    if (is_float)
      choose(own, (const float*)summaries, pages, counts[b], most, rule, first, last, H, G, D, to, width);
    else
      choose(own, (const uint16_t*)summaries, pages, counts[b], most, rule, first, last, H, G, D, to, width);
  }
}
