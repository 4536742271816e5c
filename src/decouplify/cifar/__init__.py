"""CIFAR-10: the networks that its tables are about, and its images."""

from decouplify.cifar.images import CLASSES, MEAN, STD, Cifar10, crop_and_flip, load_cifar10, normalise, read_c10j1
from decouplify.cifar.networks import CifarGoogLeNet, CifarResNet, CifarVgg, googlenet, resnet20, resnet56, vgg19

__all__ = [
    "CLASSES",
    "MEAN",
    "STD",
    "Cifar10",
    "CifarGoogLeNet",
    "CifarResNet",
    "CifarVgg",
    "crop_and_flip",
    "googlenet",
    "load_cifar10",
    "normalise",
    "read_c10j1",
    "resnet20",
    "resnet56",
    "vgg19",
]
