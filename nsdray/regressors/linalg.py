"""The few matrix operations of ridge regression, on a CPU by NumPy and SciPy, on a GPU by torch.

An `Array` is a NumPy array (device None) or a torch tensor on a device such as "cuda". On CPUs NumPy's and SciPy's BLAS and
LAPACK are the faster ones and work in place; torch's are there for GPUs (and, as device "cpu", for tests of that path).
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg

Array = np.ndarray | torch.Tensor


def find_device() -> str | None:
    """"cuda" where torch sees a GPU, else None."""
    return "cuda" if torch.cuda.is_available() else None


def to_device(x: Array, device: str | None) -> Array:
    """x on a device; a NumPy array stays itself if device is None."""
    if isinstance(x, torch.Tensor):
        return x.numpy(force=True) if device is None else x.to(device)
    if device is None:
        return x
    return torch.tensor(x, device=device)  # a copy: what Ray shares is read-only


def to_numpy(x: Array) -> np.ndarray:
    """x as a NumPy array on the CPU."""
    return to_device(x, None)


def device_of(x: Array) -> str | None:
    """The device of an array, None for NumPy's."""
    return None if isinstance(x, np.ndarray) else str(x.device)


def dtype_of(x: Array) -> np.dtype:
    """An array's precision, as NumPy names it."""
    return np.dtype(str(x.dtype).removeprefix("torch."))


def empty(shape: tuple[int, ...], dtype: np.dtype, device: str | None, order: str = "C") -> Array:
    """An array without defined contents. order: NumPy's, "C" or "F"."""
    if device is None:
        return np.empty(shape, dtype, order)
    return torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), device=device)


class Scratch:
    """Memory on the CPU that serves one large array after another: to touch new pages takes up to a fifth of the time that the
    products take. An array is good until the next one is asked for."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array without defined contents."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > len(self._bytes):
            self._bytes = np.empty(0, np.uint8)  # before there are both
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size].view(dtype).reshape(shape)


def copy_into(target: Array, source: np.ndarray) -> None:
    """target[:] = source, whatever the precisions. float16 is converted by torch, some ten times faster than by NumPy."""
    if isinstance(target, torch.Tensor):
        target.copy_(torch.tensor(source))
    elif source.dtype == np.float16 and source.flags.writeable:  # torch warns of read-only arrays
        torch.from_numpy(target).copy_(torch.from_numpy(source))
    else:
        target[:] = source


def add_gram(gram: Array, x: Array) -> None:
    """gram += x @ x.T in the lower triangle (in torch: everywhere). gram: (n, n), in NumPy of order "F"; x: (n, k)."""
    if isinstance(gram, torch.Tensor):
        gram.addmm_(x, x.T)
        return
    syrk = linalg.get_blas_funcs("syrk", (gram,))
    out = syrk(1.0, x.T, beta=1.0, c=gram, trans=1, lower=1, overwrite_c=1)
    assert np.shares_memory(out, gram), "syrk copied its output"


def symmetric_product(k: Array, right: Array) -> Array:
    """k @ right for a symmetric k, its lower triangle given (in torch: all of it). right: (n, 1)."""
    if isinstance(k, torch.Tensor):
        return k @ right
    symv, is_c = linalg.get_blas_funcs("symv", (k,)), k.flags.c_contiguous
    return symv(1.0, k.T if is_c else k, right[:, 0], lower=not is_c)[:, None]


def largest_eigenvalue(product: Callable[[Array], Array], like: Array, n_steps: int = 10) -> float:
    """Of a positive definite matrix, from its products with a vector (n, 1): a lower bound, near enough to tell a condition's
    order (power iteration). like: (n, n), of the precision and on the device of the vectors."""
    start = np.random.default_rng(0).standard_normal((len(like), 1)).astype(dtype_of(like))
    vector, size = to_device(start, device_of(like)), 0.0
    for _ in range(n_steps):
        vector = vector / float((vector * vector).sum()) ** 0.5
        vector = product(vector)
        size = float((vector * vector).sum()) ** 0.5
        if not (math.isfinite(size) and size > 0):
            break
    return size


@dataclass(frozen=True)
class Cholesky:
    """K + alpha I for one alpha, as its lower Cholesky factor."""

    alpha: float
    factor: Array

    def to(self, device: str | None) -> Cholesky:
        return Cholesky(self.alpha, to_device(self.factor, device))

    def solve(self, right: Array) -> Array:
        """(K + alpha I)^-1 right."""
        if isinstance(self.factor, torch.Tensor):
            return torch.cholesky_solve(right, self.factor)
        return linalg.cho_solve((self.factor, True), right, check_finite=False)


@dataclass(frozen=True)
class Eigen:
    """K as eigenvalues and eigenvectors: K + alpha I for any alpha."""

    values: Array
    """(n,), ascending, not negative."""
    vectors: Array
    """(n, n), an eigenvector a column."""

    def to(self, device: str | None) -> Eigen:
        return Eigen(to_device(self.values, device), to_device(self.vectors, device))

    def at(self, alpha: float) -> EigenAt:
        return EigenAt(alpha, self)


@dataclass(frozen=True)
class EigenAt:
    """K + alpha I for one alpha of many."""

    alpha: float
    eigen: Eigen

    def solve(self, right: Array) -> Array:
        """(K + alpha I)^-1 right."""
        vectors = self.eigen.vectors
        return vectors @ ((vectors.T @ right) / (self.eigen.values + self.alpha)[:, None])


Inverse = Cholesky | EigenAt


def cholesky(k: Array, alpha: float, overwrite: bool = False) -> Cholesky:
    """Factorise K + alpha I, K's lower triangle given. overwrite: use K's memory. numpy.linalg.LinAlgError if it is not positive
    definite."""
    if isinstance(k, torch.Tensor):
        k = k if overwrite else k.clone()
        k.diagonal().add_(alpha)
        factor, info = torch.linalg.cholesky_ex(k)
        if int(info):
            raise np.linalg.LinAlgError("not positive definite")
        return Cholesky(alpha, factor)
    k = k if overwrite else k.copy("F")
    k[np.diag_indices_from(k)] += k.dtype.type(alpha)
    return Cholesky(alpha, linalg.cho_factor(k, lower=True, overwrite_a=True, check_finite=False)[0])


def eigen(k: Array) -> Eigen:
    """Eigenvalues and eigenvectors of a positive semi-definite K, its lower triangle given."""
    if isinstance(k, torch.Tensor):
        values, vectors = torch.linalg.eigh(k)
        return Eigen(values.clamp_min(0), vectors)
    values, vectors = linalg.eigh(k, driver="evd", check_finite=False)
    return Eigen(np.maximum(values, 0), vectors)
