/* The custom operators of domain ai.advmoe for ONNX Runtime on the CPU.
 *
 * What each computes is said by its schema and its body of standard operators in export/ops/; these
 * kernels answer the same in one node. No header of ONNX Runtime is needed: of its C interface,
 * whose table of functions only ever grows at the end, a few slots are declared here. The library
 * needs libc alone, exports RegisterCustomOps, and serves every ONNX Runtime from 1.15 on.
 *
 * Shapes: N images, C channels, R rows (images or tokens), E experts, K experts per row,
 * S = R * K choices, D values in one answer of an expert.
 */
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- what is used of onnxruntime_c_api.h ---- */

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtTensorTypeAndShapeInfo OrtShapeInfo;

typedef struct {
    void (*slots[102])(void);
} OrtApi;

typedef struct {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

enum { OLDEST_API = 14, API_WITH_STATUS = 16 };
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { TYPE_FLOAT = 1, TYPE_INT64 = 7, TYPE_BOOL = 9 };
enum { ARGUMENT_REQUIRED = 0 };
enum { MEMORY_DEFAULT = 0 };

#define SLOT(api, number, type) ((type)(api)->slots[number])
#define CreateStatus(api) SLOT(api, 0, OrtStatus *(*)(int, const char *))
#define GetErrorMessage(api) SLOT(api, 2, const char *(*)(const OrtStatus *))
#define CreateCustomOpDomain(api) SLOT(api, 26, OrtStatus *(*)(const char *, OrtCustomOpDomain **))
#define DomainAdd(api) SLOT(api, 27, OrtStatus *(*)(OrtCustomOpDomain *, const OrtCustomOp *))
#define AddCustomOpDomain(api) \
    SLOT(api, 28, OrtStatus *(*)(OrtSessionOptions *, OrtCustomOpDomain *))
#define GetTensorMutableData(api) SLOT(api, 51, OrtStatus *(*)(OrtValue *, void **))
#define GetTensorElementType(api) SLOT(api, 60, OrtStatus *(*)(const OrtShapeInfo *, int *))
#define GetDimensionsCount(api) SLOT(api, 61, OrtStatus *(*)(const OrtShapeInfo *, size_t *))
#define GetDimensions(api) SLOT(api, 62, OrtStatus *(*)(const OrtShapeInfo *, int64_t *, size_t))
#define GetTensorTypeAndShape(api) SLOT(api, 65, OrtStatus *(*)(const OrtValue *, OrtShapeInfo **))
#define GetAttributeFloat(api) \
    SLOT(api, 85, OrtStatus *(*)(const OrtKernelInfo *, const char *, float *))
#define GetAttributeInt64(api) \
    SLOT(api, 86, OrtStatus *(*)(const OrtKernelInfo *, const char *, int64_t *))
#define GetInput(api) \
    SLOT(api, 90, OrtStatus *(*)(const OrtKernelContext *, size_t, const OrtValue **))
#define GetOutput(api) \
    SLOT(api, 91, OrtStatus *(*)(OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **))
#define ReleaseStatus(api) SLOT(api, 93, void (*)(OrtStatus *))
#define ReleaseShapeInfo(api) SLOT(api, 99, void (*)(OrtShapeInfo *))
#define ReleaseCustomOpDomain(api) SLOT(api, 101, void (*)(OrtCustomOpDomain *))

typedef struct OrtCustomOp OrtCustomOp;
struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
    const char *(*GetName)(const OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *);
    int (*GetInputType)(const OrtCustomOp *, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp *);
    int (*GetOutputType)(const OrtCustomOp *, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *);
    void (*KernelCompute)(void *, OrtKernelContext *);
    void (*KernelDestroy)(void *);
    int (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetInputMemoryType)(const OrtCustomOp *, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
    OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
    void (*later[7])(void); /* of API 17 and above: not read at the versions we declare */
};

/* Only layouts with pointers of 8 bytes were checked against the runtime. */
_Static_assert(offsetof(OrtCustomOp, GetInputCharacteristic) == 80, "layout of OrtCustomOp");
_Static_assert(offsetof(OrtCustomOp, CreateKernelV2) == 136, "layout of OrtCustomOp");
_Static_assert(offsetof(OrtCustomOp, KernelComputeV2) == 144, "layout of OrtCustomOp");
_Static_assert(sizeof(OrtCustomOp) == 208, "layout of OrtCustomOp");

/* ---- one operator, one kernel, one tensor ---- */

enum { MOST_ARGUMENTS = 4, MOST_DIMENSIONS = 8 };

typedef enum { FROM_SCORES, FROM_ROWS, FROM_MAP } Source;
typedef enum { ONE, PROBABILITY, RENORMALISED } Weighting;

typedef struct Kernel Kernel;
typedef struct {
    OrtCustomOp ort; /* first, so that a pointer to it is a pointer to this */
    const char *name;
    OrtStatus *(*compute)(const Kernel *, OrtKernelContext *);
    int inputs[MOST_ARGUMENTS]; /* element types, then zeros */
    int outputs[MOST_ARGUMENTS];
    Source source;
    Weighting weighting;
    bool weighted;
} Operator;

struct Kernel {
    const OrtApi *api;
    const Operator *operator;
    int64_t top_k;
    int64_t num_experts;
    float epsilon;
};

typedef struct {
    void *data;
    size_t rank;
    int64_t dims[MOST_DIMENSIONS];
} Tensor;

#define TRY(call)                      \
    do {                               \
        OrtStatus *status_ = (call);   \
        if (status_ != NULL) {         \
            return status_;            \
        }                              \
    } while (0)

static OrtStatus *refuse(const Kernel *kernel, const char *message)
{
    return CreateStatus(kernel->api)(ORT_INVALID_ARGUMENT, message);
}

static int64_t product(const int64_t *dims, size_t count)
{
    int64_t total = 1;
    for (size_t i = 0; i < count; i++) {
        total *= dims[i];
    }
    return total;
}

static OrtStatus *read_shape(const Kernel *kernel, const OrtShapeInfo *info, int type, Tensor *out)
{
    int found = 0;
    TRY(GetTensorElementType(kernel->api)(info, &found));
    TRY(GetDimensionsCount(kernel->api)(info, &out->rank));
    if (found != type) {
        return refuse(kernel, "ai.advmoe: an input has another element type than declared");
    }
    if (out->rank > MOST_DIMENSIONS) {
        return refuse(kernel, "ai.advmoe: an input has more than 8 dimensions");
    }
    return GetDimensions(kernel->api)(info, out->dims, out->rank);
}

static OrtStatus *get_input(
    const Kernel *kernel, const OrtKernelContext *context, size_t index, Tensor *out)
{
    const OrtApi *api = kernel->api;
    const OrtValue *value = NULL;
    OrtShapeInfo *info = NULL;
    TRY(GetInput(api)(context, index, &value));
    if (value == NULL) {
        return refuse(kernel, "ai.advmoe: an input is missing");
    }
    TRY(GetTensorTypeAndShape(api)(value, &info));
    OrtStatus *status = read_shape(kernel, info, kernel->operator->inputs[index], out);
    ReleaseShapeInfo(api)(info);
    TRY(status);
    /* The C interface has no reading variant of this slot; inputs are only read. */
    return GetTensorMutableData(api)((OrtValue *)(uintptr_t)value, &out->data);
}

/* Gives the data of a new output, NULL where it has no element. */
static OrtStatus *get_output(
    const Kernel *kernel, OrtKernelContext *context, size_t index, const int64_t *dims,
    size_t rank, void **data)
{
    OrtValue *value = NULL;
    TRY(GetOutput(kernel->api)(context, index, dims, rank, &value));
    *data = NULL;
    return value == NULL ? NULL : GetTensorMutableData(kernel->api)(value, data);
}

/* ---- the router's tail ---- */

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

/* Adds weight_EC * row_C to scores_E; both matrices may be a part, `stride` is their whole width. */
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
    const double halves = (double)x * 1.4426950408889634;
    const int twos = (int)(halves - 0.5);
    const double rest = (double)x - twos * 0.69314718055994531;
    double sum = 1.0;
    for (int term = 11; term >= 1; term--) {
        sum = 1.0 + sum * rest / term;
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
            const bool left = k == 0 || goes_before(scores_E[ids_K[k - 1]], ids_K[k - 1], scores_E[e], e);
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

static OrtStatus *check_linear(const Kernel *kernel, const Tensor *x, const Tensor *w, const Tensor *b)
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
    if (source == FROM_MAP ? x->rank < 3 : x->rank != 2) {
        return refuse(kernel, source == FROM_MAP ? "ai.advmoe: a feature map must be [N, C, H, W]"
                                                 : "ai.advmoe: rows and scores have two dimensions");
    }
    if (kernel->top_k < 1 || kernel->top_k > experts) {
        return refuse(kernel, "ai.advmoe: k must lie between 1 and the number of experts");
    }
    return NULL;
}

/* x (, weight, bias) -> ids, weights (, scores) */
static OrtStatus *compute_router(const Kernel *kernel, OrtKernelContext *context)
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

/* ---- dispatch and combine ---- */

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

/* ids -> rows, positions, offsets, busy */
static OrtStatus *compute_dispatch(const Kernel *kernel, OrtKernelContext *context)
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

static void add_weighted(float *restrict out_D, const float *restrict answer_D, float weight, int64_t count)
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
    if (weights != NULL ? weights->rank != 2 || memcmp(weights->dims, positions->dims, 2 * sizeof(int64_t)) != 0
                        : positions->dims[1] != 1) {
        return refuse(kernel, "ai.advmoe: weights must have the shape of positions; without, K is 1");
    }
    for (int64_t s = 0; s < choices; s++) {
        if (positions_S[s] < 0 || positions_S[s] >= choices) {
            return refuse(kernel, "ai.advmoe: a position lies outside the answers");
        }
    }
    return NULL;
}

/* grouped, positions (, weights) -> combined */
static OrtStatus *compute_combine(const Kernel *kernel, OrtKernelContext *context)
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
    const int64_t rows = positions.dims[0], top_k = positions.dims[1], *positions_S = positions.data;
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
            memcpy(out_D, (const float *)grouped.data + positions_S[r] * width, (size_t)width * sizeof *out_D);
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

/* ---- what the runtime asks of an operator ---- */

static const Operator *operator_of(const OrtCustomOp *op)
{
    return (const Operator *)op;
}

static const char *get_name(const OrtCustomOp *op)
{
    return operator_of(op)->name;
}

static const char *get_provider(const OrtCustomOp *op)
{
    (void)op;
    return "CPUExecutionProvider";
}

static size_t count(const int *types)
{
    size_t found = 0;
    while (found < MOST_ARGUMENTS && types[found] != 0) {
        found++;
    }
    return found;
}

static int get_input_type(const OrtCustomOp *op, size_t index)
{
    return operator_of(op)->inputs[index];
}

static size_t get_input_count(const OrtCustomOp *op)
{
    return count(operator_of(op)->inputs);
}

static int get_output_type(const OrtCustomOp *op, size_t index)
{
    return operator_of(op)->outputs[index];
}

static size_t get_output_count(const OrtCustomOp *op)
{
    return count(operator_of(op)->outputs);
}

static int get_characteristic(const OrtCustomOp *op, size_t index)
{
    (void)op, (void)index;
    return ARGUMENT_REQUIRED;
}

static int get_memory_type(const OrtCustomOp *op, size_t index)
{
    (void)op, (void)index;
    return MEMORY_DEFAULT;
}

static int get_nothing_variadic(const OrtCustomOp *op)
{
    (void)op;
    return 0;
}

static OrtStatus *read_attributes(Kernel *kernel, const OrtKernelInfo *info)
{
    const Operator *operator = kernel->operator;
    if (operator->compute == compute_dispatch) {
        TRY(GetAttributeInt64(kernel->api)(info, "num_experts", &kernel->num_experts));
        if (kernel->num_experts < 1) {
            return refuse(kernel, "ai.advmoe: num_experts must be positive");
        }
    }
    if (operator->compute == compute_router && operator->weighting != ONE) {
        TRY(GetAttributeInt64(kernel->api)(info, "k", &kernel->top_k));
    }
    if (operator->weighting == RENORMALISED) {
        TRY(GetAttributeFloat(kernel->api)(info, "epsilon", &kernel->epsilon));
    }
    return NULL;
}

static OrtStatus *create_kernel(
    const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **created)
{
    Kernel *kernel = malloc(sizeof *kernel);
    *created = NULL;
    if (kernel == NULL) {
        return CreateStatus(api)(ORT_FAIL, "ai.advmoe: out of memory");
    }
    *kernel = (Kernel){.api = api, .operator = operator_of(op), .top_k = 1, .num_experts = 1};
    OrtStatus *status = read_attributes(kernel, info);
    if (status != NULL) {
        free(kernel);
        return status;
    }
    *created = kernel;
    return NULL;
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context)
{
    return ((const Kernel *)kernel)->operator->compute(kernel, context);
}

static void destroy_kernel(void *kernel)
{
    free(kernel);
}

/* ONNX Runtime 1.15 takes no status from a kernel. What is wrong goes to stderr; a model that
 * cannot be loaded ends the process, and a call that fails answers with no rows. */
static void complain(const OrtApi *api, OrtStatus *status)
{
    fprintf(stderr, "%s\n", GetErrorMessage(api)(status));
    ReleaseStatus(api)(status);
}

static void *create_kernel_14(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info)
{
    void *kernel = NULL;
    OrtStatus *status = create_kernel(op, api, info, &kernel);
    if (status != NULL) {
        complain(api, status);
        abort();
    }
    return kernel;
}

static void compute_14(void *opaque, OrtKernelContext *context)
{
    const Kernel *kernel = opaque;
    OrtStatus *status = compute(opaque, context);
    const int64_t none = 0;
    void *data;
    for (size_t i = 0; status != NULL && i < get_output_count(&kernel->operator->ort); i++) {
        OrtStatus *another = get_output(kernel, context, i, &none, 1, &data);
        if (another != NULL) {
            complain(kernel->api, another);
        }
    }
    if (status != NULL) {
        complain(kernel->api, status);
    }
}

/* ---- the operators ---- */

#define ORT                                                                                       \
    {                                                                                             \
        .version = API_WITH_STATUS, .CreateKernel = create_kernel_14, .GetName = get_name,        \
        .GetExecutionProviderType = get_provider, .GetInputType = get_input_type,                 \
        .GetInputTypeCount = get_input_count, .GetOutputType = get_output_type,                   \
        .GetOutputTypeCount = get_output_count, .KernelCompute = compute_14,                      \
        .KernelDestroy = destroy_kernel, .GetInputCharacteristic = get_characteristic,            \
        .GetOutputCharacteristic = get_characteristic,                                     \
        .GetInputMemoryType = get_memory_type, .GetVariadicInputMinArity = get_nothing_variadic,  \
        .GetVariadicInputHomogeneity = get_nothing_variadic,                                      \
        .GetVariadicOutputMinArity = get_nothing_variadic,                                        \
        .GetVariadicOutputHomogeneity = get_nothing_variadic, .CreateKernelV2 = create_kernel,    \
        .KernelComputeV2 = compute                                                                \
    }
#define ROUTER(called, from, by)                                                                  \
    {                                                                                             \
        .ort = ORT, .name = called, .compute = compute_router, .source = from, .weighting = by,   \
        .inputs = {TYPE_FLOAT, from == FROM_SCORES ? 0 : TYPE_FLOAT,                              \
                   from == FROM_SCORES ? 0 : TYPE_FLOAT},                                         \
        .outputs = {TYPE_INT64, TYPE_FLOAT, from == FROM_SCORES ? 0 : TYPE_FLOAT}                 \
    }
#define ROUTERS(prefix, from)                                                                     \
    ROUTER(prefix "RouterTop1", from, ONE),                                                       \
        ROUTER(prefix "RouterTopKProbability", from, PROBABILITY),                                \
        ROUTER(prefix "RouterTopKRenormalised", from, RENORMALISED)

static Operator operators[] = {
    ROUTERS("", FROM_SCORES),
    ROUTERS("Linear", FROM_ROWS),
    ROUTERS("PoolLinear", FROM_MAP),
    {.ort = ORT,
     .name = "ExpertDispatch",
     .compute = compute_dispatch,
     .inputs = {TYPE_INT64},
     .outputs = {TYPE_INT64, TYPE_INT64, TYPE_INT64, TYPE_BOOL}},
    {.ort = ORT,
     .name = "ExpertCombine",
     .compute = compute_combine,
     .inputs = {TYPE_FLOAT, TYPE_INT64},
     .outputs = {TYPE_FLOAT}},
    {.ort = ORT,
     .name = "ExpertWeightedCombine",
     .compute = compute_combine,
     .weighted = true,
     .inputs = {TYPE_FLOAT, TYPE_INT64, TYPE_FLOAT},
     .outputs = {TYPE_FLOAT}},
};

static OrtStatus *make_domain(const OrtApi *api, OrtCustomOpDomain **made)
{
    OrtCustomOpDomain *domain = NULL;
    TRY(CreateCustomOpDomain(api)("ai.advmoe", &domain));
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) {
        OrtStatus *status = DomainAdd(api)(domain, &operators[i].ort);
        if (status != NULL) {
            ReleaseCustomOpDomain(api)(domain);
            return status;
        }
    }
    *made = domain;
    return NULL;
}

static bool is_before_1_16(const OrtApiBase *base)
{
    const char *version = base->GetVersionString();
    return strncmp(version, "1.14.", 5) == 0 || strncmp(version, "1.15.", 5) == 0;
}

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(
    OrtSessionOptions *options, const OrtApiBase *base);

/* Adds the operators to a session's options; from several threads at once, too. Sessions keep a
 * pointer to the one domain, which lives as long as the library. */
OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base)
{
    static OrtCustomOpDomain *shared;
    static atomic_flag making = ATOMIC_FLAG_INIT;
    const OrtApi *api = base->GetApi(OLDEST_API);
    OrtStatus *status = NULL;
    if (api == NULL) { /* before 1.14: without a status to tell it; the model's bodies will run */
        return NULL;
    }
    while (atomic_flag_test_and_set(&making)) {
    }
    OrtCustomOpDomain *domain = shared;
    if (domain == NULL) {
        for (size_t i = 0; is_before_1_16(base) && i < sizeof operators / sizeof *operators; i++) {
            operators[i].ort.version = OLDEST_API;
        }
        status = make_domain(api, &domain);
        shared = domain;
    }
    atomic_flag_clear(&making);
    return status != NULL ? status : AddCustomOpDomain(api)(options, domain);
}
