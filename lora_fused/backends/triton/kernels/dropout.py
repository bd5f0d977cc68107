"""The dropout mask in registers: Philox4x32-7, the same bits as lora_fused.reference.keep_mask.

The counter of the elements (row, 8j … 8j+7) is row · ceil(cols / 8) + j; element e of the eight
takes bits 16 (e mod 2) … of word e // 2. The seed is read from a device pointer: a captured graph
draws a new mask at each replay, and nothing waits for the host.
"""

import triton
import triton.language as tl


@triton.jit
def keep_tile(
    seed,
    threshold,
    rows,
    first_col,
    cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """The mask of `rows` and columns first_col …: bool [BLOCK_ROWS, BLOCK_COLS].

    cols is the length of a row of the whole mask, first_col a multiple of 8. Not handled: rows
    beyond 2**63 / ceil(cols / 8).
    """
    tl.static_assert(BLOCK_COLS % 8 == 0, "one Philox counter serves eight columns")
    per_row = tl.cdiv(cols, 8).to(tl.int64)
    j = first_col // 8 + tl.arange(0, BLOCK_COLS // 8)
    counter = rows.to(tl.int64)[:, None] * per_row + j[None, :]  # [BLOCK_ROWS, BLOCK_COLS / 8]
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(tl.load(seed), low, high, zero, zero, n_rounds=7)
    # Interleave: the last axes are (word // 2, word % 2, half of the word).
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    bits = tl.reshape(halves, (BLOCK_ROWS, BLOCK_COLS))
    return bits.to(tl.int32) >= threshold
