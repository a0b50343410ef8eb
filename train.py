"""Train a GPT, or go on with what its directory holds:

python train.py configs/quickstart.yaml [--model.n_layers 8 ...]
"""

import sys

from gptjax.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
