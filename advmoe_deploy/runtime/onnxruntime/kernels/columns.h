/* One tile of a matrix product, and from it some columns of one; included once per instruction set.
 *
 * Before: NAME(x) gives a name of its own to each, TARGET lets the compiler use the instructions,
 * Vector, WIDTH, LOAD, STORE, BROADCAST and MULTIPLY_ADD are theirs, and the accumulators of a tile
 * of MOST_ROWS by VECTORS fit into the registers. All are undefined again at the end.
 *
 * A sum starts at the bias and takes its products one after the other, whatever the tile: so a row's
 * answer depends neither on the rows beside it nor on who computes what.
 */
#define INLINE static inline TARGET __attribute__((always_inline))
#define PANEL (VECTORS * WIDTH)

/* y = start + x w for `rows` rows and one panel; fetches `ahead`, laid out as w, into the cache. */
INLINE void NAME(tile)(
    const int rows, const float *x, int64_t x_stride, const float *w, int64_t w_stride,
    int64_t depth, const float *start, int64_t start_stride, float *y, int64_t y_stride,
    const float *ahead, int64_t ahead_stride)
{
    Vector sums[MOST_ROWS][VECTORS], weights[VECTORS];
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < VECTORS; v++) {
            sums[r][v] = LOAD(start + r * start_stride + v * WIDTH);
        }
    }
    for (int64_t d = 0; d < depth; d++) {
        UNROLL for (int v = 0; v < VECTORS; v++) {
            weights[v] = LOAD(w + d * w_stride + v * WIDTH);
        }
        if (ahead != NULL) {
            UNROLL for (int i = 0; i < PANEL; i += LINE) {
                __builtin_prefetch(ahead + d * ahead_stride + i, 0, TO_LEVEL_2);
            }
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const Vector value = BROADCAST(x[r * x_stride + d]);
            UNROLL for (int v = 0; v < VECTORS; v++) {
                sums[r][v] = MULTIPLY_ADD(value, weights[v], sums[r][v]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < VECTORS; v++) {
            STORE(y + r * y_stride + v * WIDTH, sums[r][v]);
        }
    }
}

#define ROWS(count)                                                                               \
    case count:                                                                                   \
        NAME(tile)(                                                                               \
            count, x, x_stride, w, w_stride, depth, start, start_stride, y, y_stride, ahead,      \
            ahead_stride);                                                                        \
        break;

static TARGET void NAME(tile_of)(
    int rows, const float *x, int64_t x_stride, const float *w, int64_t w_stride, int64_t depth,
    const float *start, int64_t start_stride, float *y, int64_t y_stride, const float *ahead,
    int64_t ahead_stride)
{
    switch (rows) {
        ROWS(1) ROWS(2) ROWS(3) ROWS(4)
#if MOST_ROWS > 4
        ROWS(5) ROWS(6)
#endif
#if MOST_ROWS > 6
        ROWS(7) ROWS(8)
#endif
    }
}

/* The last columns, fewer than a panel, go through a tile with room for one. */
static TARGET void NAME(narrow)(
    int rows, int64_t columns, const float *x, int64_t x_stride, const float *panel, int64_t depth,
    const float *start, int64_t start_stride, float *y, int64_t y_stride)
{
    float padded[MOST_ROWS * PANEL] = {0};
    const size_t bytes = (size_t)columns * sizeof *padded;
    for (int r = 0; r < rows; r++) {
        memcpy(padded + r * PANEL, start + r * start_stride, bytes);
    }
    NAME(tile_of)(
        rows, x, x_stride, panel, PANEL, depth, padded, PANEL, padded, PANEL, NULL, 0);
    for (int r = 0; r < rows; r++) {
        memcpy(y + r * y_stride, padded + r * PANEL, bytes);
    }
}

static TARGET void NAME(add_block)(const Block *block, Stream *stream)
{
    const int64_t out = block->out, in = block->in, columns = block->columns;
    const float *w = block->weight;
    int64_t w_stride = out;
    float panel[MOST_DEPTH * PANEL];
    if (columns < PANEL || block->rows > FEW_ROWS) {
        for (int64_t d = 0; d < block->depth; d++) {
            memset(panel + d * PANEL, 0, columns < PANEL ? sizeof(float[PANEL]) : 0);
            memcpy(panel + d * PANEL, w + d * out, (size_t)columns * sizeof *panel);
        }
        w = panel, w_stride = PANEL;
    }
    for (int64_t r = 0; r < block->rows;) {
        const int64_t left = block->rows - r, tiles = (left + MOST_ROWS - 1) / MOST_ROWS;
        const int rows = (int)((left + tiles - 1) / tiles);
        const float *x = block->x + r * in;
        float *y = block->y + r * out;
        const float *start = block->bias != NULL ? block->bias : y;
        const int64_t start_stride = block->bias != NULL ? 0 : out;
        if (columns < PANEL) {
            NAME(narrow)(
                rows, columns, x, in, w, block->depth, start, start_stride, y, out);
        } else {
            NAME(tile_of)(
                rows, x, in, w, w_stride, block->depth, start, start_stride, y, out,
                next_of(stream, 2 * rows <= MOST_ROWS), out);
        }
        r += rows;
    }
}

static const Instructions NAME(instructions) = {PANEL, NAME(add_block)};

#undef INLINE
#undef PANEL
#undef ROWS
#undef NAME
#undef TARGET
#undef WIDTH
#undef VECTORS
#undef MOST_ROWS
#undef Vector
#undef LOAD
#undef STORE
#undef BROADCAST
#undef MULTIPLY_ADD
