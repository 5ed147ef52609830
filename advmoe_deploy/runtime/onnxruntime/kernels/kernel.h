/* One operator, one kernel, one tensor. */
#ifndef ADVMOE_KERNEL_H
#define ADVMOE_KERNEL_H

#include <stdbool.h>

#include "ort_abi.h"

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
    bool parallel; /* whether the runtime lends its threads */
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

/* Gives the status that says what does not fit. */
OrtStatus *refuse(const Kernel *kernel, const char *message);

int64_t product(const int64_t *dims, size_t count);

/* Reads an input, whose element type must be the declared one. */
OrtStatus *get_input(
    const Kernel *kernel, const OrtKernelContext *context, size_t index, Tensor *out);

/* Gives the data of a new output, NULL where it has no element. */
OrtStatus *get_output(
    const Kernel *kernel, OrtKernelContext *context, size_t index, const int64_t *dims,
    size_t rank, void **data);

/* x (, weight, bias) -> ids, weights (, scores) */
OrtStatus *compute_router(const Kernel *kernel, OrtKernelContext *context);

/* ids -> rows, positions, offsets, busy */
OrtStatus *compute_dispatch(const Kernel *kernel, OrtKernelContext *context);

/* x, offsets, weight, bias -> y */
OrtStatus *compute_linear(const Kernel *kernel, OrtKernelContext *context);

/* grouped, positions (, weights) -> combined */
OrtStatus *compute_combine(const Kernel *kernel, OrtKernelContext *context);

#endif
