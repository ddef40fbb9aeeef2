"""Device functions that the kernels share: rounding, dot, the fusions phi with their derivatives, dropout bits.

Names in kernels: ``i_`` an index, ``o_`` offsets, ``m_`` a load mask, ``p_`` pointers, ``b_`` a tile in registers.
"""

import triton
import triton.language as tl

#: True under TRITON_INTERPRET=1, where bfloat16 needs help: its casts truncate and its tl.dot multiplies raw bits.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))

#: Fusions as the kernels know them; NONE is plain LoRA.
FUSION_ID = {None: 0, "add": 1, "mul": 2, "add_relu": 3, "mul_relu": 4}
_NONE = tl.constexpr(0)
_ADD = tl.constexpr(1)
_MUL = tl.constexpr(2)
_ADD_RELU = tl.constexpr(3)
_MUL_RELU = tl.constexpr(4)


@triton.jit
def round_to(b, dtype: tl.constexpr):
    """Tile b in dtype, rounded to nearest even."""
    if INTERPRET and dtype == tl.bfloat16 and b.dtype == tl.float32:
        # the interpreter's cast truncates: round in the integer domain, so that the cast is exact
        b_bits = b.to(tl.int32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -65536
        b = b_bits.to(tl.float32, bitcast=True)
    return b.to(dtype)


@triton.jit
def dot(b_left, b_right, b_acc):
    """b_acc + b_left b_right: float32 sums, float32 operands in IEEE precision."""
    if INTERPRET:
        # the interpreter multiplies bfloat16 as the uint16 it stores it in
        b_left = b_left.to(tl.float32)
        b_right = b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_acc, input_precision="ieee")


@triton.jit
def relu(b):
    # written so that a NaN stays a NaN, as in torch.relu
    return tl.where(b <= 0, 0.0, b)


@triton.jit
def fuse(b_t, b_s, FUSION: tl.constexpr):
    """H = phi(S, T), in float32.

    none T    add S + T    mul S * T    add_relu relu(S) + relu(T)    mul_relu relu(S) * relu(T)
    """
    b_t = b_t.to(tl.float32)
    b_s = b_s.to(tl.float32)
    if FUSION == _ADD:
        return b_s + b_t
    elif FUSION == _MUL:
        return b_s * b_t
    elif FUSION == _ADD_RELU:
        return relu(b_s) + relu(b_t)
    elif FUSION == _MUL_RELU:
        return relu(b_s) * relu(b_t)
    else:
        return b_t


@triton.jit
def fuse_grad(b_dh, b_t, b_s, FUSION: tl.constexpr):
    """(dT, dS) from dH, in float32.

    none, add  dT = dS = dH
    mul        dT = dH * S                  dS = dH * T
    add_relu   dT = dH * [T > 0]            dS = dH * [S > 0]
    mul_relu   dT = dH * relu(S) * [T > 0]  dS = dH * relu(T) * [S > 0]
    """
    b_t = b_t.to(tl.float32)
    b_s = b_s.to(tl.float32)
    if FUSION == _MUL:
        return b_dh * b_s, b_dh * b_t
    elif FUSION == _ADD_RELU:
        return tl.where(b_t <= 0, 0.0, b_dh), tl.where(b_s <= 0, 0.0, b_dh)
    elif FUSION == _MUL_RELU:
        return tl.where(b_t <= 0, 0.0, b_dh * relu(b_s)), tl.where(b_s <= 0, 0.0, b_dh * relu(b_t))
    else:
        return b_dh, b_dh


@triton.jit
def pick(i, a_0, a_1, a_2, COUNT: tl.constexpr):
    """The i-th of the first COUNT arguments; the rest may be None."""
    a = a_0
    if COUNT > 1:
        if i == 1:
            a = a_1
    if COUNT > 2:
        if i == 2:
            a = a_2
    return a


@triton.jit
def load_keep_bytes(mask, mask_stride_m, o_m, m_m, i_column, K, BLOCK_K: tl.constexpr):
    """Packed keep bits of rows o_m and columns i_column .. i_column + BLOCK_K (both multiples of 8), as bytes."""
    o_byte = i_column // 8 + tl.arange(0, BLOCK_K // 8)
    p_mask = mask + o_m.to(tl.int64)[:, None] * mask_stride_m + o_byte[None, :]
    return tl.load(p_mask, mask=m_m[:, None] & (o_byte * 8 < K)[None, :], other=0)


@triton.jit
def drop(b_x, b_byte, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tile (BLOCK_M, BLOCK_K) with zeros where the bit of its keep bytes (BLOCK_M, BLOCK_K / 8) is clear."""
    b_bit = (b_byte[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
    return tl.where(tl.reshape(b_bit, (BLOCK_M, BLOCK_K)) != 0, b_x, 0.0)


@triton.jit
def load_keep_bytes_transposed(mask, mask_stride_m, o_m, m_m, i_column, K, BLOCK_K: tl.constexpr):
    """The same bytes as a (BLOCK_K / 8, rows) tile."""
    o_byte = i_column // 8 + tl.arange(0, BLOCK_K // 8)
    p_mask = mask + o_m.to(tl.int64)[None, :] * mask_stride_m + o_byte[:, None]
    return tl.load(p_mask, mask=m_m[None, :] & (o_byte * 8 < K)[:, None], other=0)


@triton.jit
def drop_transposed(b_x, b_byte, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """:func:`drop` for a tile (BLOCK_K, BLOCK_M) of x^T."""
    b_bit = (b_byte[:, None, :] >> tl.arange(0, 8).to(tl.uint8)[None, :, None]) & 1
    return tl.where(tl.reshape(b_bit, (BLOCK_K, BLOCK_M)) != 0, b_x, 0.0)


@triton.jit
def load_tile(x, o_row, m_row, stride_row, o_col, m_col, stride_col):
    """x[o_row, o_col] with zeros outside; offsets are int64 before they are multiplied."""
    p_x = x + o_row.to(tl.int64)[:, None] * stride_row + o_col.to(tl.int64)[None, :] * stride_col
    return tl.load(p_x, mask=m_row[:, None] & m_col[None, :], other=0.0)


@triton.jit
def store_tile(x, b_x, o_row, m_row, stride_row, o_col, m_col, stride_col):
    """x[o_row, o_col] = b_x, rounded to x's dtype."""
    p_x = x + o_row.to(tl.int64)[:, None] * stride_row + o_col.to(tl.int64)[None, :] * stride_col
    tl.store(p_x, round_to(b_x, x.dtype.element_ty), mask=m_row[:, None] & m_col[None, :])
