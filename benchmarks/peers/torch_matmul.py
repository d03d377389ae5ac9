"""The machine's own rate of large float32 matrix products, through PyTorch."""

import torch

from benchmarks.problem import PRODUCT
from benchmarks.turns import Turns


def main() -> None:
    turns = Turns(version=f"PyTorch {torch.__version__}")
    a, b = torch.randn(2, PRODUCT, PRODUCT)
    turns.begin()
    while turns.step_done(float((a @ b)[0, 0])):
        pass


if __name__ == "__main__":
    main()
