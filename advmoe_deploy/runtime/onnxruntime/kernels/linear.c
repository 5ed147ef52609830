/* A linear layer of every expert, each on its own rows.
 *
 * With few rows per expert the weights are the work: every byte of them is read once, from where it
 * lies. They come in blocks, down a panel of columns, so that sums stay in registers. Every tile of
 * rows that is computed also fetches a block that is wanted later: experts with many rows so fetch
 * for those with few, and the memory is never idle. With many rows a block is first copied together.
 *
 * Shapes: S rows, sorted by expert; E experts; D values in, H values out.
 */
#include <stdatomic.h>
#include <string.h>

#include "kernel.h"

enum { LINE = 16, TO_LEVEL_2 = 2 }; /* floats of a cache line; for __builtin_prefetch */
enum { MOST_DEPTH = 256, FEW_ROWS = 64, MOST_UNIT_ROWS = 512 };
enum { MOST_AHEAD = 12, LEAST_AHEAD = 2 };         /* blocks fetched: a part of a level 2 cache */
enum { LEAST_TASKS = 8, TASK_PRODUCTS = 1 << 21 }; /* about 40 us */

typedef struct Instructions Instructions;

/* The whole product. A unit of it is one panel of one expert's weights with at most MOST_UNIT_ROWS
 * of its rows, in blocks one below the other; a task is a run of units. */
typedef struct {
    const Instructions *instructions;
    const float *x, *weight, *bias;
    const int64_t *offsets;
    float *y;
    int64_t experts, in, out;
    int64_t panel, panels, depth, blocks; /* columns of a panel, panels; rows of a block, blocks */
    int64_t units, tasks;
    atomic_long running, fetched; /* tasks, and where the one that ended last stopped fetching */
} Product;

typedef struct {
    int64_t expert, first_row, panel, row; /* the first of its rows, and of those of the weights */
} Position;

/* What of the weights is fetched while something before it is computed. */
typedef struct {
    const Product *product;
    Position position;
    int64_t used, fetched, end; /* the block in use, the first not fetched, and where to stop */
} Stream;

/* A block of weights, `depth` by `columns`, and the rows that it is for. */
typedef struct {
    const float *x, *weight;
    const float *bias; /* what sums start at; NULL: they go on in y */
    float *y;
    int64_t rows, depth, columns, in, out;
} Block;

struct Instructions {
    int64_t panel; /* columns of a tile */
    void (*add_block)(const Block *, Stream *);
};

static int64_t divided_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t most(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int64_t units_of(const Product *p, int64_t expert)
{
    const int64_t rows = p->offsets[expert + 1] - p->offsets[expert];
    return divided_up(rows, MOST_UNIT_ROWS) * p->panels;
}

static Position position_of(const Product *p, int64_t block)
{
    int64_t expert = 0, unit = block / p->blocks;
    while (unit >= units_of(p, expert)) {
        unit -= units_of(p, expert++);
    }
    return (Position){
        .expert = expert,
        .first_row = p->offsets[expert] + unit / p->panels * MOST_UNIT_ROWS,
        .panel = unit % p->panels,
        .row = block % p->blocks * p->depth,
    };
}

/* Goes on to the next block; there must be one. */
static void advance(const Product *p, Position *at)
{
    at->row += p->depth;
    if (at->row < p->in) {
        return;
    }
    at->row = 0;
    if (++at->panel < p->panels) {
        return;
    }
    at->panel = 0;
    at->first_row += MOST_UNIT_ROWS;
    if (at->first_row < p->offsets[at->expert + 1]) {
        return;
    }
    do {
        at->expert++;
    } while (p->offsets[at->expert] == p->offsets[at->expert + 1]);
    at->first_row = p->offsets[at->expert];
}

static const float *weights_at(const Product *p, const Position *at)
{
    return p->weight + (at->expert * p->in + at->row) * p->out + at->panel * p->panel;
}

/* Gives the block to fetch now, or NULL. Tiles with few rows are done before a block is fetched:
 * they live on what tiles with many rows, which have the time, fetched in advance. */
static const float *next_of(Stream *stream, bool few_rows)
{
    const int64_t ahead = few_rows ? LEAST_AHEAD : MOST_AHEAD;
    if (stream->fetched >= least(stream->end, stream->used + ahead)) {
        return NULL;
    }
    const float *weights = weights_at(stream->product, &stream->position);
    stream->fetched++;
    if (stream->fetched < stream->product->units * stream->product->blocks) {
        advance(stream->product, &stream->position);
    }
    return weights;
}

#include "instructions.h"

static void compute_block(const Product *p, const Position *at, Stream *stream)
{
    const int64_t column = at->panel * p->panel;
    const Block block = {
        .x = p->x + at->first_row * p->in + at->row,
        .weight = weights_at(p, at),
        .bias = at->row == 0 ? p->bias + at->expert * p->out + column : NULL,
        .y = p->y + at->first_row * p->out + column,
        .rows = least(p->offsets[at->expert + 1] - at->first_row, MOST_UNIT_ROWS),
        .depth = least(p->in - at->row, p->depth),
        .columns = least(p->out - column, p->panel),
        .in = p->in,
        .out = p->out,
    };
    p->instructions->add_block(&block, stream);
}

/* Whoever begins alone probably goes on with the next task, and fetches for it, too. */
static void compute_task(void *opaque, size_t index)
{
    Product *p = opaque;
    const int64_t all = p->units * p->blocks, task = (int64_t)index;
    const int64_t first = task * p->units / p->tasks * p->blocks;
    const int64_t end = (task + 1) * p->units / p->tasks * p->blocks;
    const bool alone = atomic_fetch_add(&p->running, 1) == 0;
    const int64_t before = atomic_load(&p->fetched);
    const bool goes_on = before > first && before <= first + MOST_AHEAD;
    Stream stream = {.product = p, .fetched = goes_on ? before : first + 1};
    stream.end = alone ? all : end;
    stream.position = position_of(p, least(stream.fetched, all - 1));
    Position at = position_of(p, first);
    for (int64_t i = first; i < end; i++) {
        stream.used = i;
        compute_block(p, &at, &stream);
        if (i + 1 < all) {
            advance(p, &at);
        }
    }
    atomic_store(&p->fetched, stream.fetched);
    atomic_fetch_sub(&p->running, 1);
}

static OrtStatus *run_tasks(const Kernel *kernel, const OrtKernelContext *context, Product *p)
{
    if (kernel->operator->parallel) {
        return ParallelFor(kernel->api)(context, compute_task, (size_t)p->tasks, 0, p);
    }
    for (int64_t i = 0; i < p->tasks; i++) {
        compute_task(p, (size_t)i);
    }
    return NULL;
}

static OrtStatus *check_linear(
    const Kernel *kernel, const Tensor *x, const Tensor *offsets, const Tensor *w, const Tensor *b)
{
    if (x->rank != 2 || offsets->rank != 1 || w->rank != 3 || b->rank != 2) {
        return refuse(
            kernel, "ai.advmoe: must be: x [S, D], offsets [E+1], weight [E, D, H], bias [E, H]");
    }
    const int64_t experts = w->dims[0], *ends = offsets->data;
    if (offsets->dims[0] != experts + 1 || b->dims[0] != experts || b->dims[1] != w->dims[2]) {
        return refuse(kernel, "ai.advmoe: offsets, weight and bias differ in experts or values");
    }
    if (x->dims[1] != w->dims[1]) {
        return refuse(kernel, "ai.advmoe: rows and the experts' weight differ in values");
    }
    bool sorted = ends[0] == 0 && ends[experts] == x->dims[0];
    for (int64_t e = 0; e < experts; e++) {
        sorted = sorted && ends[e] <= ends[e + 1];
    }
    return sorted ? NULL : refuse(kernel, "ai.advmoe: offsets must rise from 0 to the rows");
}

OrtStatus *compute_linear(const Kernel *kernel, OrtKernelContext *context)
{
    Tensor x, offsets, weight, bias;
    void *y = NULL;
    TRY(get_input(kernel, context, 0, &x));
    TRY(get_input(kernel, context, 1, &offsets));
    TRY(get_input(kernel, context, 2, &weight));
    TRY(get_input(kernel, context, 3, &bias));
    TRY(check_linear(kernel, &x, &offsets, &weight, &bias));
    const int64_t rows = x.dims[0], in = x.dims[1], out = weight.dims[2];
    const int64_t made[] = {rows, out};
    TRY(get_output(kernel, context, 0, made, 2, &y));
    if (rows * out == 0) {
        return NULL;
    }
    if (y == NULL) {
        return refuse(kernel, "ai.advmoe: an output is missing");
    }
    Product p = {
        .instructions = best_instructions(),
        .x = x.data,
        .weight = weight.data,
        .bias = bias.data,
        .offsets = offsets.data,
        .y = y,
        .experts = weight.dims[0],
        .in = in,
        .out = out,
    };
    p.panel = p.instructions->panel;
    p.panels = divided_up(out, p.panel);
    p.blocks = most(1, divided_up(in, MOST_DEPTH));
    p.depth = most(1, divided_up(in, p.blocks));
    p.blocks = most(1, divided_up(in, p.depth));
    for (int64_t e = 0; e < p.experts; e++) {
        p.units += units_of(&p, e);
    }
    const int64_t tasks = rows * in * out / TASK_PRODUCTS;
    p.tasks = least(p.units, tasks > LEAST_TASKS ? tasks : LEAST_TASKS);
    return run_tasks(kernel, context, &p);
}
