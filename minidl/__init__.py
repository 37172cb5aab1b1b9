"""minidl: CNNs whose every kernel is CUDA C++ you can read, on NVIDIA GPUs and on any CPU."""

__version__ = "0.1.0"

from minidl.device import Device, select
from minidl.layer import Composition, Layer, Parameter
from minidl.layers import (AvgPool2d, BatchNorm2d, ChannelDropout, Conv2d, Dropout, Flatten, GlobalAvgPool2d, GlobalMaxPool2d,
                           Linear, MaxPool2d, ReLU, Residual, Sequential, ZeroPadChannels)
from minidl.optim import SGD, AdaDelta, Adam, AdamW, Average, Schedule

__all__ = ["AdaDelta", "Adam", "AdamW", "Average", "AvgPool2d", "BatchNorm2d", "ChannelDropout", "Composition", "Conv2d", "Device",
           "Dropout", "Flatten", "GlobalAvgPool2d", "GlobalMaxPool2d", "Layer", "Linear", "MaxPool2d", "Parameter", "ReLU",
           "Residual", "SGD", "Schedule", "Sequential", "ZeroPadChannels", "select"]
