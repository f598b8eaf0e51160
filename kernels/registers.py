"""Arrays of Pallas Mosaic GPU whose numbers are the registers of threads, in no other order."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu


def private(each: int, dtype=jnp.float32):
    """An array of `each` numbers of every thread of a warpgroup."""
    layout = plgpu.Layout.WG_STRIDED((128 * each,), vec_size=1)
    return plgpu.ShapeDtypeStruct((128 * each,), dtype, layout=layout)


def wrap(registers, signed: bool | None = None):
    """A thread's numbers as such an array."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    from kernels.decode_lanes import i32

    type_ = ir.VectorType.get((1,), registers[0].type)
    some = [llvm.insertelement(llvm.mlir_undef(type_), x, i32(0)) for x in registers]
    layout = mgpu.WGStridedFragLayout((128 * len(registers),), vec_size=1)
    return mgpu.FragmentedArray(_registers=np.asarray(some, dtype=object), _layout=layout, _is_signed=signed)


def unwrap(array) -> list:
    """Undo `wrap`."""
    from jaxlib.mlir.dialects import llvm

    from kernels.decode_lanes import i32

    return [llvm.extractelement(x, i32(0)) for x in array.registers.flat]
