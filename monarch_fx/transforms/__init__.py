"""Exact Monarch forms of known transforms, as structures and as layers that learn from there.

A `Monarch` where one is exact: ``dft``, ``idft``, ``dct``, ``dst``, ``hadamard``, ``haar``, ``kronecker``. A `Product`
of two: ``circulant``, ``toeplitz``, ``fastfood``, ``acdc``. A `Kronecker` product of two: ``dft2``, ``idft2``. All
multiply the last dimension, state ``params`` and ``flops``, and are differentiable in the tensors they are made of.
"""

from monarch_fx.transforms.composition import Kronecker, Product, Transform
from monarch_fx.transforms.convolution import circulant, toeplitz
from monarch_fx.transforms.cosine import dct, dst
from monarch_fx.transforms.diagonals import acdc, fastfood
from monarch_fx.transforms.fourier import dft, dft2, idft, idft2
from monarch_fx.transforms.haar import haar
from monarch_fx.transforms.kronecker import hadamard, kronecker
from monarch_fx.transforms.layer import LearnedTransform

__all__ = [
    "Kronecker",
    "LearnedTransform",
    "Product",
    "Transform",
    "acdc",
    "circulant",
    "dct",
    "dft",
    "dft2",
    "dst",
    "fastfood",
    "haar",
    "hadamard",
    "idft",
    "idft2",
    "kronecker",
    "toeplitz",
]
