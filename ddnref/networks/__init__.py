"""Networks as chains of layers, with every derivative written out."""

from ddnref.networks._activations import Activation, smoothed
from ddnref.networks._blocks import Frozen, Residual
from ddnref.networks._chain import Chain
from ddnref.networks._convolution import Conv2d
from ddnref.networks._layers import Dense, Flatten
from ddnref.networks._losses import Loss, cross_entropy
from ddnref.networks._user import Layer

__all__ = [
    "Activation",
    "Chain",
    "Conv2d",
    "Dense",
    "Flatten",
    "Frozen",
    "Layer",
    "Loss",
    "Residual",
    "cross_entropy",
    "smoothed",
]
