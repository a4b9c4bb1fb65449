"""Trains VGG networks on ImageNet-style TFRecords with TensorFlow and Horovod."""

__version__ = "0.2.0"
