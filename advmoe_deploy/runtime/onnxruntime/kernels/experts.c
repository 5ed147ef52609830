/* Which rows each expert gets, and its answers brought back.
 *
 * Shapes: R rows (images or tokens), E experts, K experts per row, S = R * K choices, D values in
 * one answer of an expert.
 */
#include <string.h>

#include "kernel.h"

/* Sorts the S choices by expert, in their order within one; offsets has E + 1 values. */
static void sort_choices(
    const int64_t *ids_S, int64_t choices, int64_t top_k, int64_t experts, int64_t *rows_S,
    int64_t *positions_S, int64_t *offsets)
{
    memset(offsets, 0, (size_t)(experts + 1) * sizeof *offsets);
    for (int64_t s = 0; s < choices; s++) {
        offsets[ids_S[s] + 1]++;
    }
    for (int64_t e = 0; e < experts; e++) {
        offsets[e + 1] += offsets[e];
    }
    for (int64_t s = 0; s < choices; s++) {
        const int64_t position = offsets[ids_S[s]]++; /* what begins at e ends where e + 1 begins */
        positions_S[s] = position;
        rows_S[position] = s / top_k;
    }
    memmove(offsets + 1, offsets, (size_t)experts * sizeof *offsets);
    offsets[0] = 0;
}

OrtStatus *compute_dispatch(const Kernel *kernel, OrtKernelContext *context)
{
    const int64_t experts = kernel->num_experts;
    Tensor ids;
    TRY(get_input(kernel, context, 0, &ids));
    if (ids.rank != 2) {
        return refuse(kernel, "ai.advmoe: ids must be [R, K]");
    }
    const int64_t choices = product(ids.dims, 2), ends = experts + 1;
    const int64_t *ids_S = ids.data;
    for (int64_t s = 0; s < choices; s++) {
        if (ids_S[s] < 0 || ids_S[s] >= experts) {
            return refuse(kernel, "ai.advmoe: an expert's id is not below num_experts");
        }
    }
    void *rows = NULL, *positions = NULL, *offsets = NULL, *busy = NULL;
    TRY(get_output(kernel, context, 0, &choices, 1, &rows));
    TRY(get_output(kernel, context, 1, ids.dims, 2, &positions));
    TRY(get_output(kernel, context, 2, &ends, 1, &offsets));
    TRY(get_output(kernel, context, 3, &experts, 1, &busy));
    if (offsets == NULL || busy == NULL || (choices > 0 && (rows == NULL || positions == NULL))) {
        return refuse(kernel, "ai.advmoe: an output is missing");
    }
    sort_choices(ids_S, choices, ids.dims[1], experts, rows, positions, offsets);
    for (int64_t e = 0; e < experts; e++) {
        ((bool *)busy)[e] = ((int64_t *)offsets)[e + 1] > ((int64_t *)offsets)[e];
    }
    return NULL;
}

static void add_weighted(
    float *restrict out_D, const float *restrict answer_D, float weight, int64_t count)
{
    for (int64_t d = 0; d < count; d++) {
        out_D[d] += weight * answer_D[d];
    }
}

static OrtStatus *check_combine(
    const Kernel *kernel, const Tensor *grouped, const Tensor *positions, const Tensor *weights)
{
    if (positions->rank != 2 || grouped->rank < 1) {
        return refuse(kernel, "ai.advmoe: positions must be [R, K], answers [S, ...]");
    }
    const int64_t choices = product(positions->dims, 2), *positions_S = positions->data;
    if (grouped->dims[0] != choices) {
        return refuse(kernel, "ai.advmoe: there are not as many answers as positions");
    }
    const bool fits = weights == NULL
                          ? positions->dims[1] == 1
                          : weights->rank == 2 && weights->dims[0] == positions->dims[0]
                                && weights->dims[1] == positions->dims[1];
    if (!fits) {
        return refuse(kernel, "ai.advmoe: weights must be [R, K], as positions; without, K is 1");
    }
    for (int64_t s = 0; s < choices; s++) {
        if (positions_S[s] < 0 || positions_S[s] >= choices) {
            return refuse(kernel, "ai.advmoe: a position lies outside the answers");
        }
    }
    return NULL;
}

OrtStatus *compute_combine(const Kernel *kernel, OrtKernelContext *context)
{
    const bool weighted = kernel->operator->weighted;
    Tensor grouped, positions, weights;
    void *combined = NULL;
    TRY(get_input(kernel, context, 0, &grouped));
    TRY(get_input(kernel, context, 1, &positions));
    if (weighted) {
        TRY(get_input(kernel, context, 2, &weights));
    }
    TRY(check_combine(kernel, &grouped, &positions, weighted ? &weights : NULL));
    const int64_t rows = positions.dims[0], top_k = positions.dims[1];
    const int64_t *positions_S = positions.data;
    const int64_t width = product(grouped.dims + 1, grouped.rank - 1);
    grouped.dims[0] = rows;
    TRY(get_output(kernel, context, 0, grouped.dims, grouped.rank, &combined));
    if (rows * width == 0) {
        return NULL;
    }
    if (combined == NULL) {
        return refuse(kernel, "ai.advmoe: an output is missing");
    }
    for (int64_t r = 0; r < rows; r++) {
        float *out_D = (float *)combined + r * width;
        if (!weighted) {
            const float *answer_D = (const float *)grouped.data + positions_S[r] * width;
            memcpy(out_D, answer_D, (size_t)width * sizeof *out_D);
            continue;
        }
        memset(out_D, 0, (size_t)width * sizeof *out_D);
        for (int64_t k = 0; k < top_k; k++) {
            const int64_t s = r * top_k + k;
            add_weighted(
                out_D, (const float *)grouped.data + positions_S[s] * width,
                ((const float *)weights.data)[s], width);
        }
    }
    return NULL;
}
