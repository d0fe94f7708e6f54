"""C++ through Inductor's compiler, and functions of torch's own C++ by address."""

from __future__ import annotations

import ctypes
import pathlib
import platform

import torch
import torch._decomp.decompositions
import torch._dynamo

from dpcompile._torch.later import Later

__all__ = ["block_products", "compile_cpp", "onednn_matmul"]

_codecache = Later("torch._inductor.codecache")


def onednn_matmul() -> int | None:
    """The address of ``at::native::mkldnn_matmul``, ``result = beta result + alpha a b``, if this torch has it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return _address("_ZN2at6native13mkldnn_matmulERKNS_6TensorES3_S3_ff")


def block_products(dtype: torch.dtype) -> tuple[int, int] | None:
    """The addresses of ``at::native::cpublas::brgemm`` for 16-bit numbers and float32 sums, and of its release.

    Args:
        dtype: bfloat16 or float16.
    """
    kind = {torch.bfloat16: "8BFloat16", torch.float16: "4Half"}[dtype]
    product = _address(f"_ZN2at6native7cpublas6brgemmEllllllbPKN3c10{kind}ES5_Pfb")
    release = _address("_ZN2at6native7cpublas14brgemm_releaseEb")
    return None if product is None or release is None else (product, release)


def _address(symbol: str) -> int | None:
    try:
        library = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def compile_cpp(source: str, *, contract: bool = False) -> ctypes.CDLL:
    """Compile C++ with Inductor's compiler, flags and cache on disk.

    Inductor turns loop vectorisation off, as it vectorises itself, and contraction too, which random numbers need to
    be the same everywhere. Flags that not every compiler knows are tried first and then left out.

    Args:
        source: the program.
        contract: whether a product and a sum may be rounded once.

    Raises:
        Exception: there is no compiler, or it failed.
    """
    plain = ("-fno-math-errno", *(("-ffp-contract=fast",) if contract else ()))
    gcc = (*plain, "-ftree-loop-vectorize", "-Wno-uninitialized")
    native = (*gcc, "-mprefer-vector-width=512") if platform.machine() in ("x86_64", "AMD64") else gcc
    for flags in (native, plain):
        try:
            return _codecache.CppCodeCache.load(source, extra_flags=flags)
        except Exception:
            if flags is plain:
                raise
    raise AssertionError
