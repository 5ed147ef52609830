/* The tail of a router: pooling, linear layer, choice of the experts and their weights.
 *
 * Shapes: C channels, R rows (images or tokens), E experts, K experts per row.
 */
#include <string.h>

#include "kernel.h"

/* Sums run in 16 lanes: as exact as a matrix product's, and in vectors on any processor. */
enum { WIDTH = 4, STEP = 4 * WIDTH };
typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float))));

static Vector load(const float *values)
{
    Vector vector;
    memcpy(&vector, values, sizeof vector);
    return vector;
}

static float sum_of_lanes(Vector a, Vector b, Vector c, Vector d)
{
    const Vector sum = (a + b) + (c + d);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

static float dot(const float *a, const float *b, int64_t count)
{
    Vector lanes[4] = {{0}};
    int64_t i = 0;
    for (; i + STEP <= count; i += STEP) {
        lanes[0] += load(a + i) * load(b + i);
        lanes[1] += load(a + i + WIDTH) * load(b + i + WIDTH);
        lanes[2] += load(a + i + 2 * WIDTH) * load(b + i + 2 * WIDTH);
        lanes[3] += load(a + i + 3 * WIDTH) * load(b + i + 3 * WIDTH);
    }
    float rest = 0;
    for (; i < count; i++) {
        rest += a[i] * b[i];
    }
    return rest + sum_of_lanes(lanes[0], lanes[1], lanes[2], lanes[3]);
}

static float mean(const float *values, int64_t count)
{
    Vector lanes[4] = {{0}};
    int64_t i = 0;
    for (; i + STEP <= count; i += STEP) {
        lanes[0] += load(values + i);
        lanes[1] += load(values + i + WIDTH);
        lanes[2] += load(values + i + 2 * WIDTH);
        lanes[3] += load(values + i + 3 * WIDTH);
    }
    float rest = 0;
    for (; i < count; i++) {
        rest += values[i];
    }
    return (rest + sum_of_lanes(lanes[0], lanes[1], lanes[2], lanes[3])) / (float)count;
}

/* Adds weight_EC * row_C to scores_E; both may be a part of rows that are `stride` wide. */
static void add_products(
    const float *row_C, const float *weight_EC, int64_t channels, int64_t stride, int64_t experts,
    float *scores_E)
{
    for (int64_t e = 0; e < experts; e++) {
        scores_E[e] += dot(row_C, weight_EC + e * stride, channels);
    }
}

/* Adds to scores_E what the channel means of one feature map score. */
static void add_pooled(
    const float *map, int64_t area, const float *weight_EC, int64_t channels, int64_t experts,
    float *scores_E)
{
    enum { PART = 256 };
    float means[PART];
    for (int64_t start = 0; start < channels; start += PART) {
        int64_t count = channels - start < PART ? channels - start : PART;
        for (int64_t c = 0; c < count; c++) {
            means[c] = mean(map + (start + c) * area, area);
        }
        add_products(means, weight_EC + start, count, channels, experts, scores_E);
    }
}

/* e to the power of x <= 0, to the last bit of a float; NaN stays NaN. */
static float power_of_e(float x)
{
    if (x != x) {
        return x;
    }
    if (x < -104.0f) { /* less than half of the smallest float */
        return 0.0f;
    }
    static const double terms[] = {/* 1 / n! */
        1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
        1.0 / 120,      1.0 / 24,      1.0 / 6,      1.0 / 2,     1.0,        1.0};
    const double halves = (double)x * 1.4426950408889634;
    const int twos = (int)(halves - 0.5);
    const double rest = (double)x - twos * 0.69314718055994531;
    double sum = terms[0];
    for (size_t term = 1; term < sizeof terms / sizeof *terms; term++) {
        sum = sum * rest + terms[term];
    }
    const uint64_t bits = (uint64_t)(1023 + twos) << 52;
    double scale;
    memcpy(&scale, &bits, sizeof scale);
    return (float)(sum * scale);
}

/* Whether score a, at index i, is chosen before b, at j: NaN first, as torch and NumPy have it. */
static bool goes_before(float a, int64_t i, float b, int64_t j)
{
    const bool a_is_nan = a != a, b_is_nan = b != b;
    if (a_is_nan != b_is_nan) {
        return a_is_nan;
    }
    if (a_is_nan || a == b) {
        return i < j;
    }
    return a > b;
}

static void choose(const float *scores_E, int64_t experts, int64_t top_k, int64_t *ids_K)
{
    for (int64_t k = 0; k < top_k; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++) {
            const int64_t last = k > 0 ? ids_K[k - 1] : -1;
            const bool left = last < 0 || goes_before(scores_E[last], last, scores_E[e], e);
            if (left && (best < 0 || goes_before(scores_E[e], e, scores_E[best], best))) {
                best = e;
            }
        }
        ids_K[k] = best;
    }
}

static void weigh(
    const Kernel *kernel, const float *scores_E, int64_t experts, const int64_t *ids_K,
    float *weights_K)
{
    const Weighting weighting = kernel->operator->weighting;
    if (weighting == ONE) {
        weights_K[0] = 1.0f;
        return;
    }
    const float most = scores_E[ids_K[0]];
    double sum = 0;
    for (int64_t e = 0; e < experts; e++) {
        sum += power_of_e(scores_E[e] - most);
    }
    float total = 0;
    for (int64_t k = 0; k < kernel->top_k; k++) {
        weights_K[k] = (float)(power_of_e(scores_E[ids_K[k]] - most) / sum);
        total += weights_K[k];
    }
    for (int64_t k = 0; weighting == RENORMALISED && k < kernel->top_k; k++) {
        weights_K[k] /= total + kernel->epsilon;
    }
}

static OrtStatus *check_linear(
    const Kernel *kernel, const Tensor *x, const Tensor *w, const Tensor *b)
{
    if (w->rank != 2 || b->rank != 1 || w->dims[0] != b->dims[0]) {
        return refuse(kernel, "ai.advmoe: weight must be [E, C] and bias [E]");
    }
    if (x->dims[1] != w->dims[1]) {
        return refuse(kernel, "ai.advmoe: the input and the router's weight differ in channels");
    }
    return NULL;
}

static OrtStatus *check_router(const Kernel *kernel, const Tensor *x, int64_t experts)
{
    const Source source = kernel->operator->source;
    if (source == FROM_MAP ? x->rank != 4 : x->rank != 2) {
        return refuse(
            kernel, source == FROM_MAP ? "ai.advmoe: a feature map must be [N, C, H, W]"
                                       : "ai.advmoe: rows and scores have two dimensions");
    }
    if (kernel->top_k < 1 || kernel->top_k > experts) {
        return refuse(kernel, "ai.advmoe: k must lie between 1 and the number of experts");
    }
    return NULL;
}

OrtStatus *compute_router(const Kernel *kernel, OrtKernelContext *context)
{
    const Source source = kernel->operator->source;
    Tensor x, weight, bias;
    TRY(get_input(kernel, context, 0, &x));
    if (source != FROM_SCORES) {
        TRY(get_input(kernel, context, 1, &weight));
        TRY(get_input(kernel, context, 2, &bias));
    }
    const int64_t experts = source == FROM_SCORES ? (x.rank == 2 ? x.dims[1] : 0)
                                                  : (bias.rank == 1 ? bias.dims[0] : 0);
    TRY(check_router(kernel, &x, experts));
    if (source != FROM_SCORES) {
        TRY(check_linear(kernel, &x, &weight, &bias));
    }
    const int64_t rows = x.dims[0], channels = x.dims[1];
    const int64_t area = product(x.dims + 2, x.rank - 2);
    const int64_t chosen[] = {rows, kernel->top_k}, scored[] = {rows, experts};
    void *ids = NULL, *weights = NULL, *scores = x.data;
    TRY(get_output(kernel, context, 0, chosen, 2, &ids));
    TRY(get_output(kernel, context, 1, chosen, 2, &weights));
    if (source != FROM_SCORES) {
        TRY(get_output(kernel, context, 2, scored, 2, &scores));
    }
    if (rows > 0 && (ids == NULL || weights == NULL || scores == NULL)) {
        return refuse(kernel, "ai.advmoe: an output is missing");
    }
    for (int64_t r = 0; r < rows; r++) {
        float *scores_E = (float *)scores + r * experts;
        int64_t *ids_K = (int64_t *)ids + r * kernel->top_k;
        const float *row = (const float *)x.data + r * channels * area;
        if (source != FROM_SCORES) {
            memcpy(scores_E, bias.data, (size_t)experts * sizeof *scores_E);
        }
        if (source == FROM_ROWS) {
            add_products(row, weight.data, channels, channels, experts, scores_E);
        } else if (source == FROM_MAP) {
            add_pooled(row, area, weight.data, channels, experts, scores_E);
        }
        choose(scores_E, experts, kernel->top_k, ids_K);
        weigh(kernel, scores_E, experts, ids_K, (float *)weights + r * kernel->top_k);
    }
    return NULL;
}
