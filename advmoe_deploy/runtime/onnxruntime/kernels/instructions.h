/* The instruction sets: tiles of a matrix product for each that the compiler knows, and the best one
 * that the processor has. For linear.c alone, which says what a Block and a Stream are.
 */
#if defined __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

/* The widest vectors to use, in floats: tests compile with fewer. */
#ifndef ADVMOE_WIDEST
#define ADVMOE_WIDEST 16
#endif

#if defined __x86_64__
#include <immintrin.h>

#define NAME(x) x##_512
#define TARGET __attribute__((target("avx512f")))
#define WIDTH 16
#define VECTORS 3
#define MOST_ROWS 8
#define Vector __m512
#define LOAD _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define BROADCAST _mm512_set1_ps
#define MULTIPLY_ADD _mm512_fmadd_ps
#include "columns.h"

#define NAME(x) x##_256
#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 8
#define VECTORS 2
#define MOST_ROWS 6
#define Vector __m256
#define LOAD _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define BROADCAST _mm256_set1_ps
#define MULTIPLY_ADD _mm256_fmadd_ps
#include "columns.h"
#endif

#if defined __aarch64__
#include <arm_neon.h>

#define VECTORS 4
#define MOST_ROWS 6
#define Vector float32x4_t
#define LOAD vld1q_f32
#define STORE vst1q_f32
#define BROADCAST vdupq_n_f32
#define MULTIPLY_ADD(a, b, sum) vfmaq_f32(sum, a, b)
#else
typedef float Floats __attribute__((vector_size(16)));

static Floats load(const float *from)
{
    Floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

static void store(float *to, Floats values)
{
    memcpy(to, &values, sizeof values);
}

#define VECTORS 2
#define MOST_ROWS 4
#define Vector Floats
#define LOAD load
#define STORE store
#define BROADCAST(value) ((Floats){value, value, value, value})
#define MULTIPLY_ADD(a, b, sum) ((a) * (b) + (sum))
#endif
#define NAME(x) x##_128
#define TARGET
#define WIDTH 4
#include "columns.h"

static const Instructions *best_instructions(void)
{
#if defined __x86_64__
    __builtin_cpu_init();
    if (ADVMOE_WIDEST >= 16 && __builtin_cpu_supports("avx512f")) {
        return &instructions_512;
    }
    if (ADVMOE_WIDEST >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return &instructions_256;
    }
#endif
    return &instructions_128;
}
