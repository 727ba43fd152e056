"""Tiny tensors gain nothing from threads, and idle OpenMP threads spin: one thread here and in the processes that tests start."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
