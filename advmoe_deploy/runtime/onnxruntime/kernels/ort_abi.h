/* What is used of ONNX Runtime's C interface, declared here so that its header is not needed.
 *
 * The interface is a table of functions that only ever grows at its end. These slots and layouts
 * were checked by running: 1.15 to 1.31.
 */
#ifndef ADVMOE_ORT_ABI_H
#define ADVMOE_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtTensorTypeAndShapeInfo OrtShapeInfo;

typedef struct {
    void (*slots[275])(void);
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
/* Of 1.17 and above. */
#define ParallelFor(api)                                                                          \
    SLOT(api, 274, OrtStatus *(*)(const OrtKernelContext *, void (*)(void *, size_t), size_t,     \
                                  size_t, void *))

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
    OrtStatus *(*CreateKernelV2)(
        const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
    OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
    void (*later[7])(void); /* of API 17 and above: not read at the versions we declare */
};

/* Only layouts with pointers of 8 bytes were checked against the runtime. */
_Static_assert(offsetof(OrtCustomOp, GetInputCharacteristic) == 80, "layout of OrtCustomOp");
_Static_assert(offsetof(OrtCustomOp, CreateKernelV2) == 136, "layout of OrtCustomOp");
_Static_assert(offsetof(OrtCustomOp, KernelComputeV2) == 144, "layout of OrtCustomOp");
_Static_assert(sizeof(OrtCustomOp) == 208, "layout of OrtCustomOp");

#endif
