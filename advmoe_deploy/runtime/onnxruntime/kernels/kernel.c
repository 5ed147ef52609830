/* What every kernel does with its inputs and outputs. */
#include "kernel.h"

OrtStatus *refuse(const Kernel *kernel, const char *message)
{
    return CreateStatus(kernel->api)(ORT_INVALID_ARGUMENT, message);
}

int64_t product(const int64_t *dims, size_t count)
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

OrtStatus *get_input(
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

OrtStatus *get_output(
    const Kernel *kernel, OrtKernelContext *context, size_t index, const int64_t *dims,
    size_t rank, void **data)
{
    OrtValue *value = NULL;
    TRY(GetOutput(kernel->api)(context, index, dims, rank, &value));
    *data = NULL;
    return value == NULL ? NULL : GetTensorMutableData(kernel->api)(value, data);
}
