// Page choice for one decode step: score every page of every (sequence, KV head), keep the best k, write them in ascending order.
// The first page (sink) and the last (recent, perhaps part-filled) are always kept where k >= 2; k == 1 keeps the last alone.
// What costs time is reading the summaries, so all else is kept below that: vectors of 16 lanes, several heads side by side.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

static const int LANES = 16, PAIR = 2 * LANES;
static const int SIDE = 4;   // heads that are scored side by side
static const int AHEAD = 2;  // pages whose first bytes are fetched before they are scored; the rest the processor foresees
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

struct Call {  // what the layers of a step share; see ttc_select
  const int32_t *tables, *counts, *keep, *rules;
  int64_t stride;
  int32_t rows, H, G, D, width, threads;
};

template <typename V>
static inline V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

static inline float wide(float x) { return x; }
static inline float wide(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  return load<float>(&bits);
}

// 32 numbers as two vectors: floats in their order, bf16 numbers by turns (which takes one instruction each)
static inline void pair(const float* s, Floats& a, Floats& b) { a = load<Floats>(s), b = load<Floats>(s + LANES); }
static inline void pair(const uint16_t* s, Floats& a, Floats& b) {
  Words both = load<Words>(s);
  a = (Floats)(both << 16), b = (Floats)(both & 0xffff0000u);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  std::swap(a, b);
#endif
}
// where channel d of a query lies, for it to meet the summaries' channel d there
static inline int place(int d, int, const float*) { return d; }
static inline int place(int d, int D, const uint16_t*) {
  return d >= D / PAIR * PAIR ? d : d / PAIR * PAIR + d % 2 * LANES + d % PAIR / 2;
}

static inline float total(Floats v) {
  typedef float Half __attribute__((vector_size(2 * LANES)));
  typedef float Quarter __attribute__((vector_size(LANES)));
  Half a = load<Half>(&v) + load<Half>((const char*)&v + sizeof(Half));
  Quarter b = load<Quarter>(&a) + load<Quarter>((const char*)&a + sizeof(Quarter));
  return (b[0] + b[2]) + (b[1] + b[3]);
}

// rule 1, M heads: mean key . sum of the group's queries
template <int M, typename T>
static inline void means(const T* s, const float* q, int D, float* to, int64_t apart) {
  Floats sums[M] = {};
  int d = 0;
  for (; d + PAIR <= D; d += PAIR)
    for (int m = 0; m < M; m++) {
      Floats a, b;
      pair(s + m * D + d, a, b);
      sums[m] += load<Floats>(q + m * D + d) * a;
      sums[m] += load<Floats>(q + m * D + d + LANES) * b;
    }
  for (int m = 0; m < M; m++) {
    float sum = total(sums[m]);
    for (int c = d; c < D; c++) sum += q[m * D + c] * wide(s[m * D + c]);
    to[m * apart] = sum;
  }
}

// rule 2, one head: the largest over the group of sum_d max(q_d lo_d, q_d hi_d)
template <typename T>
static inline float bound(const T* s, const float* q, int G, int D) {
  float best = -INFINITY;
  for (int g = 0; g < G; g++, q += D) {
    Floats sums = {};
    int d = 0;
    for (; d + PAIR <= D; d += PAIR) {
      Floats lo, lo2, hi, hi2, a = load<Floats>(q + d), b = load<Floats>(q + d + LANES);
      pair(s + d, lo, lo2);
      pair(s + D + d, hi, hi2);
      lo *= a, hi *= a, lo2 *= b, hi2 *= b;
      sums += lo > hi ? lo : hi;
      sums += lo2 > hi2 ? lo2 : hi2;
    }
    float sum = total(sums);
    for (; d < D; d++) sum += std::max(q[d] * wide(s[d]), q[d] * wide(s[D + d]));
    best = std::max(best, sum);
  }
  return best;
}

// The k best of one head's pages: 0 and n - 1, and of the others those with the highest scores [n], the earlier one where two tie.
// The score of the last one kept is found bit by bit, on whole numbers in the order of the scores.
static void pick(const float* scores, const int32_t* pages, int n, int k, int h, int H, int32_t* out) {
  int written = 0, need = k - 2;
  if (k > 1) out[written++] = pages[0] * H + h;
  if (need > 0) {
    static thread_local std::vector<int32_t> room;
    room.resize(n);
    int32_t *keys = room.data(), bar = INT_MIN;
    for (int c = 1; c < n - 1; c++) {
      float score = scores[c] + 0.f;  // -0 is 0
      int32_t bits = load<int32_t>(&score);
      keys[c] = bits ^ ((bits >> 31) & INT_MAX);
    }
    int reach = n - 2;  // pages with a key of at least bar
    for (int bit = 31; bit >= 0 && reach != need; bit--) {
      int32_t next = (int32_t)((uint32_t)bar + (1u << bit)), count = 0;
      for (int c = 1; c < n - 1; c++) count += keys[c] >= next;
      if (count >= need) bar = next, reach = count;
    }
    int ties = need;
    for (int c = 1; c < n - 1; c++) ties -= keys[c] > bar;
    for (int c = 1; c < n - 1; c++)
      if (keys[c] >= bar && (keys[c] > bar || ties-- > 0)) out[written++] = pages[c] * H + h;
  }
  out[written] = pages[n - 1] * H + h;
}

static float* aligned(std::vector<float>& room, size_t n) {
  room.resize(n + LANES);
  return (float*)(((uintptr_t)room.data() + 63) / 64 * 64);
}

// Heads [first, last) of one sequence of n pages. Page by page, all heads of each: they lie side by side, so memory is read in order.
template <typename Q, typename T>
static void choose(const Call& call, const Q* q, const T* summaries, const int32_t* pages, int n, const int32_t* keep, int rule,
                   int first, int last, int32_t* out) {
  static thread_local std::vector<float> room, more;
  int H = call.H, G = call.G, D = call.D, heads = last - first, most = 0;
  for (int h = first; h < last; h++)
    if (keep[h] < n) most = std::max(most, keep[h]);
  float* scores = aligned(more, (size_t)heads * n);
  if (most > 2) {
    int each = rule == 1 ? D : G * D;  // numbers that a head is scored by
    float* own = aligned(room, (size_t)heads * each);
    std::fill(own, own + (size_t)heads * each, 0.f);
    for (int h = 0; h < heads; h++)
      for (int g = 0; g < G; g++)
        for (int d = 0; d < D; d++)
          own[h * each + (rule == 1 ? 0 : g * D) + place(d, D, summaries)] += wide(q[((int64_t)(first + h) * G + g) * D + d]);
    int64_t one = (int64_t)D * rule, page = H * one;
    for (int c = 1; c < n - 1; c++) {
      if (c + AHEAD < n - 1) {
        const char* next = (const char*)(summaries + pages[c + AHEAD] * page + first * one);
        __builtin_prefetch(next);
        __builtin_prefetch(next + 64);
      }
      const T* here = summaries + pages[c] * page + first * one;
      int h = 0;
      if (rule == 1) {
        for (; h + SIDE <= heads; h += SIDE) means<SIDE>(here + h * D, own + h * D, D, scores + (size_t)h * n + c, n);
        for (; h < heads; h++) means<1>(here + h * D, own + h * D, D, scores + (size_t)h * n + c, n);
      } else {
        for (; h < heads; h++) scores[(size_t)h * n + c] = bound(here + h * one, own + h * each, G, D);
      }
    }
  }
  for (int h = 0; h < heads; h++) {
    int32_t* to = out + (int64_t)(first + h) * call.width;
    if (keep[first + h] < n)
      pick(scores + (size_t)h * n, pages, n, keep[first + h], first + h, H, to);
    else
      for (int j = 0; j < n; j++) to[j] = pages[j] * H + first + h;
  }
}

template <typename Q, typename T>
static void rows(const Call& call, const Q* q, int64_t apart, const T* mean, const T* bounds, int32_t* out) {
  int H = call.H, parts = std::min(H, std::max(1, (call.threads + call.rows - 1) / call.rows));  // of a sequence's heads
#pragma omp parallel for schedule(dynamic, 1) num_threads(call.threads) if (call.threads > 1)
  for (int i = 0; i < call.rows * parts; i++) {
    int b = i / parts, part = i % parts, first = H * part / parts, last = H * (part + 1) / parts, rule = call.rules[b];
    if (rule)
      choose(call, q + b * apart, rule == 1 ? mean : bounds, call.tables + b * call.stride, call.counts[b],
             call.keep + (int64_t)b * H, rule, first, last, out + (int64_t)b * H * call.width);
  }
}

// q: rows of [H * G, D], `apart` numbers from one to the next; mean [pages, H, D] and bounds [pages, H, 2, D]; both bf16, or float32
// where wide_... says so; tables [rows, stride]; counts [rows]; keep [rows, H]; rules [rows]: 0 leaves a row's table as it is;
// out [rows * H, width].
extern "C" void ttc_select(const Call* call, const void* q, int64_t apart, int wide_query, const void* mean, const void* bounds,
                           int wide_summaries, int32_t* out) {
  auto with = [&](auto* query) {
    if (wide_summaries)
      rows(*call, query, apart, (const float*)mean, (const float*)bounds, out);
    else
      rows(*call, query, apart, (const uint16_t*)mean, (const uint16_t*)bounds, out);
  };
  wide_query ? with((const float*)q) : with((const uint16_t*)q);
}
