/* The custom operators of domain ai.advmoe for ONNX Runtime on the CPU.
 *
 * What each computes is said by its schema and its body of standard operators in export/graph/; these
 * kernels answer the same in one node. The library needs libc alone, exports RegisterCustomOps, and
 * serves every ONNX Runtime from 1.15 on.
 */
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernel.h"

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
     .name = "ExpertLinear",
     .compute = compute_linear,
     .inputs = {TYPE_FLOAT, TYPE_INT64, TYPE_FLOAT, TYPE_FLOAT},
     .outputs = {TYPE_FLOAT}},
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

/* The 16 of "1.16.0". */
static long minor_version(const OrtApiBase *base)
{
    const char *version = base->GetVersionString();
    return strncmp(version, "1.", 2) == 0 ? strtol(version + 2, NULL, 10) : LONG_MAX;
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
        const long minor = minor_version(base);
        for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) {
            operators[i].ort.version = minor < 16 ? OLDEST_API : API_WITH_STATUS;
            operators[i].parallel = minor >= 17;
        }
        status = make_domain(api, &domain);
        shared = domain;
    }
    atomic_flag_clear(&making);
    return status != NULL ? status : AddCustomOpDomain(api)(options, domain);
}
