"""Device functions shared by the kernels: rounding, dot, fusions phi and their derivatives, dropout, access to tiles.

Prefixes of names in kernels: ``i_`` index, ``o_`` offsets, ``m_`` load mask, ``p_`` pointers, ``b_`` tile in registers.
"""

import triton
import triton.language as tl

from ..fusion import FUSIONS, get_fusion

#: True under TRITON_INTERPRET=1. The interpreter's bfloat16 casts truncate, and its tl.dot multiplies the raw bits.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))

#: fusion -> its number in the kernels; 0 is plain LoRA.
FUSION_ID: dict[str | None, int] = {None: 0, **{name: get_fusion(name).kernel_id for name in FUSIONS}}
_ADD = tl.constexpr(FUSION_ID["add"])
_MUL = tl.constexpr(FUSION_ID["mul"])
_ADD_RELU = tl.constexpr(FUSION_ID["add_relu"])
_MUL_RELU = tl.constexpr(FUSION_ID["mul_relu"])


@triton.jit
def round_to(b, dtype: tl.constexpr):
    """Return tile b in dtype, rounded to nearest even."""
    if INTERPRET and dtype == tl.bfloat16 and b.dtype == tl.float32:
        # the interpreter's cast truncates, so round in the integer domain first
        b_bits = b.to(tl.int32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -65536
        b = b_bits.to(tl.float32, bitcast=True)
    return b.to(dtype)


@triton.jit
def dot(b_left, b_right, b_acc):
    """Return b_acc + b_left b_right, summed in float32. Float32 operands are multiplied in IEEE precision, not TF32."""
    if INTERPRET:
        # the interpreter would multiply the uint16 values that hold bfloat16
        b_left = b_left.to(tl.float32)
        b_right = b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_acc, input_precision="ieee")


@triton.jit
def relu(b):
    # propagates NaN, as torch.relu does
    return tl.where(b <= 0, 0.0, b)


@triton.jit
def fuse(b_t, b_s, FUSION: tl.constexpr):
    """Return H = phi(S, T) in float32.

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
    """Return (dT, dS) for dH, in float32.

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
    """Return a_i, for i below COUNT; the arguments from a_COUNT on may be None."""
    a = a_0
    if COUNT > 1:
        if i == 1:
            a = a_1
    if COUNT > 2:
        if i == 2:
            a = a_2
    return a


@triton.jit
def load_mask_bytes(mask, mask_stride_m, o_m, m_m, i_column, K, BLOCK_K: tl.constexpr):
    """Return the mask bytes of rows o_m and columns i_column .. i_column + BLOCK_K.

    A byte has the bits of 8 columns (:mod:`flare_kernels.dropout`). i_column and BLOCK_K are multiples of 8.
    """
    o_byte = i_column // 8 + tl.arange(0, BLOCK_K // 8)
    p_mask = mask + o_m.to(tl.int64)[:, None] * mask_stride_m + o_byte[None, :]
    return tl.load(p_mask, mask=m_m[:, None] & (o_byte * 8 < K)[None, :], other=0)


@triton.jit
def drop(b_x, b_byte, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return b_x (BLOCK_M, BLOCK_K), zero where the element's bit in b_byte (BLOCK_M, BLOCK_K / 8) is 0."""
    b_bit = (b_byte[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
    return tl.where(tl.reshape(b_bit, (BLOCK_M, BLOCK_K)) != 0, b_x, 0.0)


@triton.jit
def load_mask_bytes_transposed(mask, mask_stride_m, o_m, m_m, i_column, K, BLOCK_K: tl.constexpr):
    """Return the bytes of :func:`load_mask_bytes` as a (BLOCK_K / 8, rows) tile."""
    o_byte = i_column // 8 + tl.arange(0, BLOCK_K // 8)
    p_mask = mask + o_m.to(tl.int64)[None, :] * mask_stride_m + o_byte[:, None]
    return tl.load(p_mask, mask=m_m[None, :] & (o_byte * 8 < K)[:, None], other=0)


@triton.jit
def drop_transposed(b_x, b_byte, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Apply :func:`drop` to a tile (BLOCK_K, BLOCK_M) of x^T."""
    b_bit = (b_byte[:, None, :] >> tl.arange(0, 8).to(tl.uint8)[None, :, None]) & 1
    return tl.where(tl.reshape(b_bit, (BLOCK_K, BLOCK_M)) != 0, b_x, 0.0)


@triton.jit
def load_tile(x, o_row, m_row, stride_row, o_col, m_col, stride_col):
    """Return x[o_row, o_col], zero where masked. Offsets are cast to int64 before they are multiplied."""
    p_x = x + o_row.to(tl.int64)[:, None] * stride_row + o_col.to(tl.int64)[None, :] * stride_col
    return tl.load(p_x, mask=m_row[:, None] & m_col[None, :], other=0.0)


@triton.jit
def store_tile(x, b_x, o_row, m_row, stride_row, o_col, m_col, stride_col):
    """Store b_x to x[o_row, o_col], rounded to x's dtype."""
    p_x = x + o_row.to(tl.int64)[:, None] * stride_row + o_col.to(tl.int64)[None, :] * stride_col
    tl.store(p_x, round_to(b_x, x.dtype.element_ty), mask=m_row[:, None] & m_col[None, :])
