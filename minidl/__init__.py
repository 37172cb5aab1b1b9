"""minidl: CNNs whose every kernel is CUDA C++ you can read, on NVIDIA GPUs and on any CPU."""

__version__ = "0.1.0"
